"""The records of a benchmark, as rows with ratios and goals. Needs no PyTorch, so any machine can read a report.

CPU and GPU write the same JSON: ``environment``, ``roofline`` and ``benchmarks``, each of which has a ``name`` and an
``extra_info`` with the seconds of every contender in every round. A qualification of a GPU adds its ``steps``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median, quantiles
from typing import Any

OURS = "kdkernels"
COMPILE_MODES = ("compile", "compile max-autotune")
ORDER = (OURS, "eager", *COMPILE_MODES)
# Goals that are upper bounds, and their names in the measurements under a CUDA graph.
AT_MOST = {
    "graph microseconds": "microseconds",
    "launches forward": "launches_forward",
    "launches backward": "launches_backward",
}


@dataclass(frozen=True)
class Ratio:
    """The time of a rival divided by ours, round by round: median, 10th and 90th percentile."""

    median: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low <= 1 <= self.high:
            return "tie"
        return "faster" if self.low > 1 else "slower"


def pairwise_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return the ratio of times in the same rounds."""
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    tenths = quantiles(ratios, n=10, method="inclusive") if len(ratios) > 1 else ratios
    return Ratio(median(ratios), tenths[0], tenths[-1])


def compare(rounds: Mapping[str, Sequence[float]]) -> tuple[dict[str, float], dict[str, Ratio]]:
    """Return the median of each contender, and the ratio of each rival."""
    medians = {name: median(times) for name, times in rounds.items()}
    return medians, {name: pairwise_ratio(rounds[OURS], times) for name, times in rounds.items() if name != OURS}


@dataclass(frozen=True)
class Benchmark:
    """One recorded benchmark."""

    name: str
    info: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.info.get("kind", "op"))

    @property
    def not_timed(self) -> dict[str, str]:
        """Why each rival without a ratio has none."""
        return self.info.get("not_timed") or {}

    @property
    def failed(self) -> str:
        """Why there are no times at all, or an empty string."""
        reason = self.info.get("failed") or self.not_timed.get(OURS, "")
        return reason or ("" if self.info.get("rounds") else "not timed")


class Row(Benchmark):
    """A function on one input."""

    @cached_property
    def compared(self) -> tuple[dict[str, float], dict[str, Ratio]]:
        return ({}, {}) if self.failed else compare(self.info["rounds"])

    @property
    def seconds(self) -> dict[str, float]:
        return self.compared[0]

    @property
    def ratios(self) -> dict[str, Ratio]:
        return self.compared[1]

    @property
    def op(self) -> str:
        return str(self.info.get("op") or self.info.get("function") or self.name)

    @property
    def parts(self) -> tuple[str, str, str, str, str]:
        """The function, shape, dtype, variant and mode, which identify a row."""
        function, dtype, variant, mode = (self.info.get(key) or "" for key in ("function", "dtype", "variant", "mode"))
        return function or self.name, shape_text(self.info.get("shape") or ()), dtype, variant, mode

    @property
    def label(self) -> str:
        return " ".join(filter(None, self.parts))

    @property
    def rivals(self) -> dict[str, Ratio]:
        """The ratios except those of other builds of our code, and of floors, which do only a part of the work."""
        floors = self.info.get("floors") or [self.info.get("floor")]
        return {name: ratio for name, ratio in self.ratios.items() if name not in floors and not name.startswith(OURS)}

    @property
    def better_compile(self) -> str | None:
        """The faster mode of torch.compile."""
        modes = [mode for mode in COMPILE_MODES if mode in self.ratios]
        return min(modes, key=lambda mode: self.ratios[mode].median) if modes else None

    @property
    def bytes_per_second(self) -> float | None:
        moved = self.info.get("bytes")
        return moved / self.seconds[OURS] if moved and not self.failed else None

    def share_of(self, copy: float | None) -> float | None:
        """Return the share of the copy bandwidth."""
        return self.bytes_per_second / copy if self.bytes_per_second and copy else None


def shape_text(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


def rows_of(report: Mapping[str, Any]) -> list[Row]:
    """Return the rows of ops and routines, including those that failed."""
    return [Row(one["name"], one["extra_info"]) for one in report["benchmarks"] if not is_sweep(one)]


def is_sweep(benchmark: Mapping[str, Any]) -> bool:
    return benchmark["extra_info"].get("kind") == "sweep"


def timed(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row.kind == kind and not row.failed]


def by_op(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.op, []).append(row)
    return groups


def in_order(names: Iterable[str]) -> list[str]:
    """Return each name once: ours, eager PyTorch, torch.compile, then the others alphabetically."""
    return sorted(set(names), key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def rivals_of(rows: Iterable[Row]) -> list[str]:
    return in_order(name for row in rows if not row.failed for name in (*row.ratios, *row.not_timed))


@dataclass(frozen=True)
class Goal:
    """A goal of a row. If nothing was measured, the note says why; otherwise it may name the rival."""

    row: Row
    name: str
    wanted: float
    measured: float | None
    note: str

    @property
    def short_by(self) -> float:
        """The share of the goal by which it was missed; not positive if it was met."""
        gap = 1 - (self.measured or 0.0) / self.wanted
        return -gap if self.name in AT_MOST else gap

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not judged"
        return "missed" if self.short_by > 0 else "met"


def goals_of(rows: Iterable[Row], copy: float | None) -> list[Goal]:
    return [_goal(row, name, wanted, copy) for row in rows for name, wanted in (row.info.get("goals") or {}).items()]


def _goal(row: Row, name: str, wanted: float, copy: float | None) -> Goal:
    measured: float | None
    if row.failed:
        measured, note = None, row.failed
    elif name in AT_MOST:
        graph = (row.info.get("graph") or {}).get(OURS, {})
        measured, note = graph.get(AT_MOST[name]), graph.get("why_not", "")
    elif name == "share of copy bandwidth":
        measured, note = row.share_of(copy), ""
    else:
        rival = name.removeprefix("faster than ")
        if rival == "compile":
            rival = row.better_compile or rival
        ratio = row.ratios.get(rival)
        measured, note = (ratio.median, rival) if ratio else (None, row.not_timed.get(rival, ""))
    return Goal(row, name, wanted, measured, note or ("not measured" if measured is None else ""))
