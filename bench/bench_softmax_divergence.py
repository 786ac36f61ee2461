"""Benchmarks of softmax_divergence: its rows are in suite.py."""

OP = "softmax_divergence"


def test_softmax_divergence(row, mode, compare):
    compare(row, mode)
