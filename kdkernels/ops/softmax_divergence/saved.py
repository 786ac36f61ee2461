"""What the forward of each backend saves for its backward: a tensor that only the same backend reads.

- ``"gradient"``: the CPU kernels may save the gradient of the student's logits for an incoming gradient of 1. The
  backward returns it if the incoming gradient is 1, and otherwise scales it.
- ``"statistics"``: the kernels of a GPU save a few sums of each position, so that the backward needs no reduction.
- ``"nothing"``: the backward starts from the logits.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from kdkernels.ops import _loader, _tracing
from kdkernels.ops._numerics import compute_dtype

Save = Literal["nothing", "gradient", "statistics"]

# Up to this size the allocator reuses warm memory, and a second tensor of it costs less than computing again.
_GRADIENT_BYTES = 32 << 20
# Rows of the statistics, with a column for each position and one more for numbers of the whole call.
_STATISTICS = 9


def on_gpu(backend: str, device: torch.device) -> bool:
    """Tell whether the kernels of a GPU compute, be it in an interpreter."""
    return backend == "triton" or (backend == "native" and _loader.native_kernels(device.type) == "cuda")


def what_to_save(backend: str, input: Tensor, target: Tensor, temperature: Tensor) -> Save:
    """Choose what the forward saves.

    No gradient is saved in 16 bits: rounded before the gradient of a loss scaler multiplies it, it would underflow. Nor
    is one saved during export, where the size would become a condition on dynamic shapes, under ``torch.func``, or for
    a learned temperature, whose gradient takes another pass. What ``torch.jit`` traces saves nothing: its check of a
    trace runs without gradients and compares the graphs.
    """
    if not torch.is_grad_enabled() or not (input.requires_grad or target.requires_grad) or _tracing.is_jit_traced():
        return "nothing"
    if on_gpu(backend, input.device):
        return "statistics"
    keeps_gradient = (
        not torch.compiler.is_exporting()
        and not _tracing.is_transformed()
        and not target.requires_grad
        and not temperature.requires_grad
        and input.device.type == "cpu"
        and input.dtype == compute_dtype(input, target)
        and input.numel() * input.element_size() <= _GRADIENT_BYTES
    )
    return "gradient" if keeps_gradient else "nothing"


def statistics_shape(positions: int) -> tuple[int, int]:
    """Return the shape of the statistics of a call."""
    return _STATISTICS, positions + 1


def fake_saved(save: str, input: Tensor, loss: Tensor, positions: int) -> Tensor:
    """Return a fake tensor in the shape of what is saved."""
    if save == "gradient":
        return torch.empty_like(input)
    return loss.new_empty(statistics_shape(positions) if save == "statistics" else 0)


def passes(device_type: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
    """Return how often forward and backward read or write a tensor of logits, with the student's gradient only.

    Forward R R, backward R R W. If the CPU saves the gradient, R R W, and the backward of a loss has nothing to do.
    """
    saves = device_type == "cpu" and dtype.itemsize >= 4 and math.prod(shape) * dtype.itemsize <= _GRADIENT_BYTES
    return (3, 0) if saves else (2, 3)


def scaled(gradient: Tensor, grad_loss: Tensor, dim: int, reduction: str) -> Tensor:
    """Multiply a saved gradient by the incoming one, unless that is 1, as in ``loss.backward()``."""
    if reduction == "none":
        return gradient * grad_loss.unsqueeze(dim)
    try:
        is_one = not torch.compiler.is_compiling() and float(grad_loss) == 1.0
    except RuntimeError:  # a fake gradient, or a batch of gradients, has no value to read
        is_one = False
    return gradient if is_one else gradient * grad_loss
