"""Timing functions against each other, so that a machine's moods hit all of them alike."""

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter
from typing import Any

import torch


def interleaved_medians(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    calls: int = 4,
    warm_up: int = 2,
    seconds: float = 30.0,
) -> dict[str, float]:
    """Time functions by turns and return the median of each, in seconds.

    In each round every function is called several times in a row, as in a training loop. The first call of a turn
    does not count: it meets the caches and the allocator as another function left them.

    Args:
        functions: by name.
        rounds: at most so many.
        calls: of a function in a round that count.
        warm_up: rounds before the first that counts.
        seconds: no further round is begun after so long, but three are timed at least.

    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    start = perf_counter()
    for number in range(warm_up + rounds):
        if number >= warm_up + 3 and perf_counter() - start > seconds:
            break
        for name, function in functions.items():
            taken = [_seconds(function) for _ in range(1 + calls)]
            if number >= warm_up:
                times[name] += taken[1:]
    return {name: median(values) for name, values in times.items()}


def _seconds(function: Callable[[], Any]) -> float:
    _wait()
    start = perf_counter()
    function()
    _wait()
    return perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
