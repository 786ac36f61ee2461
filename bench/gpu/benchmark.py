"""The benchmark on a GPU: every case and its rivals are checked, then timed in turn with device events.

    python -m bench.gpu.benchmark [--warm]

Rivals are eager PyTorch, torch.compile of the same, the installed packages of rivals.py, and our own Triton kernels.
All of them start from the same logits, activations or images, and end with a gradient that was None before. With
--warm, only torch.compile's cache is filled. A dry run times tiny cases on the CPU.
"""

import contextlib
import ctypes
import gc
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.gpu.part import Part
from bench.gpu.run import CUT, PASSED
from bench.gpu.steps import DRY, FAILED, seconds_left
from bench.gpu.workloads import GpuCase, cases
from bench.ops.rows import info_of
from bench.report.data import OURS, Row, goals_of, rows_of
from bench.roofline import copy_bandwidth
from kdkernels.ops._registry import Backend
from kdkernels.testing.comparison import COMPILE, MODES, Contest, Passes, enter, peak_bytes, why_not
from kdkernels.testing.timing import Clock, DeviceClock, HostClock, Timed, interleaved_medians, interleaved_rounds

COPY_BYTES = 2 << 30
REPEATS = 20  # forward and backward passes in a CUDA graph
NOT_REACHED = "not reached in the time"


def capture(call: Callable[[], None], repeats: int = 1, **options: Any) -> torch.cuda.CUDAGraph:
    """Capture calls in a CUDA graph, after some warm-up calls on a separate stream."""
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
    """Return the number of nodes of a call's CUDA graph: kernels, copies, fills."""
    graph = capture(call, keep_graph=True)
    runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
    count = ctypes.c_size_t()
    status = runtime.cudaGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    if status:
        raise RuntimeError(f"cudaGraphGetNodes returned {status}")
    return count.value


def under_graph(passes: Passes, clock: Clock) -> dict[str, Any]:
    """Time a forward with its backward in a CUDA graph that repeats them, and count their launches."""

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


def contest_of(case: GpuCase, device: str, compiled: Mapping[str, str | None]) -> Contest:
    # The report calls the native kernels kdkernels. liger is last: it makes the host wait, which breaks a capture.
    ours: dict[str, Backend] = {OURS: "native", f"{OURS}, Triton": "triton"}
    contest = enter(case.workload, device, ours, case.rivals, compiled, _free)
    contest.not_timed |= case.missing | dict.fromkeys(COMPILE.keys() - compiled.keys(), "left out")
    return contest


def rows_of_case(case: GpuCase, contest: Contest, device: str) -> dict[str, dict[str, Any]]:
    """Return the records of a case by mode, without times."""
    return {
        mode: {"name": case.name, "extra_info": info_of(case.workload, contest, mode, device, case.goals)}
        for mode in MODES
    }


def untimed(case: GpuCase, device: str, reason: str) -> dict[str, Any]:
    """Return the row of a case that failed or was not reached."""
    row = rows_of_case(case, Contest(), device)["full"]
    row["extra_info"]["failed"] = reason
    return row


def measure(
    case: GpuCase, clock: Clock, device: str, *, compiled: Mapping[str, str | None] = COMPILE, seconds: float = 1.5
) -> list[dict[str, Any]]:
    """Check a case, time the contenders with correct results, and return a row for each mode."""
    contest = contest_of(case, device, compiled)
    rows = rows_of_case(case, contest, device)
    if not contest.passes:
        return [rows["full"]]
    peaks = {}
    for name, passes in contest.passes.items():
        passes.clear()
        peaks[name] = peak_bytes(passes.full, device)
        passes.clear()
    _free()
    timed = {f"{mode} {name}": one for name, passes in contest.passes.items() for mode, one in passes.timed().items()}
    rounds = interleaved_rounds(timed, clock, rounds=15, seconds=seconds)
    for mode, row in rows.items():
        by_name = {name: rounds[f"{mode} {name}"] for name in contest.passes}
        row["extra_info"] |= {"rounds": by_name, "cold": device == "cuda"}
    rows["full"]["extra_info"]["peak_bytes"] = peaks
    if case.needs_graph and device == "cuda":
        rows["full"]["extra_info"]["graph"] = {n: under_graph(passes, clock) for n, passes in contest.passes.items()}
    return list(rows.values())


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def warm() -> None:
    """Compile everything that the benchmark will compile."""
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
    copy = copy_bandwidth(clock, device, COPY_BYTES // 32 if DRY else COPY_BYTES)
    _free()
    part.add(roofline={"copy_bytes_per_second": copy})
    rows: list[dict[str, Any]] = []
    judged: list[Row] = []
    waiting = list({case.name: case for case in cases(DRY)}.values())  # some tiny cases are equal
    longest = 0.0
    while waiting and seconds_left() > longest:
        case, left = waiting.pop(0), seconds_left()
        compiled = {} if DRY and rows else case.compiled  # compiling takes seconds, and once is enough for a dry run
        if DRY:
            case = replace(case, goals={})
        try:
            measured = measure(case, clock, device, compiled=compiled, seconds=0.2 if DRY else 1.5)
        except Exception as error:
            traceback.print_exc()
            measured = [untimed(case, device, why_not(error))]
        rows += measured
        _free()
        # The first compilation takes longest; half of that is a fair guess for a case with a cached compilation.
        longest = max(longest, 0.5 * (left - seconds_left()))
        report = {"benchmarks": [*rows, *(untimed(other, device, NOT_REACHED) for other in waiting)]}
        judged = rows_of(report)
        part.add(**report, summary=summary(judged, copy))
        full = judged[len(rows) - 1]
        print(f"{case.name}: {full.failed or full.seconds}", flush=True)
    if any(row.failed != NOT_REACHED for row in judged if row.failed):
        return FAILED
    return CUT if waiting else PASSED


def summary(rows: list[Row], copy: float) -> str:
    reached = [row for row in rows if row.failed != NOT_REACHED]
    cases_done = sum(row.parts[-1] == "full" for row in reached)
    wrong, waiting = sum(bool(row.failed) for row in reached), len(rows) - len(reached)
    text = f"{cases_done} cases" + (f", {wrong} of them wrong or failed" if wrong else "")
    text += f", {waiting} not reached" if waiting else ""
    verdicts = Counter(goal.verdict for goal in goals_of(reached, copy))
    goals = "no number is a claim" if DRY else f"goals: {verdicts['met']} met, {verdicts['missed']} missed"
    return f"{text}; {goals}"


def main() -> int:
    if "--warm" in sys.argv:
        warm()
        return PASSED
    return benchmark(Part(Path(os.environ["KDKERNELS_PART"])))


if __name__ == "__main__":
    sys.exit(main())
