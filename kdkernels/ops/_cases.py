"""Registry of the inputs that ops are tested and timed with; each op's ``cases.py`` fills it.

Tests, the benchmark, the self-test, the emulator and the GPU run look ops up here; none of them names an op.
"""

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdkernels import ops

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHORT_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    """One kind of input to a function, for comparing its results with the formula.

    Attributes:
        name: What distinguishes it from the other cases.
        function: Public function with its options bound, called with the tensors of a sample.
        eager: The same formula in plain PyTorch, as a user would write it.
        samples: Tensors of each sample.
        differentiable: Positions of the tensors that get a gradient.

    """

    name: str
    function: Callable[..., Any]
    eager: Callable[..., Any]
    samples: tuple[tuple[Tensor, ...], ...]
    differentiable: tuple[int, ...] = (0,)

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Call:
    """A small call of a function, for checks of how it is called rather than of its numbers."""

    name: str
    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    differentiable: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class FarCall:
    """A call on tensors whose slices along ``dim`` lie more than 2**31 elements apart in memory."""

    function: Callable[..., Any]
    shape: tuple[int, ...]
    dim: int = 0
    inputs: int = 1


@dataclass(frozen=True)
class Benchmark:
    """A row of the benchmark: a function on tensors of one shape and dtype.

    Attributes:
        function: Name of the function in ``kdkernels.functional``.
        shape: Shape of the large tensors.
        dtype: Dtype of the large tensors.
        variant: Class dimension or memory format; see :func:`workload`.
        quick: Whether it belongs to the quick set, which takes minutes.
        compared: Whether ``make bench-compare`` times it.
        goals: Target speed-ups, such as ``{"faster than eager": 4.0}``; None for the goals of the device.

    """

    function: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    variant: str = ""
    quick: bool = False
    compared: bool = False
    goals: Mapping[str, float] | None = None

    @property
    def workload(self) -> "Workload":
        """The tensors and functions of this row."""
        return workload(self.function, self.shape, self.dtype, self.variant)


@dataclass(frozen=True)
class Workload:
    """One row of the benchmark: a function on tensors of one shape and dtype, with the gradient of the first of them.

    Attributes:
        op: Name of the op's folder.
        function: Name of the function in ``kdkernels.functional``.
        shape: Shape of the large tensors.
        dtype: Dtype of the large tensors.
        variant: Class dimension or memory format.
        ours: Public function with its options bound.
        eager: The same formula in plain PyTorch, as a user would write it.
        make: Function that draws the tensors on a device.
        passes: How often forward and backward read or write a tensor of that shape, by device type, with the incoming
            gradient of the benchmark. The op's contract states them.
        cotangents: Function that draws the incoming gradients of the outputs; None for a loss, whose gradient is 1.

    """

    op: str
    function: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    variant: str
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    make: Callable[[str], tuple[Tensor, ...]]
    passes: Mapping[str, tuple[int, int]]
    cotangents: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None

    @property
    def name(self) -> str:
        """The function, the shape, the dtype, and the variant if there is one."""
        parts = [f"{self.function} {list(self.shape)} {SHORT_NAMES[self.dtype]}", self.variant]
        return ", ".join(filter(None, parts))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one large tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def tolerance(self) -> float:
        """The largest relative error with which our results count as correct."""
        return 1e-4 if self.dtype.itemsize >= 4 else 1e-2


@dataclass(frozen=True)
class OpCases:
    """What an op registers.

    Attributes:
        op: Name of the op's folder.
        accuracy: Function that yields the cases of a dtype on a device.
        calls: Function that returns small calls in float64, with at most 50 elements in each input.
        cpu_accuracy: Cases of an op of the folder that has kernels on the CPU alone, if there is one.
        cpu_calls: Small calls of that op.
        far_calls: Calls on tensors that 32-bit offsets cannot span.
        functions: Functions that are timed.
        workload: Function that returns the workload of one of these functions for a shape, a dtype and a variant.
        benchmarks: Rows of the CPU benchmark.
        gpu_benchmarks: Rows of the GPU benchmark, the most important first.

    """

    op: str
    accuracy: Callable[[torch.dtype, str], Iterator[Case]]
    calls: Callable[[], list[Call]]
    cpu_accuracy: Callable[[torch.dtype, str], Iterator[Case]] | None = None
    cpu_calls: Callable[[], list[Call]] | None = None
    far_calls: tuple[FarCall, ...] = ()
    functions: tuple[str, ...] = ()
    workload: Callable[[str, tuple[int, ...], torch.dtype, str], Workload] | None = None
    benchmarks: tuple[Benchmark, ...] = ()
    gpu_benchmarks: tuple[Benchmark, ...] = ()


