"""The benchmark of gpu.py: every case against its rivals, checked first, then timed by turns with device events.

    python bench/gpu_benchmark.py [--warm]

Rivals are eager PyTorch, torch.compile of the same, Liger-Kernel where it is installed, and our own Triton kernels.
All of them start from the same logits, activations or images, and end with a gradient that was None before. With
--warm it only lets torch.compile fill its cache. Without a device it runs tiny cases on the CPU, to be seen to run.
"""

import contextlib
import ctypes
import gc
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu import CUT, PASSED
from gpu_report import MODES, Part, judge
from gpu_steps import FAILED, seconds_left
from gpu_workloads import GpuCase, cases
from torch import Tensor

import kdkernels
from kdkernels.timing import Clock, DeviceClock, HostClock, Timed, interleaved_clock_medians

DRY = os.environ.get("KDKERNELS_DRY") == "1"
COPY_BYTES = 2 << 30
REPEATS = 20  # forward and backward passes in a CUDA graph
RIVALS_TOLERANCE = 20.0  # of ours: 16-bit intermediates cost them digits, but they compute the same
COMPILED_IN_A_DRY_RUN = 1  # compiling takes seconds, and tells a dry run nothing new


class Passes:
    """A rival on the tensors of a case: forward, backward, and what the forward left for it."""

    def __init__(
        self, function: Callable[..., Any], tensors: tuple[Tensor, ...], case: GpuCase, backend: str = "auto"
    ) -> None:
        self.function, self.tensors, self.case, self.backend = function, tensors, case, backend
        self.outputs: tuple[Tensor, ...] = ()
        self.incoming: tuple[Tensor | None, ...] | None = None

    def clear(self) -> None:
        self.tensors[0].grad, self.outputs = None, ()

    def forward(self) -> None:
        with kdkernels.set_backend(self.backend):
            result = self.function(*self.tensors)
        self.outputs = result if isinstance(result, tuple) else (result,)
        if self.incoming is None:
            self.incoming = self.case.cotangents(self.outputs) if self.case.cotangents else (None,)

    def backward(self) -> None:
        torch.autograd.backward(self.outputs, self.incoming)

    def full(self) -> None:
        self.forward()
        self.backward()

    def results(self) -> list[Tensor]:
        """Outputs and gradient, of tensors that no later pass writes to."""
        self.clear()
        self.full()
        results = [output.detach() for output in self.outputs] + [self.tensors[0].grad]
        self.clear()
        return results

    def timed(self) -> dict[str, Timed]:
        def clear_and_forward() -> None:
            self.clear()
            self.forward()

        return {
            "forward": Timed(self.forward, self.clear),
            "backward": Timed(self.backward, clear_and_forward),
            "full": Timed(self.full, self.clear),
        }


def true_results(case: GpuCase, tensors: tuple[Tensor, ...], ours: Passes) -> list[Tensor]:
    """The plain formula in fp32 on the same numbers; it is far more accurate than what it is compared with."""
    wide = tuple(t.detach().float() if t.is_floating_point() else t for t in tensors)
    wide[0].requires_grad_()
    passes = Passes(case.rivals["eager"], wide, case)
    ours.clear()
    ours.forward()  # draws the incoming gradients
    passes.incoming = tuple(None if t is None else t.float() for t in ours.incoming)
    ours.clear()
    return passes.results()


