"""Inputs for every op, one generator an op: the tests, the benchmark and the self-test draw from them.

A :class:`Case` pairs a function of this package with what a user would write in PyTorch, on a few samples of one
kind: a shape, a layout, an option, an edge.
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
COMMON_ROWS: tuple[tuple[str, tuple[int, ...], str], ...] = (
    ("batch_norm_stat_loss", (64, 64, 32, 32), ""),
    ("distillation_loss", (256, 1000), ""),
    ("js_div_with_logits", (256, 1000), ""),
    ("distillation_loss", (8192, 100), ""),
    ("js_div_with_logits", (8192, 100), ""),
    ("distillation_loss", (64, 32000), ""),
    ("js_div_with_logits", (64, 32000), ""),
    ("kl_div_with_logits", (8, 19, 128, 128), "dim=1"),
    ("kl_div_with_logits", (8, 19, 256, 256), "dim=1"),
    ("image_prior_losses", (64, 3, 128, 128), ""),
    ("image_prior_losses", (64, 3, 224, 224), ""),
)


@dataclass(frozen=True)
class Case:
    """One kind of input of one function.

    Attributes:
        name: says what is particular about it.
        function: a function of kdkernels with its options bound; it takes a sample's tensors.
        eager: the same formula in plain PyTorch, as a user would write it.
        samples: the tensors of each sample.
        differentiable: positions of the tensors that get a gradient.

    """

    name: str
    function: Callable[..., Any]
    eager: Callable[..., Any]
    samples: tuple[tuple[Tensor, ...], ...]
    differentiable: tuple[int, ...] = (0,)

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Workload:
    """One row of the benchmark: a function on tensors of one shape and dtype, with the gradient to the first of them.

    Attributes:
        op: the family.
        function: the function's name in ``kdkernels.functional``.
        shape: of the large tensors.
        dtype: of the large tensors.
        variant: what else is particular: a class dimension, a memory format.
        ours: a function of kdkernels with its options bound.
        eager: the same formula in plain PyTorch, as a user would write it.
        make: draws the tensors on a device.
        passes: by type of device, how often forward and backward have to read or write a tensor of that shape, as the
            documentation of the op states it, for the incoming gradient of the benchmark.
        cotangents: draws the incoming gradients of outputs; none for a loss, whose gradient is 1.

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
        """The function, the shape, and what else is particular."""
        parts = [f"{self.function} {list(self.shape)} {SHORT_NAMES[self.dtype]}", self.variant]
        return ", ".join(filter(None, parts))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one large tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def tolerance(self) -> float:
        """The largest relative error of our results for which they count as right."""
        return 1e-4 if self.dtype.itemsize >= 4 else 1e-2


def families() -> list[str]:
    """Return the names of all modules of cases."""
    return sorted(module.name for module in pkgutil.iter_modules(ops.__path__) if module.ispkg)


def cases_of(family: str, dtype: torch.dtype, device: str = "cpu") -> Iterator[Case]:
    """Yield the cases of a family in a dtype."""
    module = importlib.import_module(f"kdkernels.ops.{family}.cases")
    yield from module.cases(dtype, device)


def workload(function: str, shape: Sequence[int], dtype: torch.dtype = torch.float32, variant: str = "") -> Workload:
    """Return a row of the benchmark for a shape of one's own.

    Args:
        function: a name in :func:`workload_functions`.
        shape: of the large tensors: logits, images, an activation.
        dtype: of the large tensors.
        variant: empty, or one that the function has, such as ``"dim=1"`` or ``"channels_last"``.

    Raises:
        ValueError: there is no such function or variant, or the shape does not suit it.

    """
    makers = workload_functions()
    if function not in makers:
        raise ValueError(f"function must be one of {', '.join(makers)}, got {function!r}")
    if not shape or min(shape) < 1:
        raise ValueError(f"shape must consist of positive sizes, got {list(shape)}")
    return makers[function](function, tuple(shape), dtype, variant)


def workload_functions() -> dict[str, Callable[[str, tuple[int, ...], torch.dtype, str], Workload]]:
    """Return what makes the rows of the benchmark, by the function that they measure."""
    makers: dict[str, Callable[[str, tuple[int, ...], torch.dtype, str], Workload]] = {}
    for family in families():
        module = importlib.import_module(f"kdkernels.ops.{family}.cases")
        makers |= dict.fromkeys(module.WORKLOADS, module.workload)
    return makers


def workloads() -> Iterator[Workload]:
    """Yield the rows that every benchmark on a CPU has."""
    for function, shape, variant in COMMON_ROWS:
        yield workload(function, shape, variant=variant)


def one_of(variant: str, variants: Sequence[str]) -> str:
    """Return a variant that is among those of a function; raise ValueError otherwise."""
    if variant not in variants:
        raise ValueError(f"variant must be one of {', '.join(map(repr, variants))}, got {variant!r}")
    return variant


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """Return tensors equal to a given one in other memory layouts, none of them written to."""
    result = {
        "contiguous": tensor.contiguous(),
        "transposed": tensor.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": torch.stack((tensor, -tensor), -1).flatten(-2)[..., ::2],
        "offset": torch.cat((tensor.new_zeros(3), tensor.flatten()))[3:].view(tensor.shape),
    }
    if tensor.dim() in (4, 5):
        memory_format = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        result["channels_last"] = tensor.contiguous(memory_format=memory_format)
    return result


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
    """Draw standard normal numbers, the same for every device."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
