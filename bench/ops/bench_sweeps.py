"""Growth of cost with the batch, the classes, the resolution, the layers, the channels, the threads and the ranks."""

import pytest
import torch

from bench.ops.sweeps import CALLS_OF_A_RANK, RANKS, SWEEPS, TOLERANCE, Ranks, disagreement, rounds_by_value


@pytest.fixture
def _threads_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def budget(full):
    """The rounds and seconds of a sweep."""
    return {"rounds": 15, "seconds": 20.0 if full else 5.0}


def values_of(sweep, full):
    return sweep.values_of(full) or pytest.skip("in the full set only")


def check(sweep, value, contenders):
    gap = disagreement(contenders)
    assert gap <= TOLERANCE, f"results differ by {gap:.1e} at {value} {sweep.unit}"


@pytest.mark.usefixtures("_threads_restored")
@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.name)
def test_sweep(race, benchmark, full, budget, sweep):
    values = values_of(sweep, full)
    timed = {}
    for value in reversed(values):
        contenders = sweep.contenders(value)
        check(sweep, value, contenders)
        timed |= {f"{name} {value}": sweep.timed(passes, value) for name, passes in contenders.items()}
    rounds = race(timed, **budget, **sweep.info)
    benchmark.extra_info["rounds"] = rounds_by_value(rounds)


def test_ranks(race, benchmark, full, budget):
    values = values_of(RANKS, full)
    check(RANKS, 1, RANKS.contenders(1))
    with Ranks(max(values)) as ranks:
        timed = {f"{n} {value}": ranks.timed(n, value) for value in reversed(values) for n in ("kdkernels", "eager")}
        rounds = race(timed, **budget, **RANKS.info)
    benchmark.extra_info["rounds"] = rounds_by_value(rounds, CALLS_OF_A_RANK)
