"""Gradient reversal: the identity forward, a factor of -lambd backward."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops import _autograd, _checks, _registry, _tracing
from kdkernels.ops.gradient_reversal import reference


def _backward_fake(grad_output: Tensor, lambd: Tensor) -> Tensor:
    torch._check(lambd.dim() == 0, lambda: "lambd must be a 0-dim tensor")
    return torch.empty_like(grad_output)


def _backward_setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.save_for_forward(*inputs)


def _backward_jvp(ctx: Any, tangent: Tensor | None, _lambd_tangent: None) -> Tensor | None:
    return None if tangent is None else _BACKWARD.run(ctx.backend, tangent, ctx.saved_tensors[1])


def _backward_backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Differentiate the backward: the sign flips again."""
    if cotangent is None:
        return None, None
    grad_output, lambd = ctx.saved_tensors
    by_lambd = -(cotangent * grad_output).sum().to(lambd.dtype).to(lambd.device) if ctx.needs_input_grad[1] else None
    return _BACKWARD.run(ctx.backend, cotangent, lambd), by_lambd


def _copy_fake(input: Tensor, lambd: Tensor) -> Tensor:
    return torch.empty_like(input)


def _copy_setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.save_for_forward(inputs[1])


def _copy_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    return _BACKWARD.run(ctx.backend, grad, *ctx.saved_tensors), None


def _copy_jvp(ctx: Any, tangent: Tensor | None, _lambd_tangent: None) -> Tensor | None:
    """Reverse the tangent too, so that both modes agree about the derivative."""
    return None if tangent is None else _BACKWARD.run(ctx.backend, tangent, *ctx.saved_tensors)


# Passes over the features in memory, forward and backward: none and R W; none if a matrix product takes the factor.
PASSES = (0, 2)

_BACKWARD = _registry.define(
    "gradient_reversal_backward",
    "(Tensor grad_output, Tensor lambd) -> Tensor",
    reference=reference.backward,
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    jvp=_backward_jvp,
)
# Where a view inside an autograd.Function would silently lose its sign: torch.export, and the transforms of torch.func.
_COPY = _registry.define(
    "gradient_reversal_copy",
    "(Tensor input, Tensor lambd) -> Tensor",
    reference=reference.copy,
    fake=_copy_fake,
    setup_context=_copy_setup_context,
    backward=_copy_backward,
    jvp=_copy_jvp,
)


