"""End-to-end benchmarks of the routines."""
