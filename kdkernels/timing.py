"""Timing functions against each other, so that a machine's moods hit all of them alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, Protocol

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


@dataclass(frozen=True)
class Timed:
    """A call, and what has to happen before it without being timed.

    Attributes:
        call: what is timed.
        prepare: called first; gradients are cleared here, and the forward of a backward is run.

    """

    call: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None


class Clock(Protocol):
    """Something that can time a call."""

    def measure(self, timed: Timed, ahead: float) -> tuple[float, float]:
        """Return the seconds that a call took, and those in which the host issued it.

        Args:
            timed: what is timed.
            ahead: for so many seconds the device is kept busy before it, for the host to get ahead.

        """


class HostClock:
    """The host's clock, for calls that the host computes."""

    def measure(self, timed: Timed, ahead: float) -> tuple[float, float]:
        """Return the time of a call twice: the host computes what it issues."""
        timed.prepare()
        start = perf_counter()
        timed.call()
        taken = perf_counter() - start
        return taken, taken


class DeviceClock:
    """Events of a GPU around a call that starts from a cold cache, with the host ahead of the device.

    Before each call a buffer larger than the L2 cache is written, and the device is kept busy for as long as the host
    needs to issue the call. What is timed is the device's work, neither the launches nor what an earlier call left in
    the cache.
    """

    def __init__(self, device: int | None = None) -> None:
        cache: int = torch.cuda.get_device_properties(device).L2_cache_size
        self._larger_than_cache = torch.empty(max(2 * cache, 128 << 20), dtype=torch.uint8, device="cuda")
        self._cycles_per_second = 1.0
        cycles = 5_000_000
        for _ in range(2):  # the first one loads the kernel
            taken = self._between_events(lambda: torch.cuda._sleep(cycles))
        self._cycles_per_second = cycles / taken

    def measure(self, timed: Timed, ahead: float) -> tuple[float, float]:
        """Return the time between the events, and the time in which the host issued the call."""
        timed.prepare()
        self._larger_than_cache.zero_()
        if ahead > 0:
            torch.cuda._sleep(int(ahead * self._cycles_per_second))
        issued = 0.0

        def call() -> None:
            nonlocal issued
            start = perf_counter()
            timed.call()
            issued = perf_counter() - start

        return self._between_events(call), issued

    def _between_events(self, call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return 1e-3 * milliseconds


LONGEST_LEAD = 0.02


def interleaved_clock_medians(
    timed: Mapping[str, Timed],
    clock: Clock,
    *,
    rounds: int = 20,
    warm_up: int = 3,
    seconds: float = 5.0,
) -> dict[str, float]:
    """Time calls by turns, one call a turn, and return the median of each, in seconds.

    Args:
        timed: by name.
        clock: that times them.
        rounds: at most so many.
        warm_up: rounds before the first that counts; they show how far ahead the host has to be.
        seconds: no further round is begun after so long, but three are timed at least.

    """
    times: dict[str, list[float]] = {name: [] for name in timed}
    lead = dict.fromkeys(timed, 0.0)
    start = perf_counter()
    for number in range(warm_up + rounds):
        if number >= warm_up + 3 and perf_counter() - start > seconds:
            break
        for name, one in timed.items():
            taken, issued = clock.measure(one, lead[name])
            if number < warm_up:
                lead[name] = min(1.5 * issued + 1e-4, LONGEST_LEAD)
            else:
                times[name].append(taken)
    return {name: median(values) for name, values in times.items()}
