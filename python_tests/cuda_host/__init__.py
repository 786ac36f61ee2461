"""CUDA kernels executed on the CPU for tests; see build.py."""

from .build import Emulator, Library, Variant, build, guarded, missing

__all__ = ["Emulator", "Library", "Variant", "build", "guarded", "missing"]
