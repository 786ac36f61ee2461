"""The Jensen-Shannon divergence of log-probabilities and the divergence of sigmoid heads, from values by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

import kdkernels
from kdkernels.functional import binary_kl_div_with_logits, js_div
from kdkernels.ops.pointwise_divergence.cases import ours_binary
from kdkernels.testing.selftest import results_of

F64 = torch.float64
INF = math.inf


# Jensen-Shannon


def test_js_div_by_hand(backend):
    """p = 1/2 and q = 1/4: m = 3/8 at beta 1/2."""
    x = torch.tensor([0.25], dtype=F64).log().requires_grad_()
    y = torch.tensor([0.5], dtype=F64).log().requires_grad_()
    of_p, of_q = 0.5 * math.log(4 / 3) / 2, 0.25 * math.log(2 / 3) / 2
    loss = js_div(x, y, reduction="sum")
    assert loss.item() == pytest.approx(of_p + of_q, abs=1e-15)
    by_x, by_y = torch.autograd.grad(loss, (x, y))
    assert (by_x.item(), by_y.item()) == (pytest.approx(of_q, abs=1e-15), pytest.approx(of_p, abs=1e-15))
    assert js_div(x, y, beta=0.0, reduction="sum").item() == pytest.approx(0.5 * math.log(2), abs=1e-15)
    assert js_div(x, y, beta=1.0, reduction="sum").item() == pytest.approx(-0.25 * math.log(2), abs=1e-15)


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
def test_js_div_of_logits_is_the_sum_of_its_elements(beta):
    z = torch.randn(6, 50, dtype=F64), torch.randn(6, 50, dtype=F64)
    found = js_div(*(side.log_softmax(1) for side in z), beta=beta)
    expected = kdkernels.functional.js_div_with_logits(*z, beta=beta)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, torch.tensor(0.3), 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_js_div_where_sides_underflow(beta, dtype, backend):
    x = torch.tensor([-INF, -200.0, -1e4, -1e4, -2.0], dtype=dtype, requires_grad=True)
    y = torch.tensor([-INF, -300.0, -1e4, -INF, -2.0], dtype=dtype, requires_grad=True)
    loss = js_div(x, y, beta=beta, reduction="none")
    grads = torch.autograd.grad(loss.sum(), (x, y))
    assert (loss[[0, 2, 3, 4]] == 0).all()
    assert loss[1].abs() < 1e-30
    for side in (loss, *grads):
        assert side.isfinite().all()
    if 0 < beta < 1:
        assert grads[0][4] == 0 == grads[1][4]


def test_js_div_where_one_side_is_excluded(backend):
    """q = 0: m = beta p, so that the element is beta p ln(1 / beta)."""
    x, y = torch.tensor([-INF, -1.0], dtype=F64), torch.tensor([-1.0, -INF], dtype=F64)
    p = math.exp(-1)
    found = js_div(x, y, beta=0.3, reduction="none").tolist()
    assert found == pytest.approx([-0.3 * p * math.log(0.3), -0.7 * p * math.log(0.7)], abs=1e-15)
    assert js_div(x, y, beta=0.0, reduction="none").tolist() == [INF, 0.0]
    assert js_div(x, y, beta=1.0, reduction="none").tolist() == [0.0, INF]


# Sigmoid heads


def test_binary_by_hand(backend):
    """p = 1/2 and q = 3/4: KL = ln(4/3) / 2, its gradients q - p and p (1 - p) (t - s); reversed, with q ln(q/p)."""
    s = torch.tensor([math.log(3.0)], dtype=F64, requires_grad=True)
    t = torch.zeros(1, dtype=F64, requires_grad=True)
    loss = binary_kl_div_with_logits(s, t)
    assert loss.item() == pytest.approx(math.log(4 / 3) / 2, abs=1e-15)
    by_s, by_t = torch.autograd.grad(loss, (s, t))
    assert (by_s.item(), by_t.item()) == (pytest.approx(0.25, abs=1e-15), pytest.approx(-math.log(3) / 4, abs=1e-15))
    reverse = binary_kl_div_with_logits(s, t, reverse=True)
    assert reverse.item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2), abs=1e-15)
    by_s, by_t = torch.autograd.grad(reverse, (s, t))
    assert by_s.item() == pytest.approx(0.75 * 0.25 * math.log(3), abs=1e-15)
    assert by_t.item() == pytest.approx(-0.25, abs=1e-15)


def formula(s, t, temperature=1.0, reverse=False, probs=False):
    """The definition, in float64."""
    q, not_q = (s / temperature).sigmoid(), (-s / temperature).sigmoid()
    p, not_p = (t, 1 - t) if probs else ((t / temperature).sigmoid(), (-t / temperature).sigmoid())
    a, b = ((q, not_q), (p, not_p)) if reverse else ((p, not_p), (q, not_q))
    return a[0] * (a[0] / b[0]).log() + a[1] * (a[1] / b[1]).log()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_binary_is_the_definition(reverse, probs, temperature, backend):
    s, t = torch.randn(40, dtype=F64) * 4, torch.randn(40, dtype=F64) * 4
    t = t.sigmoid() if probs else t
    tensors = s, t, torch.tensor(temperature, dtype=F64)

    def ours(s, t, temperature):
        kind = "probs" if probs else "logits"
        return ours_binary(s, t, temperature=temperature, reverse=reverse, target_type=kind, reduction="sum")

    def plain(s, t, temperature):
        return formula(s, t, temperature, reverse, probs).sum()

    found, expected = (results_of(f, tensors, (0, 1, 2)) for f in (ours, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_binary_of_equal_and_of_large_logits(reverse, dtype, backend):
    s = torch.tensor([1e4, -1e4, 0.3, 0.0, 1e4, -1e4, INF, -INF], dtype=dtype, requires_grad=True)
    t = s.detach().clone().requires_grad_()
    loss = binary_kl_div_with_logits(s, t, temperature=0.7, reverse=reverse, reduction="none")
    assert (loss == 0).all()
    for grad in torch.autograd.grad(loss.sum(), (s, t)):
        assert (grad == 0).all()
    # A certain side against an uncertain one, 1e4 apart
    large, zero = torch.tensor([1e4, -1e4], dtype=F64), torch.zeros(2, dtype=F64)
    expected = [1e4 / 2 - math.log(2)] * 2 if not reverse else [math.log(2)] * 2
    assert binary_kl_div_with_logits(large, zero, reverse=reverse, reduction="none").tolist() == pytest.approx(expected)


def test_binary_of_infinite_logits(backend):
    s = torch.tensor([0.0, INF, -INF, INF, 1.0], dtype=F64, requires_grad=True)
    t = torch.tensor([INF, 0.0, 1.0, -INF, -INF], dtype=F64, requires_grad=True)
    temperature = torch.tensor(1.0, dtype=F64, requires_grad=True)
    loss = binary_kl_div_with_logits(s, t, temperature=temperature, reduction="none")
    torch.testing.assert_close(loss.detach(), torch.tensor([math.log(2), INF, INF, INF, math.log1p(math.e)], dtype=F64))
    by_s, by_t, by_temperature = torch.autograd.grad(loss.sum(), (s, t, temperature))
    p = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(by_s, torch.tensor([-0.5, 0.5, -p, 1.0, p], dtype=F64))
    assert by_t.tolist() == [0.0] * 5
    assert by_temperature.item() == pytest.approx(-p, abs=1e-15)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("other", [INF, -INF])
def test_binary_of_nan_is_nan(reverse, other, backend):
    sides = torch.tensor([other, math.nan]), torch.tensor([math.nan, other])
    assert binary_kl_div_with_logits(*sides, reverse=reverse, reduction="none").isnan().all()


@pytest.mark.parametrize("reverse", [False, True])
def test_binary_of_hard_labels(reverse, backend):
    """The forward divergence is the binary cross-entropy; the reverse one excludes an outcome that q has."""
    s = torch.randn(10, dtype=F64, requires_grad=True)
    labels = torch.tensor([0.0, 1.0] * 5, dtype=F64, requires_grad=True)
    loss = binary_kl_div_with_logits(s, labels, target_type="probs", reverse=reverse)
    by_s, by_p = torch.autograd.grad(loss, (s, labels))
    assert (by_p == 0).all()
    if reverse:
        assert loss.item() == INF
        assert (by_s == 0).all()
        return
    expected = F.binary_cross_entropy_with_logits(s, labels.detach())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(by_s, torch.autograd.grad(expected, s)[0])


def test_the_temperature_leaves_probabilities_alone():
    s, p = torch.randn(5, dtype=F64), torch.rand(5, dtype=F64)
    found = binary_kl_div_with_logits(s, p, target_type="probs", temperature=4.0, reduction="none")
    torch.testing.assert_close(found, formula(s / 4, p, probs=True), rtol=1e-12, atol=1e-12)
