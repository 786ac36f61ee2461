"""Divergences between softmax distributions and the distillation loss."""

import math
from functools import partial

import extended
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import KERNEL_BACKEND, TARGET, OpContract, of_kernels
from hypothesis import given
from hypothesis import strategies as st

import kdkernels
from kdkernels.functional import distillation_loss, js_div_with_logits, kl_div_with_logits
from kdkernels.ops._cases import layouts
from kdkernels.ops.softmax_divergence.cases import (
    CLASSES,
    DIVERGENCES,
    REDUCTIONS,
    TEMPERATURES,
    eager_loss,
)  # fmt: skip
from kdkernels.testing.selftest import error_in_ulp, results_of

F64 = torch.float64


def scalar(value):
    return torch.tensor(value, dtype=F64)


class TestSoftmaxDivergence(OpContract):
    op = "softmax_divergence"

    @classmethod
    def op_samples(cls):
        x = torch.randn(2, 5, 3, 4)
        pairs = [
            (torch.randn(4, 9), torch.randn(4, 9), 1),
            (x, x.flip(0), 1),
            (x.permute(0, 2, 3, 1), torch.randn(2, 3, 4, 5), 3),
            (torch.randn(4, 20)[:, ::2], torch.randn(10, 4).t(), 1),
            (torch.randn(0, 5), torch.randn(0, 5), 1),
            (torch.randn(3, 6, dtype=torch.bfloat16), torch.randn(3, 6), 1),
            (torch.randn(6), torch.randn(1).expand(6), 0),
        ]
        for i, (s, t, dim) in enumerate(pairs):
            for grad in (False, True):
                s, t = s.detach().requires_grad_(grad), t.detach().requires_grad_(grad)
                positions = s.shape[:dim] + s.shape[dim + 1 :]
                labels = torch.zeros(positions, dtype=torch.int64) if i % 2 else None
                reduction = REDUCTIONS[(i + grad) % 4] if dim else "none"
                common = (s, t, labels, scalar(2.0), scalar(1.0), scalar(0.5), scalar(0.3), dim)
                common = (*common, (*DIVERGENCES, "clamped_js")[i % 4], reduction, -100)
                for save in ("nothing", "statistics" if KERNEL_BACKEND == "triton" else "gradient"):
                    yield "softmax_divergence", (*common, save)
                grad_output = torch.randn(positions if reduction == "none" else (), requires_grad=grad)
                yield (
                    "softmax_divergence_backward",
                    (grad_output, None, *common, True, bool(i % 2), grad and TARGET == "cpu"),
                )
                yield "softmax_divergence_backward", (grad_output, None, *common, False, True, False)

    @classmethod
    def extended(cls, case, arrays, cotangents):
        function = case.function
        options = dict(function.keywords) if isinstance(function, partial) else {}
        name = (function.func if isinstance(function, partial) else function).__name__
        if name == "kl_div_with_logits":
            kind = "reverse_kl" if options.pop("reverse", False) else "forward_kl"
        elif name == "js_div_with_logits":
            kind = "clamped_js" if options.pop("legacy_clamp", False) else "js"
        else:
            kind = options.pop("divergence", "forward_kl")
            options["weights"] = (options.pop("kd_weight") * options["temperature"] ** 2, options.pop("ce_weight"))
        loss, *gradients = extended.softmax_divergence(kind, arrays, cotangents[0], **options)
        return [loss] + [gradients[i] for i in case.differentiable]

    def test_inductor(self):
        call = self.calls()[0]
        self._check_compiled(call, "inductor", None)


def test_the_reference_saves_no_statistics():
    s, t = torch.randn(3, 7, dtype=F64), torch.randn(3, 7, dtype=F64)
    scalars = (scalar(2.0), scalar(1.0), scalar(0.0), scalar(0.5))
    with pytest.raises(ValueError, match="save is 'statistics'; the reference accepts 'nothing' and 'gradient'"):
        torch.ops.kdkernels.softmax_divergence.reference(s, t, None, *scalars, 1, "js", "mean", -100, "statistics")


# Values derived by hand


def test_kl_div_of_two_classes():
    """Logits (0, 0) and (ln 3, 0): q = (1/2, 1/2), p = (3/4, 1/4)."""
    s, t = torch.tensor([0.0, 0.0], dtype=F64, requires_grad=True), torch.tensor([math.log(3), 0.0], dtype=F64)
    loss = kl_div_with_logits(s, t)
    loss.backward()
    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-15)
    torch.testing.assert_close(s.grad, torch.tensor([-0.25, 0.25], dtype=F64))
    reverse = kl_div_with_logits(s, t, reverse=True)
    assert reverse.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), abs=1e-15)


