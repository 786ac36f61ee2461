"""Divergences with missing rows, classes or labels and infinite logits, and wrong calls."""

import math
from functools import partial

import pytest
import torch

from kdkernels.functional import distillation_loss, js_div_with_logits, kl_div_with_logits
from kdkernels.ops.softmax_divergence.cases import REDUCTIONS
from kdkernels.testing.selftest import results_of

F64 = torch.float64


def scalar(value):
    return torch.tensor(value, dtype=F64)


# Edges of the formulas, the same on every backend


@pytest.mark.parametrize("function", [kl_div_with_logits, js_div_with_logits, distillation_loss])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(backend, function, reduction):
    s = torch.randn(0, 5, requires_grad=True)
    loss = function(s, torch.randn(0, 5), reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    loss.sum().backward()
    assert loss.sum().item() == 0
    assert s.grad.shape == (0, 5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_rows_ignored(backend, reduction):
    s = torch.randn(3, 5)
    s[1] = math.nan
    s.requires_grad_()
    loss = distillation_loss(s, torch.randn(3, 5), torch.full((3,), -100), reduction=reduction)
    loss.sum().backward()
    assert loss.sum().item() == 0
    assert torch.equal(s.grad, torch.zeros(3, 5))


@pytest.mark.parametrize("function", [kl_div_with_logits, js_div_with_logits, distillation_loss])
def test_no_classes_raise(function):
    with pytest.raises(ValueError, match="0 classes"):
        function(torch.randn(3, 0), torch.randn(3, 0))


def test_masked_classes_add_nothing(backend):
    """-inf on both sides gives the same result as leaving out the class."""
    s, t = torch.randn(4, 9, dtype=F64), torch.randn(4, 9, dtype=F64)
    keep = [0, 2, 3, 5, 8]
    masked = [torch.full_like(x, -math.inf).index_copy(1, torch.tensor(keep), x[:, keep]) for x in (s, t)]
    for function in (kl_div_with_logits, partial(kl_div_with_logits, reverse=True), js_div_with_logits):
        small = results_of(function, (s[:, keep], t[:, keep]), (0, 1))
        large = results_of(function, tuple(masked), (0, 1))
        torch.testing.assert_close(large[0], small[0])
        for a, b in zip(large[1:], small[1:], strict=True):
            torch.testing.assert_close(a[:, keep], b)
            assert torch.equal(a[:, [1, 4, 6, 7]], torch.zeros(4, 4, dtype=F64))


def test_class_the_teacher_excludes(backend):
    """p = 0 < q: it adds nothing to KL(p || q), whose gradient there is q / T; KL(q || p) is infinite."""
    s, t = torch.randn(2, 4, dtype=F64), torch.randn(2, 4, dtype=F64)
    t[:, 1] = -math.inf
    p, q = t.softmax(1), s.softmax(1)
    keep = [0, 2, 3]
    loss, grad_s, grad_t = results_of(partial(kl_div_with_logits, reduction="sum"), (s, t), (0, 1))
    expected = (p[:, keep] * (p[:, keep].log() - q[:, keep].log())).sum()
    torch.testing.assert_close(loss, expected)
    cotangent = torch.randn((), generator=torch.Generator().manual_seed(1), dtype=F64)
    torch.testing.assert_close(grad_s, (q - p) * cotangent)
    assert torch.equal(grad_t[:, 1], torch.zeros(2, dtype=F64))
    assert grad_t.isfinite().all()
    reverse, grad_s, grad_t = results_of(partial(kl_div_with_logits, reverse=True), (s, t), (0, 1))
    assert reverse.item() == math.inf
    assert torch.equal(grad_s, torch.zeros_like(s))
    assert grad_t.isfinite().all()
    js, *gradients = results_of(js_div_with_logits, (s, t), (0, 1))
    assert 0 < js.item() <= math.log(2)
    assert all(g.isfinite().all() for g in gradients)


def test_class_the_student_excludes(backend):
    """q = 0 < p: KL(p || q) is infinite, not NaN, and the student's gradient stays -p / T."""
    s, t = torch.randn(2, 4, dtype=F64), torch.randn(2, 4, dtype=F64)
    s[:, 3] = -math.inf
    loss, grad_s, grad_t = results_of(partial(kl_div_with_logits, reduction="none"), (s, t), (0, 1))
    assert torch.equal(loss, torch.full((2,), math.inf, dtype=F64))
    assert grad_s.isfinite().all()
    assert (grad_s[:, 3] != 0).all()
    assert torch.equal(grad_t, torch.zeros_like(t))


def test_row_without_a_finite_logit_is_nan(backend):
    s, t = torch.randn(2, 40), torch.randn(2, 40)
    s[0] = -math.inf
    loss, grad = results_of(partial(kl_div_with_logits, reduction="none"), (s, t), (0,))
    assert loss[0].isnan()
    assert grad[0].isnan().all()
    assert loss[1].isfinite()
    assert grad[1].isfinite().all()


# Wrong calls


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((torch.randn(3, 4), torch.randn(3, 5)), {}, ValueError, r"input has shape \(3, 4\) and target \(3, 5\)"),
        ((torch.randn(3, 4), [1.0]), {}, TypeError, "target must be a tensor, got list"),
        ((torch.randint(0, 9, (3, 4)), torch.randn(3, 4)), {}, TypeError, "input must be float16.*int64"),
        ((torch.randn(2, 3, 4), torch.randn(2, 3, 4)), {}, ValueError, "dim is required"),
        ((torch.randn(3, 4), torch.randn(3, 4)), {"dim": 2}, ValueError, "dim is 2"),
        ((torch.randn(()), torch.randn(())), {}, ValueError, "no dimensions"),
        ((torch.randn(3, 4), torch.randn(3, 4)), {"reduction": "avg"}, ValueError, "reduction is 'avg'; accepted"),
        ((torch.randn(3, 4), torch.randn(3, 4)), {"temperature": 0}, ValueError, "temperature is 0"),
        ((torch.randn(3, 4), torch.randn(3, 4)), {"temperature": math.nan}, ValueError, "temperature is nan"),
        ((torch.randn(3, 4), torch.randn(3, 4)), {"temperature": "4"}, TypeError, "temperature must be a number"),
        ((torch.randn(3, 4), torch.randn(3, 4)), {"temperature": torch.ones(2)}, ValueError, "temperature must be"),
        ((torch.randn(3, 4), torch.randn(3, 4)), {"temperature": scalar(-1.0)}, ValueError, "temperature is -1.0"),
        ((torch.randn(3, 4), torch.randn(3, 4)), {"ce_weight": 0.5}, ValueError, "there are no labels"),
        (
            (torch.randn(3, 4), torch.randn(3, 4), torch.zeros(3)),
            {},
            ValueError,
            r"are probabilities.*labels\.long\(\)",
        ),
        ((torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1])), {}, ValueError, r"expected \(3,\)"),
        ((torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 4])), {}, IndexError, r"labels\[2\].* is 4"),
        ((torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, -1, 2])), {}, IndexError, r"labels\[1\].* is -1"),
        ((torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 2])), {"kd_weight": 1.0}, ValueError, "alone"),
        ((torch.randn(3, 4), torch.randn(3, 4)), {"divergence": "tv"}, ValueError, "divergence is 'tv'; accepted"),
        ((torch.randn(3, 4), torch.randn(3, 4)), {"divergence": "js", "beta": 1.5}, ValueError, "beta is 1.5"),
        ((torch.randn(3, 4), torch.randn(3, 4)), {"divergence": "js", "beta": scalar(2.0)}, ValueError, "beta is 2.0"),
        ((torch.randn(4, 3), torch.randn(4, 3)), {"dim": 0, "reduction": "batchmean"}, ValueError, "batchmean"),
    ],
)
def test_wrong_calls(backend, arguments, options, error, text):
    with pytest.raises(error, match=text):
        distillation_loss(*arguments, **options)


