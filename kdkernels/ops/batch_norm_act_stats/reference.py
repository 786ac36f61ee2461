"""BatchNorm in eval mode with activation, residual and the statistics of its input, written to be read."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops._numerics import compute_dtype, laid_out_as

ACTIVATIONS = ("relu", "relu6", "leaky_relu", "silu", "hardswish")


def activated(x: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Return the activation of a tensor; ``"none"`` is the identity."""
    if activation == "none":
        return x
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    return getattr(F, activation)(x)  # type: ignore[no-any-return]


def _slope(x: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Return the derivative of the activation; the output of the piecewise linear ones may stand for the input."""
    if activation == "relu":
        return (x > 0).to(x.dtype)
    if activation == "relu6":
        return ((x > 0) & (x < 6)).to(x.dtype)
    if activation == "leaky_relu":
        return torch.where(x > 0, torch.ones_like(x), negative_slope)
    if activation == "silu":
        sigmoid = x.sigmoid()
        return sigmoid * (1 + x * (1 - sigmoid))
    if activation == "hardswish":
        inside = torch.where(x >= 3, 1.0, x / 3 + 0.5)
        return torch.where(x <= -3, 0.0, inside)
    return torch.ones_like(x)


def _by_channel(values: Tensor, input: Tensor) -> Tensor:
    """Return values [C] or [N, C] in a shape that broadcasts over the input."""
    return values.view(*values.shape, *[1] * (input.dim() - 2))


def _reduced(input: Tensor, by_image: bool) -> list[int]:
    return list(range(2, input.dim())) if by_image else [0, *range(2, input.dim())]


def _count(input: Tensor, by_image: bool) -> int:
    count: int = 1 if by_image else input.shape[0]
    for size in input.shape[2:]:
        count *= size
    return count


def moments(input: Tensor, by_image: bool, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel, or of each image and channel."""
    x = input.to(compute_dtype(input))
    if input.dim() == 2 and by_image:
        return x.clone(), x - x
    mean = x.mean(_reduced(input, by_image))
    squares = (x - _by_channel(mean, input)).square().sum(_reduced(input, by_image))
    return mean, squares / (_count(input, by_image) - int(unbiased))


def _normalized(
    input: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the input normalized by the running statistics, and the factor of each channel."""
    scale = (running_var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    output = (input.to(scale.dtype) - _by_channel(running_mean, input)) * _by_channel(scale, input)
    return output if bias is None else output + _by_channel(bias, input), scale


def layer(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    by_image: bool,
    unbiased: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the layer's output, and mean and variance of its input, as differentiable expressions."""
    output, _ = _normalized(input, running_mean, running_var, weight, bias, eps)
    if residual is not None:
        output = output + residual
    output = activated(output, activation, negative_slope).to(input.dtype)
    return output, *moments(input, by_image, unbiased)


def forward(input: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`layer` with the output in the memory layout of the input."""
    output, mean, var = layer(input, *arguments)  # type: ignore[arg-type]
    return laid_out_as(input, output), mean, var


def gradient(
    grad_output: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    input: Tensor,
    output: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    by_image: bool,
    unbiased: bool,
) -> tuple[Tensor, ...]:
    """Return the gradient for the input, and for the residual if there is one, as differentiable expressions.

    The derivative of the activation is taken from the output where it is given, which says that there is a residual.
    """
    x = input.to(compute_dtype(input))
    result = torch.zeros_like(x)
    through: tuple[Tensor, ...] = ()
    if grad_output is not None:
        normalized, scale = _normalized(input, running_mean, running_var, weight, bias, eps)
        at = normalized if output is None else output.to(x.dtype)
        grad = grad_output.to(x.dtype) * _slope(at, activation, negative_slope)
        result = grad * _by_channel(scale, input)
        if output is not None:
            through = (grad.to(input.dtype),)
    count = _count(input, by_image)
    if grad_mean is not None:
        result = result + _by_channel(grad_mean, input) / count
    if grad_var is not None:
        mean, _ = moments(input, by_image, False)
        distance = x - _by_channel(mean, input)
        result = result + 2 / (count - int(unbiased)) * _by_channel(grad_var, input) * distance
    return (result.to(input.dtype), *through)


def backward(
    grad_output: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    input: Tensor,
    output: Tensor | None,
    mean: Tensor,
    *arguments: object,
) -> tuple[Tensor, Tensor]:
    """Return :func:`gradient` in the memory layout of the input; the second result is empty if there is none."""
    grads = gradient(grad_output, grad_mean, grad_var, input, output, *arguments)  # type: ignore[arg-type]
    by_input, *by_residual = (laid_out_as(input, grad) for grad in grads)
    return by_input, by_residual[0] if by_residual else input.new_empty(0)
