"""Loads what was compiled, and remembers why the rest is missing."""

import importlib
import importlib.util
import platform
import sys
import warnings
from typing import Any

import torch

from kdkernels._version import __version__

_LIBRARIES = {"_C": "CPU kernels", "_cuda": "CUDA kernels"}
_missing: dict[str, str] = {}
_compiled: dict[str, Any] = {}


def load_libraries() -> None:
    """Import the compiled libraries, which registers their kernels with torch."""
    for name, content in _LIBRARIES.items():
        if importlib.util.find_spec(f"kdkernels.{name}") is None:
            _missing[name] = f"the {content} were not built (KDKERNELS_BUILD was none, cpu, or auto without nvcc)"
            continue
        try:
            library = importlib.import_module(f"kdkernels.{name}")
        except ImportError as error:
            _missing[name] = f"the {content} were built but do not load: {error}"
            warnings.warn(
                f"kdkernels: {_missing[name]}. The next backend is used instead; "
                "`python -m kdkernels doctor` says which.",
                RuntimeWarning,
                stacklevel=3,
            )
            continue
        _compiled[name] = library.build_info()


def why_missing(device_type: str) -> str | None:
    """Why no native kernels are loaded for a device, or None where they are."""
    return _missing.get({"cpu": "_C", "cuda": "_cuda"}.get(device_type, ""))


def build_info() -> dict[str, Any]:
    """Describe what is installed: versions, what was compiled and how, and which backend each op takes and why.

    Returns:
        A dictionary: ``version``, ``torch``, ``torch_cuda`` (``None`` for a CPU build of torch), ``python``,
        ``compiled`` (by library: compiler, stable-ABI target, CPU capability), ``missing`` (by library, the
        reason), and ``backends``: by device type and op, the pair (backend, reason).

    """
    from kdkernels import _backends

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "version": __version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": f"{platform.python_version()} on {sys.platform}",
        "compiled": dict(_compiled),
        "missing": dict(_missing),
        "backends": {device: _backends.explain(device) for device in devices},
    }