class _GradientReversal(torch.autograd.Function):
    @staticmethod
    def forward(input: Tensor, lambd: Tensor, backend: str) -> Tensor:
        return input.view_as(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, lambd, ctx.backend = inputs
        ctx.save_for_backward(lambd)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _BACKWARD.run(ctx.backend, grads[0], *ctx.saved_tensors), None, None


class _GradientReversalLinear(torch.autograd.Function):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, lambd: Tensor) -> Tensor:
        return F.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, bias, lambd = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(input, weight, lambd)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, lambd = ctx.saved_tensors
        grad, by_input, by_weight, by_bias = grads[0], None, None, None
        # Under autocast the dtype of the gradient differs from that of the saved tensors.
        if ctx.needs_input_grad[0]:
            by_input = (grad @ (weight * -lambd).to(grad.dtype)).to(input.dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            by_weight = (rows.t() @ input.reshape(-1, input.shape[-1]).to(grad.dtype)).to(weight.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            by_bias = rows.sum(0).to(ctx.bias_dtype)
        return by_input, by_weight, by_bias, None


_reverse: Callable[..., Any] = _GradientReversal.apply
_reverse_linear: Callable[..., Any] = _GradientReversalLinear.apply


def _coefficient(lambd: float | Tensor, input: Tensor) -> Tensor:
    """Copy the coefficient: a schedule may change it before the backward runs."""
    lambd = _checks.check_scalar("lambd", lambd, input)
    return lambd.detach().clone() if isinstance(lambd, Tensor) else _checks.scalar_tensor(lambd, input)


def _recorded(input: Tensor, lambd: Tensor) -> Tensor:
    """Reverse where calls are recorded or transformed."""
    if _tracing.is_jit_traced() and not torch.onnx.is_in_onnx_export():
        # TorchScript saves no autograd functions, and its check of a trace runs without gradients.
        constant = input.detach()
        return (constant - lambd * (input - constant)).to(input.dtype)
    without_gradients = torch.compiler.is_exporting() and not torch.is_grad_enabled()
    if torch.onnx.is_in_onnx_export() or without_gradients:
        return input.view_as(input)
    return _COPY.run_on(input.device, input, lambd)  # type: ignore[no-any-return]


def gradient_reversal(input: Tensor, lambd: float | Tensor = 1.0) -> Tensor:
    r"""Return the input and reverse its gradient: :math:`y = x`, :math:`dx = -\lambda\,dy`.

    Placed before a domain classifier, it makes features that the classifier cannot tell apart. Source: Ganin et al.,
    "Domain-Adversarial Training of Neural Networks", arXiv 1505.07818.

    Args:
        input: Features of any shape; fp16, bf16, fp32 or fp64.
        lambd: Coefficient, a number or a 0-dim tensor; a constant to every kind of derivative. It is read in the
            forward, not in the backward. A tensor that changes during training is compiled only once.

    Returns:
        A view of the input. An in-place operation on it raises if the input requires grad, since autograd cannot
        replay it on the input and would bypass the reversal. Under the transforms of ``torch.func`` and in
        ``torch.export``, a copy.

    Tangents of forward mode are reversed as gradients are: jvp and vjp agree. An export under ``torch.no_grad()`` and
    the ONNX exporters see the identity. ``torch.jit.trace`` records :math:`c - \lambda (x - c)` with the constant
    c = x, which gives the input where it is finite. ``torch.jit.script`` is not supported.

    Raises:
        TypeError: The input is not a floating-point tensor, or ``lambd`` is not a number.
        ValueError: ``lambd`` is not finite, not a 0-dim tensor, or requires grad.

    Example:
        >>> features, classifier = torch.randn(8, 32, requires_grad=True), torch.nn.Linear(32, 2)
        >>> logits = classifier(gradient_reversal(features, 0.5))
        >>> torch.nn.functional.cross_entropy(logits, torch.zeros(8, dtype=torch.long)).backward()

    """
    _checks.check_floating("input", input)
    coefficient = _coefficient(lambd, input)
    if _tracing.needs_registered_ops():
        return _recorded(input, coefficient)
    backend = _BACKWARD.choose(input.device)
    result: Tensor = _reverse(input, coefficient, backend)
    return result


def gradient_reversal_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, lambd: float | Tensor = 1.0
) -> Tensor:
    r"""Linear layer with a reversed gradient: ``linear(gradient_reversal(input, lambd), weight, bias)``.

    The factor is folded into the matrix product of the backward, :math:`dx = dy\,(-\lambda W)`, and costs no pass over
    the features. The gradients of weight and bias are not reversed.

    Args:
        input: Features [..., in_features].
        weight: Weight [out_features, in_features].
        bias: Bias [out_features], or None.
        lambd: Coefficient; see :func:`gradient_reversal`.

    Returns:
        The output, [..., out_features].

    Raises:
        TypeError, ValueError: See :func:`gradient_reversal`, or the shapes do not match.

    Example:
        >>> features, classifier = torch.randn(8, 32, requires_grad=True), torch.nn.Linear(32, 2)
        >>> logits = gradient_reversal_linear(features, classifier.weight, classifier.bias, 0.5)
        >>> logits.sum().backward()

    """
    _checks.check_floating("input", input)
    _checks.check_floating("weight", weight)
    if bias is not None:
        _checks.check_floating("bias", bias)
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input has shape {tuple(input.shape)} and weight {tuple(weight.shape)}; expected [..., in_features] and "
            "[out_features, in_features]"
        )
    input, weight = _autograd.savable(input), _autograd.savable(weight)
    if _tracing.needs_registered_ops():
        return F.linear(gradient_reversal(input, lambd), weight, bias)
    result: Tensor = _reverse_linear(input, weight, bias, _coefficient(lambd, input))
    return result
