"""What the sweeps time: one function along one parameter, such as the size of the batch, by kdkernels and by eager."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from kdkernels.inversion import BatchNormStatistics
from kdkernels.ops._cases import workload
from kdkernels.ops.batch_norm_stats.cases import eager_loss
from kdkernels.testing.comparison import Passes, relative_error, rotating
from kdkernels.testing.timing import Timed

TOLERANCE = 1e-4
CALLS_OF_A_RANK = 5  # in a round: long beside the handing over between processes
RANK_TIMEOUT = 120.0

Contenders = Mapping[str, Passes]


@dataclass(frozen=True)
class Sweep:
    """A function whose cost is timed along a parameter.

    Attributes:
        name: of the function and the parameter.
        parameter: what grows.
        unit: of its values.
        values: of the full set.
        contenders: draws the inputs for a value; kdkernels and eager, on the same tensors.
        quick: the values of the quick set; none where the sweep is not in it.
        expected_slope: of the logarithm of the time over that of the value, where nothing but the work counts.
        cold: whether large inputs come from memory; then the middle sizes do not gain from what they fit into.
        sets_threads: whether the value is the number of threads.

    """

    name: str
    parameter: str
    unit: str
    values: tuple[int, ...]
    contenders: Callable[[int], Contenders]
    quick: tuple[int, ...] = ()
    expected_slope: float = 1.0
    cold: bool = True
    sets_threads: bool = False

    def values_of(self, bench_set: str) -> tuple[int, ...]:
        return self.values if bench_set == "full" else self.quick

    def timed(self, passes: Passes, value: int) -> Timed:
        """Return a forward with its backward."""
        full = passes.timed()["full"]
        if not self.sets_threads:
            return full

        def prepare() -> None:
            torch.set_num_threads(value)
            full.prepare()

        return Timed(full.call, prepare)

    def info(self, values: Sequence[int]) -> dict[str, Any]:
        """Return what the report asks for, but the rounds."""
        return {
            "kind": "sweep", "sweep": self.name, "parameter": self.parameter, "unit": self.unit,
            "values": list(values), "expected_slope": self.expected_slope,
        }  # fmt: skip


def rounds_by_value(rounds: Mapping[str, Sequence[float]], calls: int = 1) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of a call by contender and value, from those of entries such as "eager 64"."""
    result: dict[str, dict[str, list[float]]] = {}
    for entry, seconds in reversed(rounds.items()):
        name, _, value = entry.rpartition(" ")
        result.setdefault(name, {})[value] = [s / calls for s in seconds]
    return result


def disagreement(contenders: Contenders) -> float:
    """Return the relative difference of the results of kdkernels and eager PyTorch, in fp64 if that is what errs."""
    ours, eager = contenders["kdkernels"].results(), contenders["eager"]
    gap = relative_error(ours, eager.results())
    if gap <= TOLERANCE:
        return gap
    # In fp32 on a CPU the norm of ten million numbers has an error of 3e-4.
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
    """Return BatchNorm layers and nothing else, with running statistics that their inputs do not have."""
    generator = torch.Generator().manual_seed(0)
    stack = nn.Sequential(*(nn.BatchNorm2d(16) for _ in range(layers)))
    for layer in stack:
        layer.running_mean.copy_(0.1 * torch.randn(16, generator=generator))
        layer.running_var.copy_(0.9 + 0.2 * torch.rand(16, generator=generator))
    return stack.eval().requires_grad_(False)


