"""Batch-norm statistics: in one read, with a fused backward, and as a loss against the running statistics.

Passes over memory (R a read, W a write of the activation): statistics R; their backward R W; the backward of the tap,
which adds the gradient of the network, R R W (the gradient, the activation, the result). Nothing but the activation,
which BatchNorm saves anyway, is kept for the backward.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from kdkernels.ops import _autograd, _checks, _registry
from kdkernels.ops.batch_norm_stats import reference

Mode = Literal["l2", "squared", "gaussian_kl"]
Moment = Literal["var", "std"]


def _stats_fake(input: Tensor, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(input.dim() >= 2, lambda: "input needs the dimensions [N, C, ...]")
    mean, var, mean_error = (input.new_empty(input.shape[1], dtype=reference.compute_dtype(input)) for _ in range(3))
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
    """Differentiate the gradient, any order; the mean is a function of the activation in it."""
    if cotangent is None:
        return (None,) * 7
    *grads, input = ctx.saved_tensors

    def gradient(dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None, input: Tensor) -> Tensor:
        return reference.tap_gradient(dy, dmean, dvar, input, ctx.unbiased)

    return (*_autograd.pull_back(gradient, grads, input, cotangent), None, None, None)


def _distances_fake(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, channels: list[int], mode: str, moment: str
) -> Tensor:
    for other in (var, running_mean, running_var):
        torch._check(other.shape == mean.shape, lambda: "statistics have different shapes")
        torch._check(other.dtype == mean.dtype, lambda: "statistics have different dtypes")
    return mean.new_empty(len(channels))


def _distances_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, channels, mode, moment = inputs
    ctx.options = (channels, mode, moment)
    ctx.save_for_backward(*tensors)


def _distances_backward(ctx: Any, grad_losses: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_losses is None:
        return (None,) * 7
    grads = _DISTANCES_BACKWARD.run(ctx.backend, grad_losses, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None)


def _distances_backward_fake(
    grad_losses: Tensor,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    channels: list[int],
    mode: str,
    moment: str,
) -> tuple[Tensor, ...]:
    torch._check(grad_losses.shape[0] == len(channels))
    return tuple(mean.new_empty(mean.shape) for _ in range(4))


def _distances_backward_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    def gradients(*primals: Any) -> tuple[Tensor, ...]:
        return reference.distances_backward(*primals, *ctx.options)

    primals = ctx.saved_tensors
    filled = tuple(torch.zeros_like(primals[1]) if v is None else v for v in cotangents)
    return (*torch.func.vjp(gradients, *primals)[1](filled), None, None, None)


_STATS = _registry.define(
    "batch_norm_stats",
    "(Tensor input, bool unbiased) -> (Tensor mean, Tensor var, Tensor mean_error)",
    reference=reference.stats,
    fake=_stats_fake,
    setup_context=_stats_setup_context,
    backward=_stats_backward,
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
_STATISTICS = "Tensor mean, Tensor var, Tensor running_mean, Tensor running_var, int[] channels, str mode, str moment"
_DISTANCES = _registry.define(
    "batch_norm_stat_distances",
    f"({_STATISTICS}) -> Tensor",
    reference=reference.distances,
    fake=_distances_fake,
    setup_context=_distances_setup_context,
    backward=_distances_backward,
)
_DISTANCES_BACKWARD = _registry.define(
    "batch_norm_stat_distances_backward",
    f"(Tensor grad_losses, {_STATISTICS}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.distances_backward,
    fake=_distances_backward_fake,
    setup_context=_distances_setup_context,
    backward=_distances_backward_backward,
)


def _check_input(input: Tensor, unbiased: bool) -> None:
    _checks.check_floating("input", input)
    if not 2 <= input.dim() <= 5:
        raise ValueError(f"input must be [N, C, ...] with 2 to 5 dimensions, got shape {tuple(input.shape)}")
    count, needed = reference.values_per_channel(input), 2 if unbiased else 1
    if count < needed:
        raise ValueError(
            f"input of shape {tuple(input.shape)} has {count} values a channel; "
            f"{'the unbiased' if unbiased else 'a'} variance needs {needed} at least"
        )


def _check_statistics(channels: int, running_mean: Tensor, running_var: Tensor, mode: str, moment: str) -> None:
    _checks.check_choice("mode", mode, ("l2", "squared", "gaussian_kl"))
    _checks.check_choice("moment", moment, ("var", "std"))
    if mode == "gaussian_kl" and moment != "var":
        raise ValueError("moment='std' applies to the modes 'l2' and 'squared'; 'gaussian_kl' has its own roots")
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        _checks.check_floating(name, tensor)
        if tensor.shape != (channels,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected ({channels},), one value a channel")


def batch_norm_stats(input: Tensor, *, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    r"""Mean and variance of each channel, in one read of the input.

    .. math:: \mu_c = \frac1n \sum_{i} x_{c,i}, \qquad v_c = \frac1{n} \sum_i (x_{c,i} - \mu_c)^2

    over the n values of a channel in all samples and positions, the statistics that BatchNorm normalizes with.

    Args:
        input: activation [N, C, ...] of 2 to 5 dimensions; fp16, bf16, fp32 or fp64; contiguous and channels_last
            are read in place.
        unbiased: divide by n - 1, as ``running_var`` was.

    Returns:
        mean and variance, [C], fp32 (fp64 for fp64).

    Raises:
        TypeError: input is no floating tensor.
        ValueError: wrong number of dimensions, or fewer than one value a channel (two where unbiased).

    """
    _check_input(input, unbiased)
    mean, var, _ = _STATS.run_on(input.device, input, unbiased)
    return mean, var


class _Tap(torch.autograd.Function):
    """Hands the activation on and its statistics out; the backward adds their gradients in one pass."""

    generate_vmap_rule = True

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


_tap: Callable[..., Any] = _Tap.apply


def batch_norm_tap(input: Tensor, *, unbiased: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of an activation that a network goes on with: :func:`batch_norm_stats` with a fused backward.

    Where a hook on BatchNorm's input would add the gradients of mean and variance to the network's in separate passes
    and keep a copy of the activation, the tap does it in one: grad + dmean / n + 2 dvar (x - mean) / n.

    Args:
        input: activation [N, C, ...] of 2 to 5 dimensions; fp16, bf16, fp32 or fp64.
        unbiased: divide by n - 1.

    Returns:
        the activation, unchanged (a view: an in-place operation on it raises where the input requires grad, since
        it would change what the backward reads; go on out of place), mean and variance, [C], fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: as :func:`batch_norm_stats`.

    """
    _check_input(input, unbiased)
    backend = _STATS.choose(input.device)
    activation, mean, var, _ = _tap(input, unbiased, backend)
    return activation, mean, var


