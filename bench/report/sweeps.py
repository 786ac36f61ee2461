"""Growth of time with a parameter: slopes on a log-log scale, and the cost of each doubling."""

import math
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

from bench.report.data import Benchmark, Ratio, compare, in_order, is_sweep

TOO_MUCH = 2.2


class Sweep(Benchmark):
    """The times along a parameter; the rounds are stored by contender and value."""

    @cached_property
    def points(self) -> dict[float, tuple[dict[str, float], dict[str, Ratio]]]:
        """The medians and ratios by value."""
        rounds = {} if self.failed else self.info["rounds"]
        values = sorted({value for times in rounds.values() for value in times}, key=float)
        return {float(value): compare({name: times[value] for name, times in rounds.items()}) for value in values}

    @property
    def axis(self) -> str:
        names = dict.fromkeys((self.info["parameter"], self.info["unit"]))
        return " in ".join(names)

    @property
    def contenders(self) -> list[str]:
        return in_order(name for medians, _ in self.points.values() for name in medians)

    def seconds(self, contender: str) -> dict[float, float]:
        return {value: medians[contender] for value, (medians, _) in self.points.items()}


def fitted_slope(seconds: Mapping[float, float]) -> float | None:
    """Return the exponent of the power law that best fits the upper half of the values, in logarithms.

    Small inputs show overhead, not growth.
    """
    values = sorted(seconds)[-max(2, math.ceil(len(seconds) / 2)) :]
    if len(values) < 2:
        return None
    x, y = [math.log(value) for value in values], [math.log(seconds[value]) for value in values]
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    covariance = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.fsum((a - mean_x) ** 2 for a in x)


def doublings(seconds: Mapping[float, float]) -> dict[float, float]:
    """Return, by value, the cost of the step to it, converted to the cost of a doubling."""
    pairs = pairwise(sorted(seconds))
    return {high: (seconds[high] / seconds[low]) ** (1 / math.log2(high / low)) for low, high in pairs}


def sweeps_of(report: Mapping[str, Any]) -> list[Sweep]:
    return [Sweep(one["extra_info"]["sweep"], one["extra_info"]) for one in report["benchmarks"] if is_sweep(one)]
