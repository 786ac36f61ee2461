"""Fused kernels for knowledge distillation in PyTorch, and the data-free distillation built on them."""

import torch as _torch  # noqa: F401  (the compiled libraries need it in memory)

from kdkernels import _backends, _loader, functional, nn
from kdkernels._backends import get_backend, set_backend, set_debug
from kdkernels._loader import build_info
from kdkernels._version import __version__

_loader.load_libraries()
_backends.find_kernels()

__all__ = ["__version__", "build_info", "functional", "get_backend", "nn", "set_backend", "set_debug"]
