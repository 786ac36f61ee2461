"""Mean and variance of each channel of an activation, in one read and with a fused backward."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.ops import _autograd, _checks, _registry, _tracing
from kdkernels.ops._numerics import compute_dtype
from kdkernels.ops.batch_norm_stats import reference


@_registry.returns
class BatchNormStats(NamedTuple):
    """The results of :func:`batch_norm_stats`, each of shape [C]."""

    mean: Tensor
    var: Tensor


@_registry.returns
class BatchNormTap(NamedTuple):
    """The results of :func:`batch_norm_tap`: a view of the input, and its statistics, each of shape [C]."""

    output: Tensor
    mean: Tensor
    var: Tensor


def _stats_fake(input: Tensor, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(input.dim() >= 2, lambda: "input needs the dimensions [N, C, ...]")
    mean, var, mean_error = (input.new_empty(input.shape[1], dtype=compute_dtype(input)) for _ in range(3))
    return mean, var, mean_error


def _stats_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, ctx.unbiased = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(input, output[0], output[2])


def _stats_backward(
    ctx: Any, grad_mean: Tensor | None, grad_var: Tensor | None, _grad_error: None
) -> tuple[Tensor | None, None]:
    if grad_mean is None and grad_var is None:
        return None, None
    return _TAP_BACKWARD.run(ctx.backend, None, grad_mean, grad_var, *ctx.saved_tensors, ctx.unbiased), None


def _tap_backward_fake(
    grad_output: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    input: Tensor,
    mean: Tensor,
    mean_error: Tensor,
    unbiased: bool,
) -> Tensor:
    for statistic in (mean, mean_error):
        torch._check(statistic.dim() == 1)
        torch._check(statistic.shape[0] == input.shape[1])
    return torch.empty_like(input)


def _tap_backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _mean, _mean_error, ctx.unbiased = inputs
    ctx.save_for_backward(*tensors)


def _tap_backward_backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate the gradient, to any order; in it the mean is a function of the activation."""
    if cotangent is None:
        return (None,) * 7
    *grads, input = ctx.saved_tensors

    def gradient(dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None, input: Tensor) -> Tensor:
        return reference.tap_gradient(dy, dmean, dvar, input, ctx.unbiased)

    return (*_autograd.pull_back(gradient, grads, input, cotangent), None, None, None)


_STATS = _registry.define(
    "batch_norm_stats",
    "(Tensor input, bool unbiased) -> (Tensor mean, Tensor var, Tensor mean_error)",
    reference=reference.stats,
    fake=_stats_fake,
    setup_context=_stats_setup_context,
    backward=_stats_backward,
    forward_mode=reference.stats,
)
_TAP_BACKWARD = _registry.define(
    "batch_norm_tap_backward",
    "(Tensor? grad_output, Tensor? grad_mean, Tensor? grad_var, Tensor input, Tensor mean, Tensor mean_error, "
    "bool unbiased) -> Tensor",
    reference=reference.tap_backward,
    fake=_tap_backward_fake,
    setup_context=_tap_backward_setup_context,
    backward=_tap_backward_backward,
)


def check_input(input: Tensor, unbiased: bool) -> None:
    """Raise unless an input has statistics."""
    _checks.check_floating("input", input)
    if not 2 <= input.dim() <= 5:
        raise ValueError(f"input must be [N, C, ...] with 2 to 5 dimensions, got shape {tuple(input.shape)}")
    count, needed = reference.values_per_channel(input), 2 if unbiased else 1
    if count < needed:
        raise ValueError(
            f"input of shape {tuple(input.shape)} has {count} values per channel; "
            f"{'the unbiased' if unbiased else 'a'} variance needs at least {needed}"
        )


def batch_norm_stats(input: Tensor, *, unbiased: bool = False) -> BatchNormStats:
    r"""Mean and variance of each channel, in one read of the input.

    .. math:: \mu_c = \frac1n \sum_{i} x_{c,i}, \qquad v_c = \frac1{n} \sum_i (x_{c,i} - \mu_c)^2

    over the n values of a channel in all samples and positions: the statistics that BatchNorm normalizes with.

    Args:
        input: Activation [N, C, ...] with 2 to 5 dimensions; fp16, bf16, fp32 or fp64. Contiguous and channels_last
            memory is read in place.
        unbiased: Whether to divide by n - 1, as BatchNorm does for ``running_var``.

    Returns:
        The named tuple (mean, var): [C] each, fp32 (fp64 for fp64).

    Raises:
        TypeError: The input is not a floating-point tensor.
        ValueError: The input has a wrong number of dimensions, or fewer than one value per channel (two if unbiased).

    Example:
        >>> activation = torch.randn(8, 16, 4, 4, requires_grad=True)
        >>> mean, var = batch_norm_stats(activation)
        >>> (mean.square() + (var - 1).square()).sum().backward()

    """
    check_input(input, unbiased)
    mean, var, _ = _STATS.run_on(input.device, input, unbiased)
    return BatchNormStats(mean, var)


class _Tap(torch.autograd.Function):
    """Returns the activation and its statistics; the backward adds all their gradients in one pass."""

    @staticmethod
    def forward(input: Tensor, unbiased: bool, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var, mean_error = _STATS.run(backend, input, unbiased)
        return input.view_as(input), mean, var, mean_error

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, ctx.unbiased, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[3])
        ctx.save_for_backward(input, output[1], output[3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grads[1] is None and grads[2] is None:
            return grads[0], None, None
        return _TAP_BACKWARD.run(ctx.backend, *grads[:3], *ctx.saved_tensors, ctx.unbiased), None, None


_tap = _autograd.applied(_Tap)


def batch_norm_tap(input: Tensor, *, unbiased: bool = False) -> BatchNormTap:
    """Statistics of an activation that the network continues with: :func:`batch_norm_stats` with a fused backward.

    A hook on BatchNorm's input adds the gradients of mean and variance to the network's in separate passes and keeps a
    copy of the activation. The tap does it in one pass: grad + dmean / n + 2 dvar (x - mean) / n.

    Args:
        input: Activation [N, C, ...] with 2 to 5 dimensions; fp16, bf16, fp32 or fp64.
        unbiased: Whether to divide by n - 1.

    Returns:
        The named tuple (output, mean, var). The output is a view of the input. An in-place operation on it raises if
        the input requires grad, since it would change what the backward reads. The statistics are [C] each, fp32 (fp64
        for fp64).

    Raises:
        TypeError, ValueError: See :func:`batch_norm_stats`.

    Example:
        >>> activation = torch.randn(8, 16, 4, 4, requires_grad=True)
        >>> output, mean, var = batch_norm_tap(activation)
        >>> (output.relu().sum() + mean.square().sum() + var.sum()).backward()

    """
    check_input(input, unbiased)
    if _tracing.needs_registered_ops():
        return BatchNormTap(input.view_as(input), *batch_norm_stats(input, unbiased=unbiased))
    backend = _STATS.choose(input.device)
    output, mean, var, _ = _tap(input, unbiased, backend)
    return BatchNormTap(output, mean, var)
