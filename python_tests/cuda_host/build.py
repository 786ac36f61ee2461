"""Compiles CUDA kernels for the emulator and runs them from Python.

A library contains the kernels, their launchers (C linkage: raw pointers, numbers, a stream) and the emulator:

    library = build([ROOT / "csrc/scale/cuda_kernels.cu"], "scale", "race", [ROOT])
    with Emulator(library, "warp_priority", seed=3, reads={"input": x}, writes={"output": y}) as emulator:
        emulator.launch("launch_scale", x, y, x.numel(), ctypes.c_float(2.0), None)
"""

import ctypes
import hashlib
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch

Variant = Literal["plain", "race", "undefined"]
Schedule = Literal["fifo", "reverse", "random", "warp_priority"]
SCHEDULES: tuple[Schedule, ...] = ("fifo", "reverse", "random", "warp_priority")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / "build" / "cuda_host"

# Libraries must not share gnu-unique symbols, and every machine contracts alike. CUDA code views memory as vectors,
# which breaks strict aliasing.
COMMON = [
    "-std=c++17",
    "-fPIC",
    "-mfma",
    "-ffp-contract=fast",
    "-fno-gnu-unique",
    "-fno-strict-aliasing",
    f"-ffile-prefix-map={ROOT}=.",
]
RUNTIME_FLAGS = [*COMMON, "-O2"]
# -Og halves the compile time of -O1 for templates and makes kernels a sixth slower.
KERNEL_FLAGS: dict[Variant, list[str]] = {
    "plain": ["-Og", "-g1"],
    # race.cpp defines the functions that this calls.
    "race": ["-Og", "-g1", "-fsanitize=thread"],
    # Traps need no compiler library, and the emulator reports them as errors. Merged traps would lose their lines.
    "undefined": [
        *["-Og", "-g1", "-fsanitize=undefined,alignment,bounds", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"],
        *["-fsanitize-undefined-trap-on-error", "-fno-crossjumping", "-fno-tree-tail-merge"],
    ],
}


class Library(ctypes.CDLL):
    """Kernels linked with the emulator that runs them."""

    def __init__(self, path: Path, variant: Variant):
        super().__init__(str(path))
        self.path, self.variant = path, variant
        self.cuda_host_set_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self.cuda_host_register_tensor.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p]
        self.cuda_host_last_error_text.restype = ctypes.c_char_p
        self.cuda_host_error_name.restype = ctypes.c_char_p
        self.cuda_host_counters.restype = Counters


class Counters(ctypes.Structure):
    """Number of launches so far, and the shape of the last one."""

    _fields_ = (
        ("launches", ctypes.c_ulonglong),
        ("dynamic_shared_bytes", ctypes.c_ulonglong),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
    )


def compiler() -> str:
    """Return the C++ compiler: CXX if set, else g++."""
    return os.environ.get("CXX", "g++")


