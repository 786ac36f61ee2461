"""The total variation of bilateral grids of gsplat (nerfstudio-project/gsplat); fused-bilagrid has the same."""

from typing import Literal

from torch import Tensor

from kdkernels import functional
from kdkernels.ops._checks import check_floating

__all__ = ["total_variation_loss"]


def total_variation_loss(x: Tensor) -> Tensor:
    """Return the sum over the axes of the mean squared difference of neighbours.

    For each axis, the squares of the differences of all grids are summed and divided by the number of differences in
    one grid and by the number of grids: ``total_variation(x, "mean", norm_type="l2_squared", spatial_dims=3)``.

    Args:
        x: Bilateral grids [N, 12, L, H, W], or other numbers [N, C, ...] with one to three axes.

    Returns:
        A scalar; 0 for an axis of size 1, and where there is no grid.

    Raises:
        ValueError: The grids have fewer than three or more than five dimensions.

    """
    check_floating("x", x)
    if not 3 <= x.dim() <= 5:
        raise ValueError(f"x must be [N, C, ...] with one to three axes, got shape {tuple(x.shape)}")
    axes: dict[int, Literal[1, 2, 3]] = {3: 1, 4: 2, 5: 3}
    return functional.total_variation(x, "mean", norm_type="l2_squared", spatial_dims=axes[x.dim()])
