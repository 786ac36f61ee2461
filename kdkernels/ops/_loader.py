"""Loads the compiled libraries, and records why any are missing."""

import importlib
import importlib.util
import os
import platform
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch

from kdkernels._version import __version__

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = {"_C": "CPU kernels", "_cuda": "CUDA kernels"}
_missing: dict[str, str] = {}
_compiled: dict[str, Any] = {}
_devices: dict[int, str | None] = {}


def load_libraries() -> None:
    """Import the compiled libraries, which registers their kernels with torch."""
    for name, content in _LIBRARIES.items():
        if importlib.util.find_spec(f"kdkernels.{name}") is None:
            _missing[name] = f"the {content} were not built (KDKERNELS_BUILD was none, cpu, or auto without nvcc)"
            hidden = _hidden_copy() if name == "_C" else None
            if hidden is not None:
                _missing[name] = (
                    f"{_PACKAGE.parent} has no {content}, and hides the installed copy in {hidden.parent}, which has "
                    "them: start Python in another folder, or run `pip install -e .` here"
                )
                warnings.warn(
                    f"kdkernels: {_missing[name]}. The next backend is used instead.", RuntimeWarning, stacklevel=3
                )
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


def _hidden_copy() -> Path | None:
    """Return the folder of a later kdkernels on the path that has CPU kernels, unless none were wanted."""
    if os.environ.get("KDKERNELS_BUILD") == "none":
        return None
    for entry in sys.path:
        folder = Path(entry).resolve() / "kdkernels"
        if folder != _PACKAGE and PathFinder.find_spec("kdkernels._C", [str(folder)]) is not None:
            return folder
    return None


# Kernels of the native backend, by device type. Tests replace the kernels of the CPU with those of a GPU.
_native_kernels = {"cpu": "cpu", "cuda": "cuda"}


def native_kernels(device_type: str) -> str | None:
    """Return which kernels are native on a type of device: ``"cpu"``, ``"cuda"``, or None."""
    return _native_kernels.get(device_type)


def why_missing(device_type: str) -> str | None:
    """Return why no native kernels are loaded for a type of device, or None if they are."""
    return _missing.get({"cpu": "_C", "cuda": "_cuda"}.get(device_type, ""))


def why_not_device(index: int | None) -> str | None:
    """Return why the CUDA kernels cannot run on a GPU, or None if they can; called before the first launch."""
    if "_cuda" not in _compiled or not torch.cuda.is_initialized():
        return None  # the tensors are fake, so nothing runs
    index = torch.cuda.current_device() if index is None else index
    if index not in _devices:
        _devices[index] = _compare(torch.cuda.get_device_capability(index), _compiled["_cuda"]["architectures"])
    return _devices[index]


# Set as by torch.compiler.assume_constant_result, which itself would import torch._dynamo and take seconds.
why_not_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _compare(capability: tuple[int, int], architectures: list[str]) -> str | None:
    """Return why no architecture, such as "sm_90" or "compute_90" (PTX), serves a capability, or None if one does."""
    major, minor = capability
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        at = divmod(int(number.rstrip("af")), 10)
        if number.endswith("a"):  # code for this capability only
            served = at == capability
        elif kind == "sm" or number.endswith("f"):  # also runs on later minor versions
            served = at[0] == major and at[1] <= minor
        else:  # PTX runs on everything later
            served = at <= capability
        if served:
            return None
    return (
        f"the GPU has compute capability {major}.{minor}, but the CUDA kernels were compiled for "
        f"{', '.join(architectures)}; build with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def why_no_triton() -> str | None:
    """Return why there is no Triton backend, or None if there is one."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed (pip install triton)"


def triton_keys() -> tuple[str, ...]:
    """Return the dispatch keys to register Triton kernels for; on the CPU they run in Triton's interpreter."""
    if why_no_triton() is not None:
        return ()
    return ("CUDA", "CPU") if os.environ.get("TRITON_INTERPRET") == "1" else ("CUDA",)


def build_info() -> dict[str, Any]:
    """Describe what is installed: versions, what was compiled and how, and which backend each op uses and why.

    Returns:
        A dictionary: ``version``, ``torch``, ``torch_cuda`` (``None`` for a CPU build of torch), ``python``,
        ``compiled`` (by library: compiler, stable-ABI target, CPU capability), ``missing`` (by library, the
        reason), and ``backends``: by device type and op, the pair (backend, reason).

    """
    from kdkernels.ops import _registry

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "version": __version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": f"{platform.python_version()} on {sys.platform}",
        "compiled": dict(_compiled),
        "missing": dict(_missing),
        "backends": {device: _registry.explain(device) for device in devices},
    }
