"""The statistics of other kinds of networks, which are given back as they were."""

import copy
import pickle

import pytest
import torch
from networks import trained_like
from stages import Ranks, close, expected_of, images, plain
from torch import nn

from kdkernels.functional import batch_norm_stats
from kdkernels.inversion import BatchNormStatistics
from kdkernels.models import SmallCNN

# Other layers, dtypes, and compilers


class FrozenBatchNorm(nn.Module):
    """Batch normalization with constants, as detection networks have it."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 2.0), ("bias", 1.0), ("running_mean", 0.5), ("running_var", 1.5)):
            self.register_buffer(name, torch.full((channels,), value))
        self.eps = 1e-5

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return (x - self.running_mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]


class BatchNormAct(nn.BatchNorm2d):
    """Batch normalization with an activation in one module, as timm has it."""

    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("layer", [FrozenBatchNorm, BatchNormAct, nn.BatchNorm2d, nn.SyncBatchNorm])
def test_other_kinds_of_batch_normalization(layer):
    model, x = nn.Sequential(layer(2)).double(), images()
    mean, var = batch_norm_stats(x)
    expected = (mean - model[0].running_mean).norm() + (var - model[0].running_var).norm()
    with BatchNormStatistics(model) as statistics:
        model(x)
        close(statistics.loss(), expected)


def test_parametrized_layers_count():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model, x = nn.Sequential(nn.BatchNorm2d(2)).double(), images()
    nn.utils.parametrize.register_parametrization(model[0], "weight", Doubled())
    with BatchNormStatistics(model, at="output") as statistics:
        output = model(x)
        mean, var = batch_norm_stats(output)
        close(statistics.loss(), mean.norm() + (var - 4 / (1 + 1e-5)).norm())


def test_what_is_not_counted_is_named():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.InstanceNorm2d(2, track_running_stats=True), BatchNormAct(2))
    with pytest.warns(UserWarning, match=r"statistics of 1 \(InstanceNorm2d\) are not counted"):
        assert BatchNormStatistics(model).layers == ["0", "2"]
    with pytest.warns(UserWarning, match=r"1 \(InstanceNorm2d\), 2 \(BatchNormAct\) are not counted: at='output'"):
        assert BatchNormStatistics(model, at="output").layers == ["0"]
    assert BatchNormStatistics(model, layers=nn.BatchNorm2d).layers == ["0", "2"]
    with pytest.raises(ValueError, match=r"those of 0 \(FrozenBatchNorm\) cannot be compared at='output'"):
        BatchNormStatistics(nn.Sequential(FrozenBatchNorm(2)), at="output")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_in_16_bits(dtype):
    model = plain().to(dtype)
    x = images().detach().to(dtype).requires_grad_()
    wide, wide_x = copy.deepcopy(model).float(), x.detach().float().requires_grad_()
    (expected, grad) = expected_of(wide, wide_x)
    with BatchNormStatistics(model) as statistics:
        output = model(x)
        found = statistics.loss()
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)
        (found_grad,) = torch.autograd.grad(output.float().square().sum() + found, x)
    assert (found_grad.float() - grad).norm() < 0.05 * grad.norm()


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_network(fullgraph):
    model, x = plain(), images()
    loss, grad = expected_of(model, x)
    torch._dynamo.reset()
    with BatchNormStatistics(model) as statistics:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        for _ in range(2):
            output = compiled(x)
            close(statistics.loss(), loss)
            close(torch.autograd.grad(output.square().sum() + statistics.loss(), x)[0], grad)


def test_a_compiled_network_without_gradients():
    torch._dynamo.reset()
    model, x = plain(), images()
    with BatchNormStatistics(model) as statistics, torch.no_grad():
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        found = statistics.loss()
    close(found, expected_of(model, x)[0].detach())


def test_functional_transforms():
    model, x = plain(), images()
    _, grad = expected_of(model, x)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    with BatchNormStatistics(model) as statistics:

        def objective(x):
            return torch.func.functional_call(model, tensors, (x,)).square().sum() + statistics.loss()

        close(torch.func.grad(objective)(x.detach()), grad)
        assert torch.autograd.gradcheck(objective, x)
        assert torch.autograd.gradgradcheck(objective, x)


# The network is given back


class LowRank(nn.Linear):
    """A layer that merges a low-rank update into its weight in eval mode, as loralib's does."""

    def __init__(self):
        super().__init__(8, 8)
        self.a, self.b, self.merged = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 8)), False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (self.a @ self.b).detach() * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        return super().forward(x) if self.merged else super().forward(x) + x @ (self.a @ self.b).t()


class Replacing(nn.Module):
    """A network that makes other parameters for each mode."""

    def __init__(self):
        super().__init__()
        self.scale, self.bn = nn.Parameter(torch.ones(2), requires_grad=False), nn.BatchNorm1d(2)

    def train(self, mode=True):
        super().train(mode)
        self.scale = nn.Parameter(self.scale.detach() * (0.1 if mode else 10))
        return self


