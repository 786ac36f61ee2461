"""The divergence from a teacher's top classes: values derived by hand, in float64, and from the full divergence."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from extended import L, topk_divergence

from kdkernels.functional import kl_div_with_logits, topk_kl_div_with_logits, topk_teacher

F64 = torch.float64
TAILS = ("bucket", "renormalize", "ignore")


def both(function, *tensors):
    """Return a loss and its gradients by the given tensors."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


# Values derived by hand. Student: logits ln 1, ln 2, ln 5, so that q = 1/8, 2/8, 5/8; the teacher lists class 2 with
# 1/2 and class 0 with 1/4, so that p_R = 1/4 and q_R = 1/4.
STUDENT = torch.tensor([[1.0, 2.0, 5.0]], dtype=F64).log()
VALUES, INDICES = torch.tensor([[0.5, 0.25]], dtype=F64).log(), torch.tensor([[2, 0]])
LN = math.log


@pytest.mark.parametrize(
    ("tail", "reverse", "value", "by_input", "by_values"),
    [
        # 1/2 ln(4/5) + 1/4 ln 2 + 1/4 ln 1; q - p inside, q - q p_R / q_R = 0 outside
        # by ln p: p (ln(p/q) - ln(p_R/q_R))
        ("bucket", False, LN(0.8) / 2 + LN(2) / 4, [-1 / 8, 0, 1 / 8], [LN(0.8) / 2, LN(2) / 4]),
        # 5/8 ln(5/4) + 1/8 ln(1/2) + 1/4 ln 1
        ("bucket", True, 5 / 8 * LN(5 / 4) - LN(2) / 8, None, [0.5 - 5 / 8, 0.25 - 1 / 8]),
        # p' = 2/3, 1/3 and q' = 5/6, 1/6
        ("renormalize", False, 2 / 3 * LN(4 / 5) + LN(2) / 3, [-1 / 6, 0, 1 / 6], None),
        ("renormalize", True, 5 / 6 * LN(5 / 4) - LN(2) / 6, None, [-1 / 6, 1 / 6]),
        # q sum(p) - p
        ("ignore", False, LN(0.8) / 2 + LN(2) / 4, [3 / 32 - 1 / 4, 6 / 32, 15 / 32 - 1 / 2],
         [LN(0.8) / 2 + 0.5, LN(2) / 4 + 0.25]),
        ("ignore", True, 5 / 8 * LN(5 / 4) - LN(2) / 8, None, [-5 / 8, -1 / 8]),
    ],
)  # fmt: skip
def test_by_hand(tail, reverse, value, by_input, by_values, backend):
    def loss_of(x, v):
        return topk_kl_div_with_logits(x, v, INDICES, tail=tail, reverse=reverse)

    loss, of_input, of_values = both(loss_of, STUDENT, VALUES)
    assert loss.item() == pytest.approx(value, abs=1e-14)
    if by_input is None:  # q (u - mean of u), with the u of each class
        q = [1 / 8, 2 / 8, 5 / 8]
        u = {"bucket": [LN(1 / 2), 0.0, LN(5 / 4)], "ignore": [1 + LN(1 / 2), 0.0, 1 + LN(5 / 4)]}.get(tail)
        if tail == "renormalize":
            q, u = [1 / 6, 0.0, 5 / 6], [LN(1 / 2), 0.0, LN(5 / 4)]
        mean = sum(a * b for a, b in zip(q, u, strict=True))
        by_input = [a * (b - mean) for a, b in zip(q, u, strict=True)]
    torch.testing.assert_close(of_input[0], torch.tensor(by_input, dtype=F64), rtol=0, atol=1e-14)
    if by_values is None:  # p' (ratio - its mean)
        ratios = torch.tensor([LN(4 / 5), LN(2)], dtype=F64)
        p = torch.tensor([2 / 3, 1 / 3], dtype=F64)
        by_values = (p * (ratios - (p * ratios).sum())).tolist()
    torch.testing.assert_close(of_values[0], torch.tensor(by_values, dtype=F64), rtol=0, atol=1e-14)


