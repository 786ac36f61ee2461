"""Cases of gradient reversal: layouts and coefficients."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels.ops._cases import Benchmark, Call, Case, FarCall, Workload, draw, layouts, one_of, register
from kdkernels.ops.gradient_reversal import PASSES, gradient_reversal, gradient_reversal_linear


def eager_reversal(input: Tensor, lambd: float = 1.0) -> Tensor:
    """Return the input with its gradient reversed, without an autograd Function."""
    reversed_input = -lambd * input
    return (input - reversed_input).detach() + reversed_input


def eager_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, lambd: float = 1.0) -> Tensor:
    """Return the output of a linear layer with a reversed gradient."""
    return torch.nn.functional.linear(eager_reversal(input, lambd), weight, bias)


def cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yield the cases: every coefficient and layout."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(draw, dtype=dtype, device=device, generator=generator)
    for lambd in (0.0, 1.0, 0.3, -2.0):
        ours, eager = partial(gradient_reversal, lambd=lambd), partial(eager_reversal, lambd=lambd)
        yield Case(f"lambda {lambd}", ours, eager, tuple((normal((7, 33)),) for _ in range(2)))
    for layout in ("transposed", "sliced", "part", "offset", "channels_last"):
        of = tuple((layouts(normal((2, 3, 5, 4)))[layout],) for _ in range(2))
        yield Case(f"{layout}", gradient_reversal, eager_reversal, of)
    yield Case("a large activation", gradient_reversal, eager_reversal, ((normal((300, 400)),),))
    triples = tuple((normal((6, 5)), normal((4, 5)), normal((4,))) for _ in range(2))
    linear, eager_of_linear = partial(gradient_reversal_linear, lambd=0.5), partial(eager_linear, lambd=0.5)
    yield Case("linear", linear, eager_of_linear, triples, (0, 1, 2))


class _UsualReversal(torch.autograd.Function):
    """Gradient reversal as it is usually written."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, coefficient: float) -> Tensor:
        ctx.coefficient = coefficient
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].neg() * ctx.coefficient, None


def workload(function: str, shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Workload:
    """Return a row of the benchmark: one multiplication, which a compiler does as well."""
    one_of(variant, ("",))

    def make(device: str) -> tuple[Tensor, ...]:
        return (torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype),)

    def cotangents(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.cos(torch.arange(o.numel(), device=o.device)).view_as(o).to(o.dtype) for o in outputs)

    def usual(input: Tensor) -> Tensor:
        return _UsualReversal.apply(input, 0.3)  # type: ignore[no-any-return, no-untyped-call]

    return Workload(
        "gradient_reversal", function, shape, dtype, variant, partial(gradient_reversal, lambd=0.3), usual, make,
        dict.fromkeys(("cpu", "cuda"), PASSES), cotangents,
    )  # fmt: skip


def calls() -> list[Call]:
    """Return small calls in float64."""
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((4, 3), (2, 3), (2,)))
    return [
        Call("reversal", partial(gradient_reversal, lambd=0.5), (x,)),
        Call("linear", partial(gradient_reversal_linear, lambd=0.5), (x, weight, bias), (0, 1, 2)),
    ]


def _curved(input: Tensor) -> Tensor:
    return gradient_reversal(input).sin()


register(
    __package__,
    accuracy=cases,
    calls=calls,
    far_calls=(FarCall(_curved, (2, 300)),),
    functions=("gradient_reversal",),
    workload=workload,
    benchmarks=(
        Benchmark("gradient_reversal", (1024, 1024), quick=True),
        Benchmark("gradient_reversal", (64, 256)),
        Benchmark("gradient_reversal", (4096, 4096)),
    ),
    # One multiplication, which a compiler does as well.
    gpu_benchmarks=(Benchmark("gradient_reversal", (4096, 4096), goals={}),),
)
