"""The contract of every op, one file each: schema, checks, fake, autograd, and the public functions with their docs."""
