"""The total variation of Kornia (kornia/kornia)."""

from typing import Literal

import torch
from torch import Tensor

from kdkernels import functional

__all__ = ["TotalVariation", "total_variation"]


def total_variation(img: Tensor, reduction: Literal["sum", "mean"] = "sum") -> Tensor:
    """Return the l1 total variation of each channel: sum |dx| + sum |dy|, or mean |dx| + mean |dy|.

    It is ``total_variation(img.reshape(-1, 1, H, W), "none", axis_reduction=reduction)`` in the shape of the channels.

    Args:
        img: Images [..., H, W] of floating point.
        reduction: ``"sum"``, or ``"mean"`` over the pairs of each direction. There is no ``"none"``.

    Returns:
        One value for each channel, [...].

    Raises:
        TypeError: The images are not floating-point numbers; the project takes integers too.
        ValueError: The images have fewer than two dimensions, or the reduction is another.

    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}; accepted are 'sum' and 'mean'")
    if not isinstance(img, Tensor):
        raise TypeError(f"img must be a tensor, got {type(img).__name__}")
    if img.dim() < 2:
        raise ValueError(f"img must be [..., H, W], got shape {tuple(img.shape)}")
    channels = img.shape[:-2]
    planes = img.reshape(channels.numel(), 1, *img.shape[-2:])
    return functional.total_variation(planes, "none", axis_reduction=reduction).reshape(channels)


class TotalVariation(torch.nn.Module):
    """Module of :func:`total_variation` with the sum, which it has no argument for."""

    def forward(self, img: Tensor) -> Tensor:
        """Return the total variation of each channel."""
        return total_variation(img)
