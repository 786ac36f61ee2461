"""Cases of the batch-norm statistics: ranks, layouts, modes, and statistics far from 0."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels.ops._cases import Benchmark, Call, Case, FarCall, Workload, draw, layouts, one_of, register
from kdkernels.ops.batch_norm_stats import PASSES, batch_norm_stat_loss, batch_norm_stats, batch_norm_tap

SHAPES = ((5, 3), (64, 300), (4, 6, 7), (2, 8, 4, 6), (3, 70, 7, 7), (2, 1, 33, 65), (2, 5, 3, 4, 5), (1, 4, 9, 9))
LOSSES: tuple[dict[str, Any], ...] = (
    {"mode": "l2"},
    {"mode": "l2", "moment": "std"},
    {"mode": "l2", "mean_weight": 0.3, "var_weight": 2.0},
    {"mode": "l1"},
    {"mode": "l1", "moment": "std", "reduction": "sum", "var_weight": 0.1},
    {"mode": "squared"},
    {"mode": "squared", "moment": "std"},
    {"mode": "squared", "reduction": "sum", "mean_weight": 0.7},
    {"mode": "gaussian_kl"},
    {"mode": "gaussian_kl", "reduction": "sum"},
)


def _by_channel(statistic: Tensor, input: Tensor) -> Tensor:
    return statistic.view(1, -1, *[1] * (input.dim() - 2))


def eager_stats(input: Tensor, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel as users write it."""
    dims = [0, *range(2, input.dim())]
    return input.mean(dims), input.var(dims, unbiased=unbiased)


