"""Losses of positions: their weights, and how they are reduced. A position is one softmax."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels.ops import _autograd, _registry
from kdkernels.ops._checks import FLOATING, check_dense, check_same_device

REDUCTIONS = ("none", "mean", "sum", "batchmean")


def checked_position_weight(
    weight: Tensor | None, input: Tensor, positions: Sequence[int], dtype: torch.dtype
) -> Tensor | None:
    """Return the weight of each position as contiguous numbers of the dtype that is computed in, or raise.

    Values are not read here: kernels and references refuse those that are negative or not finite.

    Args:
        weight: A mask, or floating-point numbers, in the shape of the positions; None for a weight of 1.
        input: Tensor that it is used with.
        positions: Shape of ``input`` without its dimension of classes.
        dtype: Dtype to compute in.

    """
    if weight is None:
        return None
    if not isinstance(weight, Tensor):
        raise TypeError(f"position_weight must be a tensor, got {type(weight).__name__}")
    check_dense("position_weight", weight)
    if weight.dtype != torch.bool and weight.dtype not in FLOATING:
        integers = not weight.is_complex() and not weight.is_quantized
        remedy = "; pass position_weight.bool() if it is a mask, else position_weight.float()" if integers else ""
        raise TypeError(f"position_weight must be boolean or floating-point, got {weight.dtype}{remedy}")
    if weight.shape != torch.Size(positions):
        raise ValueError(
            f"position_weight has shape {tuple(weight.shape)}; expected one weight per position, {tuple(positions)}"
        )
    check_same_device("input", input, "position_weight", weight)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("position_weight requires grad, but no gradient is computed for it; detach it")
    return _autograd.savable(weight.detach().to(dtype).contiguous())


def check_weight_values(name: str, weight: Tensor | None) -> None:
    """Raise if a weight that may be read here is negative or not finite."""
    if weight is None or not _registry.values_are_visible(weight):
        return
    bad = ~((weight >= 0) & (weight < math.inf))
    if bad.any():
        first = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"{name}[{first}] (in flattened order) is {weight.flatten()[first].item()}; expected a finite number, 0 or "
            "more"
        )


def divisor(reduction: str, weight: Tensor, batch: int) -> Tensor:
    """Return what the weighted sum over the positions is divided by; infinity where the sum is empty.

    Args:
        reduction: ``"mean"`` divides by the sum of the weights, ``"batchmean"`` by the batch, and ``"sum"`` by 1.
        weight: Weight of each position.
        batch: Size of the first dimension of the input.

    """
    if reduction == "mean":
        total = weight.sum()
        return torch.where(total > 0, total, math.inf)
    return weight.new_ones(()) * (max(batch, 1) if reduction == "batchmean" else 1)


def reduced(losses: Tensor, weight: Tensor, reduction: str, batch: int) -> Tensor:
    """Return the reduced loss; a position of weight 0 counts for nothing, whatever its loss is."""
    weighted = torch.where(weight == 0, 0.0, weight * torch.where(weight == 0, 0.0, losses))
    return weighted if reduction == "none" else weighted.sum() / divisor(reduction, weight, batch)