_registered: dict[str, OpCases] = {}


def register(package: str, **entries: Any) -> None:
    """Register an op; called by its ``cases.py`` with ``__package__`` and the fields of :class:`OpCases`."""
    op = package.rpartition(".")[2]
    _registered[op] = OpCases(op, **entries)


def registry() -> dict[str, OpCases]:
    """Return the entries of all ops, by op."""
    names = sorted(module.name for module in pkgutil.iter_modules(ops.__path__) if module.ispkg)
    for name in names:
        importlib.import_module(f"kdkernels.ops.{name}.cases")
    return {name: _registered[name] for name in names}


def cases_of(op: str, dtype: torch.dtype, device: str = "cpu") -> Iterator[Case]:
    """Yield the cases of an op in a dtype; on the CPU also those of the op with kernels on the CPU alone."""
    cases = registry()[op]
    yield from cases.accuracy(dtype, device)
    if cases.cpu_accuracy is not None and torch.device(device).type == "cpu":
        yield from cases.cpu_accuracy(dtype, device)


def workload(function: str, shape: Sequence[int], dtype: torch.dtype = torch.float32, variant: str = "") -> Workload:
    """Return a row of the benchmark for any shape.

    Args:
        function: A name in :func:`workload_functions`.
        shape: Shape of the large tensors: logits, images, an activation.
        dtype: Dtype of the large tensors.
        variant: Empty, or a variant of the function, such as ``"dim=1"`` or ``"channels_last"``.

    Raises:
        ValueError: There is no such function or variant, or the shape does not fit.

    """
    makers = workload_functions()
    if function not in makers:
        raise ValueError(f"function must be one of {', '.join(makers)}, got {function!r}")
    if not shape or min(shape) < 1:
        raise ValueError(f"shape must consist of positive sizes, got {list(shape)}")
    return makers[function](function, tuple(shape), dtype, variant)


def workload_functions() -> dict[str, Callable[[str, tuple[int, ...], torch.dtype, str], Workload]]:
    """Return the functions that make rows of the benchmark, by the function that they measure."""
    return {name: op.workload for op in registry().values() if op.workload for name in op.functions}


def benchmarks() -> list[Benchmark]:
    """Return the rows of the CPU benchmark, op by op."""
    return [row for op in registry().values() for row in op.benchmarks]


def gpu_benchmarks() -> Iterator[Benchmark]:
    """Yield the rows of the GPU benchmark: the first row of every op, then the second, and so on."""
    waiting = [list(op.gpu_benchmarks) for op in registry().values()]
    while any(waiting):
        yield from (rows.pop(0) for rows in waiting if rows)


def one_of(variant: str, variants: Sequence[str]) -> str:
    """Return a variant if the function has it; raise ValueError otherwise."""
    if variant not in variants:
        raise ValueError(f"variant must be one of {', '.join(map(repr, variants))}, got {variant!r}")
    return variant


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """Return tensors equal to a given one in several memory layouts; they must not be written to."""
    result = {
        "contiguous": tensor.contiguous(),
        "transposed": tensor.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": torch.stack((tensor, -tensor), -1).flatten(-2)[..., ::2],
        "part": torch.cat((tensor, -tensor), 1)[:, : tensor.shape[1]],
        "offset": torch.cat((tensor.new_zeros(3), tensor.flatten()))[3:].view(tensor.shape),
    }
    if tensor.dim() in (4, 5):
        memory_format = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        result["channels_last"] = tensor.contiguous(memory_format=memory_format)
    return result


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
    """Draw standard normal numbers, the same on every device."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
