"""Every Triton kernel in Triton's interpreter, on small shapes; run by test_triton.py in a process of its own.

TRITON_INTERPRET=1 python python_tests/gpu/triton_interpreter.py
"""

import math
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import test_batch_norm_stats
import test_gradient_reversal
import test_softmax_divergence
import test_total_variation
import torch
from contract import Call, OpContract

import kdkernels
from kdkernels.functional import distillation_loss, js_div_with_logits, kl_div_with_logits
from kdkernels.ops._cases import DTYPES
from kdkernels.testing.selftest import accuracy_of, reference_results, results_of

CONTRACTS = (
    test_softmax_divergence.TestSoftmaxDivergence,
    test_batch_norm_stats.TestBatchNormStats,
    test_total_variation.TestTotalVariation,
    test_gradient_reversal.TestGradientReversal,
)
LARGEST = 5000  # elements of a sample; a program of the interpreter takes some milliseconds
# The interpreter cuts fp32 off where it becomes bf16, instead of rounding: up to a unit more, in gradients only.
TRUNCATED = {torch.bfloat16: 1.0}
# In fp64 a mean of numbers that cancel, and a gradient as a derivative less its mean, one fp64 number, lose some units;
# narrower numbers are summed in fp64.
ALLOWED_FP64 = 12.0


def cases(contract, dtype):
    """Yield one sample of the small cases; of all of them in fp32, of one in three in each other dtype."""
    small = [case for case in contract.cases(dtype) if max(t.numel() for t in case.samples[0]) <= LARGEST]
    step, first = (1, 0) if dtype == torch.float32 else (3, DTYPES.index(dtype) - 1)
    for case in small[first::step]:
        yield replace(case, samples=case.samples[:1])


def calls():
    return [call for contract in CONTRACTS for call in contract.calls()]


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.family)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(contract, dtype):
    """As accurate as the other backends, for every case; the inputs stay as they are."""
    count, failures = 0, []
    for case in cases(contract, dtype):
        before = [tensor.clone() for tensor in case.samples[0]]
        is_double = torch.float64 in [t.dtype for t in case.samples[0]]
        truth = contract().extended_results if is_double else reference_results
        for row in accuracy_of(case, truth):
            more = TRUNCATED.get(dtype, 0.0)
            allowed = ALLOWED_FP64 if is_double else row.allowed + more
            count += 1
            if not row.ours <= max(row.eager + more, allowed):
                failures.append(row)
        for tensor, copy in zip(case.samples[0], before, strict=True):
            assert torch.equal(tensor, copy)
    assert count > 0
    assert not failures


def test_rows_of_any_length():
    """Rows that do not fit in a tile are read twice; the longest are left to a GPU."""
    for dtype, classes in ((torch.bfloat16, 5003), (torch.float64, 3001)):
        s, t = (torch.randn(2, classes, dtype=torch.float64).mul(3).to(dtype) for _ in range(2))
        s[0, 100:1200] = -math.inf
        t[0, :2100] = -math.inf
        labels = torch.tensor([classes - 1, 7])
        for kind in ("forward_kl", "reverse_kl", "js"):
            if kind == "reverse_kl":
                t = t.clamp(min=-80)

            def loss(s, t, kind=kind, labels=labels):
                return distillation_loss(s, t, labels, temperature=2.0, divergence=kind)

            found = results_of(loss, (s, t), (0, 1))
            with kdkernels.set_backend("reference"):
                expected = results_of(loss, (s, t), (0, 1), torch.float64)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b.to(a.dtype))


@pytest.mark.parametrize("call", calls(), ids=lambda call: call.name)
class TestEveryCall:
    """What an op's contract asks for and can be told on small inputs."""

    def test_backward(self, call: Call):
        OpContract().test_second_backward_equals_the_first(call)
        OpContract().test_no_grad_gives_the_same_value(call)
        OpContract().test_incoming_gradients(call, "zero")
        OpContract().test_incoming_gradients(call, "expanded")

    def test_gradients(self, call: Call):
        OpContract().test_gradients_under_torch_func(call)

    def test_determinism(self, call: Call):
        first, second = (results_of(call.function, call.inputs, call.differentiable) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)

    def test_compiles_without_a_break(self, call: Call):
        OpContract()._check_compiled(call, "aot_eager", None)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.family)
def test_opcheck(contract):
    count = 0
    for name, arguments in list(contract.op_samples())[::2]:
        if "gradient" in arguments:  # the forward saves statistics or nothing
            arguments = tuple("statistics" if a == "gradient" else a for a in arguments)
        overload = getattr(torch.ops.kdkernels, name).triton
        torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))
        count += 1
    assert count > 0


