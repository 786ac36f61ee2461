"""The statistics of a network that runs in checkpoints, and of one in training."""

import copy
import gc

import pytest
import torch
from networks import hooked_loss, trained_like
from stages import close, expected_of, images, plain
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from kdkernels.inversion import BatchNormStatistics
from kdkernels.inversion._recomputation import FirstRun

# Activation checkpointing


@pytest.mark.parametrize(
    "run",
    [
        lambda stage, x: checkpoint(stage, x, use_reentrant=False),
        lambda stage, x: checkpoint(stage, x, use_reentrant=True),
        lambda stage, x: checkpoint_sequential(stage, 2, x, use_reentrant=False),
        lambda stage, x: checkpoint_sequential(stage, 2, x, use_reentrant=True),
        lambda stage, x: checkpoint(
            lambda y: checkpoint(stage, y, use_reentrant=False), x, use_reentrant=False
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_checkpointed_stages(run, weight):
    """Value and gradient are those without checkpointing, for two forwards before one backward."""
    a, b = images(0), images(1)
    losses = {}
    for model in (plain(), plain(run)):
        x, y = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
        with BatchNormStatistics(model) as statistics:
            total = model(x).square().sum() + weight * statistics.loss()
            total = total + model(y).square().sum() + 3 * statistics.loss()
            total.backward()
            assert len(statistics.losses()) == 3
            losses.setdefault("total", []).append(total)
            losses.setdefault("x", []).append(x.grad)
            losses.setdefault("y", []).append(y.grad)
            model(x)
            losses.setdefault("next", []).append(statistics.loss())
    for found in losses.values():
        close(found[1], found[0])


def test_a_whole_network_checkpointed():
    for reentrant in (False, True):
        model, x = plain(), images()
        loss, grad = expected_of(model, x)
        with BatchNormStatistics(model) as statistics:
            with statistics.forward():
                output = checkpoint(model, x, use_reentrant=reentrant)
            found = statistics.loss()
            close(found, loss)
            (output.square().sum() + found).backward()
        close(x.grad, grad)


def test_a_layer_that_runs_twice_in_checkpoints():
    class Twice(nn.Module):
        def __init__(self, run):
            super().__init__()
            self.bn, self.run = nn.BatchNorm2d(2), run

        def forward(self, x):
            return self.run(self.bn, self.run(self.bn, x).sin())

    grads = []
    for run in (lambda m, x: m(x), *(lambda m, x, r=r: checkpoint(m, x, use_reentrant=r) for r in (False, True))):
        torch.manual_seed(0)
        model, x = trained_like(Twice(run)).double(), images()
        with BatchNormStatistics(model) as statistics:
            (model(x).square().sum() + statistics.loss()).backward()
        grads.append(x.grad)
    close(grads[1], grads[0])
    close(grads[2], grads[0])


def again(run, inner, outer):
    """Return a function that runs a stage in a checkpoint inside of another."""
    return lambda stage, x: run(lambda y: run(stage, y, use_reentrant=inner), x, use_reentrant=outer)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_checkpoints_in_checkpoints(inner, outer):
    x = images()
    loss, grad = expected_of(plain(), x)
    with BatchNormStatistics(plain(again(checkpoint, inner, outer))) as statistics:
        output = statistics.model(x)
        close(statistics.loss(), loss)
        (output.square().sum() + statistics.loss()).backward()
    close(x.grad, grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_backwards_of_a_checkpointed_network(reentrant):
    """The second of the same graph gives the same gradient; one of the output alone, that of the output."""
    model, x = plain(lambda stage, x: checkpoint(stage, x, use_reentrant=reentrant)), images()
    _, grad = expected_of(plain(), x)
    (alone,) = torch.autograd.grad(plain().eval()(x).square().sum(), x)
    with BatchNormStatistics(model) as statistics:
        output = model(x).square().sum()
        total = output + statistics.loss()
        total.backward(retain_graph=True)
        total.backward(retain_graph=True)
        close(x.grad, 2 * grad)
        x.grad = None
        output.backward()
        close(x.grad, alone)


@pytest.mark.parametrize("reentrant", [False, True])
def test_equal_images_in_two_checkpointed_forwards(reentrant):
    """Each gets the gradient of its own loss, although their statistics are the same."""
    model = plain(lambda stage, x: checkpoint(stage, x, use_reentrant=reentrant))
    a, b = images(), images()
    _, grad = expected_of(plain(), a)
    with BatchNormStatistics(model) as statistics:
        total = model(a).square().sum() + statistics.loss()
        total = total + 3 * (model(b).square().sum() + statistics.loss())
        total.backward()
    close(a.grad, grad)
    close(b.grad, 3 * grad)


def test_a_gradient_that_cannot_reach_a_checkpointed_network_is_not_lost_in_silence():
    model, x = plain(lambda stage, x: checkpoint(stage, x, use_reentrant=True)), images()
    lost = pytest.raises(RuntimeError, match=r"statistics of stages.0.1, .* did not reach the network")
    with BatchNormStatistics(model) as statistics:
        output = model(x).square().sum()
        loss = statistics.loss()
        output.backward()
        with lost:
            loss.backward()
        total = model(x).square().sum() + statistics.loss()
    with lost:
        total.backward()


def test_a_loss_inside_a_checkpoint():
    x = images()
    _, grad = expected_of(plain(), x)
    with BatchNormStatistics(plain()) as statistics:

        def objective(x):
            return statistics.model(x).square().sum() + statistics.loss()

        checkpoint(objective, x, use_reentrant=False).backward()
        close(x.grad, grad)
        with pytest.raises(RuntimeError, match=r"the loss is read inside of what torch\.utils\.checkpoint runs"):
            checkpoint(objective, x, use_reentrant=True)


def test_a_compiled_part_in_a_checkpoint():
    torch._dynamo.reset()
    x = images()
    loss, grad = expected_of(plain(), x)
    for reentrant in (False, True):
        model = plain(lambda stage, x, r=reentrant: checkpoint(stage, x, use_reentrant=r))
        for stage in model.stages:
            stage.compile(backend="aot_eager")
        with BatchNormStatistics(model) as statistics:
            output = model(x)
            if reentrant:
                with pytest.raises(RuntimeError, match="without gradients in compiled code"):
                    statistics.loss()
            else:
                close(statistics.loss(), loss)
                (output.square().sum() + statistics.loss()).backward()
                close(x.grad, grad)


def test_nothing_piles_up():
    """Neither forwards whose loss is not read, nor losses that are not differentiated."""
    model = plain(lambda stage, x: checkpoint(stage, x, use_reentrant=True))
    with BatchNormStatistics(model) as statistics:
        for _ in range(5):
            model(images())
            statistics.loss()
        gc.collect()
        runs = [found for found in gc.get_objects() if type(found) is FirstRun]
        assert sum(run.recomputation is statistics._recording.recomputation for run in runs) == 3
        for _ in range(5):
            model.forward(images())
        assert not statistics._recording.latest.records


class Stem(nn.Module):
    """A network whose first stage has no gradient."""

    def __init__(self):
        super().__init__()
        self.model = plain()

    def forward(self, x):
        with torch.no_grad():
            x = self.model.stages[0](x)
        return self.model.stages[1](x)


def test_a_part_without_gradient_counts_as_a_constant():
    """As it does with hooks."""
    model, twin = Stem().eval(), Stem().eval()
    x = images()
    losses, _, output = hooked_loss(twin, x)
    (output.square().sum() + sum(losses)).backward()
    with BatchNormStatistics(model, freeze=False) as statistics:
        for _ in range(2):
            output = model(x)
            close(statistics.loss(), sum(losses))
        (output.square().sum() + statistics.loss()).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) is (b.grad is None)
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_evaluation_without_gradients():
    model, x = plain(), images()
    loss, _ = expected_of(model, x)
    for mode in (torch.no_grad, torch.inference_mode):
        with BatchNormStatistics(model) as statistics, mode():
            model(x)
            close(statistics.loss(), loss.detach())
            assert not statistics.loss().requires_grad


# Trainable networks


@pytest.mark.parametrize("training", [True, False])
def test_a_trainable_network_is_left_as_it_is(training):
    """Gradients reach the parameters; the running statistics are those from before each layer's forward."""
    model, x = plain().train(training), images()
    twin = copy.deepcopy(model)
    before = [(m.running_mean.clone(), m.running_var.clone()) for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]
    taken = []
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda m, inputs: taken.append(inputs[0]))
    output = twin(x)
    losses = []
    for z, (mean, var) in zip(taken, before, strict=True):
        m, v = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)
        losses.append((m - mean).norm() + (v - var).norm())
    (output.square().sum() + sum(losses)).backward()
    with BatchNormStatistics(model, freeze=False) as statistics:
        output = model(x)
        close(statistics.loss(), sum(losses))
        (output.square().sum() + statistics.loss()).backward()
        assert model.training is training
        first = statistics.loss()
        model(x)  # the running statistics have moved
        assert torch.equal(first, statistics.loss()) is not training
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        close(a.grad, b.grad)
