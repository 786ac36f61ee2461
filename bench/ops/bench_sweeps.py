"""How cost grows with the batch, the classes, the resolution, the layers, the channels, the threads and the ranks."""

import pytest
import torch

from bench.ops.sweeps import CALLS_OF_A_RANK, RANKS, SWEEPS, TOLERANCE, Ranks, disagreement, rounds_by_value


@pytest.fixture
def _threads_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def budget(bench_set):
    """Rounds and seconds of a sweep."""
    return {"rounds": 15, "seconds": 20.0 if bench_set == "full" else 5.0}


@pytest.mark.usefixtures("_threads_restored")
@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.name)
def test_sweep(race, benchmark, bench_set, budget, sweep):
    values = sweep.values_of(bench_set)
    if not values:
        pytest.skip("in the full set only")
    timed = {}
    for value in reversed(values):
        contenders = sweep.contenders(value)
        gap = disagreement(contenders)
        assert gap <= TOLERANCE, f"results differ by {gap:.1e} at {value} {sweep.unit}"
        timed |= {f"{name} {value}": sweep.timed(passes, value) for name, passes in contenders.items()}
    rounds = race(timed, cold=sweep.cold, **budget, **sweep.info(values))
    benchmark.extra_info["rounds"] = rounds_by_value(rounds)


def test_ranks(race, benchmark, bench_set, budget):
    values = RANKS.values_of(bench_set)
    if not values:
        pytest.skip("in the full set only")
    gap = disagreement(RANKS.contenders(1))
    assert gap <= TOLERANCE, f"results differ by {gap:.1e}"
    with Ranks(max(values)) as ranks:
        timed = {f"{n} {value}": ranks.timed(n, value) for value in reversed(values) for n in ("kdkernels", "eager")}
        rounds = race(timed, cold=RANKS.cold, **budget, **RANKS.info(values))
    benchmark.extra_info["rounds"] = rounds_by_value(rounds, CALLS_OF_A_RANK)
