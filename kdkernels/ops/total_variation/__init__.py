"""Total variation, and the three image priors of DeepInversion in one op."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kdkernels.ops import _autograd, _checks, _registry
from kdkernels.ops._numerics import compute_dtype
from kdkernels.ops.total_variation import reference

NormType = Literal["l1", "l2", "l2_squared", "isotropic"]
Reduction = Literal["none", "mean", "sum"]
# Passes over the images in memory, forward and backward: R, all sums at once, and R W.
PASSES = (1, 2)


@_registry.returns
class ImagePriorLosses(NamedTuple):
    """The results of :func:`image_prior_losses`, scalars."""

    tv_l1: Tensor
    tv_l2: Tensor
    l2: Tensor


def _check_images(image: Tensor) -> None:
    torch._check(image.dim() == 4, lambda: "input needs the dimensions [B, C, H, W]")


def _prior_fake(input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_images(input)
    dtype = compute_dtype(input)
    scalars = [input.new_empty((), dtype=dtype) for _ in range(3)]
    return scalars[0], scalars[1], scalars[2], input.new_empty(4 + input.shape[0], dtype=dtype)


def _prior_setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(*inputs, output[3])


def _prior_backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
    if all(g is None for g in grads[:3]):
        return None
    result: Tensor = _PRIOR_BACKWARD.run(ctx.backend, *grads[:3], *ctx.saved_tensors)
    return result


def _prior_backward_fake(
    grad_l1: Tensor | None, grad_l2: Tensor | None, grad_norm: Tensor | None, input: Tensor, norms: Tensor
) -> Tensor:
    _check_images(input)
    return torch.empty_like(input)


def _prior_backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _prior_backward_backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate the gradient, to any order; in it the norms are functions of the images."""
    if cotangent is None:
        return (None,) * 5
    *grads, input = ctx.saved_tensors
    return (*_autograd.pull_back(reference.image_prior_gradient, grads, input, cotangent), None)


def _variation_fake(
    input: Tensor, norm_type: str, directions: int, eps: float, reduction: str
) -> tuple[Tensor, Tensor]:
    _check_images(input)
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
    _check_images(input)
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


_PRIOR = _registry.define(
    "image_prior_losses",
    "(Tensor input) -> (Tensor tv_l1, Tensor tv_l2, Tensor l2, Tensor norms)",
    reference=reference.image_prior_losses,
    fake=_prior_fake,
    setup_context=_prior_setup_context,
    backward=_prior_backward,
    forward_mode=reference.image_prior_losses,
)
_PRIOR_BACKWARD = _registry.define(
    "image_prior_losses_backward",
    "(Tensor? grad_l1, Tensor? grad_l2, Tensor? grad_norm, Tensor input, Tensor norms) -> Tensor",
    reference=reference.image_prior_losses_backward,
    fake=_prior_backward_fake,
    setup_context=_prior_backward_setup_context,
    backward=_prior_backward_backward,
)
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


def image_prior_losses(input: Tensor) -> ImagePriorLosses:
    r"""Total variation in two norms and the norm of images: the priors of DeepInversion, in one read.

    With the differences :math:`d_1 \dots d_4` between a pixel and its neighbour to the right, below, and on both
    diagonals, over pairs inside the image only (no wrap-around):

    .. math:: \mathrm{TV}_{l1} = \sum_k \operatorname{mean} |d_k|, \qquad
              \mathrm{TV}_{l2} = \sum_k \lVert d_k \rVert_F, \qquad
              \mathrm{L2} = \frac1B \sum_b \lVert x_b \rVert_2

    The norms of TV_l2 are over the whole batch and not squared, as published: its coefficient does not carry over to
    another batch size, since the term grows as :math:`\sqrt B`. Source: Yin et al., "Dreaming to Distill",
    arXiv 1912.08795.

    Args:
        input: Images [B, C, H, W]; fp16, bf16, fp32 or fp64. Contiguous and channels_last memory is read in place.

    Returns:
        The named tuple (tv_l1, tv_l2, l2): scalars in fp32 (fp64 for fp64). The gradient of a norm at 0 is 0. An empty
        batch, or a direction without pairs, gives 0.

    Raises:
        TypeError: The input is not a floating-point tensor.
        ValueError: The input does not have 4 dimensions.

    Example:
        >>> images = torch.rand(8, 3, 32, 32, requires_grad=True)
        >>> tv_l1, tv_l2, l2 = image_prior_losses(images)
        >>> (1e-4 * tv_l2 + 1e-5 * l2).backward()

    """
    _checks.check_floating("input", input)
    if input.dim() != 4:
        raise ValueError(f"input must be [B, C, H, W], got shape {tuple(input.shape)}")
    tv_l1, tv_l2, l2, _ = _PRIOR.run_on(input.device, input)
    return ImagePriorLosses(tv_l1, tv_l2, l2)


