"""Fused kernels for knowledge distillation in PyTorch, and the data-free distillation built on them."""

import torch as _torch  # the compiled libraries need it in memory

from kdkernels import _backends, _loader, functional, nn
from kdkernels._backends import get_backend, set_backend, set_debug
from kdkernels._loader import build_info
from kdkernels._version import __version__

_loader.load_libraries()
_backends.find_kernels()
# The first call of MKL's square root in a process chooses the code for it, and where two threads make it at once, as
# in the first step of Adam, one of them may round differently: one in a hundred runs differed from the others.
_torch.ones(1).sqrt()

__all__ = ["__version__", "build_info", "functional", "get_backend", "nn", "set_backend", "set_debug"]
