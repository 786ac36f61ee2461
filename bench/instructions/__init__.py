"""Instruction counts of the CPU kernels: ``python -m bench.instructions.count``."""