def stat_distances(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    channels: list[int],
    *,
    mode: Mode = "l2",
    moment: Moment = "var",
) -> Tensor:
    """Distance of each layer's statistics from its running ones, for layers laid one after another.

    Args:
        mean: of all channels of all layers, [sum(channels)].
        var: likewise.
        running_mean: likewise.
        running_var: likewise.
        channels: the number of channels of each layer.
        mode: as in :func:`batch_norm_stat_loss`.
        moment: as in :func:`batch_norm_stat_loss`.

    Returns:
        [len(channels)], the loss of each layer.

    """
    _check_statistics(sum(channels), running_mean, running_var, mode, moment)
    running = (running_mean.to(mean.dtype), running_var.to(mean.dtype))
    losses: Tensor = _DISTANCES.run_on(mean.device, mean, var, *running, channels, mode, moment)
    return losses


def batch_norm_stat_loss(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    mode: Mode = "l2",
    moment: Moment = "var",
    unbiased: bool = False,
) -> Tensor:
    r"""Distance of an activation's batch-norm statistics from running statistics: the feature term of DeepInversion.

    With mean :math:`\mu` and variance v of the batch and running statistics m and r:

    - ``"l2"``: :math:`\lVert\mu-m\rVert_2 + \lVert v-r\rVert_2`, norms over the channels, neither squared nor divided
    - ``"squared"``: the mean over the channels of :math:`(\mu-m)^2 + (v-r)^2`
    - ``"gaussian_kl"``: the mean over the channels of
      :math:`\ln\sqrt{v/r} - \tfrac12\bigl(1 - (r + (\mu-m)^2)/v\bigr)`, with 1e-8 added to v and r

    Sources: Yin et al., "Dreaming to Distill", arXiv 1912.08795 (l2); Smith et al., arXiv 2106.09701 (gaussian_kl).
    The batch variance is biased unless asked otherwise, while a BatchNorm layer's running variance is not.

    Args:
        input: activation [N, C, ...] of 2 to 5 dimensions; fp16, bf16, fp32 or fp64.
        running_mean: [C], with gradient where it requires one.
        running_var: [C], likewise.
        mode: see above.
        moment: compare variances (``"var"``) or standard deviations (``"std"``, gradient 0 at variance 0); for l2
            and squared.
        unbiased: divide by n - 1.

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64). The gradient of a norm at 0 is 0.

    Raises:
        TypeError: an argument is no floating tensor.
        ValueError: shapes, ``mode`` or ``moment`` are not as above, or there are fewer than one value a channel (two
            where unbiased).

    """
    _check_input(input, unbiased)
    _check_statistics(input.shape[1], running_mean, running_var, mode, moment)
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        _checks.check_same_device("input", input, name, tensor)
    mean, var = batch_norm_stats(input, unbiased=unbiased)
    return stat_distances(mean, var, running_mean, running_var, [input.shape[1]], mode=mode, moment=moment).squeeze(0)
