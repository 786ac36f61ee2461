"""The statistics of a network's BatchNorm layers: values, choice of layers, and which forward they are of."""

from contextlib import nullcontext

import pytest
import torch
from networks import hooked_loss, trained_like
from stages import F64, Ranks, close, expected_of, images, plain
from torch import nn

from kdkernels.functional import batch_norm_stats
from kdkernels.inversion import BatchNormStatistics


@pytest.mark.parametrize("mode", ["l2", "gaussian_kl"])
def test_statistics_equal_hooks(mode):
    model = trained_like(Ranks()).double()
    x = torch.randn(4, 3, 5, 6, dtype=F64, requires_grad=True)
    losses, names, expected = hooked_loss(model, x, mode)
    assert names == ["volume", "image", "image", "vector"]
    (expected_grad,) = torch.autograd.grad(sum(losses) + expected.square().sum(), x)
    with BatchNormStatistics(model, mode=mode) as statistics:
        outputs = model(x)
        (grad,) = torch.autograd.grad(statistics.loss() + outputs.square().sum(), x)
        by_use = statistics.losses()
        assert list(by_use) == [("volume", 0), ("image", 0), ("image", 1), ("vector", 0)]
        close(torch.stack(list(by_use.values())), torch.stack(losses))
        weighted = 2 * losses[0] + 3 * (losses[1] + losses[2]) + 5 * losses[3]
        close(statistics.loss([2.0, 3.0, 5.0]), weighted)
        close(statistics.loss({"vector": 5.0, "volume": 2.0, "image": 3.0}), weighted)
        close(statistics.loss({"vector": 2.0}), sum(losses) + losses[3])
    assert statistics.layers == ["volume", "image", "vector"]
    close(outputs, expected)
    close(grad, expected_grad)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_weights_change_and_an_evaluation_in_inference_mode_does_not_matter(backend):
    torch._dynamo.reset()
    model, x = plain().eval(), images()
    losses, _, _ = hooked_loss(model, x)
    with BatchNormStatistics(model) as statistics:

        def loss(weights):
            model(x)
            return statistics.loss(weights)

        with torch.inference_mode():
            loss([1.0, 2.0, 3.0])
        if backend is not None:
            loss = torch.compile(loss, backend=backend)
        for weights in ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [0.5, 0.0, 4.0]):
            expected = sum(w * part for w, part in zip(weights, losses, strict=True))
            found = loss(weights)
            close(found, expected)
            close(torch.autograd.grad(found, x)[0], torch.autograd.grad(expected, x, retain_graph=True)[0])


def test_the_last_use_of_a_layer_alone():
    model = trained_like(Ranks()).double()
    x = torch.randn(4, 3, 5, 6, dtype=F64)
    losses, _, _ = hooked_loss(model, x)
    with BatchNormStatistics(model, uses="last") as statistics:
        model(x)
        assert list(statistics.losses()) == [("volume", 0), ("image", 1), ("vector", 0)]
        close(statistics.loss(), losses[0] + losses[2] + losses[3])
        close(statistics.loss([1.0, 10.0, 1.0]), losses[0] + 10 * losses[2] + losses[3])


@pytest.mark.parametrize(
    "layers",
    [
        ["volume", "image"],
        nn.BatchNorm3d | nn.BatchNorm2d,
        (nn.BatchNorm3d, nn.BatchNorm2d),
        lambda name, module: name != "vector",
        ("image", "volume"),
    ],
)
def test_the_choice_of_layers(layers):
    model = trained_like(Ranks()).double()
    x = torch.randn(4, 3, 5, 6, dtype=F64)
    losses, _, _ = hooked_loss(model, x)
    with BatchNormStatistics(model, layers=layers) as statistics:
        model(x)
        assert statistics.layers == ["volume", "image"]
        close(statistics.loss(), sum(losses[:3]))
    assert BatchNormStatistics(model, layers=nn.BatchNorm1d).layers == ["vector"]


@pytest.mark.parametrize("affine", [True, False])
def test_statistics_of_the_outputs(affine):
    """Values of a layer by hand: x has mean 2 and variance 9, the layer's are 1 and 4."""
    bn = nn.BatchNorm1d(1, eps=0.5, affine=affine).double()
    bn.running_mean[0], bn.running_var[0] = 1.0, 4.0
    weight, bias = 1.0, 0.0
    if affine:
        weight, bias = 3.0, 7.0
        nn.init.constant_(bn.weight, weight), nn.init.constant_(bn.bias, bias)
    x = torch.tensor([[-1.0], [5.0]], dtype=F64, requires_grad=True)
    with BatchNormStatistics(bn, at="output") as statistics:
        bn(x)
        mean, var = bias + weight * (2 - 1) / 4.5**0.5, weight**2 * 9 / 4.5
        close(statistics.loss(), torch.tensor(abs(mean - bias) + abs(var - weight**2 * 4 / 4.5), dtype=F64))
        (grad,) = torch.autograd.grad(statistics.loss(), x)
        # d mean / dx = w / (2 sqrt 4.5), d var / dx = w^2 (x - 2) / 4.5
        slope, spread = weight / (2 * 4.5**0.5), weight**2 * 3 / 4.5
        close(grad, torch.tensor([[slope - spread], [slope + spread]], dtype=F64))


