"""What the benchmark suite recorded, as rows with ratios and verdicts. Whatever a run did not get to may be missing."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from kdkernels.testing.timing import Ratio, pairwise_ratio

OURS = "kdkernels"
COMPILE_MODES = ("compile", "compile max-autotune")
ORDER = ("eager", *COMPILE_MODES)
EXTRA = (
    "kind", "op", "function", "shape", "dtype", "variant", "mode", "rounds", "not_timed", "errors", "bytes", "passes",
    "flops", "peak_bytes", "compile_seconds", "launches", "goals", "cold", "failed", "floor",
    "sweep", "parameter", "values", "unit", "expected_slope",
)  # fmt: skip
ROUNDED = ("rounds", "errors", "compile_seconds")


@dataclass(frozen=True)
class Row:
    """A function on one input: our seconds, and how the rivals compare.

    Attributes:
        info: what the benchmark recorded beside the times.
        seconds: the median of every contender.
        ratios: of each rival, its time over ours.
        not_timed: why a rival has no ratio.
        failed: why there are no times at all, or nothing.

    """

    name: str
    info: Mapping[str, Any]
    seconds: Mapping[str, float]
    ratios: Mapping[str, Ratio]
    not_timed: Mapping[str, str]
    failed: str = ""

    @property
    def kind(self) -> str:
        return str(self.info.get("kind") or "op")

    @property
    def op(self) -> str:
        return str(self.info.get("op") or self.info.get("function") or self.name)

    @property
    def parts(self) -> tuple[str, str, str, str, str]:
        """Function, shape, dtype, variant and mode: what tells rows apart."""
        names = ("function", "shape", "dtype", "variant", "mode")
        function, shape, dtype, variant, mode = (self.info.get(name) for name in names)
        return str(function or self.name), shape_text(shape), str(dtype or ""), str(variant or ""), str(mode or "")

    @property
    def label(self) -> str:
        return " ".join(part for part in self.parts if part)

    @property
    def rivals(self) -> dict[str, Ratio]:
        """The ratios but those to our own code compiled and to a floor, which nobody can beat."""
        own = (name for name in self.ratios if name.startswith(OURS))
        left_out = {*own, self.info.get("floor")}
        return {name: ratio for name, ratio in self.ratios.items() if name not in left_out}

    @property
    def better_compile(self) -> str | None:
        """The mode of torch.compile that is harder to beat."""
        modes = [mode for mode in COMPILE_MODES if mode in self.ratios]
        return min(modes, key=lambda mode: self.ratios[mode].median) if modes else None


def shape_text(shape: Any) -> str:
    if isinstance(shape, list | tuple):
        nested = any(isinstance(size, list | tuple) for size in shape)
        return (", " if nested else "×").join(shape_text(size) for size in shape)
    return "" if shape is None else str(shape)


def load(path: Path) -> dict[str, Any]:
    """Read the output of pytest-benchmark, or an earlier report, which has the same form."""
    return slim(json.loads(path.read_text(encoding="utf-8")))


def slim(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what the report needs. What is kept of a slim report is all of it."""
    benchmarks = []
    for benchmark in recorded.get("benchmarks") or []:
        extra = benchmark.get("extra_info") or {}
        kept = {key: _rounded(extra[key]) if key in ROUNDED else extra[key] for key in EXTRA if key in extra}
        if kept.get("failed"):
            kept.pop("rounds", None)
        name = {key: benchmark[key] for key in ("name", "group") if benchmark.get(key)}
        benchmarks.append({**name, "extra_info": kept})
    # pytest-benchmark leaves out a benchmark that failed before anything was timed.
    for failure in recorded.get("failures") or []:
        reason = failure.get("reason") or "failed"
        benchmarks.append({"name": benchmark_name(failure), "extra_info": {"failed": reason}})
    environment = dict(recorded.get("environment") or {})
    if recorded.get("datetime"):
        environment.setdefault("date", recorded["datetime"])
    return {"environment": environment, "roofline": dict(recorded.get("roofline") or {}), "benchmarks": benchmarks}


def dump(report: Mapping[str, Any]) -> str:
    """Return a slim report as JSON with one benchmark a line, so that versions of it can be compared."""
    lines = ",\n".join(json.dumps(benchmark, ensure_ascii=False) for benchmark in report["benchmarks"])
    head = (f'"{key}": {json.dumps(report[key], ensure_ascii=False)},\n' for key in ("environment", "roofline"))
    return "{\n" + "".join(head) + '"benchmarks": [\n' + lines + "\n]\n}\n"


