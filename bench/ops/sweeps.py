"""The sweeps: one function along one parameter, such as the batch size, for kdkernels and eager PyTorch."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench.machine import cores
from kdkernels.inversion import BatchNormStatistics
from kdkernels.ops._cases import workload
from kdkernels.testing.comparison import Passes, relative_error, rotating
from kdkernels.testing.timing import Timed

TOLERANCE = 1e-4
CALLS_OF_A_RANK = 5  # calls per round, so that communication between the processes is negligible
RANK_TIMEOUT = 120.0

Contenders = Mapping[str, Passes]


@dataclass(frozen=True)
class Sweep:
    """A function whose cost is timed along a parameter."""

    function: str
    parameter: str
    unit: str
    values: tuple[int, ...]
    contenders: Callable[[int], Contenders]  # kdkernels and eager on the same inputs, drawn for a value
    quick: tuple[int, ...] = ()  # values in the quick set
    expected_slope: float = 1.0  # of log(time) over log(value), if only the work counts
    cold: bool = True  # whether large inputs come from memory, so that caches do not favour smaller sizes
    sets_threads: bool = False  # whether the value is the number of threads

    @property
    def name(self) -> str:
        return f"{self.function}, {self.parameter}"

    def values_of(self, full: bool) -> tuple[int, ...]:
        return self.values if full else self.quick

    def timed(self, passes: Passes, value: int) -> Timed:
        """Return a forward with its backward."""
        full = passes.timed()["full"]
        if not self.sets_threads:
            return full
        return Timed(full.call, lambda: (torch.set_num_threads(value), full.prepare()))

    @property
    def info(self) -> dict[str, Any]:
        """What the report needs besides the rounds."""
        return {
            "kind": "sweep", "sweep": self.name, "parameter": self.parameter, "unit": self.unit,
            "expected_slope": self.expected_slope, "cold": self.cold,
        }  # fmt: skip


def rounds_by_value(rounds: Mapping[str, Sequence[float]], calls: int = 1) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of a call by contender and value, from entries such as "eager 64"."""
    result: dict[str, dict[str, list[float]]] = {}
    for entry, seconds in reversed(rounds.items()):
        name, _, value = entry.rpartition(" ")
        result.setdefault(name, {})[value] = [s / calls for s in seconds]
    return result


def disagreement(contenders: Contenders) -> float:
    """Return the relative difference between kdkernels and eager PyTorch, in fp64 if fp32 is not accurate enough."""
    ours, eager = contenders["kdkernels"].results(), contenders["eager"]
    gap = relative_error(ours, eager.results())
    if gap <= TOLERANCE:
        return gap
    # In eager PyTorch on a CPU, the fp32 norm of ten million numbers has an error of 3e-4.
    wide = tuple(t.detach().double() if t.is_floating_point() else t for t in eager.tensors)
    wide[0].requires_grad_()
    return relative_error(ours, Passes(eager.function, wide, eager.cotangents).results())


def of_workload(function: str, shape: Sequence[int], variant: str = "") -> Contenders:
    row = workload(function, shape, variant=variant)
    tensors = row.make("cpu")
    tensors[0].requires_grad_()
    sets = rotating(tensors)
    functions = {"kdkernels": row.ours, "eager": row.eager}
    return {name: Passes(f, tensors, row.cotangents, sets=sets) for name, f in functions.items()}


def batch_norm_stack(layers: int) -> nn.Sequential:
    """Return a stack of BatchNorm layers whose running statistics differ from those of their inputs."""
    generator = torch.Generator().manual_seed(0)
    stack = nn.Sequential(*(nn.BatchNorm2d(16) for _ in range(layers)))
    for layer in stack:
        layer.running_mean.copy_(0.1 * torch.randn(16, generator=generator))
        layer.running_var.copy_(0.9 + 0.2 * torch.rand(16, generator=generator))
    return stack.eval().requires_grad_(False)


