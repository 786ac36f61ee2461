"""BatchNorm in eval mode, its residual, its activation and the statistics of its input, in one pass each way.

A regularizer on batch-norm statistics reads what the layer reads anyway. Together they cost less than the layer and its
activation alone: one read and one write forward; one read of the gradient, one of the input and one write backward.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kdkernels.ops import _autograd, _checks, _registry
from kdkernels.ops._numerics import compute_dtype
from kdkernels.ops.batch_norm_act_stats import reference

__all__ = ["PASSES", "BatchNormActStats", "batch_norm_act_stats"]

# Passes over the activation in memory, forward and backward: R W and R R W. A residual is one more R forward, and
# with an activation the output is read and the residual's gradient written backward.
PASSES = {"batch_norm_act_stats": (2, 3), "batch_norm_act_stats, residual": (3, 5)}

Activation = Literal["relu", "relu6", "leaky_relu", "silu", "hardswish"]
Statistics = Literal["batch", "image"]


@_registry.returns
class BatchNormActStats(NamedTuple):
    """The results of :func:`batch_norm_act_stats`: the layer's output, and mean and variance of its input."""

    output: Tensor
    mean: Tensor
    var: Tensor


def _fake(input: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    *parameters, residual, _eps, _activation, _negative_slope, by_image, _unbiased = given
    torch._check(input.dim() >= 2, lambda: "input needs the dimensions [N, C, ...]")
    for values in parameters:
        if values is not None:
            torch._check(values.dim() == 1)
            torch._check(values.shape[0] == input.shape[1], lambda: "a parameter needs one value per channel")
    if residual is not None:
        torch._check(residual.shape == input.shape, lambda: "residual and input have different shapes")
        torch._check(residual.dtype == input.dtype, lambda: "residual and input have different dtypes")
    shape = input.shape[:2] if by_image else input.shape[1:2]
    mean, var = (input.new_empty(shape, dtype=compute_dtype(input)) for _ in range(2))
    return torch.empty_like(input), mean, var


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, running_mean, running_var, weight, bias, residual, *ctx.options = inputs
    ctx.has_residual, activation = residual is not None, ctx.options[1]
    masked = output[0] if ctx.has_residual and activation != "none" else None
    ctx.save_for_backward(input, masked, output[1], running_mean, running_var, weight, bias)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if all(grad is None for grad in grads):
        return (None,) * 11
    by_input, by_residual = _BACKWARD.run(ctx.backend, *grads, *ctx.saved_tensors, *ctx.options)
    residual: Tensor | None = None
    if ctx.has_residual and grads[0] is not None:
        residual = grads[0] if ctx.options[1] == "none" else by_residual
    return (by_input, None, None, None, None, residual, *[None] * 5)


def _backward_fake(
    grad_output: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    input: Tensor,
    output: Tensor | None,
    mean: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    torch._check(mean.shape[-1] == input.shape[1])
    by_residual = torch.empty_like(input) if output is not None and grad_output is not None else input.new_empty(0)
    return torch.empty_like(input), by_residual


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_output, grad_mean, grad_var, input, masked, _mean, running_mean, running_var, weight, bias, *options = inputs
    ctx.options = options
    ctx.save_for_backward(grad_output, grad_mean, grad_var, input, masked, running_mean, running_var, weight, bias)


def _backward_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate the gradient, to any order; in it the mean is a function of the input."""
    *grads, input, masked, running_mean, running_var, weight, bias = ctx.saved_tensors
    residual = masked is not None and grads[0] is not None
    wanted = cotangents if residual else cotangents[:1]
    if all(cotangent is None for cotangent in wanted):
        return (None,) * 15

    def gradient(dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None, input: Tensor) -> tuple[Tensor, ...]:
        constants = masked, running_mean, running_var, weight, bias
        return reference.gradient(dy, dmean, dvar, input, *constants, *ctx.options)

    filled = tuple(torch.zeros_like(input) if cotangent is None else cotangent for cotangent in wanted)
    return (*_autograd.pull_back(gradient, grads, input, filled), *[None] * 11)


_PARAMETERS = "Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias"
_OPTIONS = "float eps, str activation, float negative_slope, bool by_image, bool unbiased"
_FORWARD = _registry.define(
    "batch_norm_act_stats",
    f"(Tensor input, {_PARAMETERS}, Tensor? residual, {_OPTIONS}) -> (Tensor output, Tensor mean, Tensor var)",
    reference=reference.forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    forward_mode=reference.layer,
)
_BACKWARD = _registry.define(
    "batch_norm_act_stats_backward",
    "(Tensor? grad_output, Tensor? grad_mean, Tensor? grad_var, Tensor input, Tensor? output, Tensor mean, "
    f"{_PARAMETERS}, {_OPTIONS}) -> (Tensor grad_input, Tensor grad_residual)",
    reference=reference.backward,
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
)


_PLAIN = (Tensor, torch.nn.Parameter)


def _check_input(input: Tensor, by_image: bool, unbiased: bool) -> None:
    _checks.check_floating("input", input)
    if not 2 <= input.dim() <= 5:
        raise ValueError(f"input must be [N, C, ...] with 2 to 5 dimensions, got shape {tuple(input.shape)}")
    count, needed = reference._count(input, by_image), 2 if unbiased else 1
    if count < needed:
        raise ValueError(
            f"input of shape {tuple(input.shape)} has {count} values per {'image and ' if by_image else ''}channel; "
            f"{'the unbiased' if unbiased else 'a'} variance needs at least {needed}"
        )


def _checked_parameter(name: str, values: Tensor, input: Tensor) -> Tensor:
    """Return a parameter or a running statistic in the dtype that is computed in."""
    placed = type(values) in _PLAIN and values.dtype is compute_dtype(input) and values.device == input.device
    if placed and values.shape == (input.shape[1],) and not values.requires_grad:
        return _autograd.savable(values)  # as in a network, whose layers come here in every forward
    _checks.check_floating(name, values)
    _checks.check_same_device("input", input, name, values)
    if values.shape != (input.shape[1],):
        raise ValueError(f"{name} has shape {tuple(values.shape)}; expected ({input.shape[1]},), one value per channel")
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but gradients reach only input and residual; pass {name}.detach(), or freeze the "
            "layer with requires_grad_(False)"
        )
    return _autograd.savable(values.to(compute_dtype(input)))


def batch_norm_act_stats(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    statistics: Statistics = "batch",
    unbiased: bool = False,
) -> BatchNormActStats:
    r"""Frozen BatchNorm with its residual and its activation, and the statistics of its input, in one pass.

    .. math:: y = \phi\Bigl(\frac{x - m}{\sqrt{r + \epsilon}}\, w + b + \text{residual}\Bigr), \qquad
              \mu_c = \frac1n \sum_i x_{c,i}, \qquad v_c = \frac1n \sum_i (x_{c,i} - \mu_c)^2

    with running mean m and running variance r, as a BatchNorm layer in eval mode, and mean and variance over the n
    values of a channel. The backward gives the gradients of all three results in one pass. The derivative of the
    activation is computed from the input again; with a residual it is taken from the output. So neither the normalized
    input nor the residual is kept. (``"silu"`` and ``"hardswish"`` after a residual, and a residual of another dtype,
    run as operations of their own.)

    Args:
        input: Activation [N, C, ...] with 2 to 5 dimensions; fp16, bf16, fp32 or fp64. Contiguous and channels_last
            memory is read in place.
        running_mean: Running means, [C].
        running_var: Running variances, [C].
        weight: Factors of the normalized input, [C]; 1 if None.
        bias: Terms added to it, [C]; 0 if None.
        eps: Number added to the running variance.
        activation: ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"silu"``, ``"hardswish"``, or None.
        negative_slope: Slope of ``"leaky_relu"`` below 0.
        residual: Tensor of the same shape that is added before the activation.
        statistics: Values that a mean and a variance are taken over: those of a channel in the whole ``"batch"``, or
            in each ``"image"``.
        unbiased: Whether the variance is divided by n - 1.

    Returns:
        The named tuple (output, mean, var). The output has the shape and the dtype of the input. The statistics are [C]
        for the batch and [N, C] for images, fp32 (fp64 for fp64).

    Raises:
        TypeError: An argument is not a floating-point tensor, or not a number.
        ValueError: A shape, a device or an option is not accepted, a parameter or a running statistic requires grad, or
            there are fewer than one value for a variance (two if unbiased).

    Example:
        >>> bn = torch.nn.BatchNorm2d(16).eval().requires_grad_(False)
        >>> x = torch.randn(8, 16, 4, 4, requires_grad=True)
        >>> parameters = bn.running_mean, bn.running_var, bn.weight, bn.bias
        >>> y, mean, var = batch_norm_act_stats(x, *parameters, activation="relu")
        >>> (y.mean() + (mean - bn.running_mean).norm() + (var - bn.running_var).norm()).backward()

    """
    if activation is not None:
        _checks.check_choice("activation", activation, reference.ACTIVATIONS)
    _checks.check_choice("statistics", statistics, ("batch", "image"))
    for name, value in (("eps", eps), ("negative_slope", negative_slope)):
        _checks.check_number(name, value)
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; expected a number that is not negative")
    if not isinstance(unbiased, bool):
        raise TypeError(f"unbiased must be a bool, got {unbiased!r}")
    by_image = statistics == "image"
    _check_input(input, by_image, unbiased)
    parameters = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    checked = [
        None if values is None and name in ("weight", "bias") else _checked_parameter(name, values, input)  # type: ignore[arg-type]
        for name, values in parameters.items()
    ]
    fused, added = activation or "none", residual
    if residual is not None:
        _checks.check_floating("residual", residual)
        _checks.check_same_device("input", input, "residual", residual)
        _checks.check_same_shape("input", input, "residual", residual)
        # Where the output does not tell the derivative of the activation
        if activation in ("silu", "hardswish") or (activation == "leaky_relu" and negative_slope < 0):
            fused = "none"
        if residual.dtype != input.dtype:
            fused, added = "none", None
        else:
            added = _autograd.savable(residual)
    options = float(eps), fused, float(negative_slope), by_image, unbiased
    output, mean, var = _FORWARD.run_on(input.device, _autograd.savable(input), *checked, added, *options)
    if residual is not None and added is None:
        output = output + residual
    if fused == "none" and activation is not None:
        output = reference.activated(output, activation, negative_slope)
    return BatchNormActStats(output, mean, var)
