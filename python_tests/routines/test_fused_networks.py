"""Fused networks in all the ways that networks are called."""

import copy
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from fusable import NETWORKS, VGG, EfficientNet, ResNet, Wrapped, batch, conv, leaves, made, parts_of, result_of, same
from networks import trained_like
from test_statistics_of_replicas import Parallel
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from kdkernels.inversion import BatchNormStatistics


class Arguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(3, 4), nn.BatchNorm2d(4)

    def forward(self, x, shift=None, *, scale=1.0, mode="relu", tuples=False):
        y = self.bn(self.conv(x))
        if shift is not None:
            y = y + shift
        y = (F.relu if mode == "relu" else F.silu)(y) * scale
        return (y, [y.sum()]) if tuples else y


def test_arguments_of_calls():
    model, shift = made(Arguments), torch.randn(4, 4, 8, 8, dtype=torch.float64)
    calls = [
        (lambda m: lambda x: m(x), "BatchNorm + ReLU"),
        (lambda m: lambda x: m(x=x), "BatchNorm + ReLU"),
        (lambda m: lambda x: m(x, shift), "BatchNorm + add + ReLU"),
        (lambda m: lambda x: m(x, shift=shift, scale=2.0), "BatchNorm + add + ReLU"),
        (lambda m: lambda x: m(x, None, mode="silu", tuples=True), "BatchNorm + SiLU"),
        (lambda m: lambda x: m(x, mode=["relu"][0], scale=torch.tensor(3.0)), "BatchNorm + ReLU"),
    ]
    for call, expected in calls:
        assert parts_of(same(model, call=call(model)))["bn"] == expected
    with BatchNormStatistics(model) as statistics:  # all of them, one after the other
        for _ in range(2):
            for call, _ in calls:
                found = leaves(call(model)(batch()))
                with BatchNormStatistics(copy.deepcopy(model).eval(), fuse=False) as taps:
                    expected = leaves(call(taps.model)(batch()))
                    torch.testing.assert_close(found, expected)
                    torch.testing.assert_close(statistics.loss(), taps.loss())


def test_parts_of_a_network():
    """Each of them has a graph of its own."""
    model = made(ResNet)
    text = same(model, call=lambda x: model.forward_features(x))
    assert parts_of(text)["layer1.0.bn2"] == "BatchNorm + add + ReLU"
    assert parts_of(text)["bn1"] == "BatchNorm alone"
    assert "layer1 (Sequential): traced" in text
    text = same(model, call=lambda x: model.layer2[1](model.layer2[0].conv1.forward(torch.cat([x, x[:, :1]], 1))))
    assert parts_of(text)["layer2.1.bn2"] == "BatchNorm + add + ReLU"


def test_a_network_with_control_flow_has_parts_without():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = ResNet()

        def forward(self, x):
            y = self.net.relu(self.net.bn1(self.net.conv1(x)))
            if y.mean() > -100:
                y = self.net.layer1(y)
            return y

    text = same(made(Model))
    assert "the network (Model): not traced, because its forward cannot be traced: TraceError" in text
    assert parts_of(text)["net.layer1.1.bn2"] == "BatchNorm + add + ReLU"


def test_a_layer_as_the_network_and_a_shared_layer():
    assert parts_of(same(trained_like(nn.BatchNorm2d(3)).double()))["the network"] == "BatchNorm alone"
    same(made(nn.Sequential, nn.BatchNorm2d(3), nn.ReLU()))
    bn, relu = nn.BatchNorm2d(3), nn.ReLU()
    same(made(nn.Sequential, bn, relu, conv(3, 3), bn, relu, bn))
    same(made(nn.Sequential, bn, relu, conv(3, 3), bn, relu, bn), uses="last")


@pytest.mark.parametrize("network", [ResNet, EfficientNet])
def test_a_graph_module(network):
    model = torch.fx.symbolic_trace(made(network).eval())
    text = same(model)
    assert "add" in text
    with BatchNormStatistics(model):
        copied = copy.deepcopy(model)
        torch.testing.assert_close(copied(batch()), model(batch()))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("of", ["blocks", "stages", "network", "inside"])
