"""The benchmark of gpu.py: every case against its rivals, checked first, then timed by turns with device events.

    python -m bench.gpu.benchmark [--warm]

Rivals are eager PyTorch, torch.compile of the same, the packages of rivals.py that are installed, and our own Triton
kernels. All of them start from the same logits, activations or images, and end with a gradient that was None before.
With --warm it only lets torch.compile fill its cache. Without a device it runs tiny cases on the CPU.
"""

import contextlib
import ctypes
import gc
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.gpu.report import Part, judge
from bench.gpu.run import CUT, PASSED
from bench.gpu.steps import FAILED, seconds_left
from bench.gpu.workloads import GpuCase, cases
from bench.roofline import copy_bandwidth, peak_operations
from kdkernels.ops._registry import Backend
from kdkernels.testing.comparison import COMPILE, MODES, Contest, Passes, enter, peak_bytes, why_not
from kdkernels.testing.timing import Clock, DeviceClock, HostClock, Timed, interleaved_medians, interleaved_rounds

DRY = os.environ.get("KDKERNELS_DRY") == "1"
COPY_BYTES = 2 << 30
REPEATS = 20  # forward and backward passes in a CUDA graph
COMPILED_IN_A_DRY_RUN = 1  # compiling takes seconds, and tells a dry run nothing new


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
        seconds = interleaved_medians({"graph": Timed(graph.replay)}, clock)["graph"]
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


def contest_of(case: GpuCase, device: str, compiled: Mapping[str, str | None]) -> Contest:
    ours: dict[str, Backend] = {"native": "native", "triton": "triton"}
    # Liger is last: it lets the host wait, which spoils the capture of a graph.
    return enter(case.workload, device, ours, case.rivals, compiled, _free)


def measure(
    case: GpuCase, clock: Clock, device: str, *, compiled: Mapping[str, str | None] = COMPILE, seconds: float = 1.5
) -> dict[str, Any]:
    """Check a case, time what passed, and compare it with its goals."""
    row = empty_row(case)
    row["not_timed"] |= {
        name: f"left out{' of the dry run' if DRY else ''}" for name in COMPILE if name not in compiled
    }
    contest = contest_of(case, device, compiled)
    row["errors"] = contest.errors
    row["not_timed"] |= contest.not_timed
    row["compile_seconds"] = contest.compile_seconds
    if not contest.passes:
        return row
    for name, passes in contest.passes.items():
        passes.clear()
        row["peak_bytes"][name] = peak_bytes(passes.full, device)
        passes.clear()
    _free()
    timed = {(name, mode): one for name, passes in contest.passes.items() for mode, one in passes.timed().items()}
    rounds = interleaved_rounds(
        {f"{name} {mode}": one for (name, mode), one in timed.items()}, clock, rounds=15, seconds=seconds
    )
    row["rounds"] = rounds
    row["seconds"] = {name: {mode: median(rounds[f"{name} {mode}"]) for mode in MODES} for name in contest.passes}
    passes_over = case.workload.passes["cuda"]
    for mode, count in zip(MODES, (*passes_over, sum(passes_over)), strict=True):
        if count:
            row["bytes_per_second"][mode] = count * case.workload.tensor_bytes / row["seconds"]["native"][mode]
    if case.needs_graph and device == "cuda":
        row["graph"] = {name: under_graph(passes, clock) for name, passes in contest.passes.items()}
    return row


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def warm() -> None:
    """Compile what the benchmark will compile."""
    for case in cases(dry=False):
        contest = enter(case.workload, "cuda", {"native": "native"}, {}, case.compiled, _free)
        print(f"{case.name}: {contest.compile_seconds} {contest.not_timed}", flush=True)
        del contest
        _free()


def benchmark(part: Part) -> int:
    device = "cpu" if DRY else "cuda"
    if DRY:
        torch.set_num_threads(1)
    clock: Clock = HostClock() if DRY else DeviceClock()
    bandwidth = copy_bandwidth(clock, device, COPY_BYTES // 32 if DRY else COPY_BYTES)
    peak = peak_operations(clock, device)
    _free()
    part.add(copy_bandwidth=bandwidth, operations_per_second=peak, rows=[])
    rows: list[dict[str, Any]] = []
    waiting = list({case.name: case for case in cases(DRY)}.values())  # tiny, some cases are the same
    longest = 0.0
    while waiting and seconds_left() > longest:
        case, left = waiting.pop(0), seconds_left()
        compiled = case.compiled if not DRY or len(rows) < COMPILED_IN_A_DRY_RUN else {}
        try:
            row = measure(case, clock, device, compiled=compiled, seconds=0.2 if DRY else 1.5)
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