def test_parameters_that_a_mode_replaces():
    model = Replacing()
    before = copy.deepcopy(model.state_dict())
    with BatchNormStatistics(model):
        assert not model.scale.requires_grad
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_layers_with_modes_of_their_own_come_back_bit_for_bit(training):
    torch.manual_seed(0)
    model = nn.Sequential(LowRank(), nn.BatchNorm1d(8), nn.Sequential(LowRank(), nn.BatchNorm1d(8))).train(training)
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    merged = [module.merged for module in model.modules() if isinstance(module, LowRank)]
    with BatchNormStatistics(model):
        assert all(module.merged for module in model.modules() if isinstance(module, LowRank))
        model(torch.randn(4, 8))
    assert [module.training for module in model.modules()] == modes
    assert [module.merged for module in model.modules() if isinstance(module, LowRank)] == merged
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_copy_of_the_network_is_another_network():
    model, x = plain(), images()
    with BatchNormStatistics(model) as statistics:
        model(x)
        expected = statistics.loss()
        copy.deepcopy(model)(images(1))
        assert torch.equal(statistics.loss(), expected)
        torch.func.functional_call(model, dict(model.named_parameters()), (images(1),))
        close(statistics.loss(), expected_of(model, images(1))[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda statistics: pickle.loads(pickle.dumps(statistics))])
def test_a_copy_of_the_statistics_is_of_a_copy_of_the_network(copied):
    statistics, x = BatchNormStatistics(plain()), images()
    other = copied(statistics)
    with statistics, other:
        statistics.model(x)
        other.model(x * 2)
        close(other.loss(), expected_of(plain(), x * 2)[0])
        close(statistics.loss(), expected_of(plain(), x)[0])


def test_model_is_restored():
    model = trained_like(Ranks())
    model.image.eval()
    model.vector.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    for _ in range(2):
        with BatchNormStatistics(model) as statistics, BatchNormStatistics(model, layers=["image"]) as other:
            assert not model.training
            assert not any(parameter.requires_grad for parameter in model.parameters())
            model(torch.randn(4, 3, 5, 6)).sum()
            assert torch.equal(other.loss(), statistics.loss({"volume": 0.0, "vector": 0.0}))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert set(module.__dict__) == attributes[name]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_model_is_restored_after_an_error():
    model = trained_like(SmallCNN(4))
    with pytest.raises(RuntimeError), BatchNormStatistics(model):
        model(torch.randn(2, 3, 8, 8))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_synchronized_batch_norm_is_covered():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(trained_like(SmallCNN(4)))
    assert len(BatchNormStatistics(model).layers) == 3


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: BatchNormStatistics(nn.Sequential(nn.Linear(2, 2))), "is Sequential, which has no BatchNorm layer"),
        (
            lambda m: BatchNormStatistics(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))),
            r"layers without running statistics: \['0'\]",
        ),
        (lambda m: BatchNormStatistics(nn.Sequential(nn.LazyBatchNorm2d())), r"shape is not known yet: \['0'\]"),
        (lambda m: BatchNormStatistics(m, layers="1"), r"layers is '1'; expected a list of names"),
        (
            lambda m: BatchNormStatistics(m, layers=["1", "2"]),
            r"layers names \['2'\]; the layers with statistics are 1",
        ),
        (lambda m: BatchNormStatistics(m, layers=[]), "layers chooses none of the layers with statistics, 1, 4, 7"),
        (lambda m: BatchNormStatistics(m, layers=nn.BatchNorm1d), "layers chooses none"),
        (
            lambda m: BatchNormStatistics(m, mode="l3"),
            "mode is 'l3'; accepted are 'l2', 'l1', 'squared'",
        ),
        (lambda m: BatchNormStatistics(m, uses="first"), "uses is 'first'; accepted are 'all', 'last'"),
        (lambda m: BatchNormStatistics(m, at="middle"), "at is 'middle'; accepted are 'input', 'output'"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(ValueError, match=text):
        call(SmallCNN(4))


@pytest.mark.parametrize("layers", [5, nn.BatchNorm2d(3)])
def test_wrong_types_of_layers(layers):
    with pytest.raises(TypeError, match="expected a list of names, a type or a tuple of types, or a function of name"):
        BatchNormStatistics(SmallCNN(4), layers=layers)


def test_networks_whose_layers_do_not_run():
    network, x = nn.Sequential(nn.BatchNorm2d(1)).eval(), torch.randn(2, 1, 3, 3)
    for model in (torch.jit.trace(network, x), torch.jit.script(network)):
        with pytest.raises(ValueError, match="model is a ScriptModule"):
            BatchNormStatistics(model)
    exported = torch.export.export(network, (x,)).module()
    with BatchNormStatistics(exported, freeze=False) as statistics:
        exported(x)
        with pytest.raises(RuntimeError, match="layers of an exported network do not run"):
            statistics.loss()


def test_wrong_uses():
    statistics = BatchNormStatistics(SmallCNN(4))
    with statistics:
        with pytest.raises(RuntimeError, match="no BatchNorm layer has run yet"):
            statistics.loss()
        with pytest.raises(RuntimeError, match="already active"):
            statistics.__enter__()
        statistics.model(torch.randn(2, 1, 8, 8))
        with pytest.raises(ValueError, match="weights has 2 values; expected one for each of the 3 layers"):
            statistics.loss([1.0, 1.0])
        with pytest.raises(ValueError, match=r"weights names \['0'\]; the layers are 1, 4, 7"):
            statistics.loss({"0": 1.0})
        with pytest.raises(
            ValueError, match=r"layer 1 got an activation of shape \[2, 5, 3, 3\]; expected \[N, C, ...\]"
        ):
            statistics.model[1](torch.randn(2, 5, 3, 3))
