"""Implementations of one formula side by side: checked against the true result first, and only then timed."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kdkernels.ops._cases import Workload
from kdkernels.ops._registry import Backend, set_backend
from kdkernels.testing.timing import Timed, rotation

Function = Callable[..., Any]
MODES = ("forward", "backward", "full")
COMPILE = {"compile": None, "compile max-autotune": "max-autotune-no-cudagraphs"}
RIVALS_TOLERANCE = 20.0  # times ours: 16-bit intermediates cost digits, but the formula is the same
SMALL = 1 << 20  # bytes; smaller tensors stay in a cache, and the overhead of a call matters
EXACT_ON_GPU = 512 << 20  # bytes; the truth is computed in fp64 for tensors up to this size in fp64


class Passes:
    """Forward and backward of a function on the tensors of a workload, with the state between them.

    Args:
        function: Function to call.
        tensors: Arguments; the first one gets a gradient.
        cotangents: Function that draws the incoming gradients of the outputs; None for a loss, whose gradient is 1.
        backend: Backend of kdkernels for the call.
        sets: Iterator over equal sets of tensors, see :func:`rotating`; by default the same tensors are reused.

    """

    def __init__(
        self,
        function: Function,
        tensors: tuple[Tensor, ...],
        cotangents: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None,
        backend: Backend = "auto",
        sets: Iterator[tuple[Tensor, ...]] | None = None,
    ) -> None:
        self.function, self.tensors, self.cotangents, self.backend = function, tensors, cotangents, backend
        self.sets = sets
        self.outputs: tuple[Tensor, ...] = ()
        self.incoming: tuple[Tensor | None, ...] | None = None

    def clear(self) -> None:
        """Drop the gradient and the graph, and move on to the next set of tensors."""
        self.tensors[0].grad, self.outputs = None, ()
        if self.sets is not None:
            self.tensors = next(self.sets)

    def forward(self) -> None:
        """Compute the outputs; the first call also draws the incoming gradients."""
        if self.backend == "auto":
            result = self.function(*self.tensors)
        else:
            with set_backend(self.backend):
                result = self.function(*self.tensors)
        self.outputs = result if isinstance(result, tuple) else (result,)
        if self.incoming is None:
            self.incoming = self.cotangents(self.outputs) if self.cotangents else (None,)

    def backward(self) -> None:
        """Compute the gradient of the first tensor."""
        torch.autograd.backward(self.outputs, self.incoming)

    def full(self) -> None:
        """Run forward and backward."""
        self.forward()
        self.backward()

    def results(self) -> list[Tensor]:
        """Return the outputs and the gradient, which no later pass overwrites."""
        self.clear()
        self.full()
        gradient = self.tensors[0].grad
        assert gradient is not None
        results = [output.detach() for output in self.outputs] + [gradient]
        self.clear()
        return results

    def timed(self) -> dict[str, Timed]:
        """Return each of :data:`MODES` with its untimed preparation."""

        def clear_and_forward() -> None:
            self.clear()
            self.forward()

        return {
            "forward": Timed(self.forward, self.clear),
            "backward": Timed(self.backward, clear_and_forward),
            "full": Timed(self.full, self.clear),
        }


def rotating(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Cycle through the tensors and enough copies for each to come from memory; small tensors are not copied."""
    count = 1
    if max(t.nbytes for t in tensors) >= SMALL:
        count = rotation(sum(t.nbytes for t in tensors))
    copies = [tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors) for _ in range(count - 1)]
    return cycle([tensors, *copies])


def true_results(workload: Workload, tensors: tuple[Tensor, ...], ours: Passes) -> list[Tensor]:
    """Return outputs and gradient of the plain formula on the same values, in fp64.

    On a GPU, large tensors are computed in fp32, where sums are tree reductions. On a CPU fp32 is too coarse: a norm of
    ten million values has an error of 3e-4.
    """
    first = tensors[0]
    exact = torch.float64 if first.device.type == "cpu" or 8 * first.numel() <= EXACT_ON_GPU else torch.float32
    wide = tuple(t.detach().to(exact) if t.is_floating_point() else t for t in tensors)
    wide[0].requires_grad_()
    passes = Passes(workload.eager, wide, workload.cotangents)
    ours.clear()
    ours.forward()  # draws the incoming gradients
    assert ours.incoming is not None
    passes.incoming = tuple(None if t is None else t.to(exact) for t in ours.incoming)
    ours.clear()
    return passes.results()


