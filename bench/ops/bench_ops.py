"""Benchmarks of the ops: the rows are in suite.py."""


def test_op(row, mode, compare):
    compare(row, mode)
