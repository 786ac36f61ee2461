"""Decoupled and normalized distillation: values, gradients and edges."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kdkernels.functional import decoupled_distillation_loss, kl_div_with_logits, normalized_distillation_loss
from kdkernels.ops.softmax_divergence.cases import REDUCTIONS

F64 = torch.float64
BOTH = (decoupled_distillation_loss, normalized_distillation_loss)
each = pytest.mark.parametrize("function", BOTH)


def draw(*shape, grad=True):
    return torch.randn(shape, dtype=F64, requires_grad=grad)


def without_label(x, labels):
    """Return the other classes of each row, gathered: [B, C - 1]."""
    return x[F.one_hot(labels, x.shape[1]) == 0].view(len(x), -1)


def parts_of_dkd(s, t, labels, temperature):
    """Return TCKD and NCKD of each row, from gathered logits."""
    at = labels.unsqueeze(1)
    p, q = (t / temperature).softmax(1).gather(1, at)[:, 0], (s / temperature).softmax(1).gather(1, at)[:, 0]
    target = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    log_q, log_p = (without_label(x / temperature, labels).log_softmax(1) for x in (s, t))
    return target, (log_p.exp() * (log_p - log_q)).sum(1)


def parts_of_nkd(s, t, labels, temperature):
    at = labels.unsqueeze(1)
    target = -t.softmax(1).gather(1, at)[:, 0] * s.log_softmax(1).gather(1, at)[:, 0]
    log_q, log_p = (without_label(x / temperature, labels).log_softmax(1) for x in (s, t))
    return target, -(log_p.exp() * log_q).sum(1)


def formula(function, s, t, labels, temperature, a=0.7, b=2.5):
    """Return the loss of each row as the papers write it."""
    if function is decoupled_distillation_loss:
        target, others = parts_of_dkd(s, t, labels, temperature)
        return temperature**2 * (a * target + b * others)
    target, others = parts_of_nkd(s, t, labels, temperature)
    return target + b * temperature**2 * others


def bound(function, a=0.7, b=2.5):
    if function is decoupled_distillation_loss:
        return partial(function, alpha=a, beta=b)
    return partial(function, gamma=b)


@each
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("classes", [2, 3, 11, 70])
def test_value_and_gradients_are_those_of_the_formula(cpu_backend, function, temperature, classes):
    s, t, labels = draw(6, classes), draw(6, classes), torch.randint(classes, (6,))
    tau = torch.tensor(temperature, dtype=F64, requires_grad=True)
    weight = torch.rand(6, dtype=F64)
    expected = formula(function, s, t, labels, tau)
    found = bound(function)(s, t, labels, temperature=tau, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(bound(function)(s, t, labels, temperature=temperature), expected.mean())
    found = bound(function)(s, t, labels, temperature=tau, position_weight=weight)
    expected = (weight * expected).sum() / weight.sum()
    for a, b in zip(torch.autograd.grad(found, (s, t, tau)), torch.autograd.grad(expected, (s, t, tau)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@each
def test_second_derivatives(function):
    labels = torch.tensor([0, 3, 1])
    inputs = draw(3, 4), draw(3, 4), torch.tensor(1.5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s, t, tau: bound(function)(s, t, labels, temperature=tau, reduction="none"), inputs
    )
    assert torch.autograd.gradgradcheck(lambda s, t, tau: bound(function)(s, t, labels, temperature=tau), inputs)


def test_decoupled_loss_of_three_classes(cpu_backend):
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4), label 0, at T = 2: alpha 4 TCKD + beta 4 NCKD."""
    t, s = (2 * torch.tensor(x, dtype=F64).log() for x in ([[0.5, 0.25, 0.25]], [[0.25, 0.5, 0.25]]))
    target = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    others = 0.5 * math.log(0.5 / (2 / 3)) + 0.5 * math.log(0.5 / (1 / 3))
    loss = decoupled_distillation_loss(s, t, torch.tensor([0]), alpha=3.0, beta=5.0, temperature=2.0)
    assert loss.item() == pytest.approx(4 * (3 * target + 5 * others), abs=1e-14)
    s.requires_grad_()
    loss = decoupled_distillation_loss(s, t, torch.tensor([0]), alpha=3.0, beta=5.0, temperature=2.0)
    loss.backward()
    # T [alpha (q_y - p_y)] at the label; T [alpha (p_y - q_y) q^_j + beta (q^_j - p^_j)] elsewhere
    expected = [2 * 3 * -0.25, 2 * (3 * 0.25 * 2 / 3 + 5 / 6), 2 * (3 * 0.25 / 3 - 5 / 6)]
    torch.testing.assert_close(s.grad, torch.tensor([expected], dtype=F64))