def test_temperature_divides_logits_and_the_student_but_no_log_probabilities(backend):
    teacher = torch.randn(5, 9, dtype=F64)
    student = torch.randn(5, 9, dtype=F64)
    values, indices = teacher.topk(4)
    sums = (teacher / 3).logsumexp(-1)
    stored = topk_teacher(teacher, 4, temperature=3.0)
    torch.testing.assert_close(stored.values, values / 3 - sums.unsqueeze(-1))
    assert torch.equal(stored.indices, indices)
    for tail in TAILS:
        for reverse in (False, True):
            options = {"tail": tail, "reverse": reverse}
            of_logits = topk_kl_div_with_logits(
                student, values, indices, values_type="logits", target_logsumexp=sums, temperature=3.0, **options
            )
            of_log_probs = topk_kl_div_with_logits(student, *stored, temperature=3.0, **options)
            at_one = topk_kl_div_with_logits(student / 3, *stored, **options)
            torch.testing.assert_close(of_logits, of_log_probs, rtol=1e-13, atol=0)
            torch.testing.assert_close(at_one, of_log_probs, rtol=1e-13, atol=0)
    alone = topk_kl_div_with_logits(student, values, indices, values_type="logits", tail="renormalize", temperature=3.0)
    torch.testing.assert_close(alone, topk_kl_div_with_logits(student, *stored, tail="renormalize", temperature=3.0))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("classes", [1, 2, 3, 10, 1001])
def test_all_classes_give_the_full_divergence(classes, tail, reverse, backend):
    """With K = V there is no rest, and all tails are the divergence of the full rows."""
    student, teacher = (torch.randn(6, classes, dtype=F64, requires_grad=classes > 1) for _ in range(2))
    log_p = (teacher / 2).log_softmax(-1)
    order = torch.rand(6, classes).argsort(-1)
    values = log_p.gather(-1, order)
    loss = topk_kl_div_with_logits(
        student, values, order, temperature=2.0, tail=tail, reverse=reverse, reduction="none"
    )
    full = kl_div_with_logits(student, teacher, temperature=2.0, reverse=reverse, reduction="none")
    torch.testing.assert_close(loss, full, rtol=1e-12, atol=1e-14)
    if classes > 1:
        found, expected = (torch.autograd.grad(x.sum(), (student, teacher), retain_graph=True) for x in (loss, full))
        # With "ignore", p does not have to sum to 1, but log_softmax removes that direction.
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_bucket_is_a_lower_bound_that_rises_with_k():
    """Merging outcomes loses information, never adds any."""
    student, teacher = (torch.randn(50, 40, dtype=F64) * 3 for _ in range(2))
    for reverse in (False, True):
        full = kl_div_with_logits(student, teacher, reverse=reverse, reduction="none")
        before = torch.zeros_like(full)
        for k in (1, 2, 5, 20, 30, 40):
            loss = topk_kl_div_with_logits(student, *topk_teacher(teacher, k), reverse=reverse, reduction="none")
            assert (loss >= before - 1e-10).all()
            before = loss
        torch.testing.assert_close(before, full)


def test_the_common_form_goes_negative_where_the_bucket_does_not(backend):
    """A student that gives the listed classes more than the teacher does has nothing to lose in the common form."""
    values, indices = torch.tensor([[0.3, 0.2]]).log(), torch.tensor([[0, 1]])
    student = torch.tensor([[3.0, 3.0, 0.0, 0.0]])
    ignore = topk_kl_div_with_logits(student, values, indices, tail="ignore")
    bucket = topk_kl_div_with_logits(student, values, indices)
    assert ignore.item() < -0.1
    assert bucket.item() > 0.1


