"""Timing and comparison: rounds, ratios, and the exclusion of wrong contenders."""

from dataclasses import replace

import pytest
import torch

from kdkernels import cli
from kdkernels.ops._cases import SHORT_NAMES, benchmarks, workload, workload_functions
from kdkernels.testing.comparison import MODES, SMALL, Passes, enter, peak_bytes, relative_error, rotating, true_results
from kdkernels.testing.timing import (
    HostClock,
    Ratio,
    Timed,
    interleaved_medians,
    interleaved_rounds,
    pairwise_ratio,
    rotation,
)

SHAPES = {
    "kl_div_with_logits": (6, 11), "js_div_with_logits": (6, 11), "distillation_loss": (6, 11),
    "batch_norm_stats": (4, 3, 5, 6), "batch_norm_tap": (4, 3, 5, 6), "batch_norm_stat_loss": (4, 3, 5, 6),
    "image_prior_losses": (2, 3, 5, 6), "total_variation": (2, 3, 5, 6), "gradient_reversal": (6, 7),
}  # fmt: skip


class FakeClock:
    """Reports given times for each call, and records the order of the calls."""

    def __init__(self, seconds):
        self.seconds, self.asked = seconds, []

    def measure(self, timed, ahead):
        timed.prepare()
        name = timed.call()
        self.asked.append(name)
        return self.seconds[name].pop(0), 1e-6


def test_rounds_take_turns_and_warm_up_does_not_count():
    clock = FakeClock({"a": [9.0, 1.0, 2.0, 3.0], "b": [9.0, 4.0, 4.0, 8.0]})
    timed = {name: Timed(lambda name=name: name) for name in "ab"}
    rounds = interleaved_rounds(timed, clock, rounds=3, warm_up=1)
    assert clock.asked == ["a", "b"] * 4
    assert rounds == {"a": [1.0, 2.0, 3.0], "b": [4.0, 4.0, 8.0]}
    clock = FakeClock({"a": [1.0, 5.0, 3.0]})
    assert interleaved_medians({"a": timed["a"]}, clock, rounds=3, warm_up=0) == {"a": 3.0}


def test_ratios_pair_the_rounds():
    """The ratio of each round is 2 although the machine's speed changed; minima would not show it."""
    assert pairwise_ratio([1.0, 10.0, 3.0], [2.0, 20.0, 6.0]) == Ratio(2.0, 2.0, 2.0)
    ratio = pairwise_ratio([1.0] * 11, [0.5 + 0.1 * i for i in range(11)])
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((0.6, 1.0, 1.4))
    assert [Ratio(*r).verdict for r in ((2, 1.1, 3), (0.5, 0.4, 0.9), (1.2, 0.9, 1.4), (1, 1, 1))] == [
        "faster", "slower", "tie", "tie",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="got 2 and 1"):
        pairwise_ratio([1.0, 2.0], [1.0])


def test_the_host_clock_counts_the_second_call():
    events = []
    clock = HostClock()
    taken, issued = clock.measure(Timed(lambda: events.append("call"), lambda: events.append("prepare")))
    assert taken == issued >= 0
    assert events == ["prepare", "call", "prepare", "call"]


def test_large_inputs_rotate_and_small_ones_do_not():
    large = torch.ones(SMALL // 4 + 1, requires_grad=True)
    sets = rotating((large,))
    seen = [next(sets)[0] for _ in range(rotation(large.nbytes))]
    assert len({t.data_ptr() for t in seen}) == len(seen) > 60
    assert next(sets)[0] is large
    assert all(t.requires_grad and t.is_leaf and torch.equal(t, large) for t in seen)
    small = torch.ones(10)
    sets = rotating((small,))
    assert next(sets)[0] is next(sets)[0] is small


SMALL_ROWS = {
    (row.function, row.variant): replace(row, shape=tuple(map(min, row.shape, (4, 6, 5, 7, 3)))) for row in benchmarks()
}


@pytest.mark.parametrize("row", SMALL_ROWS.values(), ids=lambda row: f"{row.function} {row.variant}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_function_has_a_workload_that_is_right(row, dtype):
    one = replace(row, dtype=dtype).workload
    contest = enter(one, "cpu", {"kdkernels": "auto", "reference": "reference"}, {}, {})
    assert contest.not_timed == {}
    assert contest.errors["kdkernels"] <= one.tolerance
    assert SHORT_NAMES[dtype] in one.name
    assert row.variant in one.name


def test_every_timed_function_is_in_the_benchmark():
    assert {row.function for row in benchmarks()} == set(workload_functions())


def test_rows_have_unique_names():
    names = [row.workload.name for row in benchmarks()]
    assert len(set(names)) == len(names)
    assert sum(row.compared for row in benchmarks()) > 5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("no_such_op", (3, 4)), "function must be one of .*, got 'no_such_op'"),
        (("kl_div_with_logits", (0, 4)), "shape must consist of positive sizes"),
        (("kl_div_with_logits", (4,)), "shape must have a dimension of positions"),
        (("image_prior_losses", (3, 4)), r"shape must be \[B, C, H, W\]"),
        (("batch_norm_tap", (3,)), r"shape must be \[N, C, ...\]"),
        (("batch_norm_tap", (3, 4), torch.float32, "channels_last"), "variant must be one of ''"),
    ],
)
def test_a_wrong_workload_raises(arguments, text):
    with pytest.raises(ValueError, match=text):
        workload(*arguments)


