"""Total variation of images and volumes, and the three image priors of DeepInversion in one op."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kdkernels.ops import _checks, _registry
from kdkernels.ops._numerics import compute_dtype
from kdkernels.ops.total_variation import reference, volumes
from kdkernels.ops.total_variation.priors import ImagePriorLosses, check_images, image_prior_losses

__all__ = ["PASSES", "ImagePriorLosses", "NormType", "Reduction", "image_prior_losses", "total_variation"]

NormType = Literal["l1", "l2", "l2_squared", "isotropic", "huber"]
Reduction = Literal["none", "mean", "sum"]
# Passes over the images in memory, forward and backward: R, all sums at once, and R W.
PASSES = (1, 2)


def _variation_fake(
    input: Tensor, norm_type: str, directions: int, eps: float, reduction: str
) -> tuple[Tensor, Tensor]:
    check_images(input)
    dtype = compute_dtype(input)
    loss = input.new_empty((input.shape[0],) if reduction == "none" else (), dtype=dtype)
    return loss, input.new_empty(input.shape[0] if norm_type == "l2" else 0, dtype=dtype)


def _variation_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(input, output[1])


def _variation_backward(ctx: Any, grad_loss: Tensor | None, _grad_norms: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 5
    grad = _VARIATION_BACKWARD.run(ctx.backend, grad_loss, *ctx.saved_tensors, *ctx.options)
    return grad, None, None, None, None


def _variation_backward_fake(
    grad_output: Tensor, input: Tensor, norms: Tensor, norm_type: str, directions: int, eps: float, reduction: str
) -> Tensor:
    check_images(input)
    return torch.empty_like(input)


def _variation_backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, input, _norms, *ctx.options = inputs
    ctx.save_for_backward(grad_output, input)


def _variation_backward_backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
    if cotangent is None:
        return (None,) * 7

    def gradient(grad_output: Tensor, input: Tensor) -> Tensor:
        return reference.total_variation_gradient(grad_output, input, *ctx.options)

    by_grad, by_input = torch.func.vjp(gradient, *ctx.saved_tensors)[1](cotangent)
    return by_grad, by_input, None, None, None, None, None


_OPTIONS = "str norm_type, int directions, float eps, str reduction"
_VARIATION = _registry.define(
    "total_variation",
    f"(Tensor input, {_OPTIONS}) -> (Tensor loss, Tensor norms)",
    reference=reference.total_variation,
    fake=_variation_fake,
    setup_context=_variation_setup_context,
    backward=_variation_backward,
    forward_mode=reference.total_variation,
)
_VARIATION_BACKWARD = _registry.define(
    "total_variation_backward",
    f"(Tensor grad_output, Tensor input, Tensor norms, {_OPTIONS}) -> Tensor",
    reference=reference.total_variation_backward,
    fake=_variation_backward_fake,
    setup_context=_variation_backward_setup_context,
    backward=_variation_backward_backward,
)


def total_variation(
    input: Tensor,
    reduction: Reduction = "sum",
    *,
    norm_type: NormType = "l1",
    directions: Literal[1, 2, 3, 4] | None = None,
    eps: float = 0.0,
    spatial_dims: Literal[1, 2, 3] = 2,
    axis_weight: float | Sequence[float] | Tensor | None = None,
    axis_reduction: Literal["sum", "mean"] | None = None,
    spacing: float | Sequence[float] | Tensor | None = None,
    mask: Tensor | None = None,
    delta: float | Tensor | None = None,
) -> Tensor:
    r"""Total variation of images, volumes or sequences, with a choice of the common libraries' definitions.

    For each image, over the differences d of neighbours along each axis, pairs inside the image only:

    - ``"l1"``: :math:`\sum |d|`
    - ``"l2_squared"``: :math:`\sum d^2`
    - ``"huber"``: :math:`\sum h(d)`, with :math:`h(d) = d^2 / 2` where :math:`|d| \le \delta`, else
      :math:`\delta (|d| - \delta / 2)`
    - ``"l2"``: :math:`\sqrt{\sum d^2}`, the norm of the whole image
    - ``"isotropic"``: :math:`\sum \sqrt{\sum_a d_a^2 + \epsilon}` over the points that have a next neighbour along at
      least one axis; a missing difference counts as 0 (Rudin, Osher and Fatemi, 1992)

    The options of an axis change its differences or its sum. With the weight :math:`w_a` and the spacing :math:`s_a`,
    every :math:`d_a` is divided by :math:`s_a`, before Huber's threshold too, and :math:`w_a` multiplies the terms of
    that axis: :math:`w_a |d_a|`, :math:`w_a d_a^2`, :math:`w_a h(d_a)`. Under a root it stands inside:
    :math:`\sqrt{\sum_a w_a \sum d_a^2}` and :math:`\sum \sqrt{\sum_a w_a d_a^2 + \epsilon}`. Sums are not multiplied by
    the size of a cell.

    A pair counts if both of its ends are in the mask; means divide by the pairs that count. What lies outside the mask
    has no influence and no gradient, even if it is NaN. An ``"isotropic"`` point counts with the differences that it
    has left.

    With images [B, C, H, W], other packages give the same numbers as follows:

    - kornia's l1 keeps the channels apart, [B, C]: ``kornia.losses.total_variation(x, "sum").sum(1)`` equals
      ``total_variation(x, "none")``, and ``kornia.losses.total_variation(x, "mean").mean()`` equals
      ``total_variation(x, "mean")``.
    - ``torchmetrics.functional.image.total_variation(x, r)`` equals ``total_variation(x, r, axis_reduction="sum")``.
    - ``piq.total_variation(x, "none", n)`` equals ``total_variation(x, "none", norm_type=n)`` for its three norms.
    - gsplat's ``total_variation_loss`` of bilateral grids [N, 12, L, H, W] equals
      ``total_variation(x, "mean", norm_type="l2_squared", spatial_dims=3)``.

    Args:
        input: Images [B, C, H, W] or one image [C, H, W]; with ``spatial_dims=3`` volumes [B, C, D, H, W] or
            [C, D, H, W], with ``spatial_dims=1`` sequences [B, C, L] or [C, L]. fp16, bf16, fp32 or fp64. Contiguous
            and channels_last memory is read in place.
        reduction: ``"none"`` gives one value per image, ``"sum"`` adds them, and ``"mean"`` averages them, except that
            l1, l2_squared and huber divide the sum along each axis by its number of pairs in the batch.
        norm_type: ``"l1"``, ``"l2"``, ``"l2_squared"``, ``"huber"`` or ``"isotropic"``.
        directions: None for the directions along every axis. Of images without the options below, 1 (right only), 2
            (right and down) or 4 (also the two diagonals); must be 2 for ``"isotropic"``.
        eps: Smoothing of ``"isotropic"``; must be 0 for the others.
        spatial_dims: Number of axes: 1, 2 or 3.
        axis_weight: Weight of each axis in the order of the dimensions, such as [D, H, W], or one number for all; 0 or
            more, 1 by default.
        axis_reduction: ``"mean"`` divides the sum along each axis by its number of pairs in the image, before anything
            else; not for ``"isotropic"``. ``"sum"`` does not, so that ``reduction="mean"`` averages the images' sums.
            None is ``"sum"`` but for the mean over pairs that ``reduction="mean"`` is.
        spacing: Distance of neighbours along each axis, or one number for all; positive, 1 by default.
        mask: Boolean mask of a shape that broadcasts to that of the input.
        delta: Threshold of ``"huber"``, a positive number, 1 by default.

    Numbers of axes and ``delta`` are Python numbers, NumPy scalars or tensors, which get no gradient.

    Returns:
        The loss in fp32 (fp64 for fp64): [B] for ``"none"`` with a batch, otherwise a scalar. The gradient of a
        norm at 0 is 0. An empty batch, or an axis without pairs, gives 0.

    Raises:
        TypeError: The input is not a floating-point tensor, the mask not a boolean one, or an option not a number.
        ValueError: A shape or an option is not accepted.

    Example:
        >>> images = torch.rand(8, 3, 32, 32, requires_grad=True)
        >>> loss = total_variation(images, "mean", norm_type="l1", directions=2)
        >>> loss.backward()
        >>> volume = torch.rand(1, 2, 16, 32, 32, requires_grad=True)
        >>> total_variation(volume, "mean", spatial_dims=3, norm_type="huber", spacing=(2.0, 1.0, 1.0)).backward()

    """
    _checks.check_floating("input", input)
    axes = _checked_axes(spatial_dims)
    batched = _check_options(input, reduction, norm_type, eps, axes, axis_reduction, delta)
    images = input if batched else input.unsqueeze(0)
    plain = axis_weight is None and axis_reduction != "mean" and spacing is None and mask is None
    if plain and axes == 2 and norm_type != "huber":
        _check_directions(directions, norm_type)
        of_sums = axis_reduction == "sum" and reduction == "mean"
        options = (norm_type, directions or 2, float(eps), "sum" if of_sums else reduction)
        loss: Tensor = _VARIATION.run_on(input.device, images, *options)[0]
        if of_sums:
            loss = loss / max(images.shape[0], 1)
    else:
        if directions is not None and directions != axes:
            raise ValueError(
                f"directions is {directions!r}; with spatial_dims={axes}, or a weight, spacing, mask, axis_reduction "
                f"or 'huber', the directions are those of the axes: leave it out or pass {axes}"
            )
        loss = volumes.total_variation_nd(
            images,
            reduction,
            norm_type=norm_type,
            eps=eps,
            axis_weight=axis_weight,
            axis_reduction=axis_reduction,
            spacing=spacing,
            mask=volumes.checked_mask(mask, input),
            delta=delta,
        )
    return loss if batched or reduction != "none" else loss.squeeze(0)


def _checked_axes(spatial_dims: object) -> int:
    """Return the number of axes as a constant, where a compiled call has a symbol for it."""
    for axes in volumes.AXES:
        if spatial_dims == axes:
            return axes
    raise ValueError(f"spatial_dims is {spatial_dims!r}; accepted are 1, 2 and 3")


def _check_options(
    input: Tensor,
    reduction: str,
    norm_type: str,
    eps: float,
    axes: int,
    axis_reduction: str | None,
    delta: object,
) -> bool:
    """Return whether the input is a batch, or raise."""
    if input.dim() not in (axes + 1, axes + 2):
        names = ", ".join(volumes.AXES[axes])
        other = {3: "sequences [B, C, L] need spatial_dims=1", 5: "volumes [B, C, D, H, W] need spatial_dims=3"}
        remedy = f"; {other[input.dim()]}" if input.dim() in other else ""
        raise ValueError(f"input must be [B, C, {names}] or [C, {names}], got shape {tuple(input.shape)}{remedy}")
    _checks.check_choice("reduction", reduction, ("none", "mean", "sum"))
    _checks.check_choice("norm_type", norm_type, ("l1", "l2", "l2_squared", "isotropic", "huber"))
    _checks.check_number("eps", eps)
    if not 0 <= eps < float("inf") or (eps != 0 and norm_type != "isotropic"):
        raise ValueError(f"eps is {eps!r}; expected 0, or a positive, finite number with norm_type='isotropic'")
    if axis_reduction is not None:
        _checks.check_choice("axis_reduction", axis_reduction, ("sum", "mean"))
        if axis_reduction == "mean" and norm_type == "isotropic":
            raise ValueError(
                "axis_reduction is 'mean', but norm_type='isotropic' has no sum along each axis; leave it out, or "
                "choose another norm_type"
            )
    if delta is not None and norm_type != "huber":
        raise ValueError(f"delta is {_checks.number_of(delta)!r}; it is the threshold of norm_type='huber' only")
    return input.dim() == axes + 2


def _check_directions(directions: int | None, norm_type: str) -> None:
    if directions not in (None, 1, 2, 4):
        raise ValueError(f"directions is {directions!r}; accepted are 1, 2 and 4")
    if norm_type == "isotropic" and directions not in (None, 2):
        raise ValueError(f"norm_type='isotropic' has directions=2, got {directions}")
