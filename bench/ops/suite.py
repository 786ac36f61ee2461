"""The rows of the CPU benchmark, as the ops register them, and what this machine's memory allows of them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from kdkernels.ops._cases import Workload, benchmarks
from kdkernels.testing.comparison import MODES

LARGEST_SHARE_OF_MEMORY = 0.5
COPIES = 20  # of a large tensor in fp32: the most that eager PyTorch holds at once, the true results included


@dataclass(frozen=True)
class Row:
    """A workload, the modes in which it is timed, and its goals by name."""

    workload: Workload
    modes: tuple[str, ...]
    goals: dict[str, float] = field(default_factory=dict)


def rows(full: bool) -> Iterator[Row]:
    """Yield the chosen set, which takes minutes, or every row that fits into memory."""
    for row in benchmarks():
        one = row.workload
        if COPIES * 4 * one.tensor_bytes / row.dtype.itemsize > LARGEST_SHARE_OF_MEMORY * memory_bytes():
            continue
        if row.quick or full:
            yield Row(one, MODES if full else ("full",), dict(row.goals or {}))


def memory_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
