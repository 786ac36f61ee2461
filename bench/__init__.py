"""The benchmark suite: ``python -m bench.run``, and a folder for each kind of measurement."""
