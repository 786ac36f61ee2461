"""Total variation along every axis, written to be read. Volumes are [B, C, ...] with one to three spatial axes.

A mask is [B or 1, C or 1, ...]; ``scale`` and ``threshold`` have one number for each axis; ``average`` says what the
sum along an axis is divided by: ``"nothing"``, or the pairs of neighbours in the ``"sample"`` or the ``"batch"``.
"""

import math

import torch
from torch import Tensor

from kdkernels.ops._checks import is_readable
from kdkernels.ops._numerics import compute_dtype, inverse, laid_out_as, root


def _checked(factors: Tensor) -> list[Tensor]:
    """Return the factor of each axis; one that is not accepted raises, or is NaN if it cannot be read."""
    valid = (factors >= 0) & (factors < math.inf)
    if is_readable(factors):
        if not valid.all():
            raise ValueError(
                f"axis_weight, spacing and delta give the axes the factors {[float(factor) for factor in factors]}; "
                "expected finite numbers, 0 or more"
            )
        return list(factors.unbind())
    return list(torch.where(valid, factors, math.nan).unbind())


def _all_but_first(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.dim()))


def _halves(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return all but the last and all but the first slice along an axis."""
    count = max(x.shape[axis] - 1, 0)
    return x.narrow(axis, 0, count), x.narrow(axis, min(x.shape[axis], 1), count)


def _differences(x: Tensor, mask: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """Return the differences of neighbours along each axis, and which of them count."""
    differences, counted = [], []
    for axis in range(2, x.dim()):
        first, second = _halves(x, axis)
        difference = first - second
        counts = torch.ones_like(difference, dtype=torch.bool)
        if mask is not None:
            counts = torch.logical_and(*_halves(mask, axis)).expand(difference.shape)
            difference = torch.where(counts, difference, 0.0)
        differences.append(difference)
        counted.append(counts)
    return differences, counted


def _padded(x: Tensor, axis: int, *, before: bool) -> Tensor:
    """Return the tensor with a slice of zeros before or after it along an axis."""
    sides = (0, 0) * (x.dim() - axis - 1) + ((1, 0) if before else (0, 1))
    return torch.nn.functional.pad(x, sides)


def _term(difference: Tensor, threshold: Tensor, norm_type: str) -> Tensor:
    if norm_type == "l1":
        return difference.abs()
    if norm_type == "huber":
        size = difference.abs()
        return torch.where(size > threshold, threshold * (size - threshold / 2), difference.square() / 2)
    return difference.square()


def _slope(difference: Tensor, threshold: Tensor, norm_type: str) -> Tensor:
    """Return the derivative of the term; that of l2 is of half the square."""
    if norm_type == "l1":
        return torch.where(difference.isnan(), difference, difference.sign())
    if norm_type == "huber":
        beyond = difference.abs() > threshold
        return torch.where(beyond, threshold * difference.sign(), difference)
    return difference if norm_type == "l2" else 2 * difference


def _lengths(x: Tensor, mask: Tensor | None, scales: list[Tensor], eps: float) -> tuple[list[Tensor], Tensor]:
    """Return the differences of each point, 0 if they do not count, and the length of their weighted vector."""
    differences, counted = _differences(x, mask)
    square, present = torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    padded = []
    for axis, (difference, counts, scale) in enumerate(zip(differences, counted, scales, strict=True), start=2):
        if x.shape[axis] > 0:
            difference, counts = _padded(difference, axis, before=False), _padded(counts, axis, before=False)
        padded.append(difference)
        square = square + scale * difference.square()
        present = present | counts
    return padded, root(torch.where(present, square + eps, 0.0))


def _divisors(counted: list[Tensor], average: str, dtype: torch.dtype) -> list[Tensor]:
    """Return what the sum along each axis is divided by, for each image."""
    pairs = [counts.sum(_all_but_first(counts)) for counts in counted]
    if average == "nothing":
        pairs = [torch.ones_like(count) for count in pairs]
    if average == "batch":
        pairs = [count.sum().expand(count.shape) for count in pairs]
    return [count.clamp(min=1).to(dtype) for count in pairs]


def _share(x: Tensor, reduction: str) -> float:
    return 1 / max(len(x), 1) if reduction == "mean" else 1.0


def total_variation_nd(
    input: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    threshold: Tensor,
    eps: float,
    norm_type: str,
    average: str,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Return the loss, and nothing for the backward, which computes all again."""
    x = input.to(compute_dtype(input))
    scales, thresholds = _checked(scale), _checked(threshold)
    if norm_type == "isotropic":
        values = _lengths(x, mask, scales, eps)[1].sum(_all_but_first(x))
    else:
        differences, counted = _differences(x, mask)
        values = x.new_zeros(len(x))
        for difference, factor, limit, pairs in zip(
            differences, scales, thresholds, _divisors(counted, average, x.dtype), strict=True
        ):
            terms = _term(difference, limit, norm_type).sum(_all_but_first(x))
            values = values + factor * terms / pairs
        if norm_type == "l2":
            values = root(values)
    loss = values if reduction == "none" else values.sum() * _share(x, reduction)
    return loss, x.new_zeros((len(x), 3))


def total_variation_nd_gradient(
    grad_output: Tensor,
    input: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    threshold: Tensor,
    eps: float,
    norm_type: str,
    average: str,
    reduction: str,
) -> Tensor:
    """Return the gradient of the total variation as a differentiable expression."""
    x = input.to(compute_dtype(input))
    scales, thresholds = _checked(scale), _checked(threshold)
    by_image = (-1, *[1] * (x.dim() - 1))
    outer = grad_output.view(by_image) if reduction == "none" else grad_output
    outer = outer * _share(x, reduction)
    if norm_type == "isotropic":
        padded, length = _lengths(x, mask, scales, eps)
        by_length = inverse(length)
        slopes = [factor * d * by_length for factor, d in zip(scales, padded, strict=True)]
        slopes = [slope.narrow(axis, 0, max(x.shape[axis] - 1, 0)) for axis, slope in enumerate(slopes, start=2)]
    else:
        differences, counted = _differences(x, mask)
        factors = [
            (factor / pairs).view(by_image)
            for factor, pairs in zip(scales, _divisors(counted, average, x.dtype), strict=True)
        ]
        slopes = [
            factor * _slope(d, limit, norm_type)
            for factor, d, limit in zip(factors, differences, thresholds, strict=True)
        ]
        if norm_type == "l2":
            squares = [
                (factor * d.square()).sum(_all_but_first(x), keepdim=True)
                for factor, d in zip(factors, differences, strict=True)
            ]
            by_norm = inverse(root(sum(squares[1:], squares[0])))
            slopes = [slope * by_norm for slope in slopes]
    gradient = torch.zeros_like(x)
    for axis, slope in enumerate(slopes, start=2):
        if x.shape[axis] > 0:
            gradient = gradient + _padded(slope, axis, before=False) - _padded(slope, axis, before=True)
    return (outer * gradient).to(input.dtype)


def total_variation_nd_backward(
    grad_output: Tensor,
    input: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    threshold: Tensor,
    coefficients: Tensor,
    eps: float,
    norm_type: str,
    average: str,
    reduction: str,
) -> Tensor:
    """Return :func:`total_variation_nd_gradient` in the memory layout of the input."""
    options = (eps, norm_type, average, reduction)
    return laid_out_as(input, total_variation_nd_gradient(grad_output, input, mask, scale, threshold, *options))
