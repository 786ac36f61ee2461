"""Timing calls in turns, so that fluctuations of the machine affect all of them equally."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Timed:
    """A call to time, with its untimed preparation.

    Attributes:
        call: Call to time.
        prepare: Called first; clears gradients, or runs the forward before a timed backward.

    """

    call: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None


class Clock(Protocol):
    """Interface of a clock that times calls."""

    def measure(self, timed: Timed, ahead: float) -> tuple[float, float]:
        """Return the seconds that a call took, and the seconds that the host took to issue it.

        Args:
            timed: Call to time.
            ahead: Seconds for which the device is kept busy beforehand, to let the host get ahead.

        """


class HostClock:
    """The host's clock, for calls that the host computes.

    Every timed call follows an untimed one, which warms the code, the allocator and the branch predictors. Whether data
    comes from a cache depends on the call; see :func:`rotation`.
    """

    def make_ready(self, timed: Timed) -> None:
        """Warm up and prepare the call."""
        timed.prepare()
        timed.call()
        timed.prepare()

    def measure(self, timed: Timed, ahead: float = 0.0) -> tuple[float, float]:
        """Return the time of a call twice, because the host computes what it issues."""
        self.make_ready(timed)
        start = perf_counter()
        timed.call()
        taken = perf_counter() - start
        return taken, taken


def rotation(input_bytes: int) -> int:
    """Return how many copies of its inputs a call must cycle through for them to come from memory instead of a cache.

    The copies fill twice the last-level cache, at most 256 MB because servers share larger caches among many cores.
    Overwriting the cache instead would also evict the interpreter, which no training loop does.
    """
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    known = [int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units]
    return 1 + -(-min(2 * max(known, default=64 << 20), 256 << 20) // input_bytes)


class DeviceClock:
    """GPU events around a call that starts with a cold cache, with the host ahead of the device.

    Before each call, a buffer larger than the L2 cache is written and the device is kept busy for as long as the host
    needs to issue the call. The time therefore covers the device's work alone: no launch overhead and no cached data.
    """

    def __init__(self, device: int | None = None) -> None:
        cache: int = torch.cuda.get_device_properties(device).L2_cache_size
        self._larger_than_cache = torch.empty(max(2 * cache, 128 << 20), dtype=torch.uint8, device="cuda")
        self._cycles_per_second = 1.0
        cycles = 5_000_000
        for _ in range(2):  # the first iteration loads the kernel
            taken = self._between_events(lambda: torch.cuda._sleep(cycles))
        self._cycles_per_second = cycles / taken

    def measure(self, timed: Timed, ahead: float) -> tuple[float, float]:
        """Return the time between the events, and the time that the host took to issue the call."""
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


LONGEST_LEAD = 0.02  # seconds


def interleaved_rounds(
    timed: Mapping[str, Timed],
    clock: Clock,
    *,
    rounds: int = 20,
    warm_up: int = 3,
    seconds: float = 5.0,
) -> dict[str, list[float]]:
    """Time calls in turns, one of each per round, and return the seconds of each in every round.

    Args:
        timed: Calls to time, by name.
        clock: Clock that times them.
        rounds: Largest number of rounds.
        warm_up: Untimed rounds at the start, which also measure the lead that the host needs.
        seconds: Time after which no further round starts; at least three rounds are timed.

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
    return times


def interleaved_medians(timed: Mapping[str, Timed], clock: Clock, **options: Any) -> dict[str, float]:
    """Return the median seconds of each call in :func:`interleaved_rounds`."""
    return {name: median(taken) for name, taken in interleaved_rounds(timed, clock, **options).items()}


@dataclass(frozen=True)
class Ratio:
    """Ratio of one call's time to another's over the rounds.

    Attributes:
        median: Median over the rounds.
        low: 10th percentile over the rounds.
        high: 90th percentile over the rounds.

    """

    median: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``"faster"``, ``"slower"``, or ``"tie"`` if the spread includes 1."""
        if self.low <= 1 <= self.high:
            return "tie"
        return "faster" if self.low > 1 else "slower"


def pairwise_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return the ratio of their time to ours, from the times of the same rounds.

    Raises:
        ValueError: If the numbers of rounds differ or are zero.

    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"both calls need the same number of rounds, at least one; got {len(ours)} and {len(theirs)}")
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0])
    tenths = quantiles(ratios, n=10, method="inclusive")
    return Ratio(median(ratios), tenths[0], tenths[-1])
