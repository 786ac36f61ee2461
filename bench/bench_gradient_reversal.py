"""Benchmarks of gradient_reversal: its rows are in suite.py."""

OP = "gradient_reversal"


def test_gradient_reversal(row, mode, compare):
    compare(row, mode)
