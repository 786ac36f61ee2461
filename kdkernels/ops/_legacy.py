"""Arguments that PyTorch has deprecated and still accepts."""

import warnings

from kdkernels.ops._types import Reduction


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> Reduction:
    """Return the reduction that two deprecated flags mean, as PyTorch does, and warn; None means True."""
    reduction: Reduction = "mean" if size_average is None or size_average else "sum"
    if not (reduce is None or reduce):
        reduction = "none"
    warnings.warn(f"size_average and reduce are deprecated; use reduction={reduction!r}", UserWarning, stacklevel=3)
    return reduction