@pytest.fixture
def on_device(monkeypatch):
    """Pass every scalar as a pointer, as one on a GPU is, and let no value be seen."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("kdkernels.ops") and hasattr(module, "known_to_host"):
            monkeypatch.setattr(module, "known_to_host", lambda scalar: False)
    monkeypatch.setattr("kdkernels.ops._registry.values_are_visible", lambda tensor: False)


def call_softmax(s, t, labels, temperature, beta, kind, reduction="none", weights=(1.0, 0.5)):
    """Return loss and both gradients by the ops themselves."""
    scalars = (torch.tensor(x, dtype=torch.float64) for x in (temperature, *weights, beta))
    common = (s, t, labels, *scalars, 1, kind, reduction, -100)
    loss, saved = torch.ops.kdkernels.softmax_divergence.triton(*common, "statistics")
    backward = torch.ops.kdkernels.softmax_divergence_backward.triton
    gradients = backward(torch.ones_like(loss), saved, *common, True, True)
    anew = backward(torch.ones_like(loss), None, *common, True, True)
    for a, b in zip(gradients, anew, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    return loss, *gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js", "clamped_js"])
def test_scalars_on_the_device(on_device, kind, dtype):
    s, t = torch.randn(5, 9, dtype=dtype), torch.randn(5, 9, dtype=dtype)
    labels = torch.tensor([0, 3, -100, 8, 2])
    for beta in (0.0, 0.3, 1.0) if kind == "js" else (0.5,):
        found = call_softmax(s, t, labels, 2.5, beta, kind)
        function = {"js": js_div_with_logits, "clamped_js": js_div_with_logits}.get(kind, kl_div_with_logits)
        options = {"js": {"beta": beta}, "clamped_js": {"legacy_clamp": True}}.get(kind, {"reverse": kind[0] == "r"})

        def loss(s, t, function=function, options=options):
            soft = function(s, t, temperature=2.5, reduction="none", **options)
            hard = torch.nn.functional.cross_entropy(s, labels, reduction="none")
            return torch.where(labels == -100, 0.0, soft + 0.5 * hard)

        leaves = [x.clone().requires_grad_() for x in (s, t)]
        with kdkernels.set_backend("reference"):
            expected = loss(*leaves)
            gradients = torch.autograd.grad(expected.sum(), leaves)
        for a, b in zip(found, (expected.detach(), *gradients), strict=True):
            rtol, atol = (1e-12, 1e-15) if dtype == torch.float64 else (1e-5, 1e-7)
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_values_out_of_range_give_nan(on_device):
    s, t, labels = torch.randn(3, 6), torch.randn(3, 6), torch.tensor([1, 6, -100])
    for a in call_softmax(s, t, labels, 1.0, 0.5, "js"):
        rows = a.view(3, -1)
        assert rows[0].isfinite().all()
        assert rows[1].isnan().all()
        assert torch.equal(rows[2], torch.zeros_like(rows[2]))
    for temperature, beta in ((0.0, 0.5), (-1.0, 0.5), (math.nan, 0.5), (1.0, 1.5), (1.0, -0.1)):
        for a in call_softmax(s, t, None, temperature, beta, "js", weights=(1.0, 0.0)):
            assert a.isnan().all()


def test_ignored_positions_may_hold_anything():
    s, t = torch.randn(2, 5, 40), torch.randn(2, 5, 40)
    labels = torch.randint(0, 5, (2, 40))
    labels[:, ::3] = -100
    for x in (s, t):
        x[:, :, ::3] = math.nan
    for dim, a, b in ((1, s, t), (2, s.mT.contiguous(), t.mT.contiguous())):
        loss, *gradients = results_of(lambda a, b, dim=dim: distillation_loss(a, b, labels, dim=dim), (a, b), (0, 1))
        assert loss.isfinite()
        for gradient in gradients:
            gradient = gradient.movedim(dim, 1)
            assert torch.equal(gradient[:, :, ::3], torch.zeros_like(gradient[:, :, ::3]))
            assert (gradient != 0).any()


def test_empty_inputs():
    for function in (kl_div_with_logits, distillation_loss):
        for reduction in ("none", "mean", "sum", "batchmean"):
            loss, grad = results_of(lambda s, t: function(s, t, reduction=reduction), (torch.randn(0, 5),) * 2, (0,))  # noqa: B023
            assert loss.sum() == 0
            assert grad.shape == (0, 5)
    image = torch.randn(0, 3, 4, 4)
    assert [float(x) for x in results_of(kdkernels.functional.image_prior_losses, (image,), (0,))[:3]] == [0, 0, 0]
    assert results_of(kdkernels.functional.total_variation, (image,), (0,))[1].shape == image.shape
    assert results_of(kdkernels.functional.gradient_reversal, (image,), (0,))[1].shape == image.shape


def test_wrong_values_raise_where_they_are_seen():
    with pytest.raises(IndexError, match="is 4; expected a class from 0 to 3"):
        distillation_loss(torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 4]))


def test_many_layers_take_several_launches():
    channels = [3, 1, 2] * 15
    statistics = [torch.rand(sum(channels), dtype=torch.float64) + 0.5 for _ in range(4)]

    def distances(*statistics):
        return kdkernels.ops.batch_norm_stats.stat_distances(*statistics, channels)

    found = results_of(distances, tuple(statistics), (0, 1, 2, 3))
    with kdkernels.set_backend("reference"):
        expected = results_of(distances, tuple(statistics), (0, 1, 2, 3))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture(autouse=True)
def _triton_backend(_reproducible):
    with kdkernels.set_backend("triton"):
        yield


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    np.seterr(all="ignore")
    torch.set_num_threads(1)
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-W", "ignore", "--durations=5"]
    sys.exit(pytest.main([__file__, *options, *sys.argv[1:]]))
