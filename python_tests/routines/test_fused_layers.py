"""Layers that are not torch's own, and run together with their statistics where they do the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fusable import (
    DropPath,
    ResNet,
    batch,
    conv,
    made,
    parts_of,
    same,
)
from torch import nn

from kdkernels.inversion import BatchNormStatistics


class FrozenBatchNorm2d(nn.Module):
    """As torchvision has it."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value) + 0.1 * torch.arange(channels))

    def forward(self, x):
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        rv, rm = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + self.eps).rsqrt()
        return x * scale + (b - rm * scale)


class FrozenWithoutEps(FrozenBatchNorm2d):
    """As maskrcnn-benchmark had it."""

    def __init__(self, channels):
        super().__init__(channels, eps=0.0)
        del self.eps

    def forward(self, x):
        scale = self.weight * self.running_var.rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm has it: the layer, dropout and activation in one module."""

    def __init__(self, channels, act_layer=nn.ReLU, apply_act=True):
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act_layer(inplace=True) if apply_act else nn.Identity()

    def forward(self, x):
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class Hidden(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu6(super().forward(x))


class Shifted(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 0.01


class Detached(nn.BatchNorm2d):
    """The same values, another gradient."""

    def forward(self, x):
        y = super().forward(x)
        return 0.5 * y + 0.5 * y.detach()


class Counting(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Careful(nn.BatchNorm2d):
    def forward(self, x):
        if x.abs().max() > 6:
            raise OverflowError("too large")
        return super().forward(x)


class WithMask(nn.BatchNorm2d):
    def forward(self, x, mask=None):
        y = super().forward(x)
        return y if mask is None else y * mask


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (FrozenBatchNorm2d, "BatchNorm alone"),
        (FrozenWithoutEps, "BatchNorm alone"),
        (BatchNormAct2d, "BatchNorm + ReLU"),
        (lambda c: BatchNormAct2d(c, nn.SiLU), "BatchNorm + SiLU"),
        (lambda c: BatchNormAct2d(c, lambda inplace: nn.LeakyReLU(0.3, inplace)), "BatchNorm + LeakyReLU"),
        (lambda c: BatchNormAct2d(c, lambda inplace: nn.GELU()), "tapped, because it is not one of torch's layers"),
        (lambda c: BatchNormAct2d(c, apply_act=False), "BatchNorm alone"),
        (Hidden, "BatchNorm + ReLU6"),
        (Shifted, "tapped, because it is not one of torch's layers"),
        (Detached, "tapped, because it is not one of torch's layers"),
        (Counting, "tapped, because it changes its attributes"),
        (WithMask, "BatchNorm alone"),
        (Careful, "tapped, because it fails when it is tried on other numbers (OverflowError: too large)"),
        (nn.SyncBatchNorm, "BatchNorm alone"),
        (lambda c: nn.BatchNorm2d(c, affine=False), "BatchNorm alone"),
    ],
)
def test_layers(layer, expected):
    model = nn.Sequential(conv(3, 4), layer(4), nn.Sigmoid()).double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 1.5)
    text = same(model)
    assert parts_of(text)["1"].startswith(expected), text
    if isinstance(model[1], Counting):
        model[1].calls = 0
        with BatchNormStatistics(model):
            model(batch())
        assert model[1].calls == 1


def test_the_activation_is_not_guessed_from_one_input():
    """Outputs that are all between 0 and 6 look like those of any of them."""
    for layer, name in ((BatchNormAct2d, "ReLU"), (Hidden, "ReLU6")):
        model = nn.Sequential(layer(3)).double()
        nn.init.constant_(model[0].bias, 3.0), nn.init.constant_(model[0].weight, 0.01)
        assert parts_of(same(model))["0"] == f"BatchNorm + {name}"


def test_layers_of_timm_in_a_graph():
    """A layer with its own identity activation takes the residual and the activation after it."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = conv(4, 4), BatchNormAct2d(4)
            self.conv2, self.bn2 = conv(4, 4), BatchNormAct2d(4, apply_act=False)
            self.drop_path, self.act3 = DropPath(), nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.bn2(self.conv2(self.bn1(self.conv1(x))))
            return self.act3(self.drop_path(y) + x)

    parts = parts_of(same(made(lambda: nn.Sequential(conv(3, 4), Block(), Block()))))
    assert parts["1.bn1"] == "BatchNorm + ReLU"
    assert parts["1.bn2"] == "BatchNorm + add + ReLU"


def test_parametrized_layers_are_tapped():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = made(ResNet)
    nn.utils.parametrize.register_parametrization(model.bn1, "weight", Doubled())
    nn.utils.parametrize.register_parametrization(model.layer1[0].conv1, "weight", Doubled())
    parts = parts_of(same(model))
    assert parts["bn1"] == "tapped, because it is parametrized"
    assert parts["layer1.0.bn1"] == "BatchNorm + ReLU"


def test_an_activation_that_is_replaced_inside():
    model, x = nn.Sequential(conv(3, 4), BatchNormAct2d(4)).double().eval(), batch()
    with BatchNormStatistics(model) as statistics:
        for activation in (nn.ReLU(), nn.SiLU(), nn.GELU(), nn.ReLU6()):
            model[1].act = activation
            for _ in range(2):
                torch.testing.assert_close(model(x), copy.deepcopy(model)(x), rtol=1e-11, atol=1e-12)
    assert parts_of(statistics.describe())["1"] == "BatchNorm + ReLU6"


def test_a_layer_that_is_run_in_two_dtypes():
    """One of its own kind may return another dtype than its input's, as this one does under autocast."""
    model, x = nn.Sequential(conv(3, 4), FrozenBatchNorm2d(4)).eval(), batch().detach().float()
    with BatchNormStatistics(model) as statistics:
        for _ in range(2):
            assert torch.equal(model(x), model(x))
            assert parts_of(statistics.describe())["1"] == "BatchNorm alone"
            with torch.autocast("cpu", torch.bfloat16):
                assert model(x).dtype == torch.float32
                torch.testing.assert_close(model(x), copy.deepcopy(model)(x), rtol=0, atol=0)


def test_a_layer_that_is_tried_without_gradients():
    for mode in (torch.no_grad, torch.inference_mode):
        model = nn.Sequential(conv(3, 4), BatchNormAct2d(4)).double()
        with BatchNormStatistics(model) as statistics, mode():
            model(batch())
            assert parts_of(statistics.describe())["1"] == "BatchNorm + ReLU"
