"""The op of the divergences of single elements: schema, fake implementation, autograd formulas to the second order."""

from typing import Any

import torch
from torch import Tensor

from kdkernels.ops import _autograd, _registry
from kdkernels.ops._numerics import compute_dtype
from kdkernels.ops.pointwise_divergence import reference

_ARGUMENTS = (
    "Tensor input, Tensor target, Tensor? weight, Tensor temperature, Tensor beta, str divergence, str reduction"
)


def _check_same_shape(input: Tensor, other: Tensor | None) -> None:
    if other is not None:
        torch._check(input.dim() == other.dim(), lambda: "the tensors have different numbers of dimensions")
        for a, b in zip(input.shape, other.shape, strict=True):
            torch._check(a == b, lambda: "the tensors have different shapes")


def _fake(
    input: Tensor, target: Tensor, weight: Tensor | None, temperature: Tensor, beta: Tensor, divergence: str,
    reduction: str,
) -> Tensor:  # fmt: skip
    _check_same_shape(input, target)
    _check_same_shape(input, weight)
    dtype = compute_dtype(input, target)
    return torch.empty_like(input, dtype=dtype) if reduction == "none" else input.new_empty((), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[5:]
    ctx.save_for_backward(*inputs[:5])


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = (*ctx.needs_input_grad[:2], ctx.needs_input_grad[3])
    if grad is None or not any(wanted):
        return (None,) * 7
    found = _BACKWARD.run(ctx.backend, grad, *ctx.saved_tensors, *ctx.options, *wanted)
    by_input, by_target, by_temperature = (g if want else None for g, want in zip(found, wanted, strict=True))
    if by_temperature is not None:
        by_temperature = by_temperature.to(ctx.saved_tensors[3])
    return by_input, by_target, None, by_temperature, None, None, None


def _backward_fake(
    grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, temperature: Tensor, beta: Tensor,
    divergence: str, reduction: str, input_gradient: bool, target_gradient: bool, temperature_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check_same_shape(input, target)
    _check_same_shape(input, weight)
    return (
        torch.empty_like(input) if input_gradient else input.new_empty(0),
        torch.empty_like(target) if target_gradient else target.new_empty(0),
        input.new_empty(() if temperature_gradient else 0, dtype=compute_dtype(input, target)),
    )


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options, ctx.wanted = inputs[6:8], inputs[8:]
    ctx.mark_non_differentiable(*(grad for grad, want in zip(output, ctx.wanted, strict=True) if not want))
    ctx.save_for_backward(*inputs[:6])


def _backward_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate the gradients, to any order, through the closed forms of the reference."""
    grad_output, input, target, weight, temperature, beta = ctx.saved_tensors
    given = [v if want else None for v, want in zip(cotangents, ctx.wanted, strict=True)]
    if all(v is None for v in given):
        return (None,) * 11

    def gradients(grad_output: Tensor, input: Tensor, target: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
        every = reference.gradients(grad_output, input, target, weight, temperature, beta, *ctx.options)
        return tuple(g for g, v in zip(every, given, strict=True) if v is not None)

    pull_back = torch.func.vjp(gradients, grad_output, input, target, temperature)[1]
    by_grad, by_input, by_target, by_temperature = pull_back(tuple(v for v in given if v is not None))
    return (by_grad, by_input, by_target, None, by_temperature, *(None,) * 6)


FORWARD = _registry.define(
    "pointwise_divergence",
    f"({_ARGUMENTS}) -> Tensor",
    reference=reference.forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    forward_mode=reference.loss_of,
)
_BACKWARD = _registry.define(
    "pointwise_divergence_backward",
    f"(Tensor grad_output, {_ARGUMENTS}, bool input_gradient, bool target_gradient, bool temperature_gradient) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.backward,
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
)


def compute(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    temperature: Tensor,
    beta: Tensor,
    divergence: str,
    reduction: str,
) -> Tensor:
    """Return the loss for arguments that have been checked; "batchmean" is left to the caller."""
    backend = FORWARD.choose(input.device)
    if _registry.checks_values(input.device):
        reference.check_values(target, weight, divergence)
    sides = _autograd.savable(input), _autograd.savable(target)
    return FORWARD.run(backend, *sides, weight, temperature, beta, divergence, reduction)  # type: ignore[no-any-return]
