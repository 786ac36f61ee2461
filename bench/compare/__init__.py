"""Comparison of this tree with another revision: ``python -m bench.compare.run``."""