def test_normalized_loss_of_three_classes(cpu_backend):
    """The same distributions at T = 1: -p_y ln q_y - gamma (ln(2/3) + ln(1/3)) / 2."""
    t, s = (torch.tensor(x, dtype=F64).log() for x in ([[0.5, 0.25, 0.25]], [[0.25, 0.5, 0.25]]))
    s.requires_grad_()
    loss = normalized_distillation_loss(s, t, torch.tensor([0]), gamma=2.0)
    assert loss.item() == pytest.approx(-0.5 * math.log(0.25) - math.log(2 / 3) - math.log(1 / 3), abs=1e-14)
    loss.backward()
    expected = [0.5 * -0.75, 0.5 * 0.5 + 2 * (2 / 3 - 0.5), 0.5 * 0.25 + 2 * (1 / 3 - 0.5)]
    torch.testing.assert_close(s.grad, torch.tensor([expected], dtype=F64))


def test_the_parts_of_the_divergence_add_up(cpu_backend):
    """KL(p || q) = TCKD + (1 - p_y) NCKD."""
    s, t, labels = draw(5, 8, grad=False), draw(5, 8, grad=False), torch.randint(8, (5,))
    parts = decoupled_distillation_loss(s, t, labels, temperature=2.0, reduction="none", return_parts=True)
    rest = 1 - (t / 2).softmax(1).gather(1, labels.unsqueeze(1))[:, 0]
    whole = kl_div_with_logits(s, t, temperature=2.0, reduction="none")
    torch.testing.assert_close(parts.cross_entropy + rest * parts.divergence, whole)
    torch.testing.assert_close(parts.loss, 4 * (parts.cross_entropy + 8 * parts.divergence))
    torch.testing.assert_close(parts.input_logsumexp, (s / 2).logsumexp(1))
    tau = torch.tensor(2.0, dtype=F64, requires_grad=True)
    learned = decoupled_distillation_loss(s, t, labels, temperature=tau, reduction="none", return_parts=True)
    torch.testing.assert_close(learned.loss, parts.loss)
    torch.testing.assert_close(learned.divergence, parts.divergence)
    parts = normalized_distillation_loss(s, t, labels, temperature=2.0, return_parts=True)
    torch.testing.assert_close(parts.loss, parts.cross_entropy + 1.5 * 4 * parts.divergence)


def test_defaults_are_the_published_ones():
    s, t, labels = draw(5, 8, grad=False), draw(5, 8, grad=False), torch.randint(8, (5,))
    expected = formula(decoupled_distillation_loss, s, t, labels, 4.0, 1.0, 8.0).mean()
    torch.testing.assert_close(decoupled_distillation_loss(s, t, labels), expected)
    expected = formula(normalized_distillation_loss, s, t, labels, 1.0, b=1.5).mean()
    torch.testing.assert_close(normalized_distillation_loss(s, t, labels), expected)