def missing() -> str | None:
    """Return why kernels cannot be executed here, or None if they can."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return "CUDA kernels run on the CPU only under x86-64 Linux"
    if shutil.which(compiler().split()[0]) is None:
        return f"CUDA kernels need g++ to run on the CPU, and {compiler()} is not installed"
    return None


def build(
    sources: Iterable[Path],
    name: str,
    variant: Variant,
    include: Iterable[Path] = (),
    *,
    flags: Iterable[str] = (),
    link: Iterable[str] = (),
) -> Library:
    """Compile and load kernels; unchanged sources are not compiled again."""
    if reason := missing():
        raise RuntimeError(reason)
    include_flags = [f"-I{path}" for path in (HERE / "include", *include)]
    host_flags = [*COMMON, "-O1", *include_flags, *flags]
    kernel_flags = [*COMMON, *KERNEL_FLAGS[variant], *include_flags, *flags]
    runtime = ["fiber", "collectives", "scheduler", "report", "host", *(["race"] if variant == "race" else [])]
    objects = [_compiled(HERE / f"{part}.cpp", [*RUNTIME_FLAGS, f"-I{HERE / 'include'}"]) for part in runtime]
    for source in map(Path, sources):
        flags = ["-x", "c++", *kernel_flags] if source.suffix == ".cu" else host_flags
        objects.append(_compiled(source.resolve(), flags))
    key = hashlib.sha256("\n".join(map(str, objects)).encode()).hexdigest()[:16]
    path = OUTPUT / f"{name}-{variant}-{key}.so"
    # Bind to the emulator's own functions even if CUDA's runtime is loaded too.
    _produce(path, [*compiler().split(), "-shared", "-Wl,-Bsymbolic,-z,defs", *map(str, objects), *link])
    return Library(path, variant)


def _compiled(source: Path, flags: list[str]) -> Path:
    digest = hashlib.sha256("\0".join([compiler(), str(source), *flags]).encode())
    headers = {path for top in (HERE, ROOT / "csrc") for path in top.rglob("*") if path.suffix in {".h", ".cuh"}}
    for path in sorted({source, *headers}):
        digest.update(path.read_bytes())
    path = OUTPUT / f"{source.parent.name}-{source.stem}-{digest.hexdigest()[:16]}.o"
    _produce(path, [*compiler().split(), *flags, "-c", str(source)])
    return path


def _produce(path: Path, command: list[str]) -> None:
    """Run the command with -o unless its result exists; safe in concurrent processes."""
    if path.exists():
        return
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUTPUT) as folder:
        result = Path(folder) / path.name
        done = subprocess.run([*command, "-o", str(result)], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        result.replace(path)


def extent(tensor: torch.Tensor) -> int:
    """Return the bytes from the first element to the end of the last one in memory."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class Emulator:
    """Launches kernels under one schedule, with the tensors that they may read or write.

    Only the race build checks accesses against the tensors; every build names them in errors.
    """

    def __init__(
        self,
        library: Library,
        schedule: Schedule = "fifo",
        seed: int = 0,
        *,
        reads: Mapping[str, torch.Tensor] | None = None,
        writes: Mapping[str, torch.Tensor] | None = None,
        max_shared: int = 0,
    ):
        self.library, self.schedule, self.seed, self.max_shared = library, schedule, seed, max_shared
        self.reads, self.writes = dict(reads or {}), dict(writes or {})

    def __enter__(self) -> Self:
        self.library.cuda_host_set_schedule(SCHEDULES.index(self.schedule), self.seed)
        self.library.cuda_host_set_max_shared(self.max_shared)
        self.library.cuda_host_clear_tensors()
        for writable, tensors in ((1, self.writes), (0, self.reads)):
            for name, tensor in tensors.items():
                self.library.cuda_host_register_tensor(tensor.data_ptr(), extent(tensor), writable, name.encode())
        return self

    def __exit__(self, *_: object) -> None:
        self.library.cuda_host_clear_tensors()
        self.library.cuda_host_set_max_shared(0)
        self.library.cuda_host_set_schedule(0, 0)

    @property
    def counters(self) -> Counters:
        """Number of launches so far, and the shape of the last one."""
        return self.library.cuda_host_counters()

    def check(self, code: int) -> None:
        """Raise the emulator's description of a launcher's error."""
        if code:
            name, text = self.library.cuda_host_error_name(code), self.library.cuda_host_last_error_text()
            raise RuntimeError(f"{name.decode()}: {text.decode()}")

    def launch(self, launcher: str, *arguments: Any) -> None:
        """Call a launcher: tensors become pointers, None a null pointer, integers 64 bits; ctypes are unchanged."""
        self.check(getattr(self.library, launcher)(*map(_argument, arguments)))


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(0)
    return ctypes.c_int64(value) if isinstance(value, int) else value


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy that ends at an inaccessible page."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    if protect(ctypes.c_void_p(address + pages), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size)
    return copy.view(tensor.shape).copy_(tensor)
