"""Checks of the arguments of the softmax divergences that need no values of tensors."""

import operator
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels.ops._checks import (
    check_choice,
    check_floating,
    check_same_device,
    check_same_shape,
    check_scalar,
    number_of,
)
from kdkernels.ops._labels import check_label_type
from kdkernels.ops._positions import REDUCTIONS


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
        _check_labels(labels, input, dim)
    if classes == 1:
        _warn_of_one_class(input, target, dim)
    return dim


def _check_labels(labels: Tensor, input: Tensor, dim: int) -> None:
    """Check class indices, one for each position, or the probability of each class."""
    positions = input.shape[:dim] + input.shape[dim + 1 :]
    check_label_type(labels)
    if labels.is_floating_point():
        check_floating("labels", labels)
        if labels.shape != input.shape:
            remedy = "; class indices are integers: pass labels.long()" if labels.shape == positions else ""
            raise ValueError(
                f"labels of dtype {labels.dtype} are probabilities, of shape {tuple(labels.shape)}; expected the shape "
                f"of input, {tuple(input.shape)}{remedy}"
            )
    elif labels.shape != positions:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; expected {tuple(positions)}, input's shape without dim {dim}"
        )
    check_same_device("input", input, "labels", labels)


def joined(
    input: Tensor, target: Tensor, labels: Tensor | None, dim: int | Sequence[int] | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor | None, int | None]:
    """Return the tensors with the classes in one dimension where ``dim`` names several, and that dimension.

    Several dimensions become the last one, in the order given: a view wherever their strides allow it.
    """
    if not isinstance(dim, (tuple, list)):
        return input, target, labels, dim  # type: ignore[return-value]
    check_floating("input", input)
    check_floating("target", target)
    check_same_shape("input", input, "target", target)
    dims = [d if type(d) is int else _integer(d) for d in dim]
    if not dims or any(not -input.dim() <= d < input.dim() for d in dims):
        raise ValueError(f"dim is {tuple(dims)}; expected dimensions of the {input.dim()}-dimensional input")
    dims = [d % input.dim() for d in dims]
    if len(set(dims)) < len(dims):
        raise ValueError(f"dim is {tuple(dim)}, which names a dimension twice")
    if 0 in (input.shape[d] for d in dims):
        raise ValueError(f"input has 0 classes: shape {tuple(input.shape)}, dim={tuple(dims)}")
    if reduction == "batchmean" and 0 in dims and input.dim() > 1:
        raise ValueError("reduction='batchmean' divides by the size of dimension 0, which is one of the classes'")

    _check_joint_labels(labels, input, dims)

    def with_classes_last(tensor: Tensor) -> Tensor:
        return tensor.movedim(dims, list(range(-len(dims), 0))).flatten(-len(dims))

    soft = isinstance(labels, Tensor) and labels.is_floating_point() and labels.shape == input.shape
    labels = with_classes_last(labels) if soft and labels is not None else labels
    return with_classes_last(input), with_classes_last(target), labels, -1


def _check_joint_labels(labels: Tensor | None, input: Tensor, dims: Sequence[int]) -> None:
    """Check the shape of labels in terms of the dimensions as they were given; joined ones would be told instead."""
    if not isinstance(labels, Tensor):
        return
    positions = tuple(size for d, size in enumerate(input.shape) if d not in dims)
    if labels.shape != positions and not (labels.is_floating_point() and labels.shape == input.shape):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; expected {positions}, input's shape without dim {tuple(dims)}, "
            f"for class indices, or {tuple(input.shape)} for probabilities"
        )


def checked_smoothing(smoothing: float | Tensor, input: Tensor, labels: Tensor | None) -> float | Tensor:
    """Return the share of the uniform distribution in the labels, or raise."""
    smoothing = check_scalar("label_smoothing", smoothing, input, minimum=0, maximum=1)
    if labels is None and (number := number_of(smoothing)) != 0:
        raise ValueError(f"label_smoothing is {number!r}, but there are no labels; pass labels or leave it out")
    return smoothing


def _integer(dim: object) -> int:
    if not hasattr(dim, "__index__"):
        raise TypeError(f"dim must be an integer, a tuple of integers or None, got {dim!r}")
    return operator.index(dim)


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
