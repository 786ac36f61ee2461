"""Benchmarks of the ops against their rivals, and of how their cost grows."""
