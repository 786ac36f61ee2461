"""Batch-norm statistics and their distance from the running statistics, written to be read."""

import torch
from torch import Tensor

from kdkernels.ops._numerics import compute_dtype, laid_out_as, root

EPS = 1e-8  # added to both variances of "gaussian_kl"


def values_per_channel(input: Tensor) -> int:
    """Return the number of values that a channel's statistics are taken over."""
    count: int = input.shape[0]
    for size in input.shape[2:]:
        count *= size
    return count


def _by_channel(statistic: Tensor, input: Tensor) -> Tensor:
    return statistic.view(-1, *[1] * (input.dim() - 2))


def _reduced(input: Tensor) -> list[int]:
    return [0, *range(2, input.dim())]


def stats(input: Tensor, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean and the variance of each channel, and the rounding error of the mean."""
    x = input.to(compute_dtype(input))
    mean = x.mean(_reduced(input))
    distance = x - _by_channel(mean, input)
    squares = distance.square().sum(_reduced(input))
    return mean, squares / (values_per_channel(input) - int(unbiased)), distance.mean(_reduced(input))


def tap_gradient(
    grad_output: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None, input: Tensor, unbiased: bool
) -> Tensor:
    """Return grad_output + grad_mean / n + 2 grad_var (x - mean) / n as a differentiable expression."""
    count = values_per_channel(input)
    x = input.to(compute_dtype(input))
    gradient = torch.zeros_like(x) if grad_output is None else grad_output.to(x.dtype)
    if grad_mean is not None:
        gradient = gradient + _by_channel(grad_mean, input) / count
    if grad_var is not None:
        mean = x.mean(_reduced(input), keepdim=True).squeeze(0)
        gradient = gradient + 2 / (count - int(unbiased)) * _by_channel(grad_var, input) * (x - mean)
    return gradient.to(input.dtype)


def tap_backward(
    grad_output: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    input: Tensor,
    mean: Tensor,
    mean_error: Tensor,
    unbiased: bool,
) -> Tensor:
    """Return :func:`tap_gradient` in the memory layout of the input."""
    gradient = tap_gradient(grad_output, grad_mean, grad_var, input, unbiased)
    return laid_out_as(input, gradient)


def _norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm, with gradient 0 at 0."""
    return root(x.square().sum())


def _distance(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    mode: str,
    moment: str,
    reduction: str,
    mean_weight: float,
    var_weight: float,
) -> Tensor:
    """Return the distance of one layer's statistics from its running statistics."""
    means = mean - running_mean
    divisor = 1 if reduction == "sum" else max(len(mean), 1)
    if mode == "gaussian_kl":
        v, r = var + EPS, running_var + EPS
        distances = ((v / r).log() + (r - v + means.square()) / v) / 2
        return distances.sum() / divisor
    if moment == "std":
        var, running_var = root(var), root(running_var)
    spreads = var - running_var
    if mode == "l2":
        return mean_weight * _norm(means) + var_weight * _norm(spreads)
    means, spreads = (x.abs() if mode == "l1" else x.square() for x in (means, spreads))
    distances = mean_weight * means + var_weight * spreads
    return distances.sum() / divisor


def distances(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    channels: list[int],
    mode: str,
    moment: str,
    reduction: str,
    mean_weight: float,
    var_weight: float,
) -> Tensor:
    """Return the distance of each layer; the tensors hold the channels of one layer after another."""
    if not channels:
        return mean.new_zeros(0)
    m, v, running_m, running_v = (s.split(channels) for s in (mean, var, running_mean, running_var))
    layers = zip(m, v, running_m, running_v, strict=True)
    return torch.stack([_distance(*layer, mode, moment, reduction, mean_weight, var_weight) for layer in layers])


def distances_backward(
    grad_losses: Tensor,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    channels: list[int],
    mode: str,
    moment: str,
    reduction: str,
    mean_weight: float,
    var_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`distances` for its four tensors, as differentiable expressions."""
    grad = torch.cat([g.expand(n) for g, n in zip(grad_losses, channels, strict=True)] or [mean.new_zeros(0)])
    divisors = [1 if reduction == "sum" else n for n in channels]
    divisor = torch.cat(
        [mean.new_full((n,), d) for n, d in zip(channels, divisors, strict=True)] or [mean.new_zeros(0)]
    )

    def slope_of_sum(differences: Tensor) -> Tensor:
        if mode == "squared":
            return 2 * differences / divisor
        if mode == "l1":
            return differences.sign() / divisor
        norm = torch.cat([_norm(layer).expand(len(layer)) for layer in differences.split(channels)] or [differences])
        return torch.where(norm == 0, 0.0, differences / torch.where(norm == 0, 1.0, norm))

    means = mean - running_mean
    if mode == "gaussian_kl":
        v, r = var + EPS, running_var + EPS
        by_mean = means / v / divisor
        by_var = (v - r - means.square()) / (2 * v * v * divisor)
        return grad * by_mean, grad * by_var, -grad * by_mean, grad * (r - v) / (2 * v * r * divisor)
    slope, running_slope = torch.ones_like(var), torch.ones_like(var)
    if moment == "std":
        var, running_var = root(var), root(running_var)
        slope, running_slope = (torch.where(s == 0, 0.0, 0.5 / torch.where(s == 0, 1.0, s)) for s in (var, running_var))
    by_mean = grad * mean_weight * slope_of_sum(means)
    by_spread = grad * var_weight * slope_of_sum(var - running_var)
    return by_mean, by_spread * slope, -by_mean, -by_spread * running_slope
