"""Fused kernels for knowledge distillation in PyTorch, and the data-free distillation built on them."""

import torch as _torch  # the compiled libraries need it in memory

from kdkernels import functional, nn
from kdkernels._version import __version__
from kdkernels.ops import _loader, _registry
from kdkernels.ops._loader import build_info
from kdkernels.ops._registry import get_backend, set_backend, set_debug

_loader.load_libraries()
_registry.find_kernels()
# The first call of MKL's square root in a process chooses its code. When two threads make that call at once, as in the
# first step of Adam, one of them may round differently: one run in a hundred differed from the others.
_torch.ones(1).sqrt()

__all__ = ["__version__", "build_info", "functional", "get_backend", "nn", "set_backend", "set_debug"]

for _name in ("build_info", "get_backend", "set_backend", "set_debug"):
    globals()[_name].__module__ = __name__


def __dir__() -> list[str]:
    return __all__