def eager_tap(input: Tensor, unbiased: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return the activation, mean and variance."""
    return (input * 1.0, *eager_stats(input, unbiased))


def eager_hook(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as a hook does: the network uses the activation itself."""
    return (input.view_as(input), *eager_stats(input))


def eager_loss(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    mode: str = "l2",
    moment: str = "var",
    reduction: str | None = None,
    mean_weight: float = 1.0,
    var_weight: float = 1.0,
    unbiased: bool = False,
) -> Tensor:
    """Return the distance from the running statistics as users write it."""
    mean, var = eager_stats(input, unbiased)
    if mode == "gaussian_kl":
        v, r = var + 1e-8, running_var + 1e-8
        kl = torch.log(v.sqrt() / r.sqrt()) - 0.5 * (1 - (r + (running_mean - mean) ** 2) / v)
        return kl.sum() if reduction == "sum" else kl.mean()
    if moment == "std":
        var, running_var = var.sqrt(), running_var.sqrt()
    spreads, means = running_var - var, running_mean - mean
    if mode == "l2":
        return var_weight * spreads.norm() + mean_weight * means.norm()  # type: ignore[no-any-return]
    means, spreads = (means.abs(), spreads.abs()) if mode == "l1" else (means**2, spreads**2)
    losses = var_weight * spreads + mean_weight * means
    return losses.sum() if reduction == "sum" else losses.mean()


def cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yield the cases: every shape, layout, mode and moment at least once."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(draw, dtype=dtype, device=device, generator=generator)

    def samples(shape: tuple[int, ...], change: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[tuple[Tensor], ...]:
        return tuple((change(normal(shape)),) for _ in range(3))

    def with_running(shape: tuple[int, ...], count: int = 3) -> tuple[tuple[Tensor, ...], ...]:
        channels = (shape[1],)
        return tuple(
            (normal(shape) * 1.5 + 0.3, normal(channels) * 0.5, normal(channels).abs() + 0.5) for _ in range(count)
        )

    for i, shape in enumerate(SHAPES):
        options: dict[str, Any] = {"unbiased": bool(i % 2)}
        ours, eager = partial(batch_norm_stats, **options), partial(eager_stats, **options)
        yield Case(f"statistics of {list(shape)}", ours, eager, samples(shape))
    for layout in ("transposed", "sliced", "part", "offset", "channels_last"):
        for shape in ((2, 20, 5, 7), (3, 6, 2, 4, 3)):
            of = samples(shape, lambda x, layout=layout: layouts(x)[layout])  # type: ignore[misc]
            yield Case(f"{layout} {list(shape)}", batch_norm_stats, eager_stats, of)
            yield Case(f"tap of {layout} {list(shape)}", batch_norm_tap, eager_tap, of)
    of = samples((8, 4, 6, 6), lambda x: x + 30)
    yield Case("mean far from 0", batch_norm_stats, eager_stats, of)
    yield Case("a large activation", batch_norm_stats, eager_stats, samples((16, 24, 40, 40)))
    of = samples((70, 1024), lambda x: x * 3)
    yield Case("many channels", batch_norm_tap, eager_tap, of)

    every = (0, 1, 2)
    for options in LOSSES:
        loss, eager_of_loss = partial(batch_norm_stat_loss, **options), partial(eager_loss, **options)
        name = ", ".join(f"{name} {value}" for name, value in options.items())
        yield Case(name, loss, eager_of_loss, with_running((4, 9, 5, 5)), every)
    loss, eager_of_loss = partial(batch_norm_stat_loss, unbiased=True), partial(eager_loss, unbiased=True)
    yield Case("unbiased loss", loss, eager_of_loss, with_running((6, 17)), every)


def workload(function: str, shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Workload:
    """Return a row of the benchmark: the statistics or the loss of an activation, contiguous or channels_last."""
    memory_format = {"": torch.contiguous_format, "channels_last": torch.channels_last}[
        one_of(variant, ("", "channels_last") if len(shape) == 4 else ("",))
    ]
    if len(shape) < 2:
        raise ValueError(f"shape must be [N, C, ...], got {list(shape)}")

    def normal(device: str, seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        values = torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(1.5).add_(0.3)
        return values.contiguous(memory_format=memory_format)

    def cotangents(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        *activation, mean, var = outputs
        ones = torch.linspace(-1, 1, mean.numel(), device=mean.device)
        # The gradient of a channel's mean is spread over all its values; the factor makes it as large as the network's.
        count = math.prod(shape) // mean.numel()
        statistics = (ones.to(mean.dtype) * count, ones.flip(0).to(var.dtype) * count)
        return (*(normal(a.device.type, 1) for a in activation), *statistics)

    def make(device: str) -> tuple[Tensor, ...]:
        if function != "batch_norm_stat_loss":
            return (normal(device, 0),)
        return normal(device, 0), torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)

    functions: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "batch_norm_stats": (batch_norm_stats, eager_stats),
        "batch_norm_tap": (batch_norm_tap, eager_hook),
        "batch_norm_stat_loss": (batch_norm_stat_loss, eager_loss),
    }
    ours, eager = functions[function]
    return Workload(
        "batch_norm_stats", function, shape, dtype, variant, ours, eager, make,
        dict.fromkeys(("cpu", "cuda"), PASSES[function]), None if ours is batch_norm_stat_loss else cotangents,
    )  # fmt: skip


def calls() -> list[Call]:
    """Return small calls in float64."""
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    running = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    every = (0, 1, 2)
    last = x.contiguous(memory_format=torch.channels_last)
    return [
        Call("statistics", batch_norm_stats, (x,)),
        Call("unbiased statistics", partial(batch_norm_stats, unbiased=True), (last,)),
        Call("tap", batch_norm_tap, (x,)),
        Call("tap of rows", partial(batch_norm_tap, unbiased=True), (x[:, :, 0, 0],)),
        Call("l2", batch_norm_stat_loss, (x, *running), every),
        Call("l2 of deviations", partial(batch_norm_stat_loss, moment="std"), (x, *running), every),
        Call("weighted l2", partial(batch_norm_stat_loss, mean_weight=0.25, var_weight=3.0), (x, *running), every),
        Call("l1", partial(batch_norm_stat_loss, mode="l1", reduction="sum", var_weight=0.5), (x, *running), every),
        Call("squared", partial(batch_norm_stat_loss, mode="squared", unbiased=True), (last, *running), every),
        Call("gaussian_kl", partial(batch_norm_stat_loss, mode="gaussian_kl"), (x, *running), every),
    ]


BF16 = torch.bfloat16
TAP, LOSS = "batch_norm_tap", "batch_norm_stat_loss"


def _variance(input: Tensor) -> Tensor:
    return batch_norm_stats(input)[1]


register(
    __package__,
    accuracy=cases,
    calls=calls,
    far_calls=(FarCall(_variance, (3, 4, 50)), FarCall(_variance, (3, 40))),
    functions=(TAP, LOSS, "batch_norm_stats"),
    workload=workload,
    # Goals for forward and backward with two CPU threads, against the default mode of torch.compile.
    benchmarks=(
        Benchmark(LOSS, (64, 64, 32, 32), quick=True, compared=True,
                  goals={"faster than eager": 6.0, "faster than compile": 1.0}),
        Benchmark(TAP, (64, 64, 32, 32), variant="channels_last", quick=True),
        Benchmark(LOSS, (32, 16, 8, 8)),
        Benchmark(TAP, (64, 64, 32, 32)),
        Benchmark(TAP, (64, 64, 32, 32), BF16),
        Benchmark(TAP, (8, 256, 56, 56), variant="channels_last"),
        Benchmark(TAP, (8, 256, 56, 56)),
        Benchmark(LOSS, (64, 512, 7, 7)),
        Benchmark("batch_norm_stats", (64, 64, 32, 32)),
    ),
    gpu_benchmarks=(
        Benchmark(TAP, (84, 256, 56, 56)),
        Benchmark(TAP, (84, 256, 56, 56), variant="channels_last"),
        Benchmark(TAP, (84, 256, 56, 56), BF16),
        Benchmark(TAP, (84, 256, 56, 56), BF16, "channels_last"),
        Benchmark(TAP, (256, 64, 32, 32)),
        Benchmark(TAP, (256, 64, 32, 32), variant="channels_last"),
        Benchmark(TAP, (256, 64, 32, 32), BF16),
        Benchmark(TAP, (256, 64, 32, 32), BF16, "channels_last"),
    ),
)  # fmt: skip
