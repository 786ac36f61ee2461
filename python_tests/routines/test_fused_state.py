"""Hooks and state of a fused network, which are those of the network."""

import copy
import cProfile
import inspect
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from fusable import BasicBlock, ResNet, Wrapped, batch, conv, made, parts_of, result_of, same
from torch import nn

from kdkernels.inversion import BatchNormStatistics


@pytest.mark.parametrize("name", ["layer1.0", "layer1.0.bn1", "layer1.0.relu", "layer1.0.conv1", "layer2", ""])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_of_users_run_once_for_each_call(name, kind):
    calls = []
    model = made(ResNet)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # which backward hooks do not allow
    module = model.get_submodule(name)
    handle = getattr(module, kind)(lambda *arguments: calls.append(len(arguments)))
    x = batch()
    result_of(model, x, False)
    expected = len(calls)
    calls.clear()
    result_of(model, x, "auto")
    assert len(calls) == expected > 0
    handle.remove()
    calls.clear()
    with BatchNormStatistics(model) as statistics:
        model(x)
        assert "traced; it" in statistics.describe()
        handle = getattr(module, kind)(lambda *arguments: calls.append(len(arguments)))
        output = model(x)
        torch.autograd.grad(output.sum() + statistics.loss(), x)
        assert len(calls) == expected
        handle.remove()
        model(x)
        assert len(calls) == expected
    same(model)


def test_a_hook_that_changes_a_value():
    for name in ("layer1.0.bn1", "layer1.0", "layer1.0.relu", "layer2.0.downsample.1"):
        model = made(ResNet)
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output: output * 2)
        text = same(model)
        assert "inside has hooks" in text
        assert parts_of(text)["layer2.1.bn1"] == "BatchNorm + ReLU"


def test_global_hooks():
    calls = []
    model, x = made(ResNet), batch()
    with BatchNormStatistics(model):
        model(x)
        handle = nn.modules.module.register_module_forward_hook(lambda *arguments: calls.append(arguments[0]))
        model(x)
        handle.remove()
    assert model.layer1[0].relu in calls


# State


def test_modes_and_attributes_that_change_in_between():
    model, x = made(ResNet), batch()
    model.layer1[0].relu = nn.ReLU()
    with BatchNormStatistics(model) as statistics:
        before = model(x)
        model.layer1[0].relu = nn.SiLU()
        after = model(x)
        torch.testing.assert_close(after, copy.deepcopy(model)(x))
        assert not torch.allclose(before, after)
        model.layer1[0].bn1.train()
        model.layer1[0].bn1.momentum = 0.0
        torch.testing.assert_close(model(x), copy.deepcopy(model)(x))
        assert len(statistics.losses()) == 10
        model.eval()
        torch.testing.assert_close(model(x), after)
        model.layer1[0].bn1.weight.requires_grad_()
        output = model(x)
        (output.sum() + statistics.loss()).backward()
        assert model.layer1[0].bn1.weight.grad is not None
        assert parts_of(statistics.describe())["layer1.1.bn1"] == "BatchNorm + ReLU"


def test_the_network_is_given_back():
    model, x = made(ResNet), batch()
    before = [(type(m), dict(vars(m)), [*m._modules.values()]) for m in model.modules()]
    for error in (None, RuntimeError):
        try:
            with BatchNormStatistics(model) as statistics:
                model(x)
                assert "traced; it" in statistics.describe()
                assert [type(m).__name__ for m in model.modules()] == [kind.__name__ for kind, _, _ in before]
                if error:
                    raise error
        except RuntimeError:
            pass
        for module, (kind, attributes, children) in zip(model.modules(), before, strict=True):
            assert type(module) is kind
            assert vars(module).keys() == attributes.keys()
            assert all(vars(module)[key] is attributes[key] for key in attributes)
            assert all(a is b for a, b in zip(module._modules.values(), children, strict=True))
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy])
def test_copies_made_inside(copied):
    model, x = made(ResNet), batch()
    with BatchNormStatistics(model) as statistics:
        model(x)
        expected = statistics.loss()
        other = copied(model.layer1[0])
        assert type(other) is BasicBlock
        if copied is not copy.copy:
            other = copied(model)
            assert [type(m).__name__ for m in other.modules()] == [type(m).__name__ for m in model.modules()]
            assert {type(m) for m in other.modules()} == {type(m) for m in made(ResNet).modules()}
            torch.testing.assert_close(other(x), model(x))
            other(x * 2)
            assert torch.equal(statistics.loss(), expected)


