"""Benchmarks of batch_norm_stats: its rows are in suite.py."""

OP = "batch_norm_stats"


def test_batch_norm_stats(row, mode, compare):
    compare(row, mode)
