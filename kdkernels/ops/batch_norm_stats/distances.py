"""The distance of batch-norm statistics from running statistics, a loss of a few numbers per channel."""

from typing import Any

import torch
from torch import Tensor

from kdkernels.ops import _autograd, _checks, _registry
from kdkernels.ops._types import ChannelReduction, Mode, Moment
from kdkernels.ops.batch_norm_stats import reference
from kdkernels.ops.batch_norm_stats.statistics import batch_norm_stats, check_input


def _distances_fake(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, channels: list[int], *options: Any
) -> Tensor:
    for other in (var, running_mean, running_var):
        torch._check(other.shape == mean.shape, lambda: "statistics have different shapes")
        torch._check(other.dtype == mean.dtype, lambda: "statistics have different dtypes")
    return mean.new_empty(len(channels))


def _distances_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, channels, mode, moment, reduction, mean_weight, var_weight = inputs
    ctx.options = (channels, mode, moment, reduction, mean_weight, var_weight)
    ctx.save_for_backward(*tensors)


def _distances_backward(ctx: Any, grad_losses: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_losses is None:
        return (None,) * 10
    grads = _DISTANCES_BACKWARD.run(ctx.backend, grad_losses, *ctx.saved_tensors, *ctx.options)
    return (*grads, *[None] * 6)


def _distances_backward_fake(
    grad_losses: Tensor,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    channels: list[int],
    *options: Any,
) -> tuple[Tensor, ...]:
    torch._check(grad_losses.shape[0] == len(channels))
    return tuple(mean.new_empty(mean.shape) for _ in range(4))


def _distances_backward_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    def gradients(*primals: Any) -> tuple[Tensor, ...]:
        return reference.distances_backward(*primals, *ctx.options)

    primals = ctx.saved_tensors
    filled = tuple(torch.zeros_like(primals[1]) if v is None else v for v in cotangents)
    return (*torch.func.vjp(gradients, *primals)[1](filled), *[None] * 6)


_STATISTICS = (
    "Tensor mean, Tensor var, Tensor running_mean, Tensor running_var, int[] channels, str mode, str moment, "
    "str reduction, float mean_weight, float var_weight"
)
_DISTANCES = _registry.define(
    "batch_norm_stat_distances",
    f"({_STATISTICS}) -> Tensor",
    reference=reference.distances,
    fake=_distances_fake,
    setup_context=_distances_setup_context,
    backward=_distances_backward,
    forward_mode=reference.distances,
)
_DISTANCES_BACKWARD = _registry.define(
    "batch_norm_stat_distances_backward",
    f"(Tensor grad_losses, {_STATISTICS}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.distances_backward,
    fake=_distances_backward_fake,
    setup_context=_distances_setup_context,
    backward=_distances_backward_backward,
)


def batch_norm_stat_distances(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    channels: list[int],
    *,
    mode: Mode = "l2",
    moment: Moment = "var",
    reduction: ChannelReduction | None = None,
    mean_weight: float = 1.0,
    var_weight: float = 1.0,
) -> Tensor:
    """Distances of the statistics of many layers from their running statistics, in one call.

    The channels of all layers lie one after another in flat tensors.

    Args:
        mean: Means, [sum(channels)].
        var: Variances, [sum(channels)].
        running_mean: Running means, [sum(channels)].
        running_var: Running variances, [sum(channels)].
        channels: Number of channels of each layer.
        mode: See :func:`batch_norm_stat_loss`.
        moment: See :func:`batch_norm_stat_loss`.
        reduction: See :func:`batch_norm_stat_loss`.
        mean_weight: See :func:`batch_norm_stat_loss`.
        var_weight: See :func:`batch_norm_stat_loss`.

    Returns:
        The loss of each layer, [len(channels)], in the dtype of ``mean``.

    Raises:
        TypeError: An argument is not a floating-point tensor, or a weight is not a number.
        ValueError: A shape does not fit ``channels``, or an option is not accepted.

    Example:
        >>> stats = batch_norm_stats(torch.randn(8, 5, 4, 4, requires_grad=True))
        >>> losses = batch_norm_stat_distances(*stats, torch.zeros(5), torch.ones(5), [2, 3])
        >>> losses.sum().backward()

    """
    statistics = {"mean": mean, "var": var, "running_mean": running_mean, "running_var": running_var}
    expected = (sum(channels),)
    for name, tensor in statistics.items():
        _checks.check_floating(name, tensor)
        if tensor.shape != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {expected}, one value per channel")
    options = _checks.checked_distance(mode, moment, reduction, mean_weight, var_weight)
    given = (_autograd.savable(tensor.to(mean.dtype)) for tensor in statistics.values())
    losses: Tensor = _DISTANCES.run_on(mean.device, *given, channels, *options)
    return losses


def batch_norm_stat_loss(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    mode: Mode = "l2",
    moment: Moment = "var",
    reduction: ChannelReduction | None = None,
    mean_weight: float = 1.0,
    var_weight: float = 1.0,
    unbiased: bool = False,
) -> Tensor:
    r"""Distance of an activation's batch-norm statistics from running statistics: the feature term of DeepInversion.

    With mean :math:`\mu` and variance v of the batch, running statistics m and r, and the weights a of the mean and b
    of the variance:

    - ``"l2"``: :math:`a\lVert\mu-m\rVert_2 + b\lVert v-r\rVert_2`, norms over the channels, neither squared nor divided
    - ``"l1"``: the mean or sum over the channels of :math:`a|\mu-m| + b|v-r|`
    - ``"squared"``: the mean or sum over the channels of :math:`a(\mu-m)^2 + b(v-r)^2`
    - ``"gaussian_kl"``: the mean or sum over the channels of
      :math:`\ln\sqrt{v/r} - \tfrac12\bigl(1 - (r + (\mu-m)^2)/v\bigr)`, with 1e-8 added to v and r

    The batch variance is biased by default, while a BatchNorm layer's running variance is not. Sources: Yin et al.,
    "Dreaming to Distill", arXiv 1912.08795 (l2); Smith et al., arXiv 2106.09701 (gaussian_kl).

    Args:
        input: Activation [N, C, ...] with 2 to 5 dimensions; fp16, bf16, fp32 or fp64.
        running_mean: Running means, [C]. They get a gradient if they require one.
        running_var: Running variances, [C]. They get a gradient if they require one.
        mode: ``"l2"``, ``"l1"``, ``"squared"`` or ``"gaussian_kl"``.
        moment: What all modes but gaussian_kl compare: variances (``"var"``) or standard deviations (``"std"``, with
            gradient 0 at variance 0).
        reduction: ``"mean"`` (the default) or ``"sum"`` over the channels, for all modes but l2.
        mean_weight: Weight of the term of the mean, for all modes but gaussian_kl.
        var_weight: Weight of the term of the variance or standard deviation, for all modes but gaussian_kl.
        unbiased: Whether to divide by n - 1.

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64). The gradient of a norm or an absolute value at 0 is 0.

    Raises:
        TypeError: An argument is not a floating-point tensor, or a weight is not a number.
        ValueError: A shape or an option is not accepted, or a channel has fewer than one value (two if unbiased).

    Example:
        >>> activation, bn = torch.randn(8, 16, 4, 4, requires_grad=True), torch.nn.BatchNorm2d(16)
        >>> loss = batch_norm_stat_loss(activation, bn.running_mean, bn.running_var, mode="l1", reduction="sum")
        >>> loss.backward()

    """
    check_input(input, unbiased)
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        _checks.check_floating(name, tensor)
        _checks.check_same_device("input", input, name, tensor)
    mean, var = batch_norm_stats(input, unbiased=unbiased)
    return batch_norm_stat_distances(
        mean,
        var,
        running_mean,
        running_var,
        [input.shape[1]],
        mode=mode,
        moment=moment,
        reduction=reduction,
        mean_weight=mean_weight,
        var_weight=var_weight,
    ).squeeze(0)
