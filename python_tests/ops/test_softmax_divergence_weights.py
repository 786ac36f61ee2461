"""Weights of positions, and teachers that are given by probabilities."""

import math

import pytest
import torch
import torch.nn.functional as F
from contract import BACKENDS

import kdkernels
from kdkernels.functional import distillation_loss, js_div_with_logits, kl_div_with_logits

F64 = torch.float64
FUNCTIONS = (kl_div_with_logits, js_div_with_logits, distillation_loss)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with kdkernels.set_backend("auto" if request.param == "native" else request.param):
        yield request.param


def rows(*shape, dtype=F64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def two_classes(ratio):
    """Logits of two classes whose first one is so many times as likely as the second."""
    return torch.tensor([[math.log(ratio), 0.0]], dtype=F64)


# Weights of positions


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "batchmean"])
def test_weights_of_positions(function, reduction):
    s, t, weight = rows(2, 3, 7), rows(2, 3, 7), torch.tensor([[0.5, 2.0, 0.0], [1.0, 0.0, 3.0]], dtype=F64)
    plain = function(s, t, dim=-1, reduction="none")
    expected = {
        "none": weight * plain,
        "mean": (weight * plain).sum() / 6.5,
        "sum": (weight * plain).sum(),
        "batchmean": (weight * plain).sum() / 2,
    }[reduction]
    loss = function(s, t, dim=-1, reduction=reduction, position_weight=weight)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (s, t)) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, -1])
def test_a_mask_leaves_positions_out_whatever_they_hold(function, dtype, dim):
    values = [torch.randn(4, 40, dtype=dtype) for _ in "st"]
    mask = torch.tensor([True, False, True, False])
    spoilt = [v.clone() for v in values]
    spoilt[0][1], spoilt[1][1], spoilt[1][3] = math.nan, -math.inf, math.nan
    results = []
    for given, weight in ((values, None), (spoilt, mask)):
        s, t = (v.clone().requires_grad_() for v in given)
        chosen = (s[mask], t[mask]) if weight is None else (s, t)
        loss = function(*chosen, position_weight=weight, dim=dim)
        loss.backward()
        results.append((loss.detach(), s.grad, t.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert not results[1][1][~mask].any()
    assert not results[1][2][~mask].any()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_with_nothing_left_the_loss_is_zero(function):
    s, t = rows(3, 5), rows(3, 5)
    for reduction in ("mean", "sum", "batchmean", "none"):
        loss = function(s, t, position_weight=torch.zeros(3, dtype=torch.bool), reduction=reduction)
        assert not loss.any()
        assert not torch.autograd.grad(loss.sum(), s)[0].any()


def test_a_label_of_a_position_that_does_not_count_may_be_anything():
    s, t, labels = rows(3, 5), rows(3, 5), torch.tensor([1, 77, 2])
    mask = torch.tensor([True, False, True])
    expected = distillation_loss(s[mask], t[mask], labels[mask])
    torch.testing.assert_close(distillation_loss(s, t, labels, position_weight=mask), expected)
    with pytest.raises(IndexError, match=r"labels\[1\] .* is 77; expected a class from 0 to 4"):
        distillation_loss(s, t, labels, position_weight=mask.double() + 0.1)


@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf])
def test_weights_that_are_refused(bad):
    s, t = rows(2, 5), rows(2, 5)
    text = r"\[1\] \(in flattened order\) is .*; expected a finite number, 0 or more"
    with pytest.raises(ValueError, match="position_weight" + text):
        kl_div_with_logits(s, t, position_weight=torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match="class_weight" + text):
        distillation_loss(s, t, torch.tensor([1, 2]), class_weight=torch.tensor([1.0, bad, 1, 1, 1]))