def test_a_weight_that_requires_grad_raises():
    s, t = torch.randn(3, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match="kd_weight requires grad"):
        distillation_loss(s, t, kd_weight=torch.tensor(1.0, requires_grad=True))
    with pytest.raises(ValueError, match="beta requires grad"):
        js_div_with_logits(s, t, beta=torch.tensor(0.5, requires_grad=True))
    with pytest.raises(ValueError, match=r"legacy_clamp=True is defined for beta=0\.5 only"):
        js_div_with_logits(s, t, beta=0.4, legacy_clamp=True)


def test_a_label_out_of_range_raises_when_compiled_too():
    function = torch.compile(distillation_loss, backend="aot_eager", fullgraph=True)
    with pytest.raises(IndexError, match="is 4; expected a class from 0 to 3"):
        function(torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 4]))


def test_returned_gradient_is_not_shared(backend):
    """The forward's gradient may become the grad of a leaf; writing to it must not change a later backward."""
    s, t, labels = torch.randn(6, 40, requires_grad=True), torch.randn(6, 40), torch.randint(0, 40, (6,))
    loss = distillation_loss(s, t, labels)
    loss.backward(retain_graph=True)
    first = s.grad.clone()
    s.grad.mul_(3)
    (second,) = torch.autograd.grad(loss, s, retain_graph=True)
    assert torch.equal(second, first)
    second.zero_()
    (doubled,) = torch.autograd.grad(2 * loss, s, retain_graph=True)
    torch.testing.assert_close(doubled, 2 * first)
    s.grad = None
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(s.grad, 2 * first)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_backward_gives_the_same_bits(backend, reduction):
    """Also if the incoming gradient is not 1; after the graph is freed, it raises."""
    s, t = torch.randn(6, 40, requires_grad=True), torch.randn(6, 40)
    loss = (kl_div_with_logits(s, t, temperature=3.0, reduction=reduction) * 0.3).sum()
    first, second = (torch.autograd.grad(loss, s, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.autograd.grad(loss, s)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, s)


def test_incoming_gradients_in_a_batch():
    s, t = torch.randn(6, 40, requires_grad=True), torch.randn(6, 40)
    loss = kl_div_with_logits(s, t)
    for _ in range(2):  # with the gradient that the forward saved, and without
        (batch,) = torch.autograd.grad(loss, s, torch.tensor([1.0, -2.0]), is_grads_batched=True, retain_graph=True)
        (one,) = torch.autograd.grad(loss, s, retain_graph=True)
        torch.testing.assert_close(batch, torch.stack([one, -2 * one]))