def test_js_div_of_opposite_certainties():
    """ln 2 is the largest value; the published clamped form gives 1.614 there."""
    s = torch.tensor([[200.0, 0.0]], dtype=F64)
    assert js_div_with_logits(s, s.flip(1)).item() == pytest.approx(math.log(2), abs=1e-15)
    clamped = js_div_with_logits(s, s.flip(1), legacy_clamp=True).item()
    expected = 2 * 0.5 * (0.5 * math.log(0.5 / 0.99) + 0.5 * math.log(0.5 / 0.01))
    assert clamped == pytest.approx(expected, abs=1e-14)
    assert clamped == pytest.approx(1.614, abs=5e-4)
    p = torch.tensor([[0.99999, 0.00001]], dtype=F64).log()
    assert js_div_with_logits(p, p.flip(1)).item() == pytest.approx(0.6930, abs=5e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_loss_is_the_weighted_sum(temperature):
    s, t = torch.randn(5, 8, dtype=F64), torch.randn(5, 8, dtype=F64)
    labels = torch.tensor([0, 3, 7, 1, 1])
    soft = F.kl_div(
        F.log_softmax(s / temperature, 1), F.log_softmax(t / temperature, 1), reduction="batchmean", log_target=True
    )
    expected = 0.9 * temperature**2 * soft + 0.1 * F.cross_entropy(s, labels)
    torch.testing.assert_close(distillation_loss(s, t, labels, temperature=temperature), expected)
    torch.testing.assert_close(distillation_loss(s, t, temperature=temperature), temperature**2 * soft)


def test_beta_is_the_teachers_share():
    s, t = torch.randn(4, 6, dtype=F64), torch.randn(4, 6, dtype=F64)
    p, q = t.softmax(1), s.softmax(1)
    for beta in (0.1, 0.5, 0.8):
        m = beta * p + (1 - beta) * q
        expected = beta * (p * (p / m).log()).sum(1) + (1 - beta) * (q * (q / m).log()).sum(1)
        torch.testing.assert_close(js_div_with_logits(s, t, beta=beta, reduction="none"), expected)
    torch.testing.assert_close(js_div_with_logits(s, t, beta=0.0), kl_div_with_logits(s, t))
    torch.testing.assert_close(js_div_with_logits(s, t, beta=1.0), kl_div_with_logits(s, t, reverse=True))


@of_kernels
@pytest.mark.parametrize("function", [kl_div_with_logits, js_div_with_logits])
@pytest.mark.parametrize("classes", [3, 19, 1000])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_never_negative_and_zero_for_equal_distributions(function, classes, scale):
    s = torch.randn(64, classes) * scale
    assert torch.equal(function(s, s.clone(), reduction="none"), torch.zeros(64))
    close = s + torch.randn(64, classes) * 1e-3
    assert (function(s, close, reduction="none") >= -1e-7).all()


def test_js_div_is_symmetric():
    s, t = torch.randn(16, 50), torch.randn(16, 50)
    torch.testing.assert_close(js_div_with_logits(s, t), js_div_with_logits(t, s), rtol=1e-6, atol=0)


def test_js_div_of_a_half_precision_teacher_is_not_negative():
    """16-bit sides are converted before anything is computed."""
    s = torch.randn(64, 1000) * 5
    t = s.bfloat16()
    assert (js_div_with_logits(s, t, reduction="none") >= 0).all()


def test_gradients_of_a_scaled_fp16_loss_do_not_underflow():
    """A loss scaler multiplies before the gradient is rounded to 16 bits."""
    s, t = torch.randn(4096, 100).half().requires_grad_(), torch.randn(4096, 100).half()
    (grad,) = torch.autograd.grad(kl_div_with_logits(s, t) * 65536.0, s)
    truth = (s.float().softmax(1) - t.float().softmax(1)) * 16
    assert ((grad == 0) & (truth.abs() > 1e-6)).sum() == 0


# Scalars


def test_temperature_gets_its_gradient():
    s, t = torch.randn(3, 5, dtype=F64, requires_grad=True), torch.randn(3, 5, dtype=F64)
    labels = torch.tensor([0, -100, 4])
    temperature = torch.tensor(2.5, dtype=F64, requires_grad=True)
    for function in (
        lambda s, T: kl_div_with_logits(s, t, temperature=T),
        lambda s, T: js_div_with_logits(s, t, temperature=T),
        lambda s, T: distillation_loss(s, t, labels, temperature=T),
    ):
        assert torch.autograd.gradcheck(function, (s, temperature))
        torch.testing.assert_close(function(s, temperature), function(s, 2.5))


@pytest.mark.parametrize("compiled", [False, True])
def test_scalars_may_be_tensors(compiled):
    s, t = torch.randn(4, 9), torch.randn(4, 9)
    labels = torch.randint(0, 9, (4,))
    function = torch.compile(distillation_loss, backend="aot_eager", fullgraph=True) if compiled else distillation_loss
    options = {"temperature": 3.0, "kd_weight": 0.25, "ce_weight": 0.75, "divergence": "js", "beta": 0.2}
    tensors = {k: torch.tensor(v) if isinstance(v, float) else v for k, v in options.items()}
    torch.testing.assert_close(function(s, t, labels, **tensors), distillation_loss(s, t, labels, **options))


def test_new_scalars_do_not_compile_again():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def function(s, t, temperature, beta):
        return distillation_loss(s, t, temperature=temperature, divergence="js", beta=beta)

    s, t = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    for i in range(10):
        temperature, beta = 1 + 0.5 * i, 0.05 + 0.09 * i
        loss = function(s, t, temperature, beta)
        loss.backward()
        torch.testing.assert_close(loss, distillation_loss(s, t, temperature=temperature, divergence="js", beta=beta))
    assert counter.frame_count <= 2


def test_export_keeps_the_loss_and_its_gradient():
    class Loss(torch.nn.Module):
        def forward(self, s, t):
            return distillation_loss(s, t, temperature=2.0)

    batch = torch.export.Dim("batch")
    inputs = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    exported = torch.export.export(Loss(), inputs, dynamic_shapes=({0: batch}, {0: batch})).module()
    inputs = torch.randn(7, 9, requires_grad=True), torch.randn(7, 9)
    for a, b in zip(results_of(exported, inputs, (0,)), results_of(Loss(), inputs, (0,)), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_computes_in_float32():
    x, w = torch.randn(8, 16), torch.randn(40, 16)
    t = torch.randn(8, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = F.linear(x, w)
        assert logits.dtype == torch.bfloat16
        loss = distillation_loss(logits, t)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, distillation_loss(logits.float(), t))


# Combinations of options


@pytest.mark.filterwarnings("ignore:input has one class")
@given(
    classes=st.sampled_from([c for c in CLASSES if c <= 1001]),
    temperature=st.sampled_from(TEMPERATURES),
    divergence=st.sampled_from([*DIVERGENCES, "clamped_js"]),
    reduction=st.sampled_from(REDUCTIONS),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "part", "offset", "channels_last"]),
    dtypes=st.sampled_from([(torch.float32,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)]),
    rows=st.integers(0, 9),
    labels=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_combination(classes, temperature, divergence, reduction, layout, dtypes, rows, labels, seed):
    """Reference and kernel agree to within the precision of the results."""
    generator = torch.Generator().manual_seed(seed)
    shape, dim = ((2, classes, 1, rows), 1) if layout == "channels_last" else ((rows, classes), -1)
    s, t = (layouts((torch.randn(shape, generator=generator) * 2).to(d))[layout] for d in dtypes)
    if divergence == "clamped_js":
        function = partial(js_div_with_logits, legacy_clamp=True, temperature=temperature, dim=dim, reduction=reduction)
    else:
        index = None
        if labels:
            index = torch.randint(0, classes, s.shape[:1] + s.shape[2:], generator=generator)
            index[torch.rand(index.shape, generator=generator) < 0.2] = -100
        function = partial(
            distillation_loss,
            labels=index,
            temperature=temperature,
            divergence=divergence,
            dim=dim,
            reduction=reduction,
        )
    ours = results_of(function, (s, t), (0, 1))
    with kdkernels.set_backend("reference"):
        truth = results_of(function, (s, t), (0, 1), F64)
        single = results_of(function, (s, t), (0, 1), torch.float32)
    for a, b, c in zip(ours, truth, single, strict=True):
        assert a.shape == b.shape
        # Some random rows are harder than any of the cases. Where terms cancel, the plain formula in fp32 is off by a
        # hundred units itself: the bound is twice its error.
        assert error_in_ulp(a, b) <= max(8.0, 2 * error_in_ulp(c.to(a.dtype), b))


def test_the_clamp_binds_where_the_formula_says():
    """With 1000 classes and flat outputs nearly everything is clamped and the gradient is 0."""
    s, t = torch.randn(4, 1000, dtype=F64), torch.randn(4, 1000, dtype=F64)
    value, grad = results_of(partial(js_div_with_logits, temperature=3.0, legacy_clamp=True), (s, t), (0,))
    assert value.item() == pytest.approx(0.0, abs=1e-12)
    assert torch.equal(grad, torch.zeros_like(s))
    expected = eager_loss(s, t, temperature=3.0, divergence="clamped_js")
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)


def test_extended_precision_agrees_with_the_reference():
    """The two versions of the truth agree, one in NumPy and one in PyTorch."""
    s, t = torch.randn(5, 30, dtype=F64), torch.randn(5, 30, dtype=F64)
    for kind in (*DIVERGENCES, "clamped_js"):
        exact = extended.softmax_divergence(kind, [s.numpy(), t.numpy()], np.ones(5), reduction="none")
        ours = eager_loss(s, t, divergence=kind, reduction="none")
        np.testing.assert_allclose(ours.numpy(), exact[0].astype(float), rtol=1e-12)
