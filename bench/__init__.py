"""The benchmark suite: ``python -m bench.run``, with a folder for each kind of measurement."""
