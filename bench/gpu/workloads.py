"""The rows of the GPU benchmark: each workload with its rivals and its goals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from bench.rivals import rivals_of
from kdkernels.ops._cases import Benchmark, Workload, gpu_benchmarks
from kdkernels.testing.comparison import COMPILE, SMALL

Function = Callable[..., Any]
FASTER = {"faster than eager": 4.0, "faster than compile": 1.2}
FASTER_THAN_LIGER = {"faster than liger": 3.0}
LARGE = 256_000_000  # smallest tensor, in bytes, for which the share of the copy bandwidth is a goal
SHARE = {"share of copy bandwidth": 0.8}
LAUNCHES = {"graph microseconds": 15.0, "launches forward": 2, "launches backward": 2}
TINY = (8, 37, 9, 9)  # largest sizes of a dry run


@dataclass(frozen=True)
class GpuCase:
    """A row of the benchmark.

    Attributes:
        workload: Tensors and functions.
        goals: Goals by name.
        rivals: Functions of other packages.
        missing: Reasons of missing rivals, by name.

    """

    workload: Workload
    goals: dict[str, float]
    rivals: dict[str, Function] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.workload.name

    @property
    def compiled(self) -> dict[str, str | None]:
        """The modes of torch.compile: tuning takes long, and only large tensors have tiles to tune."""
        return COMPILE if self.workload.tensor_bytes >= LARGE else {"compile": None}

    @property
    def needs_graph(self) -> bool:
        """Whether launches cost more than memory traffic, so that the row is also timed under a CUDA graph."""
        return "graph microseconds" in self.goals


def case(row: Benchmark) -> GpuCase:
    """Return a row with the installed rivals; its goals depend on its size unless they are given."""
    one = row.workload
    rivals, missing = rivals_of(one, "cuda")
    if row.goals is not None:
        return GpuCase(one, dict(row.goals), rivals, missing)
    goals = {**FASTER, **(SHARE if one.tensor_bytes >= LARGE else {}), **(LAUNCHES if one.tensor_bytes < SMALL else {})}
    if {"liger"} & (rivals.keys() | missing.keys()):
        goals |= FASTER_THAN_LIGER
    return GpuCase(one, goals, rivals, missing)


def cases(dry: bool) -> Iterator[GpuCase]:
    """Yield the rows of the ops, the first row of every op before the second; tiny in a dry run."""
    for row in gpu_benchmarks():
        cut = dry and row.workload.tensor_bytes >= SMALL
        yield case(replace(row, shape=tuple(map(min, row.shape, TINY))) if cut else row)