def test_two_at_once():
    model, x = made(ResNet), batch()
    expected = result_of(model, x, False)[2]
    for first, second in (("auto", "auto"), ("auto", False), (False, "auto")):
        with BatchNormStatistics(model, fuse=first) as a:
            model(x)
            with BatchNormStatistics(model, fuse=second) as b:
                model(x)
                torch.testing.assert_close(torch.stack(list(a.losses().values())), expected)
                torch.testing.assert_close(torch.stack(list(b.losses().values())), expected)
                if (first, second) == ("auto", "auto"):
                    assert "another BatchNormStatistics" in b.describe()
            model(x)
            torch.testing.assert_close(torch.stack(list(a.losses().values())), expected)
    assert type(model) is ResNet


def test_random_numbers_and_buffers_are_not_used_up():
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.count += 1
            return x + torch.randn_like(x)

    model = made(lambda: Wrapped(lambda m, x: F.relu(m.bn(m.noise(x))), noise=Noise()))
    results = []
    for fuse in (False, "auto"):
        torch.manual_seed(3)
        model.noise.count.zero_()
        results.append(result_of(model, batch(), fuse))
        assert model.noise.count == 1
        results[-1] = (*results[-1], torch.rand(3))
    torch.testing.assert_close(results[1][3], results[0][3])
    assert torch.equal(results[1][-1], results[0][-1])
    assert parts_of(results[1][4])["bn"] == "BatchNorm + ReLU"


def test_an_input_that_is_changed_in_place():
    model = made(nn.Sequential, nn.ReLU(inplace=True), conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    x = batch().detach()
    results = []
    for fuse in (False, "auto"):
        with BatchNormStatistics(model, fuse=fuse), torch.no_grad():
            y = x.clone()
            results.append((model(y), y))
    torch.testing.assert_close(results[1], results[0])
    same(model)


def test_classes_that_register_their_subclasses():
    """They do not hear of the classes that modules get for a while."""
    heard = []

    class Registered(nn.Module):
        def __init_subclass__(cls, *, key, **kwargs):
            super().__init_subclass__(**kwargs)
            heard.append(key)

    class Block(Registered, key="block"):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv(3, 3), nn.BatchNorm2d(3)

        def forward(self, x):
            return F.relu(self.bn(self.conv(x)))

    model = made(nn.Sequential, Block(), Block())
    assert parts_of(same(model))["1.bn"] == "BatchNorm + ReLU"
    with BatchNormStatistics(model):
        assert type(copy.deepcopy(model)[0]) is Block
        assert inspect.signature(model[0].forward) == inspect.signature(Block().forward)
    assert heard == ["block"]
    assert type(model[0]) is Block


def test_other_modules_run_in_other_threads_meanwhile():
    model, other, x, wrong, stop = made(ResNet), made(ResNet).eval(), batch().detach(), [], threading.Event()
    expected = other(x)

    def work():
        while not stop.is_set():
            output = other(x)
            if not isinstance(output, torch.Tensor) or not torch.equal(output, expected):
                wrong.append(output)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(5):
            with BatchNormStatistics(model) as statistics:
                model(x)
                assert "traced; it" in statistics.describe()
    finally:
        stop.set()
        thread.join()
    assert not wrong


def test_an_interrupted_comparison_leaves_nothing():
    class Stop(nn.Module):
        runs = 0

        def forward(self, x):
            Stop.runs += 1
            if Stop.runs == 2:
                raise KeyboardInterrupt
            return x

    model, x = made(ResNet), batch()
    model.avgpool = nn.Sequential(Stop(), nn.AdaptiveAvgPool2d(1))
    kinds = [type(module) for module in model.modules()]
    statistics = BatchNormStatistics(model)
    with pytest.raises(KeyboardInterrupt), statistics:
        model(x)
    assert [type(module) for module in model.modules()] == kinds
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    with statistics:
        model(x)
        assert "traced; it" in statistics.describe()
        assert len(statistics.losses()) == 10


def test_weights_that_hooks_of_torch_compute():
    model = made(ResNet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.layer1[0].conv1)
        nn.utils.spectral_norm(model.layer2[0].conv1)
    assert "traced; it" in same(model)


def test_a_network_saved_inside(tmp_path):
    model, x = made(ResNet), batch()
    with BatchNormStatistics(model):
        expected = model(x)
        torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(loaded) is ResNet
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.modules())
    torch.testing.assert_close(loaded(x), expected)


def test_a_profiler_goes_on():
    model, profiler = made(ResNet), cProfile.Profile()
    with BatchNormStatistics(model) as statistics:
        profiler.enable()
        model(batch())
        len(())
        profiler.disable()
        assert "BatchNorm + " in statistics.describe()
    profiler.create_stats()
    assert any(name == "<built-in method builtins.len>" for _, _, name in profiler.stats)
