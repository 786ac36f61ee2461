"""The three image priors of DeepInversion in one op."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.ops import _autograd, _checks, _registry
from kdkernels.ops._numerics import compute_dtype
from kdkernels.ops.total_variation import reference


@_registry.returns
class ImagePriorLosses(NamedTuple):
    """The results of :func:`image_prior_losses`, scalars."""

    tv_l1: Tensor
    tv_l2: Tensor
    l2: Tensor


def check_images(image: Tensor) -> None:
    """Raise in a fake implementation unless images have four dimensions."""
    torch._check(image.dim() == 4, lambda: "input needs the dimensions [B, C, H, W]")


def _prior_fake(input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_images(input)
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
    check_images(input)
    return torch.empty_like(input)


def _prior_backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _prior_backward_backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate the gradient, to any order; in it the norms are functions of the images."""
    if cotangent is None:
        return (None,) * 5
    *grads, input = ctx.saved_tensors
    return (*_autograd.pull_back(reference.image_prior_gradient, grads, input, cotangent), None)


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
