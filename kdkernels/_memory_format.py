"""The memory format in which a network computes, and its weights in that format for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from kdkernels._networks import REFUSALS, frozen, placement

MemoryFormat = torch.memory_format | Literal["auto"]
MEMORY_FORMATS = (torch.channels_last, torch.contiguous_format, torch.preserve_format)
CONVOLUTIONS = (nn.Conv2d.forward, nn.ConvTranspose2d.forward)


@contextmanager
def weights_in(model: nn.Module, memory_format: torch.memory_format) -> Iterator[None]:
    """Hold the 4-d weights of a network's convolutions in a memory format, and give the network back as it was.

    The parameters stay the same objects; on exit they have the memory that they had before, which nothing writes to.
    Weights that a module computes, as parametrizations do, and those of convolutions with a ``forward`` of their own,
    which may take views of them, are left alone: a convolution accepts weights in any memory format.
    """
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        if memory_format != torch.preserve_format:
            for parameter in _weights(model):
                data = parameter.data
                if type(data) is Tensor and data.layout == torch.strided:
                    before.append((parameter, data))
                    parameter.data = data.to(memory_format=memory_format)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of torch's own 2-d convolutions, each once."""
    convolutions = [
        module
        for module in model.modules()
        if getattr(type(module), "forward", None) in CONVOLUTIONS and "forward" not in vars(module)
    ]
    weights = [module._parameters.get("weight") for module in convolutions]
    found = {id(weight): weight for weight in weights if isinstance(weight, nn.Parameter)}
    return list(found.values())


@torch.inference_mode(False)
@torch.enable_grad()
def why_not_channels_last(model: nn.Module, image_shape: tuple[int, ...]) -> str | None:
    """Return why a network cannot compute in ``torch.channels_last``; None if it can.

    It is tried on two images: it must accept them, pass a gradient, and return what it returns for contiguous ones. A
    network that flattens its features by ``view()``, for example, does not accept them.
    """
    device, dtype = placement(model)
    noise = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0), device="cpu").to(device, dtype)
    with frozen(model):
        expected = model(noise)
        images = noise.to(memory_format=torch.channels_last).requires_grad_()
        with weights_in(model, torch.channels_last):
            try:
                found = model(images)
                torch.autograd.grad(found.sum(), images)
            except REFUSALS as error:
                return str(error).partition("\n")[0] or type(error).__name__
    difference = (found - expected).detach().abs().max()
    allowed = torch.finfo(found.dtype).eps ** 0.5 * expected.detach().abs().max()
    return None if bool(difference <= allowed) else "its logits are others than for contiguous images"
