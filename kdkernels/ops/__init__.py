"""The ops, one folder each: schema, checks, fake implementation, autograd, and the public functions with their docs."""
