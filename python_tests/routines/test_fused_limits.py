"""What cannot be fused is not, gives the same values, and is named."""

import re

import pytest
import torch
import torch.nn.functional as F
from fusable import ResNet, Wrapped, batch, conv, made, parts_of, same
from torch import nn
from torch.utils.checkpoint import checkpoint

from kdkernels.inversion import BatchNormStatistics


def wrapped(function, **modules):
    return made(lambda: Wrapped(function, **modules))


# In place, and several users


def late_change(m, x):
    y = m.bn(x)
    z = x.sin()
    y = y + z
    z.add_(1.0)
    return y.relu() + z


def change_of_the_residual(m, x):
    y, z = m.bn(x), x.sin()
    z.mul_(2.0)
    return F.relu(y + z)


def change_of_a_view(m, x):
    y, z = m.bn(x), x * 1
    z[:, 0].mul_(3.0)
    return F.relu(y + z)


def change_by_a_module(m, x):
    y, z = m.bn(x), x.sin()
    z = m.act(z)
    return F.relu(y + z) + z


def other_operand(m, x):
    z = x.sin()
    y = z
    z += m.bn(x)
    return F.relu(z) * y


def add_in_place_then_used(m, x):
    y = m.bn(x)
    y += x.cos()
    return y.relu() + y


def in_place_then_used(m, x):
    y = m.bn(x)
    z = y + 1
    return F.relu_(y) + z


def changed_output(m, x):
    y = F.leaky_relu(m.bn(x) + x.sin())
    y.mul_(2.0)
    return y.cos()


def changed_output_of_six(m, x):
    y = F.relu6(m.bn(x) + x.sin())
    y += 1.0
    return y.cos()


def changed_sum(m, x):
    y = m.bn(x) + x.sin()
    return y.tanh_()


def twice(m, x):
    y = m.bn(x)
    return y + y


@pytest.mark.parametrize(
    ("function", "bn", "why"),
    [
        (late_change, "BatchNorm + add + ReLU", ""),
        (change_of_the_residual, "BatchNorm alone", "may change its input or the residual in place"),
        (change_of_a_view, "BatchNorm alone", "may change its input or the residual in place"),
        (change_by_a_module, "BatchNorm alone", "may change its input or the residual in place"),
        (other_operand, "BatchNorm alone", "changes the other operand in place"),
        (add_in_place_then_used, "BatchNorm + add", ""),
        (in_place_then_used, "BatchNorm alone", ""),
        (changed_output, "BatchNorm + add", "the activation after the addition is changed in place"),
        (changed_output_of_six, "BatchNorm + add", "the activation after the addition is changed in place"),
        (changed_sum, "BatchNorm + add", ""),
        (twice, "BatchNorm alone", ""),
        (lambda m, x: m.bn(x).relu() + m.bn(x.sin()), "BatchNorm + ReLU", ""),
        (lambda m, x: F.gelu(m.bn(x)), "BatchNorm alone", ""),
        (lambda m, x: torch.add(m.bn(x), x, alpha=2), "BatchNorm alone", ""),
        (lambda m, x: F.relu(m.bn(x) + 1.0), "BatchNorm alone", ""),
        (lambda m, x: F.hardtanh(m.bn(x)), "BatchNorm alone", ""),
        (lambda m, x: F.dropout(m.bn(x), 0.0, training=True).relu(), "BatchNorm alone", ""),
        (lambda m, x: F.relu(m.bn(x) + x.mean((2, 3), keepdim=True)), "BatchNorm + add + ReLU", ""),  # computed plainly
        (lambda m, x: F.relu(m.bn(x) + F.relu(m.other(x.sin()))), "BatchNorm alone", "other runs before the addition"),
        (lambda m, x: F.gelu(m.bn(x)), "BatchNorm alone", "gelu follows"),
        (lambda m, x: m.bn(x).exp() + m.bn(x), "BatchNorm + add", "exp follows"),
        (lambda m, x: F.relu(m.bn(input=x)), "BatchNorm alone", ""),
    ],
)
def test_what_follows_a_layer(function, bn, why):
    text = same(wrapped(function, act=nn.ReLU(inplace=True)))
    found = parts_of(text).get("bn", text)
    assert found.startswith(bn), text
    import re

    assert re.search(why, text), text


def interleaved(m, x):
    y = m.bn(x)
    z = m.other(x.sin()).relu()
    x.mul_(2.0)
    return y.relu() * z + m.bn(x.cos()).relu_()


