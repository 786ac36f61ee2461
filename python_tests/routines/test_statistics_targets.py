"""What statistics are compared with: given targets and those of a training step."""

import copy

import pytest
import torch
from networks import trained_like
from stages import F64, Ranks, close, images, plain
from torch import nn

from kdkernels.functional import batch_norm_stats
from kdkernels.inversion import BatchNormStatistics, demixed_targets

LABELS = torch.tensor([2, 0, 2, 0, 1])


def tensor(*values):
    return torch.tensor(values, dtype=F64)


# Given targets


def test_a_target_by_hand():
    """x has mean 2 and variance 1, and the target is 5 and 3."""
    layer, x = nn.BatchNorm1d(1).double(), tensor([1.0], [3.0])
    mean, var = tensor(5.0), tensor(3.0)
    with BatchNormStatistics(layer, targets={"": (mean, var)}) as statistics:
        mean.zero_()  # the given ones were copied
        layer(x)
        close(statistics.loss(), torch.tensor(3.0 + 2.0, dtype=F64))


@pytest.mark.parametrize("over", ["batch", "image", "class"])
@pytest.mark.parametrize("freeze", [True, False])
def test_targets_replace_the_running_statistics_of_the_named_layers(over, freeze):
    model, x = plain().eval(), images()
    other = trained_like(copy.deepcopy(model), seed=7)
    name = "stages.1.1"
    target = other.stages[1][1]
    labels = LABELS if over == "class" else None
    with BatchNormStatistics(model, over=over) as statistics:
        model(x)
        expected = statistics.losses(labels=labels)
    with BatchNormStatistics(model, over=over) as statistics:
        model(x)
        # The running statistics are read with the first loss; those of the others stay.
        target_of = {"running_mean": target.running_mean, "running_var": target.running_var}
        kept = {key: getattr(model.stages[1][1], key).clone() for key in target_of}
        for key, values in target_of.items():
            getattr(model.stages[1][1], key).copy_(values)
        expected[name, 0] = statistics.losses(labels=labels)[name, 0]
        for key, values in kept.items():
            getattr(model.stages[1][1], key).copy_(values)
    targets = {name: (target.running_mean, target.running_var)}
    with BatchNormStatistics(model, over=over, targets=targets, freeze=freeze) as statistics:
        model(x)
        found = statistics.losses(labels=labels)
    assert list(found) == list(expected)
    close(torch.stack(list(found.values())), torch.stack(list(expected.values())))


def test_a_target_for_each_class():
    """Equals the mean of the losses of sub-batches, each with the row of its class as its target."""
    model, x = plain().eval(), images()
    name, rows = "stages.1.1", (torch.randn(3, 4, dtype=F64), torch.rand(3, 4, dtype=F64) + 0.5)
    losses = []
    for label in range(3):
        with BatchNormStatistics(model, targets={name: (rows[0][label], rows[1][label])}) as statistics:
            model(x[label == LABELS])
            losses.append(statistics.loss())
    with BatchNormStatistics(model, over="class", targets={name: rows}) as statistics:
        for _ in range(2):
            model(x)
            loss = statistics.loss(labels=LABELS)
            close(loss, torch.stack(losses).mean())
            loss = statistics.loss(labels=LABELS.flip(0))  # targets follow the labels of the call
            assert not torch.allclose(loss, torch.stack(losses).mean())
        with pytest.raises(ValueError, match=r"labels are from 0 to 3; targets\['stages.1.1'\] has rows"):
            statistics.loss(labels=torch.tensor([0, 1, 2, 3, 0]))
    expected, grad = torch.stack(losses).mean(), torch.autograd.grad(torch.stack(losses).mean(), x)[0]
    with BatchNormStatistics(model, over="class", targets={name: rows}) as statistics:
        model(x)
        found = statistics.loss(labels=LABELS)
    close(found, expected)
    close(torch.autograd.grad(found, x)[0], grad)


