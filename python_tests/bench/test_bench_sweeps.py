"""The sweeps of the benchmark, and the processes of the sweep over ranks."""

from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import pairwise

import pytest
import torch

from bench.ops import sweeps

ALL = (*sweeps.SWEEPS, sweeps.RANKS)


@pytest.fixture(autouse=True)
def _threads_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_names_differ():
    assert len({sweep.name for sweep in ALL}) == len(ALL)


@pytest.mark.parametrize("sweep", ALL, ids=lambda sweep: sweep.name)
def test_values(sweep):
    assert sweep.values[0] > 0
    for values in (sweep.values, sweep.quick):
        assert all(a < b for a, b in pairwise(values))
    assert set(sweep.quick) <= set(sweep.values)
    assert len(sweep.quick) in (0, 4, 5)
    assert sweep.values_of(full=True) == sweep.values
    assert sweep.values_of(full=False) == sweep.quick
    assert sweep.info["sweep"] == sweep.name == f"{sweep.function}, {sweep.parameter}"


def test_quick_set_is_short():
    assert len([sweep for sweep in ALL if sweep.quick]) == 4
    assert not sweeps.RANKS.quick


@pytest.mark.parametrize("sweep", ALL, ids=lambda sweep: sweep.name)
def test_contenders_agree(sweep):
    value = sweep.values[0]
    contenders = sweep.contenders(value)
    assert list(contenders) == ["kdkernels", "eager"]
    assert sweeps.disagreement(contenders) <= sweeps.TOLERANCE
    for passes in contenders.values():
        one = sweep.timed(passes, value)
        one.prepare()
        one.call()
        assert passes.tensors[0].grad is not None
    assert not sweep.sets_threads or torch.get_num_threads() == value


def test_every_layer_counts():
    contenders = sweeps.watched_stack(3)
    assert sweeps.disagreement(contenders) <= sweeps.TOLERANCE
    one, three = (sweeps.watched_stack(n)["kdkernels"].results()[0] for n in (1, 3))
    assert three > 2 * one


def test_a_difference_is_noticed():
    contenders = sweeps.logits(2)
    wrong = contenders["eager"].function
    contenders["eager"].function = lambda *tensors: 1.01 * wrong(*tensors)
    assert sweeps.disagreement(contenders) == pytest.approx(0.01, rel=0.01)


def test_doubling():
    assert sweeps.doubling(1, 1) == (1,)
    assert sweeps.doubling(1, 2) == (1, 2)
    assert sweeps.doubling(1, 6) == (1, 2, 4, 6)
    assert sweeps.doubling(125, 1000) == (125, 250, 500, 1000)


def test_rounds_by_value():
    rounds = {"kdkernels 128": [2.0, 4.0], "eager 128": [6.0], "kdkernels 64": [1.0], "eager 64": [3.0]}
    assert sweeps.rounds_by_value(rounds, calls=2) == {
        "kdkernels": {"64": [0.5], "128": [1.0, 2.0]},
        "eager": {"64": [1.5], "128": [3.0]},
    }
    assert sweeps.rounds_by_value({}) == {}


def test_ranks():
    with sweeps.Ranks(2, make=partial(sweeps.logits, 8), calls=2) as ranks:
        for name in ("kdkernels", "eager"):
            for count in (1, 2, 1):
                seconds = ranks.seconds(name, count)
                assert len(seconds) == count
                assert min(seconds) > 0
        next(iter(ranks._processes.values())).kill()
        with pytest.raises(BrokenProcessPool):
            ranks.seconds("eager", 2)