def total_variation(
    input: Tensor,
    reduction: Reduction = "sum",
    *,
    norm_type: NormType = "l1",
    directions: Literal[1, 2, 4] = 2,
    eps: float = 0.0,
) -> Tensor:
    r"""Total variation of images, with a choice of the common libraries' definitions.

    For each image, over all differences d of neighbouring pixels in the given directions (1: right; 2: right and
    down; 4: also the two diagonals), pairs inside the image only:

    - ``"l1"``: :math:`\sum |d|`
    - ``"l2_squared"``: :math:`\sum d^2`
    - ``"l2"``: :math:`\sqrt{\sum d^2}`, the norm of the whole image
    - ``"isotropic"``: :math:`\sum \sqrt{d_x^2 + d_y^2 + \epsilon}` over the pixels with a right or lower neighbour; a
      missing difference counts as 0 (Rudin, Osher and Fatemi, 1992)

    With two directions and images [B, C, H, W], other packages give the same numbers as follows:

    - kornia's l1 keeps the channels apart, [B, C]: ``kornia.losses.total_variation(x, "sum").sum(1)`` equals
      ``total_variation(x, "none")``, and ``kornia.losses.total_variation(x, "mean").mean()`` equals
      ``total_variation(x, "mean")``.
    - ``torchmetrics.functional.image.total_variation(x, r)`` equals ``total_variation(x, r)`` for ``"none"`` and
      ``"sum"``; its ``"mean"`` equals ``total_variation(x, "none").mean()``.
    - ``piq.total_variation(x, "none", n)`` equals ``total_variation(x, "none", norm_type=n)`` for its three norms.

    Args:
        input: Images [B, C, H, W] or one image [C, H, W]; fp16, bf16, fp32 or fp64. Contiguous and channels_last memory
            is read in place.
        reduction: ``"none"`` gives one value per image, ``"sum"`` adds them, and ``"mean"`` averages them, except that
            l1 and l2_squared divide each direction by its number of pairs in the batch.
        norm_type: ``"l1"``, ``"l2"``, ``"l2_squared"`` or ``"isotropic"``.
        directions: 1, 2 or 4; must be 2 for ``"isotropic"``.
        eps: Smoothing of ``"isotropic"``; must be 0 for the others.

    Returns:
        The loss in fp32 (fp64 for fp64): [B] for ``"none"`` with a batch, otherwise a scalar. The gradient of a
        norm at 0 is 0. An empty batch, or a direction without pairs, gives 0.

    Raises:
        TypeError: The input is not a floating-point tensor.
        ValueError: A shape or an option is not accepted.

    Example:
        >>> images = torch.rand(8, 3, 32, 32, requires_grad=True)
        >>> loss = total_variation(images, "mean", norm_type="l1", directions=2)
        >>> loss.backward()

    """
    _checks.check_floating("input", input)
    if input.dim() not in (3, 4):
        raise ValueError(f"input must be [B, C, H, W] or [C, H, W], got shape {tuple(input.shape)}")
    _checks.check_choice("reduction", reduction, ("none", "mean", "sum"))
    _checks.check_choice("norm_type", norm_type, ("l1", "l2", "l2_squared", "isotropic"))
    if directions not in (1, 2, 4):
        raise ValueError(f"directions is {directions!r}; accepted are 1, 2 and 4")
    if norm_type == "isotropic" and directions != 2:
        raise ValueError(f"norm_type='isotropic' has directions=2, got {directions}")
    if not 0 <= eps < float("inf") or (eps != 0 and norm_type != "isotropic"):
        raise ValueError(f"eps is {eps!r}; expected 0, or a positive, finite number with norm_type='isotropic'")
    images = input.unsqueeze(0) if input.dim() == 3 else input
    loss: Tensor = _VARIATION.run_on(input.device, images, norm_type, directions, float(eps), reduction)[0]
    return loss.squeeze(0) if input.dim() == 3 and reduction == "none" else loss