def test_outputs_may_be_changed_in_place_and_layers_must_be_in_eval_mode():
    models = [
        nn.Sequential(nn.Conv2d(2, 3, 3), trained_like(nn.BatchNorm2d(3)), nn.ReLU(inplace)).double().eval()
        for inplace in (False, True)
    ]
    models[1].load_state_dict(models[0].state_dict())
    losses, grads = [], []
    for model in models:
        x = images()
        with BatchNormStatistics(model, at="output") as statistics:
            (model(x).square().sum() + statistics.loss()).backward()
            losses.append(statistics.loss())
            grads.append(x.grad)
    close(losses[1], losses[0])
    close(grads[1], grads[0])
    with (
        BatchNormStatistics(models[0].train(), at="output", freeze=False),
        pytest.raises(RuntimeError, match="layer 1 ran in train mode, where its output has the same statistics"),
    ):
        models[0](x)


# Which forward


def test_loss_is_of_the_latest_forward():
    model, a, b = plain(), images(0), images(1)
    (loss_a, _), (loss_b, grad_b) = expected_of(model, a), expected_of(model, b)
    with BatchNormStatistics(model) as statistics:
        model(a)
        output = model(b)
        close(statistics.loss(), loss_b)
        assert torch.equal(statistics.loss(), statistics.loss())
        close(torch.autograd.grad(output.square().sum() + statistics.loss(), b)[0], grad_b)
        model(a)
        close(statistics.loss(), loss_a)


def test_several_forwards_before_one_backward():
    model, a, b = plain(), images(0), images(1)
    (_, grad_a), (_, grad_b) = expected_of(model, a), expected_of(model, b)
    with BatchNormStatistics(model) as statistics:
        total = model(a).square().sum() + statistics.loss()
        total = total + model(b).square().sum() + statistics.loss()
        found = torch.autograd.grad(total, (a, b))
    close(found[0], grad_a)
    close(found[1], grad_b)


def stages_of(model):
    """Return a function that runs a network's stages by calling them one by one."""

    def run(x):
        for stage in model.stages:
            x = stage(x)
        return model.head(x.mean((2, 3)))

    return run


@pytest.mark.parametrize("run", [lambda m: m.forward, lambda m: m.forward_features, stages_of])
def test_a_network_that_is_not_called(run):
    """In a loop that reads the loss, every forward stands for itself; otherwise it cannot be told, or is marked."""
    model = plain()
    with BatchNormStatistics(model) as statistics:
        for seed in range(3):
            x = images(seed)
            run(model)(x)
            close(statistics.loss(), expected_of(model, x)[0])
            close(statistics.loss(), expected_of(model, x)[0])
        run(model)(images(0))
        run(model)(images(1))
        with pytest.raises(RuntimeError, match=r"stages.0.1, .* ran twice outside a call of the model"):
            statistics.loss()
        run(model)(images(1))  # after the refusal, the next forward stands for itself again
        close(statistics.loss(), expected_of(model, images(1))[0])
        model(images(2))
        close(statistics.loss(), expected_of(model, images(2))[0])
        with statistics.forward():
            run(model)(images(1))
        close(statistics.loss(), expected_of(model, images(1))[0])


def test_features_and_head_are_one_forward():
    model = trained_like(Ranks()).double()
    x = torch.randn(4, 3, 5, 6, dtype=F64)
    losses, _, _ = hooked_loss(model, x)
    with BatchNormStatistics(model, layers=["volume", "vector"]) as statistics:
        for _ in range(2):
            model.forward_head(model.forward_features(x))
            close(statistics.loss(), losses[0] + losses[3])
    with BatchNormStatistics(model) as statistics, statistics.forward():
        model.forward_head(model.forward_features(x))
        close(statistics.loss(), sum(losses))


def test_a_forward_that_fails_does_not_disturb_the_next():
    model, x = plain(), images()
    with BatchNormStatistics(model) as statistics:
        for marked in (nullcontext, statistics.forward):
            stop = model.stages[2].register_forward_pre_hook(lambda module, inputs: 1 / 0)
            with pytest.raises(ZeroDivisionError), marked():
                model(x)
            stop.remove()
            with pytest.raises(RuntimeError, match="the latest forward ended in an error"):
                statistics.loss()  # of the first two stages
            model(x)
            close(statistics.loss(), expected_of(model, x)[0])


def test_keyword_calls_of_a_layer():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(2)

        def forward(self, x):
            return self.bn(input=x)

    model, x = trained_like(Keyword()).double(), images()
    mean, var = batch_norm_stats(x)
    with BatchNormStatistics(model) as statistics:
        model(x=x)
        close(statistics.loss(), (mean - model.bn.running_mean).norm() + (var - model.bn.running_var).norm())
