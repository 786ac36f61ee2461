"""The CUDA backend executed on the CPU: the kernels and bindings of csrc, registered as the native kernels of CPU
tensors. For separate processes; it is never shipped.
"""

import sys
from pathlib import Path

from cuda_host.build import HERE, SCHEDULES, Library, Schedule, Variant, build
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
_installed: list[Library] = []


def library(variant: Variant) -> Library:
    """Compile the CUDA half of csrc for the emulator, bindings included, and register the ops with torch.

    The plain build runs the kernels as on a GPU. The other two run them with few blocks, so that each block takes
    several turns, and treat 0-dim tensors as if they were on a GPU, where only the kernels see their values.
    """
    sources = [*sorted(ROOT.glob("csrc/*/cuda_kernels.cu")), *sorted(ROOT.glob("csrc/*/cuda.cpp"))]
    sources += [HERE / "torch_shim.cpp", *sorted(ROOT.glob("python_tests/ops/*_plans.cpp"))]
    flags = ["-DTORCH_TARGET_VERSION=0x020b000000000000ull", "-DUSE_CUDA", "-DKDKERNELS_DISPATCH_KEY=CPU"]
    if variant != "plain":
        flags += ["-DKDKERNELS_SCALARS_ON_DEVICE=1", "-DKDKERNELS_MOST_BLOCKS=3"]
    else:
        flags += ["-DKDKERNELS_SCALARS_ON_DEVICE=0"]
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    paths = cpp_extension.library_paths()
    link = [f"-L{path}" for path in paths] + [f"-Wl,-rpath,{path}" for path in paths]
    link += ["-ltorch", "-ltorch_cpu", "-lc10"]
    return build(sources, "kdkernels", variant, [ROOT / "csrc"], flags=flags, link=link)


def install(variant: Variant) -> Library:
    """Make the emulated kernels the native backend of CPU tensors in this process; call before importing kdkernels."""
    if "kdkernels" in sys.modules:
        raise RuntimeError("kdkernels is imported already, with the CPU kernels")
    sys.modules["kdkernels._C"] = None  # type: ignore[assignment]
    import kdkernels  # noqa: F401
    from kdkernels.ops import _loader, _registry

    emulator = library(variant)
    _loader._missing.pop("_C")
    _registry.find_kernels()

    _loader._native_kernels["cpu"] = "cuda"
    emulator.cuda_host_open_memory(1)
    _installed.append(emulator)
    return emulator


def installed() -> Library:
    """Return the library with the emulated kernels of this process."""
    return _installed[-1]


def set_schedule(schedule: Schedule, seed: int = 0) -> None:
    """Set the order of blocks and threads for the launches that follow."""
    installed().cuda_host_set_schedule(SCHEDULES.index(schedule), seed)
