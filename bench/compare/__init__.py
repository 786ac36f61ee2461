"""This tree against another revision: ``python -m bench.compare.run``."""
