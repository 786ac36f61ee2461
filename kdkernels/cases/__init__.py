"""Inputs for every op, one generator an op: the tests, the benchmark and the self-test draw from them.

A :class:`Case` pairs a function of this package with what a user would write in PyTorch, on a few samples of one
kind: a shape, a layout, an option, an edge.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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
    """One row of the benchmark: a forward and a backward to the differentiable tensors.

    Attributes:
        name: of the function and the shape.
        function: a function of kdkernels with its options bound.
        eager: the same formula in plain PyTorch.
        make: draws the tensors.
        read: bytes that forward and backward have to read at least, each input once a pass.
        write: bytes that they have to write at least.
        goals: the speed-up over eager PyTorch and over ``torch.compile`` that is aimed for, with two threads.
        differentiable: positions of the tensors that get a gradient.

    """

    name: str
    function: Callable[..., Any]
    eager: Callable[..., Any]
    make: Callable[[], tuple[Tensor, ...]]
    read: int
    write: int
    goals: tuple[float, float]
    differentiable: tuple[int, ...] = (0,)


def families() -> list[str]:
    """Return the names of all modules of cases."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def cases_of(family: str, dtype: torch.dtype, device: str = "cpu") -> Iterator[Case]:
    """Yield the cases of a family in a dtype."""
    module = importlib.import_module(f"kdkernels.cases.{family}")
    yield from module.cases(dtype, device)


def workloads() -> Iterator[Workload]:
    """Yield the benchmark's rows of all families."""
    for family in families():
        yield from importlib.import_module(f"kdkernels.cases.{family}").workloads()


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