@pytest.mark.parametrize("reverse", [False, True])
def test_equal_rows(reverse, backend):
    logits = torch.randn(64, 500) * 3
    for dtype, most in ((torch.float32, 1e-6), (F64, 1e-14)):
        student = logits.to(dtype).requires_grad_()
        for k in (1, 20, 500):
            values, indices = topk_teacher(logits.to(dtype), k)
            for tail in ("bucket", "renormalize"):
                loss = topk_kl_div_with_logits(student, values, indices, tail=tail, reverse=reverse, reduction="none")
                assert (loss >= 0).all()
                assert (loss <= most).all()
                (grad,) = torch.autograd.grad(loss.sum(), student)
                assert grad.abs().max() <= most


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tail", TAILS)
def test_float64_equals_its_derivation(tail, reverse, backend):
    """To 1e-10, in value and gradients, with padding, a temperature and weights."""
    student = torch.randn(3, 4, 30, dtype=F64) * 3
    values, indices = topk_teacher(torch.randn(3, 4, 30, dtype=F64) * 2, 6, temperature=2.0)
    values[0, :, 4:], indices[0, :, 4:] = -torch.inf, -1
    weight = torch.rand(3, 4, dtype=F64)
    options = {"temperature": 2.0, "tail": tail, "reverse": reverse, "reduction": "mean"}
    loss, *gradients = both(
        lambda s, v: topk_kl_div_with_logits(s, v, indices, position_weight=weight, **options), student, values
    )
    arrays = [t.numpy().astype(L) for t in (student, values)]
    expected = topk_divergence(*arrays, indices.numpy(), L(1), position_weight=weight.numpy().astype(L), **options)
    for a, b in zip((loss, *gradients), expected, strict=False):
        np.testing.assert_allclose(a.numpy(), b.astype(float), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tiny_rest_of_the_student(dtype, backend):
    """q_R near 1e-12, which 1 minus the sum of the others loses: value and gradient keep their precision."""
    student = torch.full((1, 1000), -27.0 - LN(998))
    student[0, :2] = 0.0
    student = student.to(dtype)
    values, indices = torch.tensor([[0.25, 0.25]]).log(), torch.tensor([[0, 1]])
    z = student.double()
    q_rest = (z[0, 2:].logsumexp(-1) - z[0].logsumexp(-1)).exp().item()
    assert 5e-13 < q_rest < 2e-12
    loss, grad = both(lambda s: topk_kl_div_with_logits(s, values, indices), student)
    assert loss.item() == pytest.approx(0.5 * LN(0.5) + 0.5 * LN(0.5 / q_rest), rel=1e-6)
    torch.testing.assert_close(
        grad[0, 2:].double(),
        torch.full((998,), -0.5 / 998, dtype=F64),
        rtol=1e-2 if dtype == torch.bfloat16 else 1e-6,
        atol=0,
    )
    values = torch.tensor([[0.5, 0.5 - 1e-3]], dtype=F64).log()
    loss = topk_kl_div_with_logits(student, values, indices, reverse=True)
    p, p_rest = values.exp()[0], 1 - values.exp().sum().item()
    q = (z[0, :2] - z[0].logsumexp(-1)).exp()
    expected = (q * (q / p).log()).sum().item() + q_rest * LN(q_rest / p_rest)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_the_forms_that_users_write():
    """Of log-probabilities of the listed classes: Hinton's cross-entropy differs from "ignore" by a constant."""
    student = torch.randn(6, 50, dtype=F64, requires_grad=True)
    values, indices = topk_teacher(torch.randn(6, 50, dtype=F64), 5)
    soft = -(values.exp() * F.log_softmax(student, -1).gather(-1, indices)).sum(-1).mean()
    loss = topk_kl_div_with_logits(student, values, indices, tail="ignore")
    torch.testing.assert_close(loss, soft + (values.exp() * values).sum(-1).mean())
    found, expected = (torch.autograd.grad(x, student)[0] for x in (loss, soft))
    torch.testing.assert_close(found, expected)
