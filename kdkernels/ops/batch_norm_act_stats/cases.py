"""Cases of the fused BatchNorm layer: activations, residuals, layouts, and statistics over batch and images."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops._cases import Benchmark, Call, Case, FarCall, Workload, draw, layouts, one_of, register
from kdkernels.ops.batch_norm_act_stats import PASSES, batch_norm_act_stats
from kdkernels.ops.batch_norm_act_stats.reference import ACTIVATIONS

SHAPES = ((5, 3), (64, 300), (4, 6, 7), (2, 8, 4, 6), (3, 70, 7, 7), (2, 1, 33, 65), (2, 5, 3, 4, 5), (1, 4, 9, 9))


def eager(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    negative_slope: float = 0.01,
    statistics: str = "batch",
    unbiased: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the layer's output and the statistics of its input as users write it."""
    dims = list(range(2, input.dim())) if statistics == "image" else [0, *range(2, input.dim())]
    mean = input.mean(dims) if dims else input.clone()
    var = input.var(dims, unbiased=unbiased) if dims else input - input
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training=False, eps=eps)
    if residual is not None:
        output = output + residual
    if activation == "leaky_relu":
        return F.leaky_relu(output, negative_slope), mean, var
    return output if activation is None else getattr(F, activation)(output), mean, var


