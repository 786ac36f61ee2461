"""Networks and settings for the tests of the loop of DeepInversion."""

from dataclasses import replace

import torch
from networks import trained_like

from kdkernels.inversion import PRESETS, DeepInversion, Stage
from kdkernels.models import SmallCNN

COLOURED = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
EVERYTHING = replace(
    PRESETS["digits"], stages=(Stage(5, pool=2), Stage(7)), schedule="warmup_cosine", first_layer_weight=10.0,
    tv_l1=1e-3, compete_weight=0.5, jitter=3, flip=0.5, clip=True, keep="best", **COLOURED,
)  # fmt: skip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(dtype=torch.float32):
    """Return a teacher and a student for images of three channels, always the same."""
    torch.manual_seed(0)
    return trained_like(SmallCNN(4, in_channels=3)).to(dtype), trained_like(SmallCNN(3, in_channels=3), 1).to(dtype)


def inverter_of(config, dtype=torch.float32, **execution):
    teacher, student = pair(dtype)
    return DeepInversion(teacher, (3, 12, 10), config, student=student, **execution)


def state_of(model):
    """Return what must be the same after a synthesis: objects, memory, strides, values and flags."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [
        (name, id(tensor), tensor.data_ptr(), tensor.stride(), tensor._version, tensor.requires_grad)
        for name, tensor in tensors
    ] + [module.training for module in model.modules()], [tensor.detach().clone() for _, tensor in tensors]


def assert_as_before(model, before):
    states, values = state_of(model)
    assert states == before[0]
    assert all(map(torch.equal, values, before[1]))
