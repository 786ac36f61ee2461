"""The total variation along every axis of a volume, with weights, a mask and averages: the op and its options."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from kdkernels.ops import _autograd, _checks, _registry
from kdkernels.ops._numerics import compute_dtype
from kdkernels.ops.total_variation import volumes_reference as reference

AXES = {1: ("L",), 2: ("H", "W"), 3: ("D", "H", "W")}


def _check_shapes(input: Tensor, mask: Tensor | None, scale: Tensor, threshold: Tensor) -> None:
    axes = input.dim() - 2
    torch._check(1 <= axes <= 3, lambda: "input needs the dimensions [B, C, ...] with one to three axes")
    torch._check(scale.dim() == 1 and scale.shape[0] == axes, lambda: "scale needs one number for each axis")
    torch._check(threshold.shape == scale.shape, lambda: "threshold needs one number for each axis")
    if mask is not None:
        torch._check(
            mask.dtype == torch.bool and mask.dim() == input.dim(), lambda: "mask needs the input's dimensions"
        )
        for d in range(input.dim()):
            broadcast = d < 2 and mask.shape[d] == 1
            torch._check(broadcast or mask.shape[d] == input.shape[d], lambda: "mask does not match the input")


def _fake(
    input: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    threshold: Tensor,
    eps: float,
    norm_type: str,
    average: str,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    _check_shapes(input, mask, scale, threshold)
    dtype = compute_dtype(input)
    loss = input.new_empty((input.shape[0],) if reduction == "none" else (), dtype=dtype)
    return loss, input.new_empty((input.shape[0], 3), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, ctx.norm_type, ctx.average, ctx.reduction = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad_loss: Tensor | None, _coefficients: None) -> tuple[Tensor | None, ...]:
    grad = None
    if grad_loss is not None:
        options = (ctx.eps, ctx.norm_type, ctx.average, ctx.reduction)
        grad = _BACKWARD.run(ctx.backend, grad_loss, *ctx.saved_tensors, *options)
    return (grad, *[None] * 7)


def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    threshold: Tensor,
    coefficients: Tensor,
    eps: float,
    norm_type: str,
    average: str,
    reduction: str,
) -> Tensor:
    _check_shapes(input, mask, scale, threshold)
    return torch.empty_like(input)


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _coefficients, ctx.eps, ctx.norm_type, ctx.average, ctx.reduction = inputs
    ctx.save_for_backward(*tensors)


def _backward_backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate the gradient, to any order; in it norms are functions of the volume."""
    if cotangent is None:
        return (None,) * 10
    grad_output, input, mask, scale, threshold = ctx.saved_tensors
    options = (ctx.eps, ctx.norm_type, ctx.average, ctx.reduction)

    def gradient(grad_output: Tensor, input: Tensor) -> Tensor:
        return reference.total_variation_nd_gradient(grad_output, input, mask, scale, threshold, *options)

    by_grad, by_input = torch.func.vjp(gradient, grad_output, input)[1](cotangent)
    return (by_grad, by_input, *[None] * 8)


_TENSORS = "Tensor input, Tensor? mask, Tensor scale, Tensor threshold"
_OPTIONS = "float eps, str norm_type, str average, str reduction"
_VARIATION = _registry.define(
    "total_variation_nd",
    f"({_TENSORS}, {_OPTIONS}) -> (Tensor loss, Tensor coefficients)",
    reference=reference.total_variation_nd,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    forward_mode=reference.total_variation_nd,
    triton=False,
)
_BACKWARD = _registry.define(
    "total_variation_nd_backward",
    f"(Tensor grad_output, {_TENSORS}, Tensor coefficients, {_OPTIONS}) -> Tensor",
    reference=reference.total_variation_nd_backward,
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    triton=False,
)


def _stacked(values: Sequence[float | Tensor], input: Tensor) -> Tensor:
    """Return numbers as one tensor, without waiting for a device that some of them may be on."""
    tensors = [_checks.scalar_tensor(value, input).to(torch.float64) for value in values]
    elsewhere = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
    if elsewhere is not None:
        tensors = [tensor * torch.ones((), dtype=torch.float64, device=elsewhere) for tensor in tensors]
    return torch.stack(tensors)


def _numbers(name: str, given: object, input: Tensor, axes: Sequence[str], *, positive: bool) -> list[float | Tensor]:
    """Return the number of each axis, 1 if none is given, or raise."""
    values: list[Any] = [1.0 if given is None else given] * len(axes)
    if isinstance(given, Tensor) and given.dim() > 0:
        values = list(given.unbind())
    elif (isinstance(given, Sequence) and not isinstance(given, str)) or (
        not isinstance(given, Tensor) and getattr(given, "shape", ()) != ()
    ):
        values = list(cast("Sequence[Any]", given))
    if len(values) != len(axes):
        raise ValueError(
            f"{name} has {len(values)} numbers; expected one number, or one for each axis, [{', '.join(axes)}]"
        )
    return [
        _number(f"{name}[{i}]" if len(axes) > 1 else name, value, input, positive) for i, value in enumerate(values)
    ]


def _number(name: str, value: object, input: Tensor, positive: bool) -> float | Tensor:
    checked = _checks.check_scalar(name, value, input)
    number = _checks.number_of(checked)
    if isinstance(number, (int, float)) and not (number > 0 if positive else number >= 0):
        accepted = "a positive, finite number" if positive else "a finite number, 0 or more"
        raise ValueError(f"{name} is {number!r}; expected {accepted}")
    return checked


def checked_mask(mask: object, input: Tensor) -> Tensor | None:
    """Return a mask that broadcasts to the input, or raise."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    _checks.check_dense("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got {mask.dtype}; pass mask != 0")
    _checks.check_same_device("input", input, "mask", mask)
    fits = mask.dim() <= input.dim() and all(
        size in (1, whole) for size, whole in zip(reversed(mask.shape), reversed(input.shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; expected a shape that broadcasts to the input's, "
            f"{tuple(input.shape)}"
            + ("; a mask for each image without channels needs mask.unsqueeze(1)" if input.dim() > 2 else "")
        )
    return _autograd.savable(mask)


def total_variation_nd(
    input: Tensor,
    reduction: str,
    *,
    norm_type: str,
    eps: float,
    axis_weight: object,
    axis_reduction: str | None,
    spacing: object,
    mask: Tensor | None,
    delta: object,
) -> Tensor:
    """Return the total variation of volumes [B, C, ...]; the public function documents and checks the other options."""
    axes = AXES[input.dim() - 2]
    weights = _numbers("axis_weight", axis_weight, input, axes, positive=False)
    spacings = _numbers("spacing", spacing, input, axes, positive=True)
    limit = _number("delta", 1.0 if delta is None else delta, input, positive=True)
    # Differences are not divided: Huber's loss of d / h with delta is that of d with h * delta, over h^2.
    scales = [w / h if norm_type == "l1" else w / h / h for w, h in zip(weights, spacings, strict=True)]
    scale = _stacked(scales, input)
    threshold = _stacked([limit * h for h in spacings], input)
    average = {None: "nothing", "sum": "nothing", "mean": "sample"}[axis_reduction]
    if axis_reduction is None and reduction == "mean" and norm_type in ("l1", "l2_squared", "huber"):
        average, reduction = "batch", "sum"
    if mask is not None:
        mask = mask.reshape((1,) * (input.dim() - mask.dim()) + mask.shape)
        mask = mask.expand(*mask.shape[:2], *input.shape[2:])
    loss: Tensor = _VARIATION.run_on(
        input.device, input, mask, scale, threshold, float(eps), norm_type, average, reduction
    )[0]
    return loss
