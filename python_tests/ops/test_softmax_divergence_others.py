"""Soft cross-entropy, skewed divergences, total variation distance and entropy: values, gradients and edges."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kdkernels.functional import (
    entropy_with_logits,
    kl_div_with_logits,
    skew_kl_div_with_logits,
    soft_cross_entropy,
    total_variation_distance_with_logits,
)
from kdkernels.ops.softmax_divergence.cases import REDUCTIONS

F64 = torch.float64
PAIRED = (soft_cross_entropy, skew_kl_div_with_logits, total_variation_distance_with_logits)


def draw(*shape, grad=True):
    return torch.randn(shape, dtype=F64, requires_grad=grad)


def skew(log_w, log_v, alpha):
    return (log_w.exp() * (log_w - (alpha * log_w.exp() + (1 - alpha) * log_v.exp()).log())).sum(-1)


# The formulas as a user would write them, from log-probabilities
FORMULAS = {
    "soft_cross_entropy": (soft_cross_entropy, lambda log_q, log_p: -(log_p.exp() * log_q).sum(-1)),
    "skew_kl": (partial(skew_kl_div_with_logits, alpha=0.3), lambda log_q, log_p: skew(log_p, log_q, 0.3)),
    "reverse skew_kl": (
        partial(skew_kl_div_with_logits, alpha=0.7, reverse=True), lambda log_q, log_p: skew(log_q, log_p, 0.7)
    ),
    "total variation": (
        total_variation_distance_with_logits, lambda log_q, log_p: (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    ),
    "entropy": (
        lambda s, t, **options: entropy_with_logits(s, **options), lambda log_q, _: -(log_q.exp() * log_q).sum(-1)
    ),
}  # fmt: skip
every_formula = pytest.mark.parametrize("name", FORMULAS)


@every_formula
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_value_and_gradients_are_those_of_the_formula(cpu_backend, name, temperature):
    ours, formula = FORMULAS[name]
    s, t, tau = draw(7, 11), draw(7, 11), torch.tensor(temperature, dtype=F64, requires_grad=True)
    weight = torch.rand(7, dtype=F64)
    wanted = (s, tau) if name == "entropy" else (s, t, tau)
    expected = formula((s / tau).log_softmax(1), (t / tau).log_softmax(1))
    found = ours(s, t, temperature=tau, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    found, expected = ours(s, t, temperature=tau, position_weight=weight), (weight * expected).sum() / weight.sum()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in FORMULAS if name != "entropy"])
@pytest.mark.parametrize("target_type", ["log_probs", "probs"])
def test_teachers_given_by_probabilities(cpu_backend, name, target_type):
    """The temperature divides the student alone, and the gradient reaches the logits behind the probabilities."""
    ours, formula = FORMULAS[name]
    s, t = draw(5, 6), draw(5, 6)
    log_p = t.log_softmax(1)
    given = log_p if target_type == "log_probs" else log_p.exp()
    found = ours(s, given, temperature=2.0, target_type=target_type, reduction="sum")
    expected = formula((s / 2).log_softmax(1), log_p).sum()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    by_ours = torch.autograd.grad(found, (s, t), retain_graph=True)
    for a, b in zip(by_ours, torch.autograd.grad(expected, (s, t)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@every_formula
def test_second_derivatives(name):
    ours, _ = FORMULAS[name]
    inputs = draw(3, 4), draw(3, 4), torch.tensor(1.5, dtype=F64, requires_grad=True)
    inputs = (inputs[0], inputs[1].detach(), inputs[2]) if name == "entropy" else inputs
    assert torch.autograd.gradcheck(lambda s, t, tau: ours(s, t, temperature=tau, reduction="none"), inputs)
    assert torch.autograd.gradgradcheck(lambda s, t, tau: ours(s, t, temperature=tau), inputs)


@pytest.mark.parametrize("target_type", ["log_probs", "probs"])
def test_derivatives_by_probabilities(target_type):
    for name in ("soft_cross_entropy", "skew_kl", "reverse skew_kl", "total variation"):
        ours = partial(FORMULAS[name][0], target_type=target_type, temperature=1.5)
        p = torch.rand(3, 4, dtype=F64) + 0.1
        p = p / p.sum(1, keepdim=True)
        p = (p.log() if target_type == "log_probs" else p).requires_grad_()
        assert torch.autograd.gradcheck(ours, (draw(3, 4), p))
        assert torch.autograd.gradgradcheck(ours, (draw(3, 4), p))


# Values derived by hand: logits (0, 0) give q = (1/2, 1/2), logits (ln 3, 0) give p = (3/4, 1/4).

ZERO, LN3 = torch.zeros(2, dtype=F64), torch.tensor([math.log(3), 0.0], dtype=F64)


def test_soft_cross_entropy_of_two_classes(cpu_backend):
    s = ZERO.clone().requires_grad_()
    loss = soft_cross_entropy(s, LN3)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    loss.backward()
    torch.testing.assert_close(s.grad, torch.tensor([-0.25, 0.25], dtype=F64))
    expected = -0.5 * (math.log(0.75) + math.log(0.25))
    assert soft_cross_entropy(LN3, ZERO).item() == pytest.approx(expected, abs=1e-15)


def test_soft_cross_entropy_takes_probabilities_as_given(cpu_backend):
    """With p = (2, 1): -(2 ln q_1 + ln q_2), with the derivative 3 q - p."""
    s, p = ZERO.clone().requires_grad_(), torch.tensor([2.0, 1.0], dtype=F64, requires_grad=True)
    loss = soft_cross_entropy(s, p, target_type="probs")
    assert loss.item() == pytest.approx(3 * math.log(2), abs=1e-14)
    loss.backward()
    torch.testing.assert_close(s.grad, torch.tensor([-0.5, 0.5], dtype=F64))
    torch.testing.assert_close(p.grad, torch.full((2,), math.log(2), dtype=F64))
    labels = torch.rand(4, 5, 3, dtype=F64)
    logits = draw(4, 5, 3, grad=False)
    ours = soft_cross_entropy(logits, labels, target_type="probs", dim=1)
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels))


def test_a_one_hot_target_has_the_gradient_of_a_label(cpu_backend):
    """The derivative by p = 0 is -ln q as well, since the loss is linear in p."""
    s, p = draw(3, 4, grad=False), torch.eye(4, dtype=F64)[:3].requires_grad_()
    loss = soft_cross_entropy(s, p, target_type="probs", reduction="sum")
    torch.testing.assert_close(loss, F.cross_entropy(s, torch.arange(3), reduction="sum"))
    torch.testing.assert_close(torch.autograd.grad(loss, p)[0], -s.log_softmax(1))


def test_skew_kl_of_two_classes(cpu_backend):
    """At alpha = 1/2 the mixture is (5/8, 3/8)."""
    expected = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
    assert skew_kl_div_with_logits(ZERO, LN3, alpha=0.5).item() == pytest.approx(expected, abs=1e-15)
    expected = 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    assert skew_kl_div_with_logits(ZERO, LN3, alpha=0.5, reverse=True).item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("reverse", [False, True])
def test_rounded_probabilities_are_normalized(cpu_backend, alpha, reverse):
    s, p = draw(4, 5), draw(4, 5, grad=False).softmax(1)
    function = partial(skew_kl_div_with_logits, alpha=alpha, reverse=reverse, target_type="probs", reduction="none")
    torch.testing.assert_close(function(s, 1.0005 * p), function(s, p), rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match=r"sum to 1\.1"):
        function(s, 1.1 * p)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", [float, torch.tensor])
def test_ends_of_the_skew(cpu_backend, reverse, form):
    """alpha = 0 is the divergence itself, with its gradients; alpha = 1 compares a distribution with itself."""
    s, t = draw(4, 5), draw(4, 5)
    plain = kl_div_with_logits(s, t, reverse=reverse)
    skewed = skew_kl_div_with_logits(s, t, alpha=form(0.0), reverse=reverse)
    torch.testing.assert_close(skewed, plain, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(skewed, (s, t)), torch.autograd.grad(plain, (s, t)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    none = skew_kl_div_with_logits(s * 100, t * 100, alpha=form(1.0), reverse=reverse)
    assert none.item() == 0
    assert all(torch.equal(g, torch.zeros(4, 5, dtype=F64)) for g in torch.autograd.grad(none, (s, t)))


def test_total_variation_of_two_classes(cpu_backend):
    """(|3/4 - 1/2| + |1/4 - 1/2|) / 2 = 1/4; it grows with q_2 = 1/2, whose derivative by the logits is 1/4."""
    s = ZERO.clone().requires_grad_()
    loss = total_variation_distance_with_logits(s, LN3)
    loss.backward()
    assert loss.item() == pytest.approx(0.25, abs=1e-15)
    torch.testing.assert_close(s.grad, torch.tensor([-0.25, 0.25], dtype=F64))
    opposite = torch.tensor([800.0, 0.0], dtype=F64)
    assert total_variation_distance_with_logits(opposite, opposite.flip(0)).item() == 1


def test_entropy_of_two_classes(cpu_backend):
    s = LN3.clone().requires_grad_()
    entropy = entropy_with_logits(s)
    expected = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert entropy.item() == pytest.approx(expected, abs=1e-15)
    entropy.backward()
    slope = -0.75 * (math.log(0.75) + expected)
    torch.testing.assert_close(s.grad, torch.tensor([slope, -slope], dtype=F64))
    assert entropy_with_logits(ZERO).item() == pytest.approx(math.log(2), abs=1e-15)


# Special values


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("classes", [2, 3, 40])
def test_equal_rows_give_zero(cpu_backend, dtype, scale, classes):
    s = (torch.randn(6, classes) * scale).to(dtype)
    for alpha in (0.0, 0.1, 0.9, 1.0):
        for reverse in (False, True):
            _is_zero(partial(skew_kl_div_with_logits, alpha=alpha, reverse=reverse), s)
    _is_zero(total_variation_distance_with_logits, s)


def _is_zero(function, logits):
    s, t = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = function(s, t, reduction="none")
    assert torch.equal(loss, torch.zeros_like(loss))
    for grad in torch.autograd.grad(loss.sum(), (s, t)):
        assert torch.equal(grad, torch.zeros_like(logits))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_never_negative(cpu_backend, scale):
    s = torch.randn(64, 30) * scale
    for close in (s + torch.randn(64, 30) * 1e-3, s + torch.randn(64, 30) * scale):
        for alpha in (0.01, 0.5):
            for reverse in (False, True):
                value = skew_kl_div_with_logits(s, close, alpha=alpha, reverse=reverse, reduction="none")
                assert (value >= -1e-7).all()
                assert (value <= -math.log(alpha) + 1e-5).all()
        value = total_variation_distance_with_logits(s, close, reduction="none")
        assert ((value >= 0) & (value <= 1 + 1e-6)).all()
        assert (entropy_with_logits(s, reduction="none") >= 0).all()


@every_formula
def test_masked_classes_add_nothing(cpu_backend, name):
    """-inf on both sides gives the same result as leaving out the class."""
    ours, _ = FORMULAS[name]
    keep = [0, 2, 3, 5, 8]
    small = draw(4, 5), draw(4, 5)
    large = [
        torch.full((4, 9), -math.inf, dtype=F64).index_copy(1, torch.tensor(keep), x.detach()).requires_grad_()
        for x in small
    ]
    found, expected = ours(*large), ours(*small)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    for a, b in zip(large, small, strict=True):
        if b.grad is None:
            continue
        torch.testing.assert_close(a.grad[:, keep], b.grad)
        assert torch.equal(a.grad[:, [1, 4, 6, 7]], torch.zeros(4, 4, dtype=F64))


def test_class_that_one_side_excludes(cpu_backend):
    """With q = (1, 0) and p = (3/4, 1/4), and the other way round."""
    sure = torch.tensor([0.0, -math.inf], dtype=F64)
    for reverse in (False, True):
        s, t = (LN3, sure) if reverse else (sure, LN3)
        s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
        loss = skew_kl_div_with_logits(s, t, alpha=0.2, reverse=reverse)
        # The mixture is (3/20 + 16/20, 1/20).
        assert loss.item() == pytest.approx(0.75 * math.log(0.75 / 0.95) + 0.25 * math.log(5), abs=1e-14)
        by_s, by_t = torch.autograd.grad(loss, (s, t))
        by_weighting, by_other = (by_s, by_t) if reverse else (by_t, by_s)
        assert torch.equal(by_other, torch.zeros(2, dtype=F64))
        # d/dp_1 - d/dp_2 of the formula, times p_1 p_2
        slope = (math.log(0.75 / 0.95) - 0.2 * 0.75 / 0.95 - math.log(5) + 1) * 0.75 * 0.25
        torch.testing.assert_close(by_weighting, torch.tensor([slope, -slope], dtype=F64))
    s, t = sure.clone().requires_grad_(), LN3.clone().requires_grad_()
    loss = soft_cross_entropy(s, t)
    loss.backward()
    assert loss.item() == math.inf
    torch.testing.assert_close(s.grad, torch.tensor([0.25, -0.25], dtype=F64))
    assert torch.equal(t.grad, torch.zeros(2, dtype=F64))
    assert soft_cross_entropy(LN3, sure).item() == pytest.approx(-math.log(0.75), abs=1e-15)
    assert total_variation_distance_with_logits(sure, LN3).item() == pytest.approx(0.25, abs=1e-15)
    assert entropy_with_logits(sure).item() == 0


@every_formula
@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_rows_without_a_finite_logit_give_nan(cpu_backend, name, value):
    ours, _ = FORMULAS[name]
    good, bad = draw(2, 40, grad=False), draw(2, 40, grad=False)
    bad[1] = value
    for s, t in ((bad, good), (good, bad)):
        loss = ours(s, t, reduction="none")
        assert loss.isnan().tolist() == [False, name != "entropy" or s is bad]


def test_equal_logits_have_no_gradient_of_the_entropy(cpu_backend):
    s = torch.full((3, 7), 0.3, requires_grad=True)
    entropy = entropy_with_logits(s, reduction="sum")
    entropy.backward()
    assert entropy.item() == pytest.approx(3 * math.log(7), rel=1e-6)
    assert torch.equal(s.grad, torch.zeros(3, 7))


@every_formula
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_position_weights(cpu_backend, name, reduction):
    """A position of weight 0 counts for nothing, NaN logits included; "mean" divides by the sum of the weights."""
    ours, formula = FORMULAS[name]
    s, t = draw(2, 3, 5), draw(2, 3, 5)
    weight = torch.tensor([[0.5, 0.0, 2.0], [1.0, 0.0, 0.0]])
    each = weight * formula(s.log_softmax(-1), t.log_softmax(-1))
    batch = {"none": each, "sum": each.sum(), "mean": each.sum() / 3.5, "batchmean": each.sum() / 2}
    expected = batch[reduction]
    with torch.no_grad():
        bad = [x.masked_fill((weight == 0).unsqueeze(-1), math.nan).requires_grad_() for x in (s, t)]
    found = ours(*bad, dim=-1, position_weight=weight, reduction=reduction)
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(found.sum(), bad[0])
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), s)[0])
    none = ours(*bad, dim=-1, position_weight=torch.zeros(2, 3, dtype=torch.bool), reduction=reduction)
    assert torch.equal(none, torch.zeros_like(none))


@every_formula
def test_joint_dimensions(cpu_backend, name):
    ours, _ = FORMULAS[name]
    s, t = draw(2, 3, 4, 5, grad=False), draw(2, 3, 4, 5, grad=False)
    flat = [x.flatten(2) for x in (s, t)]
    torch.testing.assert_close(ours(s, t, dim=(2, 3)), ours(*flat, dim=-1))
    torch.testing.assert_close(
        ours(s[..., 1:], t[..., :-1], dim=1), ours(s[..., 1:].clone(), t[..., :-1].clone(), dim=1)
    )


def test_standardized_logits(cpu_backend):
    """Mean 0 and unbiased standard deviation 1 on each side, before the temperature divides."""
    s, t = draw(4, 6), draw(4, 6)
    for function in PAIRED:
        plain = [(x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7) for x in (s, t)]
        found, expected = function(s, t, temperature=2.0, standardize=True), function(*plain, temperature=2.0)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        for a, b in zip(torch.autograd.grad(found, (s, t)), torch.autograd.grad(expected, (s, t)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_parts(cpu_backend):
    s, t = draw(4, 6, grad=False), draw(4, 6, grad=False)
    for function in PAIRED:
        parts = function(s, t, temperature=2.0, return_parts=True)
        torch.testing.assert_close(parts.loss, function(s, t, temperature=2.0))
        torch.testing.assert_close(parts.divergence, parts.loss)
        torch.testing.assert_close(parts.input_logsumexp, (s / 2).logsumexp(1))
        torch.testing.assert_close(parts.target_logsumexp, (t / 2).logsumexp(1))
        torch.testing.assert_close(parts.target_entropy, entropy_with_logits(t, temperature=2.0, reduction="none"))
        assert torch.equal(parts.agreement, s.argmax(1) == t.argmax(1))