@pytest.mark.parametrize(
    ("targets", "error", "text"),
    [
        ([1, 2], TypeError, r"targets is a list; expected \{name of a layer: \(mean, var\)\}"),
        ({"0": (1, 2)}, ValueError, r"targets names \['0'\]; the layers are stages.0.1, "),
        ({"stages.0.1": torch.ones(4)}, TypeError, r"targets\['stages.0.1'\] is a Tensor; expected the pair"),
        ({"stages.0.1": (torch.ones(4),)}, ValueError, r"targets\['stages.0.1'\] holds 1; expected the pair"),
        ({"stages.0.1": (torch.ones(4), [1.0] * 4)}, TypeError, "the var of targets.* must be a tensor, got list"),
        ({"stages.0.1": (torch.ones(3), torch.ones(3))}, ValueError, r"the mean of .* shape \[3\]; expected \[4\];"),
        (
            {"stages.0.1": (torch.ones(2, 4), torch.ones(2, 4))},
            ValueError,
            "each class needs over='class'",
        ),
        ({"stages.0.1": (torch.ones(4).requires_grad_(), torch.ones(4))}, ValueError, "requires grad, .* detach it"),
    ],
)
def test_wrong_targets(targets, error, text):
    with pytest.raises(error, match=text):
        BatchNormStatistics(plain(), targets=targets)


def test_wrong_targets_for_classes():
    rows = {"stages.0.1": (torch.ones(2, 4), torch.ones(3, 4))}
    with pytest.raises(ValueError, match=r"a mean of shape \[2, 4\] and a var of shape \[3, 4\]"):
        BatchNormStatistics(plain(), over="class", targets=rows)
    with pytest.raises(ValueError, match=r"shape \[2, 3\]; expected \[4\], or \[classes, 4\]"):
        BatchNormStatistics(plain(), over="class", targets={"stages.0.1": (torch.ones(2, 3), torch.ones(2, 3))})


# The statistics of a training step


def trained_a_step(model, x):
    before = {name: values.clone() for name, values in model.state_dict().items()}
    model.train()(x)
    return before, model.state_dict()


@pytest.mark.parametrize("momentum", [0.1, 0.3, 1.0])
def test_the_statistics_of_a_training_step_are_recovered(momentum):
    model = trained_like(Ranks()).double()
    model.image.momentum = model.volume.momentum = model.vector.momentum = momentum
    seen = {}
    for name in ("volume", "vector"):
        getattr(model, name).register_forward_pre_hook(lambda m, inputs, name=name: seen.update({name: inputs[0]}))
    x = torch.randn(4, 3, 5, 6, dtype=F64)
    # A layer that runs twice in a step cannot be demixed.
    with pytest.raises(ValueError, match=r"image.num_batches_tracked grows by 2 .* expected 1"):
        demixed_targets(*trained_a_step(model, x), momentum=momentum)
    model = trained_like(Ranks()).double()
    model.image = nn.Identity()
    model.volume.momentum = model.vector.momentum = momentum
    for name in ("volume", "vector"):
        getattr(model, name).register_forward_pre_hook(lambda m, inputs, name=name: seen.update({name: inputs[0]}))
    before, after = trained_a_step(model, x)
    targets = demixed_targets(before, after, momentum=momentum)
    biased = demixed_targets(before, after, momentum=momentum, values={"volume": 4 * 30, "vector": 4})
    assert list(targets) == ["volume", "vector"]
    for name, (mean, var) in targets.items():
        z = seen[name]
        close(mean, batch_norm_stats(z).mean)
        close(var, batch_norm_stats(z, unbiased=True).var)
        close(biased[name][0], mean)
        close(biased[name][1], batch_norm_stats(z).var)


def test_a_batch_agrees_with_its_own_training_step():
    model, x = plain(), images()
    twin = copy.deepcopy(model).train()
    targets = demixed_targets(*trained_a_step(model, x))
    with BatchNormStatistics(twin, targets=targets, unbiased=True, freeze=False) as statistics:
        twin(x)
        assert statistics.loss() < 1e-12
    with BatchNormStatistics(twin, unbiased=True, freeze=False) as statistics:
        twin(x)
        assert statistics.loss() > 1


