"""The op of the softmax divergences: schema, fake implementation, and autograd formulas to the second order."""

import math
from typing import Any

import torch
from torch import Tensor

from kdkernels.ops import _registry
from kdkernels.ops._numerics import compute_dtype
from kdkernels.ops.softmax_divergence import reference
from kdkernels.ops.softmax_divergence.saved import fake_saved, scaled

_ARGUMENTS = (
    "Tensor input, Tensor target, Tensor? labels, Tensor temperature, Tensor divergence_weight, Tensor label_weight, "
    "Tensor beta, int dim, str divergence, str reduction, int ignore_index"
)


def _check_shapes(input: Tensor, target: Tensor, labels: Tensor | None, dim: int) -> None:
    torch._check(input.dim() == target.dim(), lambda: "input and target have different numbers of dimensions")
    for a, b in zip(input.shape, target.shape, strict=True):
        torch._check(a == b, lambda: "input and target have different shapes")
    if labels is not None:
        positions = input.shape[:dim] + input.shape[dim + 1 :]
        torch._check(labels.dim() == len(positions), lambda: "labels have the wrong number of dimensions")
        for a, b in zip(labels.shape, positions, strict=True):
            torch._check(a == b, lambda: "labels do not have the shape of the positions")


def _fake(
    input: Tensor, target: Tensor, labels: Tensor | None, temperature: Tensor, divergence_weight: Tensor,
    label_weight: Tensor, beta: Tensor, dim: int, divergence: str, reduction: str, ignore_index: int,
    save: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_shapes(input, target, labels, dim)
    positions = input.shape[:dim] + input.shape[dim + 1 :]
    loss = input.new_empty(positions if reduction == "none" else (), dtype=compute_dtype(input, target))
    return loss, fake_saved(save, input, loss, math.prod(positions))


def _backward_fake(
    grad_output: Tensor, statistics: Tensor | None, input: Tensor, target: Tensor, labels: Tensor | None,
    temperature: Tensor, divergence_weight: Tensor, label_weight: Tensor, beta: Tensor, dim: int, divergence: str,
    reduction: str, ignore_index: int, input_gradient: bool, target_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_shapes(input, target, labels, dim)
    return (
        torch.empty_like(input) if input_gradient else input.new_empty(0),
        torch.empty_like(target) if target_gradient else target.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dim, ctx.divergence, ctx.reduction, ctx.ignore_index, ctx.save = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1] if ctx.save == "statistics" else None, *tensors)
    ctx.gradient = [output[1]] if ctx.save == "gradient" else []


def _backward(ctx: Any, grad_loss: Tensor | None, _grad_saved: None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    if grad_loss is None or not any(wanted):
        return (None,) * 12
    arguments = (*ctx.saved_tensors, ctx.dim, ctx.divergence, ctx.reduction, ctx.ignore_index)
    # The saved gradient is a constant to autograd; a backward that is differentiated itself starts from the logits.
    if ctx.save == "gradient" and not wanted[1] and not torch.is_grad_enabled():
        return scaled(_take_gradient(ctx, grad_loss, arguments), grad_loss, ctx), *(None,) * 11
    grads = _BACKWARD.run(ctx.backend, grad_loss, *arguments, *wanted)
    return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * 10)


def _take_gradient(ctx: Any, grad_loss: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """Give away the saved gradient; another backward of the same graph computes the same bits from the logits."""
    try:
        return ctx.gradient.pop()  # type: ignore[no-any-return]
    except IndexError:
        return _BACKWARD.run(ctx.backend, torch.ones_like(grad_loss), *arguments, True, False)[0]  # type: ignore[no-any-return]


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, dim, divergence, reduction, ignore_index, input_gradient, target_gradient = inputs
    ctx.wanted = (input_gradient, target_gradient)
    ctx.options = (dim, divergence, reduction, ignore_index)
    ctx.mark_non_differentiable(*(grad for grad, want in zip(output, ctx.wanted, strict=True) if not want))
    ctx.save_for_backward(*tensors)


def _backward_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate the gradients, to any order, through the closed forms of the reference."""
    grad_output, _statistics, input, target, labels, *scalars = ctx.saved_tensors
    given = [v if want else None for v, want in zip(cotangents, ctx.wanted, strict=True)]
    if all(v is None for v in given):
        return (None,) * 15

    def gradients(grad_output: Tensor, input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        both = reference.gradients(grad_output, input, target, labels, tuple(scalars), *ctx.options)
        return tuple(g for g, v in zip(both, given, strict=True) if v is not None)

    pull_back = torch.func.vjp(gradients, grad_output, input, target)[1]
    by_grad_output, by_input, by_target = pull_back(tuple(v for v in given if v is not None))
    return by_grad_output, None, by_input, by_target, *(None,) * 11


FORWARD = _registry.define(
    "softmax_divergence",
    f"({_ARGUMENTS}, str save) -> (Tensor loss, Tensor saved)",
    reference=reference.forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_BACKWARD = _registry.define(
    "softmax_divergence_backward",
    f"(Tensor grad_output, Tensor? statistics, {_ARGUMENTS}, bool input_gradient, bool target_gradient) "
    "-> (Tensor, Tensor)",
    reference=reference.backward,
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
)