@pytest.mark.parametrize(
    ("weight", "error", "text"),
    [
        ([1.0, 2.0], TypeError, "position_weight must be a tensor, got list"),
        (torch.tensor([1, 0]), TypeError, r"int64; pass position_weight.bool\(\) if it is a mask"),
        (torch.rand(2, 1), ValueError, r"position_weight has shape \(2, 1\); expected one weight per position, \(2,\)"),
        (torch.rand(2, requires_grad=True), ValueError, "position_weight requires grad, .*; detach it"),
    ],
    ids=["list", "integers", "shape", "grad"],
)
def test_position_weights_of_another_kind_are_refused(weight, error, text):
    with pytest.raises(error, match=text):
        kl_div_with_logits(rows(2, 5), rows(2, 5), position_weight=weight)


# Targets


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["log_probs", "probs"])
def test_the_temperature_divides_the_student_alone(kind, temperature):
    s, t = rows(4, 9), torch.randn(4, 9, dtype=F64)
    target = t.log_softmax(1) if kind == "log_probs" else t.softmax(1)
    target.requires_grad_()
    ours = kl_div_with_logits(s, target, target_type=kind, temperature=temperature, reduction="batchmean")
    log_q = F.log_softmax(s / temperature, 1)
    theirs = F.kl_div(log_q, target, reduction="batchmean", log_target=kind == "log_probs")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    for a, b in zip(*(torch.autograd.grad(x, (s, target)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_probabilities_of_any_sum():
    """The gradient is ((sum p) q - p) / T."""
    s, p = rows(1, 2), torch.tensor([[0.6, 1.4]], dtype=F64)
    loss = kl_div_with_logits(s, p, target_type="probs", temperature=2.0, reduction="sum")
    q = (s / 2).softmax(1)
    torch.testing.assert_close(loss, (p * (p.log() - q.log())).sum(), rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(loss, s)[0], (2.0 * q - p) / 2, rtol=0, atol=1e-14)


@pytest.mark.parametrize("classes", [3, 40])
def test_a_row_without_any_probability_is_zero(classes):
    s, p = rows(2, classes), torch.zeros(2, classes, dtype=F64)
    p[0, 0] = 1.0
    for kind, target in (("probs", p), ("log_probs", p.log())):
        loss = kl_div_with_logits(s, target, target_type=kind, reduction="none")
        assert loss[0].item() == pytest.approx(-s[0].log_softmax(0)[0].item(), abs=1e-13)
        assert loss[1].item() == 0
        assert not torch.autograd.grad(loss.sum(), s)[0][1].any()


@pytest.mark.parametrize("kind", ["log_probs", "probs"])
def test_other_divergences_need_probabilities_that_sum_to_one(kind):
    s, p = rows(3, 5), torch.randn(3, 5, dtype=F64).softmax(1)
    p[1] *= 1.1
    target = p.log() if kind == "log_probs" else p
    for call in (
        lambda **o: kl_div_with_logits(s, target, reverse=True, **o),
        lambda **o: js_div_with_logits(s, target, **o),
    ):
        with pytest.raises(ValueError, match=r"target at position 1 .* sum to 1\.1\d*; .* normalize them"):
            call(target_type=kind)
        assert call(target_type=kind, position_weight=torch.tensor([True, False, True])).isfinite()


@pytest.mark.parametrize("kind", ["log_probs", "probs"])
@pytest.mark.parametrize("function", [lambda *a, **o: kl_div_with_logits(*a, reverse=True, **o), js_div_with_logits])
def test_normalized_probabilities_give_what_their_logits_give(function, kind):
    s, t = rows(4, 30), torch.randn(4, 30, dtype=F64)
    target = t.log_softmax(1) if kind == "log_probs" else t.softmax(1)
    torch.testing.assert_close(function(s, target, target_type=kind), function(s, t), rtol=0, atol=1e-12)


def test_negative_probabilities_are_not_a_number():
    s, p = rows(2, 3), torch.tensor([[0.5, -0.1, 0.6], [0.2, 0.3, 0.5]], dtype=F64)
    assert kl_div_with_logits(s, p, target_type="probs", reduction="none").isnan().tolist() == [True, False]