def watched_stack(layers: int) -> Contenders:
    """The statistics of a stack by BatchNormStatistics, and by a hook on each layer as it is usually written."""
    images = torch.randn(16, 16, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours, usual = batch_norm_stack(layers), batch_norm_stack(layers)
    # Never left: it watches as long as the stack lives, as it does in a loop over many batches.
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


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def doubling(first: int, last: int) -> tuple[int, ...]:
    """Return first, twice that and so on, and last."""
    values = [first]
    while 2 * values[-1] < last:
        values.append(2 * values[-1])
    return (*values, last) if last > first else (first,)


def images(pixels: int) -> Contenders:
    side = math.isqrt(pixels)
    return of_workload("image_prior_losses", (16, 3, side, side))


def maps(pixels: int) -> Contenders:
    side = math.isqrt(pixels)
    return of_workload("kl_div_with_logits", (4, 19, side, side), "dim=1")


def logits(rows: int = 2048) -> Contenders:
    return of_workload("kl_div_with_logits", (rows, 1000))


SWEEPS = (
    Sweep(
        "kl_div_with_logits, batch", "batch", "rows", doubling(64, 8192), logits, quick=(64, 256, 1024, 4096)
    ),
    Sweep(
        "kl_div_with_logits, classes", "classes", "classes", doubling(125, 128000),
        lambda classes: of_workload("kl_div_with_logits", (64, classes)), quick=(125, 1000, 8000, 64000),
    ),
    Sweep(
        "image_prior_losses, resolution", "resolution", "pixels", tuple(side**2 for side in doubling(16, 512)), images,
        quick=tuple(side**2 for side in doubling(32, 256)),
    ),
    Sweep(
        "kl_div_with_logits(dim=1), resolution", "resolution", "pixels", tuple(side**2 for side in doubling(16, 512)),
        maps,
    ),
    # The activations of a layer are in the caches when the next one comes, in training as here.
    Sweep(
        "BatchNormStatistics, layers", "layers", "layers", doubling(1, 64), watched_stack, quick=(4, 8, 16, 32),
        cold=False,
    ),
    Sweep(
        "batch_norm_stat_loss, channels", "channels", "channels", doubling(4, 1024),
        lambda channels: of_workload("batch_norm_stat_loss", (32, channels, 16, 16)),
    ),
    Sweep(
        "kl_div_with_logits, threads", "threads", "threads", doubling(1, cores()), lambda _: logits(),
        expected_slope=-1.0, sets_threads=True,
    ),
    Sweep(
        "batch_norm_stat_loss, threads", "threads", "threads", doubling(1, cores()),
        lambda _: of_workload("batch_norm_stat_loss", (64, 64, 32, 32)), expected_slope=-1.0, sets_threads=True,
    ),
)  # fmt: skip

# Each rank computes the same on a batch of its own, with one thread; the time of a round is that of the slowest.
RANKS = Sweep(
    "kl_div_with_logits, ranks", "ranks", "processes", doubling(1, cores()), lambda _: logits(),
    expected_slope=0.0, cold=False,
)  # fmt: skip


class Ranks:
    """Processes with a thread each that compute the same at the same time; they are started once, and wait.

    Args:
        count: of processes.
        make: draws the inputs of one.
        calls: that each makes in a round.

    """

    def __init__(self, count: int, make: Callable[[], Contenders] = logits, calls: int = CALLS_OF_A_RANK) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._barriers = {ranks: context.Barrier(ranks) for ranks in range(1, count + 1)}
        self._connections: list[Connection] = []
        self._processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._barriers, make, calls), daemon=True)
            process.start()
            theirs.close()  # so that the end of a process is noticed
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, name: str, ranks: int) -> list[float]:
        """Let some ranks run a contender at the same time, and return the seconds of each."""
        chosen = self._connections[:ranks]
        for connection in chosen:
            connection.send((name, ranks))
        return [connection.recv() for connection in chosen]

    def timed(self, name: str, ranks: int) -> Timed:
        return Timed(partial(self.run, name, ranks))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            process.close()
            connection.close()


def _serve(connection: Connection, barriers: Mapping[int, Any], make: Callable[[], Contenders], calls: int) -> None:
    torch.set_num_threads(1)
    contenders = make()
    while True:
        try:
            name, ranks = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        passes = contenders[name]
        barriers[ranks].wait(RANK_TIMEOUT)
        start = perf_counter()
        for _ in range(calls):
            passes.clear()
            passes.full()
        connection.send(perf_counter() - start)
