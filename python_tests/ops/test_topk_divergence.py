"""The divergence from a teacher of whom only the likeliest classes are known: the contract, and values by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import OpContract, of_cpu
from extended import L
from hypothesis import given
from hypothesis import strategies as st

import kdkernels
from kdkernels.functional import kl_div_with_logits, topk_kl_div_with_logits, topk_teacher
from kdkernels.ops._cases import layouts

F64 = torch.float64
TAILS = ("bucket", "renormalize", "ignore")


class TestTopKDivergence(OpContract):
    op = "topk_divergence"

    @classmethod
    def op_samples(cls):
        x = torch.randn(4, 3, 10)
        options = [("bucket", False, "mean"), ("renormalize", True, "none"), ("ignore", False, "sum")]
        options += [("bucket", True, "batchmean"), ("ignore", True, "none"), ("renormalize", False, "mean")]
        inputs = [x, x.transpose(0, 1), x[..., ::2], x[0, 0], x[:0], x.bfloat16()]
        for i, (input, given_) in enumerate(zip(inputs, options, strict=True)):
            shape = (*input.shape[:-1], 2)
            indices = torch.tensor([4, 1]).expand(shape).clone()
            weight = torch.rand(input.shape[:-1]) if i % 2 else None
            for grad in (True, False):
                input = input.detach().requires_grad_(grad)
                values = torch.randn(shape).log_softmax(-1).sub(0.5).requires_grad_(grad)
                arguments = (input, values, indices, weight, torch.tensor(2.0, dtype=F64), *given_)
                yield "topk_divergence", (*arguments, bool(i % 3))
                plain = (a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
                with kdkernels.set_backend(cls.backends()[0]):
                    backend = getattr(torch.ops.kdkernels.topk_divergence, cls.backends()[0])
                loss, _, _, rest = backend(*plain, False)
                incoming = torch.randn_like(loss).requires_grad_(grad)
                for wanted in ((True, True), (True, False), (False, True)):
                    yield "topk_divergence_backward", (incoming, rest, *arguments, *wanted)

    @classmethod
    def extended(cls, case, arrays, cotangents):
        options = dict(case.function.keywords)
        names = options.pop("names", ())
        more = dict(zip(names, arrays[3:], strict=True))
        loss, *gradients = extended(*arrays[:3], cotangents[0], **more, **options)
        return [loss, *(gradients[{0: 0, 1: 1, 3: 2}[i]] for i in case.differentiable)]

    def test_inductor(self):
        for call in (self.calls()[0], self.calls()[6]):
            self._check_compiled(call, "inductor", None)


def extended(
    z, v, indices, cotangent, *, temperature=1.0, values_type="log_probs", target_logsumexp=None, tail="bucket",
    reverse=False, position_weight=None, reduction="mean",
):  # fmt: skip
    """Return loss and gradients of input, values and target_logsumexp in extended precision, outcome by outcome.

    The outcomes are the listed classes and one for the rest, whose logit is the log-sum-exp of its classes.
    """
    temperature, positions = L(temperature), z.shape[:-1]
    shape = z.shape[-1:], v.shape[-1:]
    z, v, indices = z.reshape(-1, *shape[0]), v.reshape(-1, *shape[1]), indices.reshape(-1, *shape[1])
    sums = np.zeros(len(z), L) if target_logsumexp is None else target_logsumexp.reshape(-1)
    weight = np.ones(len(z), L) if position_weight is None else position_weight.reshape(-1)
    divisor = {"mean": weight.sum(), "batchmean": L((*positions, 1)[0] if positions else shape[0][0])}.get(reduction, L(1))
    scale = weight / divisor * (cotangent.reshape(-1) if reduction == "none" else cotangent)
    losses, by_z, by_v = np.zeros(len(z), L), np.zeros_like(z), np.zeros_like(v)
    for i in range(len(z)):
        kept = np.flatnonzero(v[i] != -np.inf)
        at = indices[i, kept]
        others = np.setdiff1d(np.arange(z.shape[1]), at)
        s = z[i] / temperature
        log_p = v[i, kept] / temperature - sums[i] if values_type == "logits" else v[i, kept]
        value, dz, dv = _outcomes(s, log_p, at, others, tail, reverse)
        losses[i] = weight[i] * value
        by_z[i] = scale[i] * dz / temperature
        by_v[i, kept] = scale[i] * dv
    loss = losses.reshape(positions) if reduction == "none" else losses.sum() / divisor
    by_sums = -by_v.sum(-1)
    if values_type == "logits":
        by_v = by_v / temperature
    return loss, by_z.reshape(*positions, *shape[0]), by_v.reshape(*positions, *shape[1]), by_sums.reshape(positions)


def _outcomes(s, log_p, at, others, tail, reverse):
    """Return the divergence of a row, T times its gradient by the logits, and that by log_p."""
    of = np.concatenate((at, others)) if tail != "renormalize" else at
    largest = s[of].max()
    log_total = largest + np.log(np.exp(s[of] - largest).sum())
    p, log_q = np.exp(log_p), s[at] - log_total
    if tail == "renormalize":
        log_p = log_p - np.log(p.sum())
        p = np.exp(log_p)
    q = np.exp(log_q)
    q_others = np.exp(s[others] - log_total) if tail != "renormalize" else np.zeros(len(others), L)
    q_rest, p_rest = q_others.sum(), max(L(0), 1 - p.sum())
    rest = tail == "bucket" and len(others) > 0
    dz = np.zeros_like(s)
    if not reverse:
        value = (p * (log_p - log_q)).sum()
        dv = p * (log_p - log_q + 1)
        mass = p.sum()
        if rest and p_rest > 0:
            ratio = np.log(p_rest / q_rest)
            value, dv, mass = value + p_rest * ratio, dv - p * (ratio + 1), L(1)
        dz[at] = mass * q - p
        dz[others] = q_others * (mass - (p_rest / q_rest if rest else 0))
    else:
        slope = log_q - log_p + 1
        value, dv = (q * (log_q - log_p)).sum(), -q
        rest_slope = L(0)
        if rest:
            value, rest_slope = value + q_rest * np.log(q_rest / p_rest), np.log(q_rest / p_rest) + 1
            dv = dv + p * q_rest / p_rest
        mean = (q * slope).sum() + q_rest * rest_slope
        dz[at], dz[others] = q * (slope - mean), q_others * (rest_slope - mean)
    if tail == "renormalize":
        dv = dv - p * dv.sum()
    return max(value, L(0)) if tail != "ignore" else value, dz, dv


def both(function, *tensors):
    """Return a loss and its gradients by the given tensors."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