def test_no_contender_is_timed_if_ours_is_wrong():
    one = workload("kl_div_with_logits", (6, 11))
    wrong = replace(one, ours=lambda s, t: 1.01 * one.ours(s, t))
    contest = enter(wrong, "cpu", {"kdkernels": "auto"}, {}, {})
    assert contest.passes == {}
    assert contest.not_timed["kdkernels"].startswith("wrong: relative error 1.0e-02")
    assert contest.not_timed["eager"] == "not timed: ours failed"


def test_rivals_that_are_wrong_or_raise_are_left_out():
    one = workload("kl_div_with_logits", (6, 11))

    def raises(s, t):
        raise TypeError("no such dtype")

    rivals = {"double": lambda s, t: 2 * one.eager(s, t), "raises": raises}
    contest = enter(one, "cpu", {"kdkernels": "auto"}, rivals, {})
    assert list(contest.passes) == ["kdkernels", "eager"]
    assert contest.not_timed["double"].startswith("wrong: relative error 1.0e+00")
    assert contest.not_timed["raises"] == "failed: TypeError: no such dtype"


def test_errors_see_nan_shapes_and_missing_results():
    a, b = torch.ones(3), torch.full((3,), 2.0)
    assert relative_error([b], [a]) == pytest.approx(1.0)
    assert relative_error([a, a * float("nan")], [a, a]) != relative_error([a, a], [a, a]) == 0
    assert relative_error([torch.ones(2)], [a]) == relative_error([a], [a, a]) == float("inf")


def test_truth_is_exact_and_sees_the_same_incoming_gradients():
    one = workload("batch_norm_tap", (4, 3, 5, 6), torch.bfloat16)
    tensors = one.make("cpu")
    tensors[0].requires_grad_()
    ours = Passes(one.ours, tensors, one.cotangents)
    truth = true_results(one, tensors, ours)
    assert {t.dtype for t in truth} == {torch.float64}
    wide = tensors[0].detach().double().requires_grad_()
    outputs = one.eager(wide)
    torch.autograd.backward(outputs, [g.double() for g in ours.incoming])
    torch.testing.assert_close(truth[-1], wide.grad, rtol=0, atol=0)


def test_passes_start_without_gradient_and_graph():
    one = workload("kl_div_with_logits", (6, 11))
    tensors = one.make("cpu")
    tensors[0].requires_grad_()
    passes = Passes(one.ours, tensors)
    gradient = passes.results()[1]
    for mode in MODES:
        timed = passes.timed()[mode]
        timed.prepare()
        timed.call()
        assert (tensors[0].grad is None) == (mode == "forward")
        if mode != "forward":
            torch.testing.assert_close(tensors[0].grad, gradient, rtol=0, atol=0)


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.ones(1000)
    assert 12_000 <= peak_bytes(lambda: [x * 2 for _ in range(3)]) < 12_100  # PyTorch makes the 2 a tensor

    def one_after_the_other():
        for _ in range(3):
            x * 2

    assert 4000 <= peak_bytes(one_after_the_other) < 8100


def test_bench_on_the_command_line(capsys):
    arguments = ["bench", "--op", "distillation_loss", "--shape", "6", "11", "--no-compile", "--dtype", "bf16"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "distillation_loss [6, 11] bf16 on CPU" in out
    assert "| eager |" in out
    assert cli.main(["bench", "--op", "image_prior_losses", "--shape", "6", "11"]) == 2
    assert "shape must be [B, C, H, W], got [6, 11]" in capsys.readouterr().err
