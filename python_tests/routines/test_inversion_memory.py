"""The peak memory of an iteration of DeepInversion, as sums of allocations."""

from dataclasses import replace

import pytest
import torch

from bench.routines.bench_deep_inversion import network_alone
from bench.routines.contest import CifarResNet, with_statistics
from bench.routines.published_inversion import PublishedInversion
from kdkernels.inversion import PRESETS, DeepInversion, Stage
from kdkernels.testing.comparison import peak_bytes

SHAPE = 16, 3, 32, 32


# Beyond the activations of the network stay the moved images, those in the other memory format, and, in a backward of
# the last stage, the gradient of the residual. In bf16 the activations have half the size.
@pytest.mark.parametrize(
    ("memory_format", "autocast", "allowed"),
    [
        (torch.channels_last, None, 1.04),
        (torch.contiguous_format, None, 1.015),
        (torch.channels_last, "bf16", 0.56),
    ],
    ids=["channels_last", "contiguous", "bf16"],
)
def test_an_iteration_holds_little_more_than_the_activations_of_the_network(memory_format, autocast, allowed):
    torch.manual_seed(0)
    teacher = with_statistics(CifarResNet("ResNet-20"), torch.randn(SHAPE))
    images, labels = torch.randn(SHAPE), torch.arange(16) % 10
    config = replace(PRESETS["nvlabs-cifar10"], flip=0.5, keep="best_per_image", stages=(Stage(10),))
    alone = network_alone(teacher, images, labels, memory_format)
    alone()
    published = PublishedInversion(teacher, config, freeze=True)
    published.begin(images, labels)
    published.iteration()
    inverter = DeepInversion(teacher, SHAPE[1:], config, memory_format=memory_format, autocast=autocast)
    with inverter.loop(labels, images=images, generator=torch.Generator().manual_seed(0)) as loop:
        loop.step()  # which makes the state of the optimizer and fuses the layers
        ours = peak_bytes(loop.step)
    assert 0 < ours <= allowed * peak_bytes(alone)
    assert ours <= 0.7 * peak_bytes(lambda: published.iteration((1, -1), True))
