"""Total variation and the image priors of DeepInversion, written to be read. Images are [B, C, H, W]."""

import torch
from torch import Tensor

from kdkernels.ops._numerics import compute_dtype, inverse, laid_out_as, root


def differences(x: Tensor, directions: int) -> list[Tensor]:
    """Return the differences of neighbours: right, down, and the two diagonals; pairs inside the image only."""
    return [
        x[..., :, :-1] - x[..., :, 1:],
        x[..., :-1, :] - x[..., 1:, :],
        x[..., 1:, :-1] - x[..., :-1, 1:],
        x[..., :-1, :-1] - x[..., 1:, 1:],
    ][:directions]


def _mean(x: Tensor) -> Tensor:
    """Return the mean, or 0 for an empty tensor."""
    return x.sum() / max(x.numel(), 1)


def _scatter(slopes: list[Tensor], like: Tensor) -> Tensor:
    """Return the gradient of the pixels from the gradient of the differences: the transpose of :func:`differences`."""
    total = torch.zeros_like(like)
    pad = torch.nn.functional.pad
    if len(slopes) > 0:
        total = total + pad(slopes[0], (0, 1)) - pad(slopes[0], (1, 0))
    if len(slopes) > 1:
        total = total + pad(slopes[1], (0, 0, 0, 1)) - pad(slopes[1], (0, 0, 1, 0))
    if len(slopes) > 2:
        total = total + pad(slopes[2], (0, 1, 1, 0)) - pad(slopes[2], (1, 0, 0, 1))
        total = total + pad(slopes[3], (0, 1, 0, 1)) - pad(slopes[3], (1, 0, 1, 0))
    return total


def image_prior_losses(input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return TV_l1, TV_l2, L2, and the norms of the four differences over the batch and of each image."""
    x = input.to(compute_dtype(input))
    d = differences(x, 4)
    difference_norms = torch.stack([root(k.square().sum()) for k in d])
    image_norms = root(x.flatten(1).square().sum(1))
    tv_l1 = torch.stack([_mean(k.abs()) for k in d]).sum()
    return tv_l1, difference_norms.sum(), _mean(image_norms), torch.cat([difference_norms, image_norms])


def image_prior_gradient(
    grad_l1: Tensor | None, grad_l2: Tensor | None, grad_norm: Tensor | None, input: Tensor
) -> Tensor:
    """Return the gradient of the image priors as a differentiable expression."""
    x = input.to(compute_dtype(input))
    slopes = []
    for d in differences(x, 4):
        slope = torch.zeros_like(d)
        if grad_l1 is not None:
            slope = slope + grad_l1 * d.sign() / max(d.numel(), 1)
        if grad_l2 is not None:
            slope = slope + grad_l2 * d * inverse(root(d.square().sum()))
        slopes.append(slope)
    gradient = _scatter(slopes, x)
    if grad_norm is not None:
        norms = root(x.flatten(1).square().sum(1)).view(-1, 1, 1, 1)
        gradient = gradient + grad_norm * x * inverse(norms) / max(len(x), 1)
    return gradient.to(input.dtype)


def image_prior_losses_backward(
    grad_l1: Tensor | None, grad_l2: Tensor | None, grad_norm: Tensor | None, input: Tensor, norms: Tensor
) -> Tensor:
    """Return :func:`image_prior_gradient` in the memory layout of the input."""
    return laid_out_as(input, image_prior_gradient(grad_l1, grad_l2, grad_norm, input))


def _isotropic(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx and dy, 0 if the neighbour is missing, and sqrt(dx^2 + dy^2 + eps), 0 if both are missing."""
    pad = torch.nn.functional.pad
    right, down = differences(x, 2)
    dx, dy = pad(right, (0, 1)), pad(down, (0, 0, 0, 1))
    has_neighbour = torch.ones_like(x)
    if x.numel():
        has_neighbour[..., -1, -1] = 0
    return dx, dy, root((dx.square() + dy.square() + eps) * has_neighbour)


def _averages_images(norm_type: str, reduction: str) -> bool:
    return reduction == "mean" and norm_type in ("l2", "isotropic")


def total_variation(
    input: Tensor, norm_type: str, directions: int, eps: float, reduction: str
) -> tuple[Tensor, Tensor]:
    """Return the loss, and for the l2 norm the norm of each image."""
    x = input.to(compute_dtype(input))
    if norm_type == "isotropic":
        values = _isotropic(x, eps)[2].sum((1, 2, 3))
    else:
        terms = [d.abs() if norm_type == "l1" else d.square() for d in differences(x, directions)]
        if reduction == "mean" and not _averages_images(norm_type, reduction):
            return torch.stack([_mean(t) for t in terms]).sum(), x.new_empty(0)
        values = torch.stack([t.sum((1, 2, 3)) for t in terms]).sum(0)
    if norm_type == "l2":
        values = root(values)
    norms = values.clone() if norm_type == "l2" else x.new_empty(0)
    if reduction == "none":
        return values, norms
    return (_mean(values) if reduction == "mean" else values.sum()), norms


def total_variation_gradient(
    grad_output: Tensor, input: Tensor, norm_type: str, directions: int, eps: float, reduction: str
) -> Tensor:
    """Return the gradient of the total variation as a differentiable expression."""
    x = input.to(compute_dtype(input))
    scale = grad_output.view(-1, 1, 1, 1) if reduction == "none" else grad_output
    if _averages_images(norm_type, reduction):
        scale = scale / max(len(x), 1)
    if norm_type == "isotropic":
        dx, dy, length = _isotropic(x, eps)
        by_length = inverse(length)
        slopes = [(dx * by_length)[..., :, :-1], (dy * by_length)[..., :-1, :]]
        return (scale * _scatter(slopes, x)).to(input.dtype)
    d = differences(x, directions)
    if norm_type == "l2":
        norms = root(sum((k.square().sum((1, 2, 3)) for k in d), x.new_zeros(len(x)))).view(-1, 1, 1, 1)
        slopes = [k * inverse(norms) for k in d]
    else:
        slopes = [k.sign() if norm_type == "l1" else 2 * k for k in d]
        if reduction == "mean":
            slopes = [k / max(k.numel(), 1) for k in slopes]
    return (scale * _scatter(slopes, x)).to(input.dtype)


def total_variation_backward(
    grad_output: Tensor, input: Tensor, norms: Tensor, norm_type: str, directions: int, eps: float, reduction: str
) -> Tensor:
    """Return :func:`total_variation_gradient` in the memory layout of the input."""
    return laid_out_as(input, total_variation_gradient(grad_output, input, norm_type, directions, eps, reduction))