def relative_error(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest error of a result, as the norm of the error over the norm of the result; NaN if there is one."""
    errors = []
    for a, b in zip(found, truth, strict=True):
        if a.shape != b.shape:
            return float("inf")
        errors.append(float((a.float() - b).norm() / b.norm().clamp(min=1e-30)))
    return max(errors, key=lambda error: float("inf") if error != error else error)


def rivals_of(case: GpuCase, tensors: tuple[Tensor, ...], compiles: bool) -> dict[str, Passes]:
    torch._dynamo.reset()
    rivals = {
        "native": Passes(case.ours, tensors, case, "native"),
        "triton": Passes(case.ours, tensors, case, "triton"),
    }
    rivals |= {name: Passes(function, tensors, case) for name, function in case.rivals.items()}
    if compiles:
        rivals["compile"] = Passes(torch.compile(case.rivals["eager"], dynamic=False), tensors, case)
    if "liger" in rivals:  # last: it lets the host wait, which spoils the capture of a graph
        rivals["liger"] = rivals.pop("liger")
    return rivals


def why_not(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if "was requested, but" in str(error):
        return f"not available: {str(error).partition(': ')[2].partition('. set_backend')[0]}"
    return f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"


def check(row: dict[str, Any], rivals: dict[str, Passes], truth: list[Tensor], tolerance: float) -> None:
    """Compare every rival with the truth; those that differ, or do not run, are not timed."""
    for name, passes in list(rivals.items()):
        allowed = tolerance if name in {"native", "triton"} else RIVALS_TOLERANCE * tolerance
        try:
            error = relative_error(passes.results(), truth)
            row["errors"][name] = error
            if error <= allowed:
                continue
            reason = f"wrong: relative error {error:.1e}, allowed {allowed:.0e}"
        except Exception as error:
            reason = why_not(error)
        row["not_timed"][name] = reason
        rivals.pop(name).clear()
        _free()


def peak_bytes(passes: Passes) -> int | None:
    """What a forward and a backward take beyond the inputs, the gradient included."""
    if not passes.tensors[0].is_cuda:
        return None
    passes.clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    passes.full()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    passes.clear()
    return peak


def capture(call: Callable[[], None], repeats: int = 1, **options: Any) -> torch.cuda.CUDAGraph:
    """Capture calls in a CUDA graph, after some on a stream of their own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(**options)
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph


def launches(call: Callable[[], None]) -> int:
    """How many nodes a call's CUDA graph has: kernels, copies, fills."""
    graph = capture(call, keep_graph=True)
    runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
    count = ctypes.c_size_t()
    status = runtime.cudaGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    if status:
        raise RuntimeError(f"cudaGraphGetNodes returned {status}")
    return count.value


def under_graph(passes: Passes, clock: Clock) -> dict[str, Any]:
    """Time a forward and a backward as a part of a graph of many of them, and count their launches."""

    def step(backward: bool = True) -> None:
        passes.clear()
        passes.forward()
        if backward:
            passes.backward()

    result: dict[str, Any] = {}
    try:
        graph = capture(step, REPEATS)
        seconds = interleaved_clock_medians({"graph": Timed(graph.replay)}, clock)["graph"]
        result["microseconds"] = round(1e6 * seconds / REPEATS, 2)
        result["launches_forward"] = launches(lambda: step(backward=False))
        result["launches_backward"] = launches(step) - result["launches_forward"]
    except Exception as error:
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        result["why_not"] = why_not(error)
    passes.clear()
    return result


def empty_row(case: GpuCase) -> dict[str, Any]:
    return {
        "name": case.name, "errors": {}, "seconds": {}, "bytes_per_second": {}, "peak_bytes": {},
        "not_timed": dict(case.missing), "targets": [],
    }  # fmt: skip


def measure(case: GpuCase, clock: Clock, device: str, *, compiles: bool = True, seconds: float = 1.5) -> dict[str, Any]:
    """Check a case, time what passed, and compare it with its goals."""
    row = empty_row(case)
    if not compiles:
        row["not_timed"]["compile"] = "left out of the dry run"
    tensors = case.make(device)
    tensors[0].requires_grad_()
    rivals = rivals_of(case, tensors, compiles)
    try:
        truth = true_results(case, tensors, rivals["native"])
        _free()
        check(row, rivals, truth, case.tolerance)
    except Exception as error:
        row["not_timed"]["native"] = why_not(error)
    truth = []
    if "native" in row["not_timed"]:
        row["not_timed"] |= {name: "not timed: ours failed" for name in rivals if name not in row["not_timed"]}
        return row
    row["peak_bytes"] = {name: peak_bytes(passes) for name, passes in rivals.items()}
    _free()
    timed = {(name, mode): one for name, passes in rivals.items() for mode, one in passes.timed().items()}
    medians = interleaved_clock_medians(
        {f"{name} {mode}": one for (name, mode), one in timed.items()}, clock, rounds=15, seconds=seconds
    )
    row["seconds"] = {name: {mode: medians[f"{name} {mode}"] for mode in MODES} for name in rivals}
    for mode, passes in zip(MODES, (*case.passes, sum(case.passes)), strict=True):
        if passes:
            row["bytes_per_second"][mode] = passes * case.tensor_bytes / row["seconds"]["native"][mode]
    if case.needs_graph and device == "cuda":
        row["graph"] = {name: under_graph(passes, clock) for name, passes in rivals.items()}
    return row


def copy_bandwidth(clock: Clock, device: str, size: int) -> float:
    """Bytes per second of a large copy, reads and writes counted."""
    source = torch.ones(size // 4, device=device)
    destination = torch.empty_like(source)
    seconds = interleaved_clock_medians({"copy": Timed(lambda: destination.copy_(source))}, clock)["copy"]
    return 2 * size / seconds


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def warm() -> None:
    """Compile what the benchmark will compile."""
    for case in cases(dry=False):
        tensors = case.make("cuda")
        tensors[0].requires_grad_()
        try:
            rivals_of(case, tensors, compiles=True)["compile"].results()
        except Exception as error:
            print(f"{case.name}: {why_not(error)}", flush=True)
        del tensors
        _free()


def benchmark(part: Part) -> int:
    device = "cpu" if DRY else "cuda"
    if DRY:
        torch.set_num_threads(1)
    clock: Clock = HostClock() if DRY else DeviceClock()
    bandwidth = copy_bandwidth(clock, device, COPY_BYTES // 32 if DRY else COPY_BYTES)
    _free()
    part.add(copy_bandwidth=bandwidth, rows=[])
    rows: list[dict[str, Any]] = []
    waiting = list({case.name: case for case in cases(DRY)}.values())  # tiny, some cases are the same
    longest = 0.0
    while waiting and seconds_left() > longest:
        case, left = waiting.pop(0), seconds_left()
        compiles = not DRY or len(rows) < COMPILED_IN_A_DRY_RUN
        try:
            row = measure(case, clock, device, compiles=compiles, seconds=0.2 if DRY else 1.5)
        except Exception as error:
            traceback.print_exc()
            row = empty_row(case)
            row["not_timed"]["native"] = why_not(error)
        row["targets"] = [] if DRY else judge(row, case.goals, bandwidth)
        rows.append(row)
        _free()
        # What compiles anew takes longest; the half of it is a fair guess for a case whose compilation is cached.
        longest = max(longest, 0.5 * (left - seconds_left()))
        part.add(rows=rows, not_reached=[other.name for other in waiting], summary=_summary(rows, waiting))
        print(f"{case.name}: {row['seconds'] or row['not_timed']}", flush=True)
    if any("native" in row["not_timed"] for row in rows):
        return FAILED
    return CUT if waiting else PASSED


def _summary(rows: list[dict[str, Any]], waiting: list[GpuCase]) -> str:
    verdicts = [target["verdict"] for row in rows for target in row["targets"]]
    wrong = sum("native" in row["not_timed"] for row in rows)
    text = f"{len(rows)} cases" + (f", {wrong} of them wrong or failed" if wrong else "")
    text += f", {len(waiting)} not reached" if waiting else ""
    if not verdicts:
        return f"{text}, no number of which is a claim"
    return f"{text}; targets: {verdicts.count('met')} met, {verdicts.count('MISSED')} MISSED"


def main() -> int:
    if "--warm" in sys.argv:
        warm()
        return PASSED
    return benchmark(Part(Path(os.environ["KDKERNELS_PART"])))


if __name__ == "__main__":
    sys.exit(main())
