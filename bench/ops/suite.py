"""The rows of the CPU benchmark that the ops register and that fit in the memory of this machine."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from kdkernels.ops._cases import Workload, benchmarks
from kdkernels.testing.comparison import MODES

LARGEST_SHARE_OF_MEMORY = 0.5
COPIES = 20  # largest number of copies in fp32 of a large tensor at once, in eager PyTorch and the check


@dataclass(frozen=True)
class Row:
    """A workload, the modes in which it is timed, and its goals by name."""

    workload: Workload
    modes: tuple[str, ...]
    goals: dict[str, float] = field(default_factory=dict)


def rows(full: bool) -> Iterator[Row]:
    """Yield the quick set, which takes minutes, or all rows, except those that do not fit in memory."""
    for row in benchmarks():
        one = row.workload
        if COPIES * 4 * one.tensor_bytes / row.dtype.itemsize > LARGEST_SHARE_OF_MEMORY * memory_bytes():
            continue
        if row.quick or full:
            yield Row(one, MODES if full else ("full",), dict(row.goals or {}))


def memory_bytes() -> int:
    """Return the memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