def test_checkpoints(reentrant, of):
    run = lambda stage, x: checkpoint(stage, x, use_reentrant=reentrant)  # noqa: E731

    class Model(ResNet):
        def forward(self, x):
            if of == "network":
                return run(super().forward, x)
            y = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            for stage in (self.layer1, self.layer2):
                if of == "blocks":
                    for block in stage:
                        y = run(block, y)
                elif of == "stages":
                    y = run(stage, y)
                else:
                    y = checkpoint_sequential(stage, 2, y, use_reentrant=reentrant)
            return self.fc(torch.flatten(self.avgpool(y), 1))

    text = same(made(Model))
    if of != "network":
        assert "(Model): not traced, because " in text
        assert parts_of(text)["layer1.1.bn2"] == "BatchNorm + add + ReLU"


def test_two_forwards_through_checkpoints_before_one_backward():
    grads = []
    for reentrant in (None, False, True):

        class Model(ResNet):
            def forward(self, x, reentrant=reentrant):
                y = self.relu(self.bn1(self.conv1(x)))
                for stage in (self.layer1, self.layer2):
                    y = stage(y) if reentrant is None else checkpoint(stage, y, use_reentrant=reentrant)
                return y

        model, a, b = made(Model), batch(0), batch(1)
        with BatchNormStatistics(model) as statistics:
            total = model(a).square().sum() + statistics.loss()
            total = total + model(b).square().sum() + 3 * statistics.loss()
            total.backward()
        grads.append((a.grad, b.grad))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(grads[2], grads[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("network", NETWORKS)
def test_replicas(network):
    inner = made(network).eval()
    if network is EfficientNet:
        inner.__class__ = type(
            "Logits", (EfficientNet,), {"forward": lambda s, x: EfficientNet.forward(s, x)["logits"]}
        )
    x = batch(count=7)
    expected = result_of(inner, x, False)
    model = Parallel(inner)
    with BatchNormStatistics(model) as statistics:
        for _ in range(2):
            output = model(x)
            torch.testing.assert_close(output, expected[0][0])
            torch.testing.assert_close(torch.stack(list(statistics.losses().values())), expected[2])
            model.module(x)  # after which replicas are fused too
            torch.testing.assert_close(torch.stack(list(statistics.losses().values())), expected[2])
        replicas = [model.replica() for _ in range(2)]
        del replicas


def test_data_parallel_without_devices():
    model = nn.DataParallel(made(ResNet))
    text = same(model)
    assert "the network: not traced, because it is DataParallel of torch" in text
    assert parts_of(text)["module.layer1.1.bn2"] == "BatchNorm + add + ReLU"


@pytest.mark.parametrize("over", ["image", "class"])
def test_statistics_over_images(over):
    model, x = made(ResNet), batch()
    results = []
    for fuse in (False, "auto"):
        y = x.detach().clone().requires_grad_()
        with BatchNormStatistics(model, fuse=fuse, over=over) as statistics:
            output = model(y)
            labels = {"labels": torch.tensor([0, 1, 0, 2])} if over == "class" else {}
            (output.square().sum() + statistics.loss(**labels)).backward()
            results.append((output, statistics.loss(**labels), y.grad))
    assert parts_of(statistics.describe())["layer1.1.bn2"] == "BatchNorm + add + ReLU"
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", [{"unbiased": True}, {"mode": "gaussian_kl"}, {"layers": nn.BatchNorm1d}])
def test_options(options):
    same(made(VGG), **options)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("network", [ResNet, VGG, EfficientNet])
def test_dtypes(network, dtype, bound):
    model = made(network).to(dtype)
    x = batch().detach().to(dtype)
    _, _, losses, grad, _ = result_of(model, x, False)
    _, _, found_losses, found_grad, text = result_of(model, x, "auto")
    assert "traced; it differs" in text, text
    torch.testing.assert_close(found_losses, losses, rtol=bound, atol=bound * losses.abs().max().item())
    assert (found_grad - grad).float().norm() <= 2 * bound * grad.float().norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_autocast(layout):
    model = made(ResNet, 5, 16).float().to(memory_format=layout)
    x = batch(count=16).detach().float().to(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        _, _, losses, _, _ = result_of(model, x, False)
        _, _, found, grad, text = result_of(model, x, "auto")
    assert "traced; it differs" in text, text
    assert grad.dtype == torch.float32
    torch.testing.assert_close(found, losses, rtol=0.1, atol=0.05)


def test_without_gradients():
    model, x = made(ResNet), batch()
    expected = result_of(model, x, False)
    for mode in (torch.no_grad, torch.inference_mode):
        with BatchNormStatistics(model) as statistics, mode():
            for _ in range(2):
                torch.testing.assert_close(model(x), expected[0][0])
                torch.testing.assert_close(torch.stack(list(statistics.losses().values())), expected[2])
            assert "traced; it" in statistics.describe()


def test_a_first_input_that_tells_nothing():
    """Numbers that are not finite agree with anything, so that a later input decides."""
    model, x = made(ResNet), batch()
    with BatchNormStatistics(model) as statistics:
        model(x * float("nan"))
        assert "traced; it" not in statistics.describe()
        model(x)
        assert "traced; it" in statistics.describe()


def test_it_is_decided_once():
    model, x, runs = made(ResNet), batch(), []
    statistics = BatchNormStatistics(model)
    for _ in range(3):
        model.conv1.forward = lambda y: runs.append(1) or nn.Conv2d.forward(model.conv1, y)
        with statistics:
            model(x)
            model(x)
        del model.conv1.forward
    assert len(runs) == 2 + 6


def test_descriptions():
    model, x = made(ResNet), batch()
    statistics = BatchNormStatistics(model)
    assert statistics.describe() == "Nothing is fused outside the with block."
    with statistics:
        assert statistics.describe().startswith("the network (ResNet): not traced yet, because no call of it")
        assert "bn1: BatchNorm alone" in statistics.describe()
        model.layer1.train()
        model(x)
        assert "not traced yet, because a module inside is in train mode" in statistics.describe()
        model.eval()
        model(x * float("inf"))
        assert "not traced yet, because the outputs of its first calls were not finite" in statistics.describe()
        model(x)
        assert "yet" not in statistics.describe()
    for options, why in (
        ({"fuse": False}, "fuse=False"),
        ({"at": "output"}, "at='output'"),
        ({"freeze": False}, "freeze=False"),
    ):
        with BatchNormStatistics(model.eval(), **options) as statistics:
            model(x)
            assert statistics.describe().startswith(f"Nothing is fused: {why}")
    with pytest.raises(ValueError, match=r"fuse is 'always'; accepted are 'auto' and False"):
        BatchNormStatistics(model, fuse="always")


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    ("make", "traced"),
    [
        (lambda y: Pair(y, y.sum()), True),
        (lambda y: Output(y), True),
        (lambda y: {"a": y, "count": 3, "none": None}, True),
        (lambda y: (y, "text", [y.sum(), {"b": y}]), True),
        (lambda y: OrderedDict(a=y), False),  # of which torch.fx makes a dictionary
    ],
)
def test_kinds_of_outputs(make, traced):
    model = made(Wrapped, lambda m, x: make(F.relu(m.bn(x))))
    with BatchNormStatistics(model) as statistics:
        output = model(batch())
        assert ("traced; it" in statistics.describe()) is traced
        assert traced or "its graph gives outputs of another kind" in statistics.describe()
    with BatchNormStatistics(model, fuse=False):
        expected = model(batch())
    assert type(output) is type(expected)
    held = [leaves(vars(value) if isinstance(value, Output) else value) for value in (output, expected)]
    tensors = [[value for value in values if isinstance(value, torch.Tensor)] for values in held]
    others = [[value for value in values if not isinstance(value, torch.Tensor)] for values in held]
    torch.testing.assert_close(*tensors)
    assert others[0] == others[1]


def test_numbers_that_are_different_in_each_call():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv(3, 3), nn.BatchNorm2d(3)

        def forward(self, x, step):
            return F.relu(self.bn(self.conv(x))) * step

    model, x = made(Steps), batch()
    with BatchNormStatistics(model):
        outputs = [model(x, step) for step in range(40)]
    for step, output in enumerate(outputs):
        torch.testing.assert_close(output, outputs[1] * step)


def test_what_wrong_shapes_raise():
    model = made(nn.Sequential, nn.BatchNorm2d(3), nn.ReLU())
    for fuse in (False, "auto"):
        with BatchNormStatistics(model, fuse=fuse):
            with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
                model(torch.randn(2, 3, 5, dtype=torch.float64))
            with pytest.raises(ValueError, match=r"layer 0 got an activation of shape \[2, 4, 5, 5\]"):
                model(torch.randn(2, 4, 5, 5, dtype=torch.float64))
            with pytest.raises(ValueError, match="has 0 values per channel"):
                model(torch.randn(0, 3, 5, 5, dtype=torch.float64))
