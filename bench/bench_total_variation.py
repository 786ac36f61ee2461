"""Benchmarks of total_variation: its rows are in suite.py."""

OP = "total_variation"


def test_total_variation(row, mode, compare):
    compare(row, mode)
