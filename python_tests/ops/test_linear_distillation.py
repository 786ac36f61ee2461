"""The loss of hidden states, against hand-derived values, whole logits in float64, and extended precision."""

import itertools
import math
from functools import partial

import extended
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import OpContract, of_cpu
from hypothesis import given
from hypothesis import strategies as st

import kdkernels
from bench.rivals import rivals_of
from kdkernels.functional import distillation_loss, linear_distillation_loss
from kdkernels.ops._cases import workload
from kdkernels.ops.linear_distillation.cases import eager, ours
from kdkernels.testing.comparison import enter
from kdkernels.testing.selftest import accuracy_of, results_of

F64 = torch.float64


def scalar(value):
    return torch.tensor(value, dtype=F64)


class TestLinearDistillation(OpContract):
    op = "linear_distillation"

    @classmethod
    def op_samples(cls):
        def sample(shape, hidden, classes, dtype, grad):
            sizes = ((*shape, 5), (classes, 5), (classes,), (*shape, hidden), (classes, hidden), (classes,))
            return [torch.randn(size, dtype=dtype).requires_grad_(grad) for size in sizes]

        shapes = [((4,), 3, 6, F64), ((2, 3), 7, 4, F64), ((0,), 2, 3, F64), ((3,), 4, 5, torch.bfloat16)]
        for i, ((shape, hidden, classes, dtype), grad) in enumerate(itertools.product(shapes, (False, True))):
            tensors = sample(shape, hidden, classes, dtype, grad)
            labels = torch.zeros(shape, dtype=torch.int64) if i % 2 else None
            reduction = ("sum", "none", "mean")[i % 3]
            numbers = (2.0, 0.5, 0.25, 0.5, 0.0)
            options = (1.5, 3.0, 1.0, 0.0, "js", "logits", "bucket", reduction, -100, True, i % 4 < 2, 1 << 20)
            common = (*tensors, labels, None, None, None, *map(scalar, numbers), *options)
            wanted = list(range(6)) if grad and reduction != "none" else []
            yield "linear_distillation", (*common, wanted)
            grad_output = torch.randn(shape if reduction == "none" else (), dtype=torch.float64 if dtype == F64 else
                                      torch.float32, requires_grad=grad)  # fmt: skip
            yield "linear_distillation_backward", (grad_output, *common, list(range(6)))

    @classmethod
    def extended(cls, case, arrays, cotangents):
        raise NotImplementedError("float64 is compared by test_in_extended_precision")

    def test_accuracy(self, case):
        """The bar of the kernels; the op has none of its own, so that the contract's test does not run."""
        for row in accuracy_of(case):
            assert row.passed, row

    def test_chunks_do_not_change_the_gradients_much(self, call):
        """One row at a time, against all at once."""
        whole = results_of(partial(call.function, memory_budget=1 << 30), call.inputs, call.differentiable)
        least = results_of(partial(call.function, memory_budget=least_budget(call)), call.inputs, call.differentiable)
        for a, b in zip(whole, least, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def least_budget(call):
    with pytest.raises(ValueError, match="needs at least") as error:
        call.function(*call.inputs, memory_budget=1)
    return int(str(error.value).partition("needs at least ")[2].partition(",")[0])


# Values derived by hand


def test_by_hand():
    """Logits (0, 0) and (ln 3, 0), as h W^T: q = (1/2, 1/2), p = (3/4, 1/4)."""
    h = torch.tensor([[2.0]], dtype=F64, requires_grad=True)
    w = torch.zeros(2, 1, dtype=F64, requires_grad=True)
    t = torch.tensor([[1.0, 1.0]], dtype=F64)
    v = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], dtype=F64)
    loss = linear_distillation_loss(h, w, t, v, temperature=1.0)
    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-15)
    loss.backward()
    assert h.grad.tolist() == [[0.0]]
    # dz = q - p = (-1/4, 1/4); dW = dz^T h
    torch.testing.assert_close(w.grad, torch.tensor([[-0.5], [0.5]], dtype=F64))


def test_cap_and_scale_by_hand():
    """One class of two: z = 3 tanh(2 (h w + b) / 3) beside -inf would be certain; beside 0 it is a logistic."""
    h = torch.tensor([[0.5]], dtype=F64, requires_grad=True)
    w = torch.tensor([[1.0], [0.0]], dtype=F64, requires_grad=True)
    b = torch.tensor([0.25, 0.0], dtype=F64, requires_grad=True)
    labels = torch.tensor([1])
    loss = linear_distillation_loss(
        h, w, None, labels=labels, linear_bias=b, logit_scale=2.0, softcap=3.0, kd_weight=0, ce_weight=1
    )
    z = 3 * math.tanh(0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(z)), abs=1e-15)
    loss.backward()
    slope = 2 * (1 - math.tanh(0.5) ** 2) / (1 + math.exp(-z))
    assert h.grad.item() == pytest.approx(slope, abs=1e-15)
    assert w.grad[0].item() == pytest.approx(0.5 * slope, abs=1e-15)
    assert b.grad[0].item() == pytest.approx(slope, abs=1e-15)


