"""The options of the objective of DeepInversion, and wrong ones."""

from dataclasses import replace

import pytest
import torch
from inverted import EVERYTHING, inverter_of
from torch import nn

F64 = torch.float64


# The options of the statistics


def inputs_of_layers(model, images):
    """Return the inputs of the BatchNorm layers, with their running mean and variance."""
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    seen = []
    handles = [
        layer.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0], module))) for layer in layers
    ]
    model.eval()(images)
    for handle in handles:
        handle.remove()
    return [(x, module.running_mean, module.running_var) for x, module in seen]


def l2(mean, var, m, r):
    return (mean - m).norm() + (var - r).norm()


def weighted_l2(mean, var, m, r):
    return 2 * (mean - m).norm() + 0.5 * (var - r).norm()


@pytest.mark.parametrize(
    ("options", "distance", "correction"),
    [
        ({"over": "image"}, l2, 0),
        ({"over": "class"}, l2, 0),
        ({"unbiased": True}, l2, 1),
        (
            {"mean_weight": 2.0, "var_weight": 0.5},
            lambda mean, var, m, r: 2 * (mean - m).norm() + (var - r).norm() / 2,
            0,
        ),
        ({"mode": "l1", "reduction": "sum"}, lambda mean, var, m, r: (mean - m).abs().sum() + (var - r).abs().sum(), 0),
        ({"mode": "squared"}, lambda mean, var, m, r: (mean - m).square().mean() + (var - r).square().mean(), 0),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_of_the_statistics(options, distance, correction):
    config = replace(EVERYTHING, first_layer_weight=10.0, feature_weight=0.3, **options)
    inverter = inverter_of(config, F64)
    images, labels = torch.randn(6, 3, 12, 10, dtype=F64), torch.tensor([1, 4, 1, 1, 4, 2])
    groups = {"batch": [torch.arange(6)], "image": list(torch.arange(6).view(6, 1))}
    groups["class"] = [(labels == label).nonzero()[:, 0] for label in (1, 2, 4)]
    expected = 0
    for weight, (x, m, r) in zip((10, 1, 1), inputs_of_layers(inverter.teacher, images), strict=True):
        parts = [x[group] for group in groups[options.get("over", "batch")]]
        each = [distance(p.mean((0, 2, 3)), p.var((0, 2, 3), correction=correction), m, r) for p in parts]
        expected += 0.3 * weight * sum(each) / len(each)
    assert inverter.objective(images, labels)["features"].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"over": "batches"}, "over is 'batches'; accepted are 'batch', 'image', 'class'"),
        ({"reduction": "sum"}, "reduction is 'sum', but mode='l2' is a norm"),
        ({"mode": "l1", "reduction": "none"}, "reduction is 'none'; accepted are 'mean', 'sum'"),
        ({"var_weight": float("inf")}, "var_weight is inf; expected a finite number"),
        ({"keep": "first"}, "keep is 'first'; accepted are 'last', 'best', 'best_per_image'"),
    ],
    ids=str,
)
def test_wrong_settings(options, text):
    with pytest.raises(ValueError, match=text):
        replace(EVERYTHING, **options)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda one, x, y: one.objective(x, y, pool=11), ValueError, "images as large as pool=11 or larger"),
        (lambda one, x, y: one.objective(x, y, pool=0), ValueError, "pool is 0; expected 1 or more"),
        (
            lambda one, x, y: one.objective(x[0], y),
            ValueError,
            r"labels \[4\]; expected \[B, C, H, W\]",
        ),
        (lambda one, x, y: one.gradient_norms(x, y[:2]), ValueError, r"labels \[2\]; expected"),
        (lambda one, x, y: one.objective(x, y, shift=3), ValueError, "shift is 3; expected the pixels down"),
        (
            lambda one, x, y: one.objective(x, y, shift=(1, 0.5)),
            TypeError,
            "an offset of shift must be an integer",
        ),
        (
            lambda one, x, y: one.loop(y, images=x[:2]).__enter__(),
            ValueError,
            r"the shape \[2, 3, 12, 10\]; expected",
        ),
    ],
)
def test_wrong_batches(call, error, text):
    with pytest.raises(error, match=text):
        call(inverter_of(EVERYTHING), torch.zeros(4, 3, 12, 10), torch.arange(4))