# Special values


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("classes", [2, 3, 40])
def test_equal_rows_give_zero(cpu_backend, dtype, scale, classes):
    s = (torch.randn(6, classes) * scale).to(dtype).requires_grad_()
    t = s.detach().clone().requires_grad_()
    loss = decoupled_distillation_loss(s, t, torch.randint(classes, (6,)), reduction="none")
    assert torch.equal(loss, torch.zeros_like(loss))
    for grad in torch.autograd.grad(loss.sum(), (s, t)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_never_negative(cpu_backend, scale):
    s, labels = torch.randn(64, 30) * scale, torch.randint(30, (64,))
    for close in (s + torch.randn(64, 30) * 1e-3, s + torch.randn(64, 30) * scale):
        value = decoupled_distillation_loss(s, close, labels, beta=1.0, temperature=1.0, reduction="none")
        assert (value >= -2e-7).all()
        assert (normalized_distillation_loss(s, close, labels, reduction="none") >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("margin", [40.0, 800.0, 1e4])
def test_sides_that_are_sure_of_the_label(cpu_backend, dtype, margin):
    """1 - q_y is far below the precision of q_y: logarithms of sums of rounded probabilities would be infinite.

    With others at 0 and label logits m + 1 and m at T = 1, the log-odds are a = ln 2 - m - 1 and b = ln 2 - m, and
    KL of the two classes is P (e^(a - b) - 1 - (a - b)) to first order in P = e^b.
    """
    s, t = torch.zeros(1, 3, dtype=dtype), torch.tensor([[0.0, 0.0, math.log(3)]], dtype=dtype)
    s[0, 0], t[0, 0] = margin, margin
    s.requires_grad_()
    t.requires_grad_()
    loss = decoupled_distillation_loss(s, t, torch.tensor([0]), temperature=1.0, beta=1.0)
    others = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert loss.item() == pytest.approx(others, rel=1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (s, t)))
    s = torch.zeros(1, 3, dtype=dtype)
    s[0, 0] = margin
    alone = decoupled_distillation_loss(s + torch.eye(3, dtype=dtype)[:1], s, torch.tensor([0]), temperature=1.0)
    expected = 2 * math.exp(-margin) * (math.exp(-1) - 1 + 1)
    assert alone.item() == pytest.approx(expected, rel=1e-5, abs=1e-30)


def test_wrong_and_sure_of_it(cpu_backend):
    """The label is far below: TCKD is about p_y times the margin."""
    s, t = torch.tensor([[-1000.0, 0.0, 0.0]], dtype=F64, requires_grad=True), torch.zeros(1, 3, dtype=F64)
    loss = decoupled_distillation_loss(s, t, torch.tensor([0]), temperature=1.0)
    expected = (math.log(1 / 3) + 1000 + math.log(2)) / 3 + 2 / 3 * math.log(2 / 3)
    assert loss.item() == pytest.approx(expected, rel=1e-14)
    loss.backward()
    torch.testing.assert_close(s.grad, torch.tensor([[-1 / 3, 1 / 6, 1 / 6]], dtype=F64))
    loss = normalized_distillation_loss(s, t, torch.tensor([0]))
    assert loss.item() == pytest.approx((1000 + math.log(2)) / 3 + 1.5 * math.log(2), rel=1e-14)


@each
def test_masked_classes_add_nothing(cpu_backend, function):
    keep, labels = [0, 2, 3, 5, 8], torch.tensor([4, 0, 2, 1])
    small = draw(4, 5), draw(4, 5)
    large = [
        torch.full((4, 9), -math.inf, dtype=F64).index_copy(1, torch.tensor(keep), x.detach()).requires_grad_()
        for x in small
    ]
    found, expected = function(*large, torch.tensor(keep)[labels]), function(*small, labels)
    torch.testing.assert_close(found, expected)
    by_large, by_small = torch.autograd.grad(found, large), torch.autograd.grad(expected, small)
    for a, b in zip(by_large, by_small, strict=True):
        torch.testing.assert_close(a[:, keep], b)
        assert torch.equal(a[:, [1, 4, 6, 7]], torch.zeros(4, 4, dtype=F64))


@each
def test_infinite_logits(cpu_backend, function):
    """A class that only the student excludes: +inf, with a finite gradient of the student and none of the teacher."""
    loss = partial(bound(function), temperature=1.0, reduction="none")
    none = -math.inf
    t = torch.tensor([[0.0, 1.0, 2.0]] * 2, dtype=F64, requires_grad=True)
    s = torch.tensor([[0.0, none, 2.0], [none, 1.0, 2.0]], dtype=F64, requires_grad=True)
    value = loss(s, t, torch.tensor([0, 0]))
    assert (value == math.inf).all()
    by_s, by_t = torch.autograd.grad(value.sum(), (s, t))
    assert by_s.isfinite().all()
    assert by_t.isfinite().all()
    # A class that only the teacher excludes adds nothing.
    s, t = t, s.detach()
    for row, label in ((0, 0), (1, 0)):
        value = loss(s[row : row + 1], t[row : row + 1], torch.tensor([label]))
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), s)[0].isfinite().all()
    # No other class: nothing is compared there, unless the teacher has some.
    alone = torch.tensor([[0.0, none, none]], dtype=F64, requires_grad=True)
    full = torch.tensor([[0.0, 1.0, 2.0]], dtype=F64, requires_grad=True)
    labels = torch.tensor([0])
    assert loss(alone, alone.detach(), labels).item() == 0
    assert loss(alone, full, labels).item() == math.inf
    value = loss(full, alone.detach(), labels)
    weight = 0.7 if function is decoupled_distillation_loss else 1.0
    assert value.item() == pytest.approx(weight * math.log(1 + math.e + math.e**2), abs=1e-13)
    (grad,) = torch.autograd.grad(value, full)
    expected = weight * (full.softmax(1) - torch.tensor([[1.0, 0.0, 0.0]], dtype=F64))
    torch.testing.assert_close(grad, expected.detach())


@each
@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_rows_without_a_finite_logit_give_nan(cpu_backend, function, value):
    good, bad = draw(2, 40, grad=False), draw(2, 40, grad=False)
    bad[1] = value
    for s, t in ((bad, good), (good, bad)):
        assert function(s, t, torch.tensor([3, 3]), reduction="none").isnan().tolist() == [False, True]


# Positions