def ours(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the function with the residual in the position of a tensor."""
    return batch_norm_act_stats(input, running_mean, running_var, weight, bias, residual=residual, **options)


def cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yield the cases: every shape, layout, activation and kind of statistics at least once."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(draw, dtype=dtype, device=device, generator=generator)

    def samples(
        shape: tuple[int, ...],
        change: Callable[[Tensor], Tensor] = lambda x: x,
        residual: bool = False,
        affine: bool = True,
        mean: float = 0.3,
    ) -> tuple[tuple[Tensor, ...], ...]:
        """Return inputs far enough from the kinks of the activations that rounding does not move them across."""
        result = []
        for _ in range(3):
            running = [normal((shape[1],)) * 0.5 + mean, normal((shape[1],)).abs() + 0.5]
            parameters = [normal((shape[1],)) + 0.1, normal((shape[1],)) * 0.5] if affine else []
            added = [change(normal(shape))] if residual else []
            result.append((change(normal(shape) * 1.5 + mean), *running, *parameters, *added))
        return tuple(result)

    def case(name: str, inputs: tuple[tuple[Tensor, ...], ...], **options: Any) -> Case:
        differentiable = (0, 5) if len(inputs[0]) == 6 else (0,)
        return Case(name, partial(ours, **options), partial(eager, **options), inputs, differentiable)

    for i, shape in enumerate(SHAPES):
        activation = (None, "relu")[i % 2]
        yield case(f"{activation} of {list(shape)}", samples(shape), activation=activation, unbiased=bool(i % 3))
    for activation in ACTIVATIONS:
        for layout in ("contiguous", "channels_last"):
            of = samples((3, 21, 6, 7), lambda x, layout=layout: layouts(x)[layout])  # type: ignore[misc]
            yield case(f"{activation}, {layout}", of, activation=activation)
    residuals = ("relu", "leaky_relu", "relu6") if dtype.itemsize > 2 else ("relu", "leaky_relu")
    for activation in (None, *residuals):  # in 16 bits a sum just below 6 rounds to the kink of relu6
        for layout in ("contiguous", "channels_last"):
            of = samples((2, 24, 5, 9), lambda x, layout=layout: layouts(x)[layout], residual=True)  # type: ignore[misc]
            yield case(f"{activation} of residual, {layout}", of, activation=activation)
    for layout in ("transposed", "sliced", "part", "offset", "channels_last"):
        for shape in ((2, 20, 5, 7), (3, 6, 2, 4, 3)):
            of = samples(shape, lambda x, layout=layout: layouts(x)[layout], residual=True)  # type: ignore[misc]
            yield case(f"{layout} {list(shape)}", of, activation="relu")
    for layout in ("contiguous", "channels_last", "part"):
        of = samples((4, 9, 5, 6), lambda x, layout=layout: layouts(x)[layout])  # type: ignore[misc]
        yield case(f"images, {layout}", of, activation="relu", statistics="image", unbiased=layout == "part")
    yield case("images of rows", samples((4, 9)), statistics="image")
    yield case("no affine parameters", samples((4, 9, 5, 5), affine=False), eps=1e-3)
    yield case("mean far from 0", samples((8, 4, 6, 6), mean=30.0), activation="relu")
    yield case("a large activation", samples((16, 24, 40, 40)), activation="relu")
    last = samples((16, 24, 40, 40), lambda x: layouts(x)["channels_last"])
    yield case("a large activation in channels_last", last, activation="relu")
    yield case("large images", samples((2, 3, 90, 90)), statistics="image")
    yield case("many channels", samples((70, 1024)), activation="silu")


FUNCTION = "batch_norm_act_stats"
VARIANTS = ("", "channels_last", "residual", "channels_last residual", "silu")


def workload(function: str, shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Workload:
    """Return a row of the benchmark: BatchNorm, ReLU and statistics, in a layout, with or without a residual."""
    words = one_of(variant, VARIANTS if len(shape) == 4 else ("", "residual", "silu")).split()
    if len(shape) < 2:
        raise ValueError(f"shape must be [N, C, ...], got {list(shape)}")
    memory_format = torch.channels_last if "channels_last" in words else torch.contiguous_format
    residual = "residual" in words
    options: dict[str, Any] = {"activation": "silu" if "silu" in words else "relu"}

    def normal(device: str, seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        values = torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(1.5).add_(0.3)
        return values.contiguous(memory_format=memory_format)

    def make(device: str) -> tuple[Tensor, ...]:
        c = shape[1]
        running = torch.linspace(-0.5, 0.5, c, device=device), torch.linspace(0.5, 2, c, device=device)
        parameters = torch.linspace(0.5, 1.5, c, device=device), torch.linspace(0.5, -0.5, c, device=device)
        return (normal(device, 0), *running, *parameters, *([normal(device, 2)] if residual else []))

    def cotangents(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        output, mean, var = outputs
        ones = torch.linspace(-1, 1, mean.numel(), device=mean.device)
        # The gradient of a channel's mean is spread over all its values; the factor makes it as large as the network's.
        count = math.prod(shape) // mean.numel()
        return normal(output.device.type, 1), ones.to(mean.dtype) * count, ones.flip(0).to(var.dtype) * count

    passes = PASSES[FUNCTION + (", residual" if residual else "")]
    return Workload(
        FUNCTION, function, shape, dtype, variant, partial(ours, **options), partial(eager, **options), make,
        dict.fromkeys(("cpu", "cuda"), passes), cotangents,
    )  # fmt: skip


def calls() -> list[Call]:
    """Return small calls in float64."""
    double = partial(torch.randn, dtype=torch.float64)
    x, residual = double(4, 3, 2, 2), double(4, 3, 2, 2)
    parameters = double(3), torch.rand(3, dtype=torch.float64) + 0.5, double(3), double(3)
    last = x.contiguous(memory_format=torch.channels_last)
    return [
        Call("relu", partial(ours, activation="relu"), (x, *parameters)),
        Call("normalization of rows", partial(ours, unbiased=True), (x[:, :, 0, 0], *parameters[:2])),
        Call("relu of residual", partial(ours, activation="relu"), (last, *parameters, residual), (0, 5)),
        Call("residual", ours, (x, *parameters, residual), (0, 5)),
        Call("silu by image", partial(ours, activation="silu", statistics="image"), (x, *parameters)),
        Call("silu of residual", partial(ours, activation="silu"), (x, *parameters, residual), (0, 5)),
        Call("hardswish", partial(ours, activation="hardswish"), (last, *parameters)),
    ]


def _output(input: Tensor) -> Tensor:
    channels = input.shape[1]
    return batch_norm_act_stats(input, input.new_zeros(channels), input.new_ones(channels), activation="relu").output


BF16 = torch.bfloat16
SHAPE = (64, 64, 32, 32)

register(
    __package__,
    accuracy=cases,
    calls=calls,
    far_calls=(FarCall(_output, (3, 4, 50)), FarCall(_output, (3, 40))),
    functions=(FUNCTION,),
    workload=workload,
    # Goals for forward and backward with two CPU threads, against the default mode of torch.compile.
    benchmarks=(
        Benchmark(FUNCTION, SHAPE, quick=True, compared=True,
                  goals={"faster than eager": 6.0, "faster than compile": 2.0}),
        Benchmark(FUNCTION, SHAPE, variant="channels_last", quick=True,
                  goals={"faster than eager": 6.0, "faster than compile": 2.0}),
        Benchmark(FUNCTION, SHAPE, variant="residual"),
        Benchmark(FUNCTION, SHAPE, variant="channels_last residual", quick=True),
        Benchmark(FUNCTION, SHAPE, BF16, "channels_last"),
        Benchmark(FUNCTION, SHAPE, variant="silu"),
        Benchmark(FUNCTION, (8, 96, 112, 112), variant="channels_last"),
        Benchmark(FUNCTION, (64, 512, 7, 7)),
        Benchmark(FUNCTION, (32, 16, 32, 32), variant="channels_last"),
    ),
)  # fmt: skip
