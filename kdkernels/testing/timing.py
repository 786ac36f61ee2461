"""Timing calls against each other, so that a machine's moods hit all of them alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, Protocol

import torch


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
    """The host's clock, for calls that the host computes.

    Each call follows another of the same that does not count: it met the code, the allocator and the branch predictors
    as something else left them. Whether data comes from a cache is up to what is timed: see :func:`rotation`.
    """

    def make_ready(self, timed: Timed) -> None:
        """Bring everything into the state in which the call is to be timed."""
        timed.prepare()
        timed.call()
        timed.prepare()

    def measure(self, timed: Timed, ahead: float = 0.0) -> tuple[float, float]:
        """Return the time of a call twice: the host computes what it issues."""
        self.make_ready(timed)
        start = perf_counter()
        timed.call()
        taken = perf_counter() - start
        return taken, taken


def rotation(input_bytes: int) -> int:
    """Return how many copies of its inputs a call has to take in turn for them to come from memory, not from a cache.

    That is twice the last cache, but 256 MB at most: servers share larger ones among many cores. To overwrite a cache
    instead would also drive the interpreter out of it, which no training loop does.
    """
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    known = [int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units]
    return 1 + -(-min(2 * max(known, default=64 << 20), 256 << 20) // input_bytes)


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


def interleaved_rounds(
    timed: Mapping[str, Timed],
    clock: Clock,
    *,
    rounds: int = 20,
    warm_up: int = 3,
    seconds: float = 5.0,
) -> dict[str, list[float]]:
    """Time calls by turns, one call a turn, and return what each took in every round, in seconds.

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
    return times


def interleaved_medians(timed: Mapping[str, Timed], clock: Clock, **options: Any) -> dict[str, float]:
    """Return the median of each call in :func:`interleaved_rounds`, in seconds."""
    return {name: median(taken) for name, taken in interleaved_rounds(timed, clock, **options).items()}


@dataclass(frozen=True)
class Ratio:
    """How many times as long one call took as another, round by round.

    Attributes:
        median: of the rounds.
        low: the 10th percentile of the rounds.
        high: the 90th percentile of the rounds.

    """

    median: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``"faster"``, ``"slower"``, or ``"tie"`` where the spread reaches to both sides of 1."""
        if self.low <= 1 <= self.high:
            return "tie"
        return "faster" if self.low > 1 else "slower"


def pairwise_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return how many times as long theirs took as ours, from the times of the same rounds.

    Raises:
        ValueError: the two have not the same number of rounds, or none.

    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"as many rounds of both are needed, and one at least; got {len(ours)} and {len(theirs)}")
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0])
    tenths = quantiles(ratios, n=10, method="inclusive")
    return Ratio(median(ratios), tenths[0], tenths[-1])