def _rounded(value: Any) -> Any:
    """Four significant digits, and null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def usable(times: Any) -> bool:
    return isinstance(times, list) and bool(times) and all(is_number(t) and t > 0 for t in times)


def compare(rounds: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Ratio], dict[str, str]]:
    """Return medians, ratios, and why a rival with rounds has none. Only rounds of one turn are comparable."""
    seconds, ratios, reasons = {OURS: median(rounds[OURS])}, {}, {}
    for name, times in rounds.items():
        if name == OURS:
            continue
        if not usable(times):
            reasons[name] = "no times were recorded"
        elif len(times) != len(rounds[OURS]):
            reasons[name] = f"rounds do not pair up: {len(times)}, and {len(rounds[OURS])} of {OURS}"
        else:
            seconds[name], ratios[name] = median(times), pairwise_ratio(rounds[OURS], times)
    return seconds, ratios, reasons


def benchmark_name(benchmark: Mapping[str, Any]) -> str:
    return str(benchmark.get("name") or benchmark.get("group") or "a benchmark without a name")


def is_sweep(info: Mapping[str, Any]) -> bool:
    return info.get("kind") == "sweep" or "sweep" in info


def rows_of(report: Mapping[str, Any]) -> list[Row]:
    """Return the rows of ops and routines, those that failed included."""
    rows = []
    for benchmark in report["benchmarks"]:
        info = benchmark["extra_info"]
        if is_sweep(info):
            continue
        rounds, not_timed = info.get("rounds") or {}, dict(info.get("not_timed") or {})
        failed = str(info.get("failed") or not_timed.pop(OURS, ""))
        if not failed and not usable(rounds.get(OURS)):
            failed = "no times of kdkernels were recorded"
        if failed:
            rows.append(Row(benchmark_name(benchmark), info, {}, {}, {}, failed))
        else:
            seconds, ratios, reasons = compare(rounds)
            rows.append(Row(benchmark_name(benchmark), info, seconds, ratios, {**reasons, **not_timed}))
    return rows


def timed(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row.kind == kind and not row.failed]


def groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return rows by op, in the order in which the ops were met."""
    by_op: dict[str, list[Row]] = {}
    for row in rows:
        by_op.setdefault(row.op, []).append(row)
    return by_op


def in_order(names: Iterable[str]) -> list[str]:
    """Return names once each: ours, eager PyTorch, torch.compile, and the others by the alphabet."""
    known = (OURS, *ORDER)
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


def rivals_of(rows: Iterable[Row]) -> list[str]:
    return in_order(name for row in rows for name in (*row.ratios, *row.not_timed))


@dataclass(frozen=True)
class Goal:
    """What a row was to reach, and what it did; measured is None where nothing can be said, and note says why."""

    row: Row
    name: str
    wanted: float
    measured: float | None
    note: str = ""

    @property
    def missed(self) -> bool:
        return self.measured is not None and self.measured < self.wanted


def goals_of(rows: Sequence[Row], roofline: Mapping[str, Any]) -> list[Goal]:
    return [_goal(row, *item, roofline) for row in rows for item in (row.info.get("goals") or {}).items()]


def _goal(row: Row, name: str, wanted: float, roofline: Mapping[str, Any]) -> Goal:
    if row.failed:
        return Goal(row, name, wanted, None, "the row failed")
    if name == "share of copy bandwidth":
        share = share_of_copy(row, roofline)
        return Goal(row, name, wanted, share, "" if share else "bytes or copy bandwidth are not recorded")
    if not name.startswith("faster than "):
        return Goal(row, name, wanted, None, "the report does not know this goal")
    rival = name.removeprefix("faster than ")
    if rival == "compile":
        rival = row.better_compile or rival
    if rival in row.ratios:
        return Goal(row, name, wanted, row.ratios[rival].median, rival)
    return Goal(row, name, wanted, None, row.not_timed.get(rival, "not timed"))


def bytes_per_second(row: Row) -> float | None:
    moved = row.info.get("bytes")
    return moved / row.seconds[OURS] if is_number(moved) and OURS in row.seconds else None


def share_of_copy(row: Row, roofline: Mapping[str, Any]) -> float | None:
    speed, copy = bytes_per_second(row), roofline.get("copy_bytes_per_second")
    return speed / copy if speed and is_number(copy) and copy > 0 else None
