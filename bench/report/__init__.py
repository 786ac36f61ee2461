"""The report of the benchmark suite: ``python -m bench.report.run``."""
