"""What the forward of each backend saves for its backward: a tensor that only the same backend reads.

- ``"gradient"``: the CPU kernels may save the gradient by the student's logits for an incoming gradient of 1. Where the
  incoming gradient is 1 the backward hands it on; otherwise it scales it.
- ``"statistics"``: the kernels of a GPU save a few sums of each position, with which the backward needs no reduction.
- ``"nothing"``: the backward starts from the logits.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from kdkernels.ops import _loader, _registry
from kdkernels.ops._numerics import compute_dtype

Save = Literal["nothing", "gradient", "statistics"]

# Up to this size the allocator reuses warm memory, and a second tensor of it costs less than computing again.
_GRADIENT_BYTES = 32 << 20
# Of each position; the kernels store numbers of the call in one more column.
_STATISTICS = 9


def _on_gpu(backend: str, device: torch.device) -> bool:
    return backend == "triton" or (backend == "native" and _loader.native_kernels(device.type) == "cuda")


def what_to_save(backend: str, input: Tensor, target: Tensor) -> Save:
    """Choose what the forward saves.

    No gradient in 16 bits: rounded before the gradient of a loss scaler multiplies it, it would underflow. None while
    exporting, where the size would become a condition on dynamic shapes, and none under ``torch.func``.
    """
    if not torch.is_grad_enabled() or not (input.requires_grad or target.requires_grad):
        return "nothing"
    if _on_gpu(backend, input.device):
        return "statistics"
    keeps_gradient = (
        not torch.compiler.is_exporting()
        and not _registry.is_transformed()
        and not target.requires_grad
        and input.device.type == "cpu"
        and input.dtype == compute_dtype(input, target)
        and input.numel() * input.element_size() <= _GRADIENT_BYTES
    )
    return "gradient" if keeps_gradient else "nothing"


def statistics_shape(positions: int) -> tuple[int, int]:
    """Return the shape of the statistics of a call."""
    return _STATISTICS, positions + 1


def fake_saved(save: str, input: Tensor, loss: Tensor, positions: int) -> Tensor:
    """Return a fake tensor of the shape of what is saved."""
    if save == "gradient":
        return torch.empty_like(input)
    return loss.new_empty(statistics_shape(positions) if save == "statistics" else 0)


def passes(device_type: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
    """Return how often a forward and its backward read or write a tensor of logits, student gradient only.

    Forward R R, backward R R W. Where the CPU saves the gradient, R R W, the backward of a loss has nothing to do.
    """
    saves = device_type == "cpu" and dtype.itemsize >= 4 and math.prod(shape) * dtype.itemsize <= _GRADIENT_BYTES
    return (3, 0) if saves else (2, 3)


def scaled(gradient: Tensor, grad_loss: Tensor, ctx: Any) -> Tensor:
    """Multiply a saved gradient by the incoming one, unless that is 1, as in ``loss.backward()``."""
    if ctx.reduction == "none":
        return gradient * grad_loss.unsqueeze(ctx.dim)
    try:
        is_one = not torch.compiler.is_compiling() and float(grad_loss) == 1.0
    except RuntimeError:  # a batch of incoming gradients, or a fake one, has no value to read
        is_one = False
    return gradient if is_one else gradient * grad_loss
