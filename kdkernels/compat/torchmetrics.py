"""The total variation of TorchMetrics (Lightning-AI/torchmetrics)."""

from typing import Literal

from torch import Tensor

from kdkernels import functional
from kdkernels.ops._checks import check_floating

__all__ = ["total_variation"]


def total_variation(img: Tensor, reduction: Literal["mean", "sum", "none"] | None = "sum") -> Tensor:
    """Return the l1 total variation of images: sum |dx| + sum |dy| over each image.

    It is ``total_variation(img, reduction, axis_reduction="sum")``: the mean is over the images, not over the pixels.

    Args:
        img: Images [B, C, H, W].
        reduction: ``"sum"`` or ``"mean"`` over the images, or ``"none"`` (None too) for one value per image.

    Raises:
        ValueError: The images do not have four dimensions, or the reduction is another.

    """
    check_floating("img", img)
    if img.dim() != 4:
        raise ValueError(f"img must be [B, C, H, W], got shape {tuple(img.shape)}")
    return functional.total_variation(img, "none" if reduction is None else reduction, axis_reduction="sum")