def test_demixing_in_single_precision():
    model = trained_like(nn.BatchNorm2d(3))
    x = torch.randn(4, 3, 5, 5)
    mean, var = demixed_targets(*trained_a_step(model, x))[""]
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=0, atol=1e-5)
    torch.testing.assert_close(var, x.var((0, 2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda b, a: demixed_targets(b, a, momentum=0), ValueError, r"momentum is 0; expected a number in \(0, 1\]"),
        (lambda b, a: demixed_targets(b, a, momentum="0.1"), TypeError, "momentum must be a number"),
        (lambda b, a: demixed_targets({}, {}), ValueError, "before and after have no running statistics"),
        (lambda b, a: demixed_targets(a, a), ValueError, r"grows by 0 from before to after; .*Copy the tensors"),
        (lambda b, a: demixed_targets({}, a), ValueError, "before and after differ in 0.running_mean"),
        (lambda b, a: demixed_targets(b, {}), ValueError, "before and after differ in 0.running_mean"),
        (lambda b, a: demixed_targets(b, a, values={}), ValueError, "values lacks the layer '0'"),
    ],
)
def test_wrong_training_steps(change, error, text):
    states = trained_a_step(nn.Sequential(nn.BatchNorm1d(2)), torch.randn(4, 2))
    with pytest.raises(error, match=text):
        change(*states)


# Options of the distance


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"reduction": "sum"}, ValueError, "reduction is 'sum', but mode='l2' is a norm"),
        ({"mode": "gaussian_kl", "moment": "std"}, ValueError, "moment='std' applies to"),
        ({"mode": "gaussian_kl", "mean_weight": 2.0}, ValueError, "mean_weight is 2.0, but mode='gaussian_kl' is one"),
        ({"var_weight": float("nan")}, ValueError, "var_weight is nan; expected a finite number"),
    ],
)
def test_options_are_checked_before_the_network_runs(options, error, text):
    with pytest.raises(error, match=text):
        BatchNormStatistics(plain(), **options)


def test_the_parts_of_mean_and_variance():
    model, x = plain(), images()
    options = {"mode": "l1", "reduction": "sum"}
    parts = []
    for weights in ({"var_weight": 0.0}, {"mean_weight": 0.0}, {"mean_weight": 2.0, "var_weight": 0.25}):
        with BatchNormStatistics(model, **options, **weights) as statistics:
            model(x)
            parts.append(statistics.loss())
    close(parts[2], 2 * parts[0] + 0.25 * parts[1])


@pytest.mark.parametrize("at", ["input", "output"])
def test_running_statistics_that_change_in_the_block_are_read_again(at):
    layer = torch.nn.BatchNorm2d(2, eps=0.0).double().eval()
    x = torch.tensor([[[[1.0, 3.0]], [[2.0, 2.0]]]], dtype=torch.float64)  # means 2 and 2, variances 1 and 0
    weights = torch.tensor([1.0, 1.0], dtype=torch.float64)
    with BatchNormStatistics(layer, mode="squared", reduction="sum", at=at) as statistics:

        def loss():
            layer(x)
            return float(statistics.loss())

        def expected():
            mean, var = layer.running_mean, layer.running_var
            given = torch.tensor([2.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
            if at == "input":
                return float(((given[0] - mean) ** 2 + (given[1] - var) ** 2).sum())
            factor = layer.weight**2 / var
            outputs = (given[0] - mean) * layer.weight / var.sqrt() + layer.bias, given[1] * factor
            return float(((outputs[0] - layer.bias) ** 2 + (outputs[1] - layer.weight**2) ** 2).sum())

        assert loss() == pytest.approx(9.0)  # 4 + 4 of the means, 0 + 1 of the variances
        layer.load_state_dict({**layer.state_dict(), "running_mean": weights, "running_var": 4 * weights})
        assert loss() == pytest.approx(expected())
        layer.running_mean = layer.running_mean + 1
        assert loss() == pytest.approx(expected())
        layer.weight.mul_(3.0)
        assert loss() == pytest.approx(expected())
        assert loss() == loss()