# Values derived by hand. Student: logits ln 1, ln 2, ln 5, so that q = 1/8, 2/8, 5/8; the teacher lists class 2 with 1/2
# and class 0 with 1/4, so that p_R = 1/4 and q_R = 1/4.
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
        ("ignore", False, LN(0.8) / 2 + LN(2) / 4, [3 / 32 - 1 / 4, 6 / 32, 15 / 32 - 1 / 2], [LN(0.8) / 2 + 0.5, LN(2) / 4 + 0.25]),
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
    loss = topk_kl_div_with_logits(student, values, order, temperature=2.0, tail=tail, reverse=reverse, reduction="none")
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
        for k in (1, 2, 5, 20, 39, 40):
            loss = topk_kl_div_with_logits(student, *topk_teacher(teacher, k), reverse=reverse, reduction="none")
            assert (loss >= before - 1e-12).all()
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
    expected = extended(*arrays, indices.numpy(), L(1), position_weight=weight.numpy().astype(L), **options)
    for a, b in zip((loss, *gradients), expected, strict=False):
        np.testing.assert_allclose(a.numpy(), b.astype(float), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tiny_rest_of_the_student(dtype, backend):
    """q_R near 1e-12, which 1 minus the sum of the others loses: value and gradient of the rest keep their precision."""
    student = torch.full((1, 1000), -27.0 - LN(998))
    student[0, :2] = 0.0
    student = student.to(dtype)
    values, indices = torch.tensor([[0.25, 0.25]]).log(), torch.tensor([[0, 1]])
    z = student.double()
    q_rest = (z[0, 2:].logsumexp(-1) - z[0].logsumexp(-1)).exp().item()
    assert 5e-13 < q_rest < 2e-12
    loss, grad = both(lambda s: topk_kl_div_with_logits(s, values, indices), student)
    assert loss.item() == pytest.approx(0.5 * LN(0.5) + 0.5 * LN(0.5 / q_rest), rel=1e-6)
    torch.testing.assert_close(grad[0, 2:].double(), torch.full((998,), -0.5 / 998, dtype=F64), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    values = torch.tensor([[0.5, 0.5 - 1e-3]]).log()
    loss = topk_kl_div_with_logits(student, values, indices, reverse=True)
    p, p_rest = values.double().exp()[0], 1 - values.double().exp().sum().item()
    q = (z[0, :2] - z[0].logsumexp(-1)).exp()
    expected = (q * (q / p).log()).sum().item() + q_rest * LN(q_rest / p_rest)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# Layouts and dtypes


def test_shifted_slices_are_read_where_they_lie(monkeypatch):
    """Logits of a language model without their last position: neither they nor their gradient are copied."""
    logits = torch.randn(2, 6, 50, requires_grad=True)
    values, indices = topk_teacher(torch.randn(2, 6, 50), 4)
    shifted = logits[:, :-1]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = topk_kl_div_with_logits(shifted, values[:, 1:], indices[:, 1:])
    assert logits.data_ptr() in {t.data_ptr() for t in saved}
    loss.backward()
    plain, grad = both(
        lambda s: topk_kl_div_with_logits(s, values[:, 1:].clone(), indices[:, 1:].clone()), shifted.contiguous()
    )
    assert torch.equal(loss, plain)
    assert torch.equal(logits.grad[:, :-1], grad)
    assert not logits.grad[:, -1].any()


@of_cpu
def test_memory_beyond_the_gradient(monkeypatch):
    """K numbers per position or fewer, forward and backward."""
    rows, classes, k = 16, 4000, 10
    student = torch.randn(rows, classes, requires_grad=True)
    values, indices = topk_teacher(torch.randn(rows, classes), k)
    sizes = []
    with torch.autograd.profiler.profile(profile_memory=True, use_cpu=True) as profile:
        topk_kl_div_with_logits(student, values, indices).backward()
    sizes = sorted(event.cpu_memory_usage for event in profile.function_events if event.cpu_memory_usage > 0)
    assert sizes[-1] >= 4 * rows * classes
    assert 4 * rows * classes == student.grad.numel() * 4
    large = [size for size in sizes if size > 8 * rows * k]
    assert all(4 * rows * classes <= size <= 4 * rows * classes + 8 * rows * k for size in large)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_dtypes_of_the_results(dtype, backend):
    student = torch.randn(3, 20).to(dtype).requires_grad_()
    values, indices = topk_teacher(torch.randn(3, 20), 4)
    values = values.to(dtype).requires_grad_()
    result = topk_kl_div_with_logits(student, values, indices.int(), return_masses=True)
    expected = F64 if dtype == F64 else torch.float32
    assert [t.dtype for t in result] == [expected] * 3
    assert (result.target_mass.shape, result.input_mass.shape) == ((3,), (3,))
    by_input, by_values = torch.autograd.grad(result.loss, (student, values))
    assert (by_input.dtype, by_values.dtype) == (dtype, dtype)
    p, q = values.double().exp(), student.double().softmax(-1).gather(-1, indices)
    torch.testing.assert_close(result.target_mass.double(), p.sum(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(result.input_mass.double(), q.sum(-1), rtol=1e-6, atol=0)
    assert not result.target_mass.requires_grad
    assert not result.input_mass.requires_grad


@given(
    positions=st.sampled_from([(), (1,), (7,), (2, 3), (0,), (2, 1, 3)]),
    classes=st.sampled_from([1, 2, 3, 10, 33, 257, 1000]),
    share=st.floats(0, 1),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "offset"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, F64]),
    tail=st.sampled_from(TAILS),
    reverse=st.booleans(),
    masked=st.booleans(),
    reduction=st.sampled_from(["none", "mean", "sum", "batchmean"]),
    seed=st.integers(0, 2**16),
)
def test_any_combination(positions, classes, share, layout, dtype, tail, reverse, masked, reduction, seed):
    generator = torch.Generator().manual_seed(seed)
    k = max(1, round(share * classes))
    logits = torch.randn((*positions, classes), generator=generator, dtype=F64).mul(2).to(dtype)
    student = layouts(logits)[layout] if logits.dim() > 1 else logits
    values, indices = topk_teacher(torch.randn((*positions, classes), generator=generator, dtype=F64), k)
    padding = torch.rand(values.shape, generator=generator) < 0.2
    values = values.masked_fill(padding, -torch.inf).to(dtype)
    indices = indices.masked_fill(padding, 10**9)
    weight = torch.rand(positions, generator=generator) if masked else None
    if weight is not None and weight.numel() > 1:
        weight.view(-1)[0] = 0.0
        student = student.clone()
        student.view(-1, classes)[0] = torch.nan
    options = {"temperature": 1.5, "tail": tail, "reverse": reverse, "reduction": reduction, "return_masses": True}

    def results(s, v, w):
        leaves = s.detach().requires_grad_(), v.detach().requires_grad_()
        out = topk_kl_div_with_logits(*leaves, indices, position_weight=w, **options)
        return *out, *torch.autograd.grad(out.loss.sum(), leaves)

    found = results(student, values, weight)
    with kdkernels.set_backend("reference"):
        truth = results(student.double(), values.double(), None if weight is None else weight.double())
    for i, (a, b) in enumerate(zip(found, truth, strict=True)):
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(a.dtype, 2e-4 if i == 0 else 1e-4)
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite)
        scale = b[finite].abs().max().item() if finite.any() else 0.0
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance * max(scale, 1e-3), equal_nan=True)


def test_bfloat16_student_equals_its_float32_copy():
    student = torch.randn(4, 3, 1000).bfloat16()
    values, indices = topk_teacher(torch.randn(4, 3, 1000), 16)
    assert torch.equal(
        topk_kl_div_with_logits(student, values, indices, reduction="none"),
        topk_kl_div_with_logits(student.float(), values, indices, reduction="none"),
    )


def test_the_forms_that_users_write():
    """Of log-probabilities of the listed classes: Hinton's cross-entropy differs from "ignore" by a constant."""
    student = torch.randn(6, 50, dtype=F64, requires_grad=True)
    values, indices = topk_teacher(torch.randn(6, 50, dtype=F64), 5)
    soft = -(values.exp() * F.log_softmax(student, -1).gather(-1, indices)).sum(-1).mean()
    loss = topk_kl_div_with_logits(student, values, indices, tail="ignore")
    torch.testing.assert_close(loss, soft + (values.exp() * values).sum(-1).mean())
    found, expected = (torch.autograd.grad(x, student)[0] for x in (loss, soft))
    torch.testing.assert_close(found, expected)