def test_order_of_the_records():
    """Layers report in the order in which they run without fusion."""
    model = wrapped(lambda m, x: F.relu(m.bn(x) + F.relu(m.other(m.bn(x).sin()))) + m.bn(x.cos()).relu())
    same(model)
    same(model, uses="last")
    same(made(ResNet))
    with BatchNormStatistics(wrapped(interleaved)) as statistics, torch.no_grad():
        statistics.model(batch())
        assert list(statistics.losses()) == [("bn", 0), ("other", 0), ("bn", 1)]
        assert "traced; it" in statistics.describe()
        assert parts_of(statistics.describe())["other"] == "BatchNorm + ReLU"
        losses = statistics.losses()
    with BatchNormStatistics(wrapped(interleaved), fuse=False) as statistics, torch.no_grad():
        statistics.model(batch())
        torch.testing.assert_close(losses, statistics.losses(), rtol=1e-11, atol=1e-12)


# Forwards whose graph would do something else


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -2 * grad


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return -2 * grad


def no_grad(m, x):
    with torch.no_grad():
        y = x.sin()
    return F.relu(m.bn(x)) + y


def autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = x @ x.transpose(2, 3)
    return F.relu(m.bn(x)) + y.sum()


def branch(m, x):
    return F.relu(m.bn(x)) if x.mean() > 0 else F.silu(m.bn(x))


def on_cpu(m, x):
    with torch.autograd.graph.save_on_cpu():
        return F.relu(m.bn(x).sin())


class Keeper(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.conv, self.bn, self.keep = conv(3, 4), nn.BatchNorm2d(4), keep
        self.seen, self.calls = [], 0

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        self.keep(self, y)
        return y.sin()


KEPT = []


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Wrapped(no_grad), "runs under a context"),
        (lambda: Wrapped(autocast), "runs under a context"),
        (lambda: Wrapped(on_cpu), "runs under a context"),
        (
            lambda: Wrapped(branch),
            "cannot be traced: TraceError: symbolically traced variables",
        ),
        (lambda: Wrapped(lambda m, x: F.relu(m.bn(Scaled.apply(x)))), "an autograd function|under a context"),
        (lambda: Wrapped(lambda m, x: F.relu(m.bn(Same.apply(x)))), "applies an autograd function"),
        (lambda: Wrapped(lambda m, x: F.relu(m.bn(x)) + torch.arange(8)), "tensors that do not depend on its input"),
        (lambda: Wrapped(lambda m, x: F.relu(m.bn(x)) * (m.conv.weight.detach().clone() ** 2).sum()), ""),
        (lambda: Keeper(lambda m, y: setattr(m, "last", y)), "changes attributes"),
        (lambda: Keeper(lambda m, y: m.seen.append(y)), "changes attributes"),
        (lambda: Keeper(lambda m, y: setattr(m, "calls", m.calls + 1)), "changes attributes"),
        (lambda: Keeper(lambda m, y: KEPT.append(y)), "keeps an activation"),
        (
            lambda: Wrapped(lambda m, x: checkpoint(lambda y: F.relu(m.bn(y)), x, use_reentrant=False)),
            "under a context",
        ),
        (
            lambda: Wrapped(lambda m, x: checkpoint(lambda y: F.relu(m.bn(y)), x, use_reentrant=True)),
            "function|context",
        ),
    ],
)
def test_forwards_that_have_no_graph(make, why):
    KEPT.clear()
    text = same(made(make))
    assert re.search(why, text), text
    if why:
        assert parts_of(text)["bn"].startswith("BatchNorm alone")
    assert all(isinstance(value, torch.Tensor) for value in KEPT)
    model = made(make)
    if isinstance(model, Keeper):
        KEPT.clear()
        with BatchNormStatistics(model):
            for _ in range(2):
                model(batch())
        assert len(model.seen) in (0, 2)
        assert model.calls in (0, 2)
        assert len(KEPT) in (0, 2)


def test_a_graph_that_computes_something_else():
    class Odd(nn.Module):
        """A network that fx takes for another: a list where it gets a tensor."""

        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv(3, 4), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.bn(self.conv(x))
            return F.relu(y) if isinstance(y, torch.Tensor) else F.silu(y)

    text = same(made(Odd))
    assert "its graph gives another output or other statistics (relative difference" in text
    assert parts_of(text)["bn"] == "BatchNorm alone"


def test_devices_without_a_kernel_are_tapped():
    model = made(ResNet).to("meta")
    with BatchNormStatistics(model) as statistics:
        model(batch().to("meta"))
        assert statistics.loss().device.type == "meta"
        assert "Nothing is fused: the fused layer has no kernel for meta" in statistics.describe()