@each
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_labels_and_weights_leave_positions_out(cpu_backend, function, reduction):
    s, t = draw(2, 5, 3), draw(2, 5, 3)
    labels = torch.tensor([[0, -1, 4], [2, 3, -1]])
    weight = torch.tensor([[0.5, 1.0, 0.0], [2.0, 1.0, 1.0]])
    kept = (labels != -1) & (weight != 0)
    rows = formula(function, s.movedim(1, -1)[kept], t.movedim(1, -1)[kept], labels[kept], 2.0)
    losses = torch.zeros(2, 3, dtype=F64).masked_scatter(kept, weight[kept] * rows)
    expected = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / 3.5, "batchmean": losses.sum() / 2}[
        reduction
    ]
    with torch.no_grad():
        bad = [x.masked_fill(~kept.unsqueeze(1), math.nan).requires_grad_() for x in (s, t)]
    found = bound(function)(
        *bad, labels, temperature=2.0, dim=1, ignore_index=-1, position_weight=weight, reduction=reduction
    )
    torch.testing.assert_close(found, expected)
    by_ours, by_formula = torch.autograd.grad(found.sum(), bad), torch.autograd.grad(expected.sum(), (s, t))
    for a, b in zip(by_ours, by_formula, strict=True):
        torch.testing.assert_close(a, b)
    none = function(*bad, torch.full((2, 3), -100), dim=1, reduction=reduction)
    assert torch.equal(none, torch.zeros_like(none))


@each
def test_joint_dimensions(cpu_backend, function):
    s, t, labels = draw(2, 3, 4, 5, grad=False), draw(2, 3, 4, 5, grad=False), torch.randint(20, (2, 3))
    found = function(s, t, labels, dim=(2, 3))
    torch.testing.assert_close(found, function(s.flatten(2), t.flatten(2), labels, dim=-1))


def test_standardized_logits(cpu_backend):
    """All of the decoupled loss has standardized logits, of the normalized one the term of the others."""
    s, t, labels = draw(4, 6), draw(4, 6), torch.tensor([0, 5, 2, 2])
    plain = [(x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7) for x in (s, t)]
    found = decoupled_distillation_loss(s, t, labels, standardize=True)
    torch.testing.assert_close(found, decoupled_distillation_loss(*plain, labels))
    found = normalized_distillation_loss(s, t, labels, temperature=2.0, standardize=True)
    target, others = parts_of_nkd(s, t, labels, 2.0)[0], parts_of_nkd(*plain, labels, 2.0)[1]
    torch.testing.assert_close(found, (target + 1.5 * 4 * others).mean())


@each
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(cpu_backend, function, reduction):
    s = torch.randn(0, 5, requires_grad=True)
    loss = function(s, torch.randn(0, 5), torch.zeros(0, dtype=torch.int64), reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    loss.sum().backward()
    assert loss.sum().item() == 0
    assert s.grad.shape == (0, 5)


# How they are called


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_computed_in_32(cpu_backend, function, dtype):
    s, t, labels = torch.randn(8, 40).to(dtype), torch.randn(8, 40).to(dtype), torch.randint(40, (8,))
    loss = function(s, t, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, function(s.float(), t.float(), labels))


@each
def test_wrong_calls(function):
    s, t, labels = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, 4, 2])
    with pytest.raises(ValueError, match=r"input has one class: shape \(3, 1\); this loss compares .* two or more"):
        function(s[:, :1], t[:, :1], torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"labels are probabilities, torch.float32; .* such as labels.argmax\(1\)"):
        function(s, t, t.softmax(1))
    with pytest.raises(TypeError, match=r"labels must be a tensor of class indices, torch.int64, got None"):
        function(s, t, None)
    with pytest.raises(TypeError, match=r"got torch.int32; pass labels.long\(\)"):
        function(s, t, labels.int())
    with pytest.raises(ValueError, match=r"labels have shape \(2,\); expected \(3,\)"):
        function(s, t, labels[:2])
    with pytest.raises(IndexError, match=r"labels\[1\] \(in flattened order\) is 5; expected a class from 0 to 4"):
        function(s, t, torch.tensor([0, 5, 2]))
    with pytest.raises(ValueError, match="temperature is -1; expected a positive, finite number"):
        function(s, t, labels, temperature=-1)
    name = "alpha" if function is decoupled_distillation_loss else "gamma"
    with pytest.raises(ValueError, match=f"{name} is inf; expected a finite number"):
        function(s, t, labels, **{name: math.inf})
    with pytest.raises(ValueError, match=f"{name} requires grad, but no gradient is computed for it"):
        function(s, t, labels, **{name: torch.tensor(1.0, requires_grad=True)})
    with pytest.raises(TypeError, match=f"{name} must be a number or a 0-dim tensor, got str"):
        function(s, t, labels, **{name: "1"})
