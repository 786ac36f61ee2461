"""What the layers and hooks of the vision side do beyond value and gradient."""

import importlib

import pytest
import torch

from kdkernels.compat import deep_inversion, gsplat, kornia, piq, pytorch_adapt, tllib, torchmetrics


def test_the_schedule_by_hand():
    """2 / (1 + 1/e) - 1 = 0.4621 after N steps with alpha = 1, and 0.7616 after 2 N."""
    layer = tllib.WarmStartGradientReverseLayer(max_iters=10)
    found = []
    for step in range(21):
        x = torch.zeros(1, requires_grad=True)
        layer(x).sum().backward()
        found.append(-x.grad.item())
        assert layer.iter_num == step
        layer.step()
    assert found[0] == 0
    assert found[10] == pytest.approx(0.46211716, abs=1e-7)
    assert found[20] == pytest.approx(0.76159416, abs=1e-7)


def test_the_schedule_does_not_overflow():
    x = torch.zeros(1, requires_grad=True)
    layer = tllib.WarmStartGradientReverseLayer(alpha=-1e6, max_iters=1)
    layer.step()
    layer(x).sum().backward()
    assert x.grad.item() == 1.0
    with pytest.raises(ValueError, match="max_iters is 0; expected a positive number of steps"):
        tllib.WarmStartGradientReverseLayer(max_iters=0)


def test_the_weight_is_in_the_checkpoint_of_pytorch_adapt():
    layer = pytorch_adapt.GradientReversal(0.5)
    layer.load_state_dict({"weight": torch.tensor([0.25])})
    x = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.tolist() == [-0.25] * 3
    assert x.grad.dtype == torch.bfloat16


def test_the_hook_follows_the_latest_forward_until_it_is_closed():
    layer = torch.nn.BatchNorm2d(3)
    hook = deep_inversion.DeepInversionFeatureHook(layer)
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    layer(x)
    first = hook.r_feature
    layer(2 * x)  # in training mode, which updates the running statistics in place
    (first + hook.r_feature).backward()
    assert x.grad.isfinite().all()
    latest = hook.r_feature
    hook.close()
    layer(x)
    assert hook.r_feature is latest
    with pytest.raises(ValueError, match="BatchNorm2d without running statistics"):
        deep_inversion.DeepInversionFeatureHook(torch.nn.BatchNorm2d(3, track_running_stats=False))


def test_constant_images_have_a_gradient_of_0():
    x = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    piq.total_variation(x).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: kornia.total_variation(x, "none"), ValueError, "reduction is 'none'; accepted are 'sum' and 'mean'"),
        (lambda x: kornia.total_variation(x[0, 0, 0]), ValueError, r"img must be \[\.\.\., H, W\], got shape \(4,\)"),
        (lambda x: kornia.total_variation([1.0]), TypeError, "img must be a tensor, got list"),
        (lambda x: kornia.total_variation(x.int()), TypeError, "must be float16, bfloat16, float32 or float64"),
        (lambda x: torchmetrics.total_variation(x[0]), ValueError, r"img must be \[B, C, H, W\]"),
        (lambda x: torchmetrics.total_variation(x, "median"), ValueError, "reduction is 'median'; accepted are"),
        (lambda x: piq.total_variation(x[0]), ValueError, r"x must be \[B, C, H, W\]"),
        (lambda x: piq.total_variation(x, norm_type="isotropic"), ValueError, "norm_type is 'isotropic'; accepted are"),
        (lambda x: gsplat.total_variation_loss(x[0, 0]), ValueError, r"x must be \[N, C, \.\.\.\]"),
    ],
)
def test_what_cannot_be_served_raises(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize("package", ["kornia", "torchmetrics", "piq"])
def test_agrees_with_the_installed_package(package):
    """In value and gradient, float64."""
    pytest.importorskip(package, exc_type=ImportError)
    theirs = {
        "kornia": lambda x: importlib.import_module("kornia.losses").total_variation(x, "mean"),
        "torchmetrics": lambda x: importlib.import_module("torchmetrics.functional.image").total_variation(x, "mean"),
        "piq": lambda x: importlib.import_module("piq").total_variation(x, "mean", "l2"),
    }[package]
    ours = {
        "kornia": lambda x: kornia.total_variation(x, "mean"),
        "torchmetrics": lambda x: torchmetrics.total_variation(x, "mean"),
        "piq": lambda x: piq.total_variation(x, "mean", "l2"),
    }[package]
    x = torch.rand(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    results = [(loss.detach(), *torch.autograd.grad(loss.sum(), x)) for loss in (ours(x), theirs(x))]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
