"""Networks whose BatchNorm layers are fused with what follows them: the same values, fewer passes."""

import operator

import pytest
import torch
import torch.nn.functional as F
from fusable import (
    NETWORKS,
    VGG,
    DropPath,
    EfficientNet,
    MobileNet,
    RepVGG,
    ResNet,
    Swish,
    WideResNet,
    Wrapped,
    batch,
    leaves,
    made,
    parts_of,
    same,
)
from torch import nn

from kdkernels.inversion import BatchNormStatistics


@pytest.mark.parametrize("network", NETWORKS)
def test_values_and_gradients_of_networks(network):
    text = same(made(network))
    assert "traced; it differs from its own output by" in text.split("\n")[0]


def test_what_is_fused_with_what():
    parts = parts_of(same(made(ResNet)))
    assert parts["bn1"] == parts["layer1.0.bn1"] == "BatchNorm + ReLU"
    assert parts["layer1.1.bn2"] == "BatchNorm + add + ReLU"
    assert parts["layer2.0.downsample.1"] == "BatchNorm + add + ReLU"
    assert parts["layer2.0.bn2"] == "BatchNorm alone (it is the residual of layer2.0.downsample.1)"
    parts = parts_of(same(made(VGG)))
    assert parts["features.5"] == "BatchNorm + LeakyReLU"
    assert parts["classifier.1"] == "BatchNorm + ReLU"
    parts = parts_of(same(made(MobileNet)))
    assert parts["1"] == "BatchNorm + Hardswish"
    assert parts["3.conv.0.1"] == parts["3.conv.1.1"] == "BatchNorm + ReLU6"
    assert parts["3.conv.3"] == "BatchNorm + add"
    parts = parts_of(same(made(EfficientNet)))
    assert {parts[f"blocks.{i}.bn{j}"] for i in range(3) for j in range(2)} == {"BatchNorm + SiLU"}
    assert parts["blocks.0.bn2"] == "BatchNorm + add"
    parts = parts_of(same(made(RepVGG)))
    assert parts["1.dense.1"] == "BatchNorm alone (it is the residual of 1.point.1)"
    assert parts["1.point.1"] == "BatchNorm + add"
    assert parts["1.identity"] == "BatchNorm + add + ReLU"
    parts = parts_of(same(made(WideResNet)))
    assert set(map(parts.get, ("1.bn1", "1.bn2", "3"))) == {"BatchNorm + ReLU"}


ACTIVATIONS = {
    "ReLU": [
        nn.ReLU(),
        nn.ReLU(True),
        F.relu,
        lambda x: F.relu(x, True),
        F.relu_,
        torch.relu,
        torch.relu_,
        lambda x: x.relu(),
        lambda x: x.relu_(),
    ],
    "ReLU6": [nn.ReLU6(), nn.ReLU6(True), F.relu6, nn.Hardtanh(0, 6), lambda x: F.hardtanh(x, 0.0, 6.0)],
    "LeakyReLU": [
        nn.LeakyReLU(),
        nn.LeakyReLU(0.3, True),
        F.leaky_relu,
        lambda x: F.leaky_relu(x, 0.2),
        lambda x: F.leaky_relu(x, negative_slope=0.5, inplace=True),
        lambda x: F.leaky_relu_(x, 0.1),
    ],
    "SiLU": [
        nn.SiLU(),
        nn.SiLU(True),
        F.silu,
        lambda x: F.silu(x, inplace=True),
        Swish(),
        Swish(True),
        lambda x: x * torch.sigmoid(x),
    ],
    "Hardswish": [nn.Hardswish(), nn.Hardswish(True), F.hardswish, lambda x: F.hardswish(x, True)],
}
CASES = [(name, i) for name, kinds in ACTIVATIONS.items() for i in range(len(kinds))]
ADDITIONS = [
    operator.add,
    operator.iadd,
    torch.add,
    lambda a, b: a.add(b),
    lambda a, b: a.add_(b),
    lambda a, b: b + a,
    lambda a, b: torch.add(a, other=b, alpha=1),
]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_activations(name, number):
    act = ACTIVATIONS[name][number]
    modules = {"act": act} if isinstance(act, nn.Module) else {}
    model = made(lambda: Wrapped(lambda m, x: getattr(m, "act", act)(m.bn(x)), **modules))
    assert parts_of(same(model))["bn"] == f"BatchNorm + {name}"
    model = made(lambda: Wrapped(lambda m, x: getattr(m, "act", act)(m.bn(x) + x), **modules))
    assert parts_of(same(model))["bn"] == f"BatchNorm + add + {name}"


@pytest.mark.parametrize("number", range(len(ADDITIONS)))
def test_additions(number):
    add = ADDITIONS[number]
    assert parts_of(same(made(Wrapped, lambda m, x: add(m.bn(x), x))))["bn"] == "BatchNorm + add"
    assert parts_of(same(made(Wrapped, lambda m, x: add(m.bn(x), x).relu())))["bn"] == "BatchNorm + add + ReLU"
    parts = parts_of(same(made(Wrapped, lambda m, x: add(m.bn(x), m.other(x.sin())))))
    assert parts["bn"] == "BatchNorm alone (it is the residual of other)"
    assert parts["other"] == "BatchNorm + add"


def test_identities_are_skipped():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.same, self.drop = nn.BatchNorm2d(3), nn.Identity(), nn.Dropout2d(0.5)
            self.path = DropPath()

        def forward(self, x):
            y = F.dropout(self.path(self.drop(self.same(self.bn(x)))), 0.3, self.training)
            return F.relu(self.same(y + x))

    assert parts_of(same(made(Model)))["bn"] == "BatchNorm + add + ReLU"


def kept_by(model, x, fuse):
    """Return the tensors [N, C, H, W] that are kept for the backward of a network and its loss, and their memory."""
    kept = []

    def pack(tensor):
        if tensor.dim() == 4 and tensor.shape[0] == len(x):
            kept.append(tensor)
        return tensor

    with BatchNormStatistics(model, fuse=fuse) as statistics:
        model(x)  # which decides
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            total = sum(value.sum() for value in leaves(model(x))) + statistics.loss()
        total.backward()
    return len(kept), sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())


def test_fewer_tensors_are_kept_for_the_backward():
    """Each layer keeps its input once instead of twice, and an activation keeps nothing."""
    for network, layers, activations in ((ResNet, 9, 0), (MobileNet, 5, 3), (EfficientNet, 10, 7)):
        model, x = made(network), batch()
        (taps, memory), (fused, less) = kept_by(model, x, False), kept_by(model, x, "auto")
        assert taps - fused >= layers + activations
        assert less < memory or not activations
