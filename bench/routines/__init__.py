"""Benchmarks of the routines, end to end."""