def test_in_extended_precision():
    """Loss and gradients in float64, with the product in 80 bits."""
    h, w, t, v = (torch.randn(*size, dtype=F64) for size in ((6, 4), (30, 4), (6, 5), (30, 5)))
    labels = torch.tensor([3, -100, 29, 0, 7, 7])
    options = {"temperature": 2.0, "divergence": "js", "kd_weight": 0.5, "ce_weight": 0.5, "memory_budget": 20000}
    loss, by_h, by_w, by_t, by_v = results_of(partial(ours, **options), (h, w, t, v, labels), (0, 1, 2, 3))
    hl, wl, tl, vl = (x.numpy().astype(np.longdouble) for x in (h, w, t, v))
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn((), generator=generator, dtype=F64).numpy()
    arrays = [hl @ wl.T, tl @ vl.T, labels.numpy()]
    value, dz, du = extended.softmax_divergence("js", arrays, cotangent, temperature=2.0, weights=(2.0, 0.5))
    for found, truth in ((loss, value), (by_h, dz @ wl), (by_w, dz.T @ hl), (by_t, du @ vl), (by_v, du.T @ tl)):
        assert np.abs(found.numpy() - truth).max() <= 1e-14 * max(1, np.abs(truth).max())


# The options of distillation_loss


def whole(h, w, t, v, y=None, **options):
    """The loss of whole logits."""
    return distillation_loss(h @ w.T, t @ v.T if v is not None else t, y, dim=-1, **options)