def watched_stack(layers: int) -> Contenders:
    """Return the feature loss of a stack by BatchNormStatistics, and by a hook on each layer as usually written."""
    eager_loss = workload("batch_norm_stat_loss", (16, 16, 16, 16)).eager
    images = torch.randn(16, 16, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours, usual = batch_norm_stack(layers), batch_norm_stack(layers)
    # Never exited: it watches the stack for its lifetime, as in a loop over many batches.
    statistics = BatchNormStatistics(ours).__enter__()
    losses: list[Tensor] = []

    def hook(layer: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        losses.append(eager_loss(inputs[0], layer.running_mean, layer.running_var))

    for layer in usual:
        layer.register_forward_pre_hook(hook)

    def by_kdkernels(batch: Tensor) -> Tensor:
        return ours(batch).mean() + statistics.loss()

    def by_hooks(batch: Tensor) -> Tensor:
        losses.clear()
        output = usual(batch)
        return output.mean() + torch.stack(losses).sum()

    return {"kdkernels": Passes(by_kdkernels, (images,)), "eager": Passes(by_hooks, (images,))}


def doubling(first: int, last: int) -> tuple[int, ...]:
    """Return the first value, its doublings below the last, and the last."""
    values = [first]
    while 2 * values[-1] < last:
        values.append(2 * values[-1])
    return (*values, last) if last > first else (first,)


def logits(rows: int = 2048) -> Contenders:
    return of_workload("kl_div_with_logits", (rows, 1000))


def square(function: str, shape: tuple[int, int], variant: str, pixels: int) -> Contenders:
    return of_workload(function, (*shape, math.isqrt(pixels), math.isqrt(pixels)), variant)


def squares(first: int, last: int) -> tuple[int, ...]:
    return tuple(side**2 for side in doubling(first, last))


SWEEPS = (
    Sweep(
        "kl_div_with_logits", "batch", "rows", doubling(64, 8192), logits, quick=(64, 256, 1024, 4096)
    ),
    Sweep(
        "kl_div_with_logits", "classes", "classes", doubling(125, 128000),
        lambda classes: of_workload("kl_div_with_logits", (64, classes)), quick=(125, 1000, 8000, 64000),
    ),
    Sweep(
        "image_prior_losses", "resolution", "pixels", squares(16, 512),
        partial(square, "image_prior_losses", (16, 3), ""), quick=squares(32, 256),
    ),
    Sweep(
        "kl_div_with_logits(dim=1)", "resolution", "pixels", squares(16, 512),
        partial(square, "kl_div_with_logits", (4, 19), "dim=1"),
    ),
    # The activations of a layer are in the caches when the next layer runs, in training as here.
    Sweep(
        "BatchNormStatistics", "layers", "layers", doubling(1, 64), watched_stack, quick=(4, 8, 16, 32), cold=False
    ),
    Sweep(
        "batch_norm_stat_loss", "channels", "channels", doubling(4, 1024),
        lambda channels: of_workload("batch_norm_stat_loss", (32, channels, 16, 16)),
    ),
    Sweep(
        "kl_div_with_logits", "threads", "threads", doubling(1, cores()), lambda _: logits(),
        expected_slope=-1.0, sets_threads=True,
    ),
    Sweep(
        "batch_norm_stat_loss", "threads", "threads", doubling(1, cores()),
        lambda _: of_workload("batch_norm_stat_loss", (64, 64, 32, 32)), expected_slope=-1.0, sets_threads=True,
    ),
)  # fmt: skip

# Each rank computes the same on a separate batch with one thread; the slowest rank determines the time of a round.
RANKS = Sweep(
    "kl_div_with_logits", "ranks", "processes", doubling(1, cores()), lambda _: logits(), expected_slope=0.0, cold=False
)


class Rank:
    """The state of one process: its contenders, and a barrier for each number of concurrent ranks."""

    contenders: ClassVar[Contenders]
    barriers: ClassVar[Mapping[int, Any]]

    @classmethod
    def start(cls, barriers: Mapping[int, Any], make: Callable[[], Contenders]) -> None:
        torch.set_num_threads(1)
        cls.barriers, cls.contenders = barriers, make()

    @classmethod
    def run(cls, name: str, ranks: int, calls: int) -> float:
        passes = cls.contenders[name]
        cls.barriers[ranks].wait(RANK_TIMEOUT)  # also keeps a process from taking a second task
        start = perf_counter()
        for _ in range(calls):
            passes.clear()
            passes.full()
        return perf_counter() - start


class Ranks(ProcessPoolExecutor):
    """Processes with one thread each that compute the same concurrently; they are started once, and wait."""

    def __init__(self, count: int, make: Callable[[], Contenders] = logits, calls: int = CALLS_OF_A_RANK) -> None:
        context = torch.multiprocessing.get_context("spawn")
        barriers = {ranks: context.Barrier(ranks) for ranks in range(1, count + 1)}
        super().__init__(count, context, Rank.start, (barriers, make))
        self.calls = calls
        self.seconds("kdkernels", count)  # starts the processes

    def seconds(self, name: str, ranks: int) -> list[float]:
        """Run a contender in some of the processes concurrently, and return the seconds of each."""
        return list(self.map(Rank.run, [name] * ranks, [ranks] * ranks, [self.calls] * ranks))

    def timed(self, name: str, ranks: int) -> Timed:
        return Timed(partial(self.seconds, name, ranks))
