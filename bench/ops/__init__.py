"""Benchmarks of the ops: each against its rivals, and how its cost grows."""
