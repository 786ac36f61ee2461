"""How time grows with a parameter: slopes on a log-log scale, and what each doubling costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bench.report.data import OURS, benchmark_name, compare, in_order, is_number, is_sweep, usable
from kdkernels.testing.timing import Ratio

TOO_MUCH = 2.2


@dataclass(frozen=True)
class Step:
    """From one value of the parameter to the next; factor is what doubling it costs at that rate."""

    low: float
    high: float
    factor: float

    @property
    def flagged(self) -> bool:
        return self.factor > TOO_MUCH


@dataclass(frozen=True)
class Sweep:
    """Times along a parameter.

    Attributes:
        seconds: medians by contender and value.
        ratios: by rival and value.
        not_timed: why a contender is missing.
        failed: why there are no times at all, or nothing.

    """

    name: str
    info: Mapping[str, Any]
    values: Sequence[float]
    seconds: Mapping[str, Mapping[float, float]]
    ratios: Mapping[str, Mapping[float, Ratio]]
    not_timed: Mapping[str, str]
    failed: str = ""

    @property
    def parameter(self) -> str:
        return str(self.info.get("parameter") or "value")

    @property
    def axis(self) -> str:
        unit = self.info.get("unit")
        return f"{self.parameter} ({unit})" if unit else self.parameter

    @property
    def contenders(self) -> list[str]:
        return in_order(self.seconds)

    @property
    def expected_slope(self) -> float | None:
        slope = self.info.get("expected_slope")
        return float(slope) if is_number(slope) else None

    def steps(self, contender: str) -> list[Step]:
        return doublings(self.seconds[contender])

    def slope(self, contender: str) -> float | None:
        return fitted_slope(self.seconds[contender])


def upper_half(values: Sequence[float]) -> list[float]:
    """Return the values that a slope is fitted to, at least two: small inputs show overhead, not growth."""
    positive = sorted(value for value in values if value > 0)
    return positive[-max(2, math.ceil(len(positive) / 2)) :]


def fitted_slope(seconds: Mapping[float, float]) -> float | None:
    """Return the exponent of the power law that fits the upper half best, by least squares of logarithms."""
    values = upper_half(list(seconds))
    if len(values) < 2:
        return None
    x = [math.log(value) for value in values]
    y = [math.log(seconds[value]) for value in values]
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    covariance = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.fsum((a - mean_x) ** 2 for a in x)


def doublings(seconds: Mapping[float, float]) -> list[Step]:
    """Return the cost of each step, as that of a doubling: a step by another factor is brought to one."""
    values = sorted(value for value in seconds if value > 0)
    steps = []
    for low, high in pairwise(values):
        factor = (seconds[high] / seconds[low]) ** (1 / math.log2(high / low))
        steps.append(Step(low, high, factor))
    return steps


def sweeps_of(report: Mapping[str, Any]) -> list[Sweep]:
    return [_sweep(benchmark) for benchmark in report["benchmarks"] if is_sweep(benchmark["extra_info"])]


def _sweep(benchmark: Mapping[str, Any]) -> Sweep:
    info = benchmark["extra_info"]
    name = str(info.get("sweep") or benchmark_name(benchmark))
    not_timed = dict(info.get("not_timed") or {})
    failed = str(info.get("failed") or not_timed.pop(OURS, ""))
    rounds = {contender: _by_value(times) for contender, times in (info.get("rounds") or {}).items()}
    if not failed and not rounds.get(OURS):
        failed = "no times of kdkernels were recorded"
    if failed:
        return Sweep(name, info, [], {}, {}, {}, failed)
    # The rounds say which values were reached; the list of values may be of the whole plan.
    values = sorted(rounds[OURS])
    seconds: dict[str, dict[float, float]] = {}
    ratios: dict[str, dict[float, Ratio]] = {}
    for value in values:
        here = {contender: times[value] for contender, times in rounds.items() if value in times}
        medians, compared, reasons = compare(here)
        for contender, taken in medians.items():
            seconds.setdefault(contender, {})[value] = taken
        for rival, ratio in compared.items():
            ratios.setdefault(rival, {})[value] = ratio
        for rival, reason in reasons.items():
            not_timed.setdefault(rival, reason)
    return Sweep(name, info, values, seconds, ratios, not_timed)


def _by_value(times: Any) -> dict[float, list[float]]:
    """Keys of JSON are strings; what is no number, or has no times, is left out."""
    found = {}
    for key, taken in times.items() if isinstance(times, Mapping) else ():
        try:
            value = float(key)
        except ValueError:
            continue
        if usable(taken) and math.isfinite(value):
            found[value] = taken
    return found
