"""The total variation of PyTorch Image Quality (photosynthesis-team/piq)."""

from typing import Literal

import torch
from torch import Tensor

from kdkernels import functional
from kdkernels.ops._checks import check_floating

__all__ = ["TVLoss", "total_variation"]


def total_variation(
    x: Tensor,
    reduction: Literal["mean", "sum", "none"] = "mean",
    norm_type: Literal["l1", "l2", "l2_squared"] = "l2",
) -> Tensor:
    """Return the total variation of images: sum |d|, the norm of all d, or sum d^2 over each image.

    It is ``total_variation(x, reduction, norm_type=norm_type, axis_reduction="sum")``: the mean is over the images. The
    gradient of the norm of a constant image is 0, where the project's is NaN, and negative numbers are accepted.

    Args:
        x: Images [B, C, H, W].
        reduction: ``"mean"`` or ``"sum"`` over the images, or ``"none"`` for one value per image.
        norm_type: ``"l1"``, ``"l2"`` (one norm over the whole image, which is not the isotropic total variation) or
            ``"l2_squared"``.

    Raises:
        ValueError: The images do not have four dimensions, or an option is another.

    """
    check_floating("x", x)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got shape {tuple(x.shape)}")
    if norm_type not in ("l1", "l2", "l2_squared"):
        raise ValueError(f"norm_type is {norm_type!r}; accepted are 'l1', 'l2' and 'l2_squared'")
    return functional.total_variation(x, reduction, norm_type=norm_type, axis_reduction="sum")


class TVLoss(torch.nn.Module):
    """Module of :func:`total_variation`.

    Args:
        norm_type: ``"l1"``, ``"l2"`` or ``"l2_squared"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    """

    def __init__(
        self,
        norm_type: Literal["l1", "l2", "l2_squared"] = "l2",
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        self.norm_type: Literal["l1", "l2", "l2_squared"] = norm_type
        self.reduction: Literal["mean", "sum", "none"] = reduction

    def forward(self, x: Tensor) -> Tensor:
        """Return the total variation of the images."""
        return total_variation(x, self.reduction, self.norm_type)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"norm_type={self.norm_type!r}, reduction={self.reduction!r}"
