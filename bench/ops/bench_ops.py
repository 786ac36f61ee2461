"""Benchmarks of the ops: the rows are in suite.py."""

import pytest

from bench import rivals
from bench.ops.rows import info_of
from kdkernels.testing.comparison import COMPILE, SMALL, Contest, enter

CONTESTS: dict[str, Contest] = {}  # only that of the current row, shared by its modes


@pytest.fixture
def contest(row, request):
    if row.workload.name not in CONTESTS:
        CONTESTS.clear()  # frees its memory first
        functions, missing = rivals.rivals_of(row.workload, "cpu")
        compiled = {} if request.config.getoption("--no-compile") else COMPILE
        contest = enter(row.workload, "cpu", {"kdkernels": "auto"}, functions, compiled)
        contest.not_timed |= missing | dict.fromkeys(COMPILE.keys() - compiled.keys(), "left out")
        CONTESTS[row.workload.name] = contest
    return CONTESTS[row.workload.name]


def test_op(row, mode, contest, race):
    assert contest.passes, f"{row.workload.name}: {contest.not_timed['kdkernels']}"
    timed = {name: one.timed()[mode] for name, one in contest.passes.items()}
    info = info_of(row.workload, contest, mode, "cpu", row.goals)
    race(timed, cold=row.workload.tensor_bytes >= SMALL, seconds=3.0, **info)
    for one in contest.passes.values():
        one.clear()
