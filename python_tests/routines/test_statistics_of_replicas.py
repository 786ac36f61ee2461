"""The statistics of a network whose replicas share a batch, as DataParallel runs it."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from stages import close, expected_of, images, plain
from torch import nn
from torch.utils.checkpoint import checkpoint

from kdkernels.inversion import BatchNormStatistics


class Parallel(nn.Module):
    """What ``DataParallel`` does, on one device: copies of the module in threads, each on a part of the batch."""

    def __init__(self, module, copies=3):
        super().__init__()
        self.module, self.copies = module, copies

    def replica(self):
        modules = {module: module._replicate_for_data_parallel() for module in self.module.modules()}
        for module, copied in modules.items():
            copied._former_parameters = {}
            for name, child in module._modules.items():
                copied._modules[name] = modules[child]
            for name, parameter in module._parameters.items():
                setattr(copied, name, parameter)
            for name, buffer in module._buffers.items():
                copied._buffers[name] = buffer
        return modules[self.module]

    def forward(self, x):
        with ThreadPoolExecutor(self.copies) as threads:
            replicas = [self.replica() for _ in range(self.copies)]  # all of them before the first runs
            outputs = [
                threads.submit(replica, part)
                for replica, part in zip(replicas, x.tensor_split(self.copies), strict=True)
            ]
            return torch.cat([output.result() for output in outputs])


class Backwards(Parallel):
    """The same, the last part of the batch first, as threads may run."""

    def forward(self, x):
        replicas = [self.replica() for _ in range(self.copies)]
        parts = list(zip(replicas, x.tensor_split(self.copies), strict=True))
        return torch.cat([replica(part) for replica, part in reversed(parts)][::-1])


@pytest.mark.parametrize("unbiased", [False, True])
def test_replicas_are_merged(unbiased):
    inner = plain()
    model, x = Parallel(inner), images(count=7)
    with BatchNormStatistics(inner, unbiased=unbiased) as statistics:
        output = inner(x)
        expected = statistics.loss()
        (grad,) = torch.autograd.grad(output.square().sum() + expected, x)
    with BatchNormStatistics(model, unbiased=unbiased) as statistics:
        for _ in range(2):
            output = model(x)
            assert list(statistics.losses()) == [(f"module.stages.{i}.1", 0) for i in range(3)]
            close(statistics.loss(), expected)
            close(torch.autograd.grad(output.square().sum() + statistics.loss(), x)[0], grad)
    with BatchNormStatistics(inner, unbiased=unbiased) as statistics:
        for _ in range(2):
            model(images(1))  # another forward, whose loss is not read
            output = model(x)
            close(statistics.loss(), expected)
            close(torch.autograd.grad(output.square().sum() + statistics.loss(), x)[0], grad)
            copy.deepcopy(model)(images(1))
            close(statistics.loss(), expected)
            with statistics.forward():
                model(x)
            close(statistics.loss(), expected)
            inner.forward(x)
            close(statistics.loss(), expected)
    for module, other in zip(inner.modules(), plain().modules(), strict=True):
        assert vars(module).keys() == vars(other).keys()


@pytest.mark.parametrize("kind", [Parallel, Backwards])
@pytest.mark.parametrize("over", ["image", "class"])
def test_images_and_classes_of_replicas(over, kind):
    inner, labels = plain(), torch.tensor([0, 1, 1, 2, 0, 0, 1]) if over == "class" else None
    model, x = kind(inner), images(count=7)
    with BatchNormStatistics(inner, over=over) as statistics:
        output = inner(x)
        expected = statistics.loss(labels=labels)
        (grad,) = torch.autograd.grad(output.square().sum() + expected, x)
    for watched in (inner, model):
        with BatchNormStatistics(watched, over=over) as statistics:
            for _ in range(2):
                output = model(x)
                close(statistics.loss(labels=labels), expected)
                found = torch.autograd.grad(output.square().sum() + statistics.loss(labels=labels), x)[0]
                close(found, grad)
                copy.deepcopy(model)(images(1, count=7))
                close(statistics.loss(labels=labels), expected)
    for module, other in zip(inner.modules(), plain().modules(), strict=True):
        assert vars(module).keys() == vars(other).keys()


def test_replicas_of_a_network_that_is_watched_twice():
    inner, labels = plain(), torch.tensor([0, 1, 1, 2, 0, 0, 1])
    model, x = Backwards(inner), images(count=7)
    with BatchNormStatistics(inner, over="class") as statistics, BatchNormStatistics(inner) as batch:
        inner(x)
        expected = statistics.loss(labels=labels), batch.loss()
        for watched in (inner, model):
            with BatchNormStatistics(watched, over="class") as again:
                model(x)
                close(again.loss(labels=labels), expected[0])
            model(x)
            close(statistics.loss(labels=labels), expected[0])
            close(batch.loss(), expected[1])
    assert not any(hasattr(module, "_number_of_replica") for module in inner.modules())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("of", ["inner", "outer"])
def test_checkpointed_replicas_are_merged(reentrant, of):
    inner = plain(lambda stage, x: checkpoint(stage, x, use_reentrant=reentrant))
    model, a, b = Parallel(inner), images(0, count=7), images(1, count=7)
    (loss_a, grad_a), (loss_b, grad_b) = expected_of(plain(), a), expected_of(plain(), b)
    with BatchNormStatistics(inner if of == "inner" else model) as statistics:
        total = model(a).square().sum() + statistics.loss()
        total = total + model(b).square().sum() + statistics.loss()
        close(statistics.loss(), loss_b)
        total.backward()
        close(statistics.loss(), loss_b)
        model(a)
        close(statistics.loss(), loss_a)
    close(a.grad, grad_a)
    close(b.grad, grad_b)
