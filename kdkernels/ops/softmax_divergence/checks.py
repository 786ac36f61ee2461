"""Checks of the arguments of the softmax divergences that need no values of tensors."""

import operator
import warnings

import torch
from torch import Tensor, int64

from kdkernels.ops._checks import (
    check_choice,
    check_dense,
    check_floating,
    check_same_device,
    check_same_shape,
    check_scalar,
    number_of,
)

REDUCTIONS = ("none", "mean", "sum", "batchmean")


def check_logits(input: Tensor, target: Tensor, labels: Tensor | None, dim: int | None, reduction: str) -> int:
    """Check the arguments without reading tensor values; return the class dimension, counted from the front."""
    check_floating("input", input)
    check_floating("target", target)
    check_same_shape("input", input, "target", target)
    check_same_device("input", input, "target", target)
    check_choice("reduction", reduction, REDUCTIONS)
    if input.dim() == 0:
        raise ValueError("input has no dimensions; expected at least one, for the classes")
    if dim is None:
        if input.dim() > 2:
            raise ValueError(
                f"dim is required for logits of more than 2 dimensions, here {tuple(input.shape)}: "
                "dim=1 for [B, C, H, W], dim=-1 for [B, T, C]"
            )
        dim = -1
    if type(dim) is not int:
        dim = _integer(dim)
    if not -input.dim() <= dim < input.dim():
        raise ValueError(f"dim is {dim}; expected a dimension of the {input.dim()}-dimensional input")
    dim %= input.dim()
    classes = input.shape[dim]
    if classes == 0:
        raise ValueError(f"input has 0 classes: shape {tuple(input.shape)}, dim={dim}")
    if reduction == "batchmean" and dim == 0 and input.dim() > 1:
        raise ValueError("reduction='batchmean' divides by the size of dimension 0, which holds the classes (dim=0)")
    if labels is not None:
        positions = input.shape[:dim] + input.shape[dim + 1 :]
        if not isinstance(labels, Tensor) or labels.dtype != int64:
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels must be a tensor of class indices, torch.int64, got {got}{_remedy(labels)}")
        check_dense("labels", labels)
        if labels.shape != positions:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; expected {tuple(positions)}, input's shape without dim {dim}"
            )
        check_same_device("input", input, "labels", labels)
    if classes == 1:
        _warn_of_one_class(input, target, dim)
    return dim


def _integer(dim: object) -> int:
    if not hasattr(dim, "__index__"):
        raise TypeError(f"dim must be an integer or None, got {dim!r}")
    return operator.index(dim)


def _remedy(labels: object) -> str:
    integers = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    return "; pass labels.long()" if integers else ""


def _warn_of_one_class(input: Tensor, target: Tensor, dim: int) -> None:
    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        _warn(
            f"input has one class (dim={dim}), whose probability is always 1: the loss and its gradient are 0, so that "
            "nothing is learned. For a binary sigmoid head with one logit z, pass "
            f"torch.cat([torch.zeros_like(z), z], {dim})"
        )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=1)


# Run while Dynamo traces, as torch.compiler.assume_constant_result would have it; see _loader.why_not_device.
_warn._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_temperature(temperature: float | Tensor, input: Tensor) -> float | Tensor:
    """Return the temperature as a number or a 0-dim tensor of at least 32 bits, or raise."""
    if isinstance(temperature, Tensor) and temperature.numel() > 1:
        raise ValueError(
            f"temperature must be a number or a 0-dim tensor, got a tensor of shape {tuple(temperature.shape)}; for a "
            "temperature per sample leave it at 1, divide both logits by it, as in input / T[:, None], and weigh the "
            'losses of reduction="none"'
        )
    return check_scalar("temperature", temperature, input, minimum=0, grad=True)


def check_weights(
    labels: Tensor | None, kd_weight: float | Tensor | None, ce_weight: float | Tensor | None
) -> tuple[float | Tensor, float | Tensor]:
    """Return the weights of the divergence and of the cross-entropy, with their defaults."""
    if labels is None:
        if ce_weight is not None and (number := number_of(ce_weight)) != 0:
            raise ValueError(f"ce_weight is {number!r}, but there are no labels; pass labels or leave it out")
        return 1.0 if kd_weight is None else kd_weight, 0.0
    if kd_weight is None and ce_weight is None:
        return 0.9, 0.1
    if kd_weight is None or ce_weight is None:
        given = "ce_weight" if kd_weight is None else "kd_weight"
        raise ValueError(f"{given} alone was given; with labels give both kd_weight and ce_weight, or neither")
    return kd_weight, ce_weight