def relative_error(found: list[Tensor], truth: list[Tensor]) -> float:
    """Return the largest relative error in norm over the results.

    It is infinite if shapes or numbers of results differ, and NaN if an error is NaN.
    """
    if len(found) != len(truth):
        return float("inf")
    errors = []
    for a, b in zip(found, truth, strict=True):
        if a.shape != b.shape:
            return float("inf")
        errors.append(float((a.to(b.dtype) - b).norm() / b.norm().clamp(min=1e-30)))
    return max(errors, key=lambda error: float("inf") if error != error else error)


@dataclass
class Contest:
    """All contenders on one workload and the same tensors, by name.

    Attributes:
        passes: Passes of the contenders whose results are right.
        errors: Relative errors of the results.
        not_timed: Reasons for excluding a contender.
        compile_seconds: Seconds of a compiled contender's first call, which compiles it.

    """

    passes: dict[str, Passes] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    not_timed: dict[str, str] = field(default_factory=dict)
    compile_seconds: dict[str, float] = field(default_factory=dict)


def enter(
    workload: Workload,
    device: str,
    ours: Mapping[str, Backend],
    rivals: Mapping[str, Function],
    compiled: Mapping[str, str | None] = COMPILE,
    after_each: Callable[[], None] = lambda: None,
) -> Contest:
    """Run every contender on a workload and exclude those that fail or differ from the true result.

    Args:
        workload: Row of the benchmark.
        device: Device type of the tensors.
        ours: Backends of kdkernels, by contender name. If the first is wrong, no contender is timed.
        rivals: Other functions of the same tensors, by contender name. Eager PyTorch always takes part.
        compiled: Modes of ``torch.compile`` for the eager formula, by contender name.
        after_each: Function called after each contender, to release memory.

    """
    tensors = workload.make(device)
    tensors[0].requires_grad_()
    torch._dynamo.reset()
    # All contenders share one rotation, so none finds in a cache what another has just read. A GPU's clock overwrites
    # the cache.
    sets = rotating(tensors) if device == "cpu" else None
    contenders = {
        name: Passes(workload.ours, tensors, workload.cotangents, backend, sets) for name, backend in ours.items()
    }
    functions: dict[str, Function] = {"eager": workload.eager}
    functions |= {name: torch.compile(workload.eager, dynamic=False, mode=mode) for name, mode in compiled.items()}
    functions |= rivals
    contenders |= {
        name: Passes(function, tensors, workload.cotangents, sets=sets) for name, function in functions.items()
    }
    contest = Contest()
    first = next(iter(ours))
    try:
        truth = true_results(workload, tensors, contenders[first])
    except Exception as error:
        contest.not_timed = dict.fromkeys(contenders, "not timed: ours failed") | {first: why_not(error)}
        return contest
    for name, passes in contenders.items():
        allowed = workload.tolerance * (1.0 if name in ours else RIVALS_TOLERANCE)
        start = perf_counter()
        try:
            results = passes.results()
            if name in compiled:
                contest.compile_seconds[name] = perf_counter() - start
            contest.errors[name] = error_of = relative_error(results, truth)
            del results
            if error_of <= allowed:
                contest.passes[name] = passes
            else:
                contest.not_timed[name] = f"wrong: relative error {error_of:.1e}, allowed {allowed:.0e}"
        except Exception as error:
            contest.not_timed[name] = why_not(error)
        passes.clear()
        after_each()
    if first in contest.not_timed:
        contest.not_timed |= dict.fromkeys(contest.passes, "not timed: ours failed")
        contest.passes = {}
    return contest


def why_not(error: Exception) -> str:
    """Return a short reason for an error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if "was requested, but" in str(error):
        return f"not available: {str(error).partition(': ')[2].partition('. set_backend')[0]}"
    return f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """Return the peak memory of a call in bytes, beyond what was in use before it."""
    if device == "cpu":
        return _peak_on_cpu(call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(call: Callable[[], Any]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler logs every start and stop
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    used = peak = 0
    for _, change in changes:
        used += change
        peak = max(peak, used)
    return peak
