"""The divergence from a teacher's top classes: infinities, rounding, padding, weights, and nothing at all."""

import math

import pytest
import torch

from kdkernels.functional import topk_kl_div_with_logits, topk_teacher

F64 = torch.float64
TAILS = ("bucket", "renormalize", "ignore")
INF, NAN, LN = math.inf, math.nan, math.log


def logs(*probabilities):
    return torch.tensor([probabilities], dtype=F64).log()


def with_gradient(input, values, indices, **options):
    """Return the loss and its gradients by the logits and the values."""
    leaves = input.detach().clone().requires_grad_(), values.detach().clone().requires_grad_()
    loss = topk_kl_div_with_logits(*leaves, torch.as_tensor(indices), **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


def assert_near(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=0, atol=1e-14)


# Infinities, by hand. The student is q = 1/8, 2/8, 5/8 unless said otherwise.
STUDENT = logs(1, 2, 5)


def test_no_probability_is_left_for_the_rest(backend):
    """p_R = 0 and q_R = 1/4: the bucket adds 0 forward, and the gradient outside is q_j."""
    loss, by_input, by_values = with_gradient(STUDENT, logs(0.5, 0.5), [[2, 0]])
    assert loss.item() == pytest.approx(0.5 * LN(0.8) + 0.5 * LN(4), abs=1e-14)
    assert_near(by_input, [[1 / 8 - 1 / 2, 2 / 8, 5 / 8 - 1 / 2]])
    assert_near(by_values, [[0.5 * LN(0.8) + 0.5, 0.5 * LN(4) + 0.5]])


def test_no_probability_is_left_for_the_rest_in_reverse(backend):
    """+inf by the formula. There is no direction to follow for the student; the teacher's gradient is -q."""
    loss, by_input, by_values = with_gradient(STUDENT, logs(0.5, 0.5), [[2, 0]], reverse=True)
    assert loss.item() == INF
    assert_near(by_input, [[0.0, 0.0, 0.0]])
    assert_near(by_values, [[-5 / 8, -1 / 8]])


def test_the_student_leaves_nothing_for_the_rest(backend):
    """q_R = 0: forward +inf if the teacher leaves something, with the gradient q - p inside; reverse a plain number."""
    student = torch.tensor([[0.0, -INF, 0.0]], dtype=F64)
    values, indices = logs(0.5, 0.25), [[2, 0]]
    loss, by_input, by_values = with_gradient(student, values, indices)
    assert loss.item() == INF
    assert_near(by_input, [[0.5 - 0.25, 0.0, 0.0]])
    assert_near(by_values, [[0.0, 0.0]])
    loss, by_input, by_values = with_gradient(student, values, indices, reverse=True)
    assert loss.item() == pytest.approx(0.5 * LN(1) + 0.5 * LN(2), abs=1e-14)
    # u = ln 1, ln 2 with the mean ln(2) / 2
    assert_near(by_input, [[LN(2) / 4, 0.0, -LN(2) / 4]])
    assert_near(by_values, [[-0.5, -0.5]])
    loss, by_input, _ = with_gradient(student, logs(0.5, 0.5), indices)
    assert loss.item() == pytest.approx(0.0, abs=1e-14)
    assert_near(by_input, [[0.0, 0.0, 0.0]])


@pytest.mark.parametrize("tail", TAILS)
def test_the_student_gives_nothing_to_a_listed_class(tail, backend):
    student = torch.tensor([[0.0, -INF, 0.0, 0.0]], dtype=F64)
    values, indices = logs(0.4, 0.2), [[0, 1]]
    loss, by_input, by_values = with_gradient(student, values, indices, tail=tail)
    assert loss.item() == INF
    assert_near(by_values, [[0.0, 0.0]])
    # q = 1/3, 0 inside and 2/3 outside; p_R = 0.4; renormalized p = 2/3, 1/3 and q = 1, 0
    rest = {"bucket": (2 / 3 - 0.4) / 2, "renormalize": 0.0, "ignore": 0.6 / 3}[tail]
    p = (2 / 3, 1 / 3) if tail == "renormalize" else (0.4, 0.2)
    q, mass = (1.0 if tail == "renormalize" else 1 / 3), (0.6 if tail == "ignore" else 1.0)
    assert_near(by_input, [[q * mass - p[0], -p[1], rest, rest]])
    loss, by_input, by_values = with_gradient(student, values, indices, tail=tail, reverse=True)
    assert loss.isfinite()
    assert by_input.isfinite().all()
    assert by_input[0, 1] == 0
    assert by_values.isfinite().all()


def test_a_row_without_a_finite_logit_gives_nan(backend):
    loss = topk_kl_div_with_logits(torch.full((1, 3), -INF), torch.tensor([[-1.0]]), torch.tensor([[1]]))
    assert loss.isnan()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("at", [0, 2])
def test_nan_passes(bad, at, backend):
    student = torch.zeros(2, 400)
    student[0, at] = bad
    values, indices = torch.full((2, 2), -1.5), torch.tensor([[0, 1], [0, 1]])
    for reverse in (False, True):
        loss, by_input, _ = with_gradient(student, values, indices, reverse=reverse, reduction="none")
        assert loss[0].isnan()
        assert loss[1].isfinite()
        assert by_input[0].isnan().all()
        assert by_input[1].isfinite().all()


def test_renormalized_does_not_look_at_other_logits(backend):
    student = torch.tensor([[0.0, NAN, LN(3)]], dtype=F64)
    loss, by_input, _ = with_gradient(student, logs(0.1, 0.1), [[0, 2]], tail="renormalize")
    assert loss.item() == pytest.approx(0.5 * LN(2) + 0.5 * LN(2 / 3), abs=1e-14)
    assert_near(by_input, [[-0.25, 0.0, 0.25]])


@pytest.mark.parametrize("excess", [1e-7, 0.02])
def test_probabilities_that_add_up_to_more_than_1(excess, backend):
    """As stored in 16 bits: the formula as it is, without a rest, and never below 0."""
    p = [0.5 + excess, 0.5]
    loss, by_input, _ = with_gradient(STUDENT, logs(*p), [[2, 0]])
    assert loss.item() == pytest.approx(p[0] * LN(p[0] / (5 / 8)) + p[1] * LN(4), abs=1e-14)
    assert_near(by_input, [[sum(p) / 8 - 0.5, sum(p) / 4, sum(p) * 5 / 8 - p[0]]])
    # With K = V, the student at p / sum(p): sum(p) ln(sum(p)) forward; reverse, -ln(sum(p)) < 0 is bounded
    student = logs(*p)
    loss, by_input, _ = with_gradient(student, logs(*p), [[0, 1]])
    assert loss.item() == pytest.approx(sum(p) * LN(sum(p)), abs=1e-14)
    assert_near(by_input, [[0.0, 0.0]])
    loss, by_input, _ = with_gradient(student, logs(*p), [[0, 1]], reverse=True)
    assert loss.item() == 0.0
    assert_near(by_input, [[0.0, 0.0]])


def test_all_classes_with_less_than_all_probability(backend):
    """Without other classes there is no rest, whatever is missing from the sum."""
    student = logs(0.25, 0.75)
    loss, by_input, _ = with_gradient(student, logs(0.5, 0.5 - 1e-6), [[1, 0]])
    assert loss.item() == pytest.approx(0.5 * LN(0.5 / 0.75) + (0.5 - 1e-6) * LN((0.5 - 1e-6) / 0.25), abs=1e-14)
    assert_near(by_input, [[(1 - 1e-6) * 0.25 - (0.5 - 1e-6), (1 - 1e-6) * 0.75 - 0.5]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [3, 20])
def test_never_negative_after_rounding_to_16_bits(dtype, k, backend):
    teacher = torch.randn(2000, 20) * 3
    stored = topk_teacher(teacher, k)
    values, indices = stored.values.to(dtype), stored.indices.int()
    assert (values.double().exp().sum(-1) > 1).any() == (k == 20)
    for tail in ("bucket", "renormalize"):
        for reverse in (False, True):
            loss = topk_kl_div_with_logits(teacher, values, indices, tail=tail, reverse=reverse, reduction="none")
            assert (loss >= 0).all()


# Padding and weights


@pytest.mark.parametrize("index", [0, 2, -1, 10**12])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tail", TAILS)
def test_padding_is_as_if_it_were_not_there(tail, reverse, index, backend):
    options = {"tail": tail, "reverse": reverse, "temperature": 2.0}
    student, values = torch.randn(1, 6, dtype=F64), logs(0.5, 0.2)
    plain = with_gradient(student, values, [[2, 0]], **options)
    padded_values = torch.cat((values[:, :1], torch.tensor([[-INF]], dtype=F64), values[:, 1:]), 1)
    loss, by_input, by_values = with_gradient(student, padded_values, [[2, index, 0]], **options)
    torch.testing.assert_close(loss, plain[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(by_input, plain[1], rtol=1e-13, atol=1e-16)
    torch.testing.assert_close(by_values[:, [0, 2]], plain[2], rtol=1e-13, atol=1e-16)
    assert by_values[0, 1] == 0


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tail", TAILS)
def test_padding_alone_is_0(tail, reverse, backend):
    student, values = torch.randn(2, 5, dtype=F64), torch.full((2, 3), -INF, dtype=F64)
    options = {"tail": tail, "reverse": reverse, "reduction": "none"}
    loss, by_input, by_values = with_gradient(student, values, [[0, 0, -5]] * 2, **options)
    assert_near(loss, [0.0, 0.0])
    assert_near(by_input, torch.zeros(2, 5))
    assert_near(by_values, torch.zeros(2, 3))


@pytest.mark.parametrize(("reduction", "divisor"), [("none", 1), ("sum", 1), ("mean", 2.5), ("batchmean", 3)])
@pytest.mark.parametrize("tail", TAILS)
def test_weights(tail, reduction, divisor, backend):
    student, teacher = torch.randn(3, 1, 6, dtype=F64), torch.randn(3, 1, 6, dtype=F64)
    values, indices = topk_teacher(teacher, 2)
    each, by_input, by_values = with_gradient(student, values, indices, tail=tail, reduction="none")
    weight = torch.tensor([[2.0], [0.0], [0.5]], dtype=F64)
    student[1], values[1], indices[1] = NAN, NAN, 77
    found = with_gradient(student, values, indices, tail=tail, reduction=reduction, position_weight=weight)
    expected = weight * each if reduction == "none" else (weight * each).sum() / divisor
    torch.testing.assert_close(found[0], expected, rtol=1e-13, atol=0)
    for a, b in zip(found[1:], (by_input, by_values), strict=True):
        torch.testing.assert_close(a, b * weight.unsqueeze(-1) / divisor, rtol=1e-13, atol=1e-16)


def test_a_rest_that_underflows_adds_nothing(backend):
    """The student's rest is e^-1e4, 0 in any dtype, where p_R = 0: an outcome without weight."""
    loss, by_input, _ = with_gradient(torch.tensor([[1e4, 0.0, 0.0]], dtype=F64), logs(1.0), [[0]], reverse=True)
    assert loss.item() == 0
    assert not by_input.any()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("unlisted", [NAN, INF])
def test_renormalized_logits_that_are_not_listed_do_not_matter(reverse, unlisted, backend):
    options = {"tail": "renormalize", "reverse": reverse, "return_masses": True}
    student = logs(1, 2, 5).requires_grad_()
    expected = torch.autograd.grad(
        topk_kl_div_with_logits(student, logs(0.3, 0.5), torch.tensor([[0, 2]]), **options)[0], student
    )
    with torch.no_grad():
        student[0, 1] = unlisted
    found = torch.autograd.grad(
        topk_kl_div_with_logits(student, logs(0.3, 0.5), torch.tensor([[0, 2]]), **options)[0], student
    )
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_everything_masked(reduction, backend):
    student, values = torch.full((2, 3, 6), NAN), torch.full((2, 3, 2), NAN)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    options = {"position_weight": mask, "reduction": reduction, "return_masses": True}
    leaf = student.requires_grad_()
    loss, *masses = topk_kl_div_with_logits(leaf, values, torch.full((2, 3, 2), 9), **options)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert not loss.any()
    assert not grad.any()
    assert not any(mass.any() for mass in masses)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_no_positions(shape, reduction, backend):
    student = torch.empty(shape, requires_grad=True)
    values, indices = topk_teacher(torch.empty(shape), 2)
    assert values.shape == (*shape[:-1], 2)
    loss = topk_kl_div_with_logits(student, values, indices, reduction=reduction)
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    loss.sum().backward()
    assert student.grad.shape == shape
    assert loss.sum() == 0