WEIGHTS = torch.tensor([[0.0, 2.0, 1.0, 0.5, 0.0], [1.0, 0.0, 3.0, 0.25, 1.0], [1.0] * 5], dtype=F64)
OPTIONS = [
    {},
    {"label_smoothing": 0.2},
    {"class_weight": torch.linspace(0.1, 2.0, 11)},
    {"label_smoothing": 0.3, "class_weight": torch.linspace(0.1, 2.0, 11, dtype=F64), "position_weight": WEIGHTS},
    {"position_weight": WEIGHTS > 0},
    {"ignore_index_in": "cross_entropy"},
    {"ignore_index_in": "cross_entropy", "position_weight": WEIGHTS, "class_weight": torch.linspace(0.1, 2.0, 11)},
    {"ignore_index": 3, "divergence": "reverse_kl"},
    {"divergence": "js", "beta": 0.3, "temperature": 1.0, "kd_weight": 2.0, "ce_weight": 0.0},
    {"temperature": torch.tensor(3.0), "kd_weight": torch.tensor(0.5), "ce_weight": np.float32(0.25)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(options) or "defaults")
@pytest.mark.parametrize("reduction", ["mean", "none", "sum", "batchmean"])
def test_equals_the_loss_of_whole_logits(options, reduction, backend):
    h, w, t, v = (torch.randn(*size, dtype=F64) for size in ((3, 5, 4), (11, 4), (3, 5, 6), (11, 6)))
    y = torch.randint(0, 11, (3, 5))
    y[0, 1], y[2, 2] = -100 if options.get("ignore_index") is None else 3, 3
    options = {**options, "reduction": reduction}
    budget = 12000 if backend == "native" else 60000
    found = results_of(
        partial(linear_distillation_loss, memory_budget=budget, **options), (h, w, t, v, y), (0, 1, 2, 3)
    )
    with kdkernels.set_backend("reference"):
        truth = results_of(partial(whole, **options), (h, w, t, v, y), (0, 1, 2, 3))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("target_type", ["logits", "log_probs", "probs"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("soft", [False, True])
def test_teacher_without_a_layer(target_type, divergence, soft):
    h, w, u = (torch.randn(*size, dtype=F64) for size in ((7, 4), (11, 4), (7, 11)))
    target = {"logits": u, "log_probs": u.log_softmax(-1), "probs": u.softmax(-1)}[target_type]
    y = torch.randn(7, 11, dtype=F64).softmax(-1) if soft else torch.randint(0, 11, (7,))
    options = {"divergence": divergence, "target_type": target_type}
    places = (0, 1, 2)
    found = results_of(lambda h, w, t: linear_distillation_loss(h, w, t, None, y, **options), (h, w, target), places)
    truth = results_of(lambda h, w, t: whole(h, w, t, None, y, **options), (h, w, target), places)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_teacher_with_a_cap_of_its_own():
    h, w, t, v = (torch.randn(*size, dtype=F64) for size in ((7, 4), (11, 4), (7, 6), (11, 6)))
    found = linear_distillation_loss(
        h, w, t, v, softcap=2.0, logit_scale=0.5, target_softcap=math.inf, target_logit_scale=3.0
    )
    truth = distillation_loss(2 * torch.tanh(0.5 * h @ w.T / 2), 3 * t @ v.T)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    found = linear_distillation_loss(h, w, t, v, softcap=2.0, logit_scale=0.5)
    truth = distillation_loss(2 * torch.tanh(0.5 * h @ w.T / 2), 2 * torch.tanh(0.5 * t @ v.T / 2))
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
def test_without_a_teacher_it_is_linear_cross_entropy(reduction):
    h, w = torch.randn(20, 8, dtype=F64), torch.randn(30, 8, dtype=F64)
    y = torch.randint(0, 30, (20,)).index_fill(0, torch.tensor([4, 9]), -100)

    def loss(h, w):
        return linear_distillation_loss(h, w, None, None, y, kd_weight=0, ce_weight=1, reduction=reduction)

    def torchs(h, w):
        return F.linear_cross_entropy(h, w, y, reduction=reduction)

    for a, b in zip(results_of(loss, (h, w), (0, 1)), results_of(torchs, (h, w), (0, 1)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@given(
    shape=st.sampled_from([(), (1,), (7,), (3, 5), (2, 1, 4), (0,), (2, 0)]),
    hidden=st.integers(0, 9),
    classes=st.integers(2, 40),
    budget=st.sampled_from([None, 90000, 200000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kind=st.sampled_from(["forward_kl", "reverse_kl", "js"]),
    reduction=st.sampled_from(["mean", "none", "sum"]),
    with_labels=st.booleans(),
    biased=st.booleans(),
    softcap=st.sampled_from([None, 1.5]),
    seed=st.integers(0, 2**16),
)
def test_any_combination(
    shape, hidden, classes, budget, dtype, kind, reduction, with_labels, biased, softcap, seed
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator).to(dtype)

    y = torch.randint(0, classes, shape, generator=generator) if with_labels else None
    inputs = (draw(*shape, hidden), draw(classes, hidden), draw(*shape, 5), draw(classes, 5))
    biases = (draw(classes), draw(classes)) if biased else ()
    options = {"divergence": kind, "reduction": reduction, "kd_weight": 0.5, "ce_weight": 0.5 if with_labels else 0.0}
    options |= {"softcap": softcap, "memory_budget": budget}

    def call(function, h, w, t, v, *biases):
        return function(h, w, t, v, y, *biases, **options)

    places = tuple(range(4 + len(biases)))
    found = results_of(partial(call, ours), (*inputs, *biases), places)
    truth = results_of(partial(call, eager), (*inputs, *biases), places, F64)
    if 0 in shape and reduction == "mean":
        assert found[0] == 0
        truth[0] = torch.zeros((), dtype=F64)
        truth[1:] = [torch.zeros_like(x) for x in truth[1:]]
    for a, b in zip(found, truth, strict=True):
        scale = max(1e-30, b.abs().max().item() if b.numel() else 0.0)
        allowed = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[a.dtype] * 1.5
        assert a.shape == b.shape
        assert not a.numel() or (a.double() - b).abs().max() <= allowed * scale + 1e-6


@of_cpu
def test_module_finds_the_backend_of_the_logits(backend):
    """With every backend, the chosen one computes the loss of the chunks."""
    used = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            used.append(str(func))
            return func(*args, **(kwargs or {}))

    h, w = torch.randn(6, 4), torch.randn(9, 4)
    with Recorder():
        linear_distillation_loss(h, w, h, w)
    assert f"kdkernels.linear_distillation.{backend}" in used


@of_cpu
def test_the_chunked_function_of_torch_is_a_rival():
    """Its results are right, so that the benchmark times it."""
    row = workload("linear_distillation_loss", (96, 3000), torch.float32, "cross-entropy")
    rivals, missing = rivals_of(row, "cpu")
    assert not missing
    contest = enter(row, "cpu", {"kdkernels": "auto"}, rivals, {})
    assert set(contest.passes) == {"kdkernels", "eager", "F.linear_cross_entropy"}
