"""The Triton kernels of the softmax divergences with scalars on the device, long rows and unusual values.

Run in Triton's interpreter by python_tests/gpu/triton_interpreter.py.
"""

import math
from functools import partial

import pytest
import torch

import kdkernels
from kdkernels.functional import distillation_loss, js_div_with_logits, kl_div_with_logits
from kdkernels.testing.selftest import results_of


def call_softmax(s, t, labels, temperature, beta, kind, reduction="none", weights=(1.0, 0.5)):
    """Return the loss and both gradients from the ops themselves."""
    scalars = (torch.tensor(x, dtype=torch.float64) for x in (temperature, *weights, beta))
    common = (s, t, labels, *scalars, 1, kind, reduction, -100)
    loss, saved = torch.ops.kdkernels.softmax_divergence.triton(*common, "statistics")
    backward = torch.ops.kdkernels.softmax_divergence_backward.triton
    gradients = backward(torch.ones_like(loss), saved, *common, True, True, False)[:2]
    again = backward(torch.ones_like(loss), None, *common, True, True, False)[:2]
    for a, b in zip(gradients, again, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    return loss, *gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js", "clamped_js"])
def test_scalars_on_the_device(scalars_on_device, kind, dtype):
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


def test_values_out_of_range_give_nan(scalars_on_device):
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


def test_rows_of_any_length():
    """Rows that do not fit in a tile are read twice; the longest are tested on a GPU only."""
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


def test_wrong_values_raise_where_they_are_seen():
    with pytest.raises(IndexError, match="is 4; expected a class from 0 to 3"):
        distillation_loss(torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 4]))


def test_empty_inputs():
    for function in (kl_div_with_logits, distillation_loss):
        for reduction in ("none", "mean", "sum", "batchmean"):
            loss, grad = results_of(partial(function, reduction=reduction), (torch.randn(0, 5),) * 2, (0,))
            assert loss.sum() == 0
            assert grad.shape == (0, 5)


def test_a_gradient_is_not_saved():
    scalars = (torch.tensor(value, dtype=torch.float64) for value in (2.0, 1.0, 0.0, 0.5))
    arguments = (torch.randn(3, 7), torch.randn(3, 7), None, *scalars, 1, "js", "mean", -100, "gradient")
    with pytest.raises(ValueError, match="save is 'gradient'; the Triton kernels accept 'nothing' and 'statistics'"):
        torch.ops.kdkernels.softmax_divergence.triton(*arguments)
