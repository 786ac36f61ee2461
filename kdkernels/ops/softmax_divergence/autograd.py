"""The op of the softmax divergences: schema, fake implementation, and autograd formulas to the second order."""

import math
from typing import Any

import torch
from torch import Tensor

from kdkernels.ops import _checks, _registry
from kdkernels.ops._numerics import compute_dtype
from kdkernels.ops.softmax_divergence import reference
from kdkernels.ops.softmax_divergence.saved import fake_saved, on_gpu, scaled

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
    reduction: str, ignore_index: int, input_gradient: bool, target_gradient: bool, scalar_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check_shapes(input, target, labels, dim)
    return (
        torch.empty_like(input) if input_gradient else input.new_empty(0),
        torch.empty_like(target) if target_gradient else target.new_empty(0),
        input.new_empty(2 if scalar_gradients else 0, dtype=compute_dtype(input, target)),
    )


def save_tensors(ctx: Any, tensors: tuple[Tensor | None, ...], at: int) -> None:
    """Save tensors for the backward, of which input, target and labels begin at an index.

    Those may be inference tensors, which autograd refuses to save for want of a version; they are held by themselves.
    """
    input, target, labels = tensors[at : at + 3]
    if not (input.is_inference() or target.is_inference() or (labels is not None and labels.is_inference())):  # type: ignore[union-attr]
        ctx.held = None
        ctx.save_for_backward(*tensors)
        return
    ctx.held = {i: t for i, t in enumerate(tensors) if at <= i < at + 3 and t is not None and t.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.held else t for i, t in enumerate(tensors)))


def restored(ctx: Any) -> tuple[Any, ...]:
    """Return the tensors of :func:`save_tensors`."""
    if not ctx.held:
        return ctx.saved_tensors  # type: ignore[no-any-return]
    return tuple(ctx.held.get(i, tensor) for i, tensor in enumerate(ctx.saved_tensors))


def _forward_mode(
    input: Tensor, target: Tensor, labels: Tensor | None, temperature: Tensor, divergence_weight: Tensor,
    label_weight: Tensor, beta: Tensor, dim: int, divergence: str, reduction: str, ignore_index: int, _save: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if labels is not None and _checks.is_readable(labels):
        reference.check_labels(labels, input.shape[dim], ignore_index)
    scalars = (temperature, divergence_weight, label_weight, beta)
    loss = reference.loss_of(input, target, labels, scalars, dim, divergence, reduction, ignore_index)
    return loss, loss.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.options, ctx.save = inputs[:7], inputs[7:11], inputs[11]
    ctx.mark_non_differentiable(output[1])
    save_tensors(ctx, (output[1] if ctx.save == "statistics" else None, *tensors), 1)
    ctx.gradient = [output[1]] if ctx.save == "gradient" else []


def _backward(ctx: Any, grad_loss: Tensor | None, _grad_saved: None) -> tuple[Tensor | None, ...]:
    wanted, (of_temperature, of_weight) = ctx.needs_input_grad[:2], ctx.needs_input_grad[3:5]
    of_scalars = of_temperature or of_weight
    if grad_loss is None or not (any(wanted) or of_scalars):
        return (None,) * 12
    arguments = (*restored(ctx), *ctx.options)
    dim, _, reduction, _ = ctx.options
    # The saved gradient is a constant to autograd; a backward that is differentiated itself starts from the logits.
    if ctx.save == "gradient" and not wanted[1] and not of_scalars and not torch.is_grad_enabled():
        return scaled(_take_gradient(ctx, grad_loss, arguments), grad_loss, dim, reduction), *(None,) * 11
    in_kernel = of_scalars and not on_gpu(ctx.backend, arguments[1].device)
    *sides, scalars = _BACKWARD.run(ctx.backend, grad_loss, *arguments, *wanted, in_kernel)
    by_side = (grad if want else None for grad, want in zip(sides, wanted, strict=True))
    if not of_scalars:
        return (*by_side, *(None,) * 10)
    if not in_kernel:
        _, input, target, labels, *numbers, dim, divergence, reduction, ignore_index = arguments
        *_, scalars = reference.gradients(
            grad_loss, input, target, labels, tuple(numbers), dim, divergence, reduction, ignore_index, True
        )
    by_temperature = scalars[0].to(arguments[4]) if of_temperature else None
    by_weight = scalars[1].to(arguments[5]) if of_weight else None
    return (*by_side, None, by_temperature, by_weight, *(None,) * 7)


def _take_gradient(ctx: Any, grad_loss: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """Give away the saved gradient; another backward of the same graph computes the same bits from the logits."""
    try:
        return ctx.gradient.pop()  # type: ignore[no-any-return]
    except IndexError:
        return _BACKWARD.run(ctx.backend, torch.ones_like(grad_loss), *arguments, True, False, False)[0]  # type: ignore[no-any-return]


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, dim, divergence, reduction, ignore_index, input_gradient, target_gradient, scalar_gradients = inputs
    ctx.wanted = (input_gradient, target_gradient, scalar_gradients)
    ctx.options = (dim, divergence, reduction, ignore_index, scalar_gradients)
    ctx.mark_non_differentiable(*(grad for grad, want in zip(output, ctx.wanted, strict=True) if not want))
    save_tensors(ctx, tuple(tensors), 2)


def _backward_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate the gradients, to any order, through the closed forms of the reference."""
    grad_output, _statistics, input, target, labels, temperature, weight, *others = restored(ctx)
    given = [v if want else None for v, want in zip(cotangents, ctx.wanted, strict=True)]
    if all(v is None for v in given):
        return (None,) * 16

    def gradients(
        grad_output: Tensor, input: Tensor, target: Tensor, temperature: Tensor, weight: Tensor
    ) -> tuple[Tensor, ...]:
        numbers = (temperature, weight, *others)
        every = reference.gradients(grad_output, input, target, labels, numbers, *ctx.options)
        return tuple(g for g, v in zip(every, given, strict=True) if v is not None)

    pull_back = torch.func.vjp(gradients, grad_output, input, target, temperature, weight)[1]
    by_grad_output, *by_side, by_temperature, by_weight = pull_back(tuple(v for v in given if v is not None))
    return by_grad_output, None, *by_side, None, by_temperature, by_weight, *(None,) * 9


FORWARD = _registry.define(
    "softmax_divergence",
    f"({_ARGUMENTS}, str save) -> (Tensor loss, Tensor saved)",
    reference=reference.forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    forward_mode=_forward_mode,
)
_BACKWARD = _registry.define(
    "softmax_divergence_backward",
    f"(Tensor grad_output, Tensor? statistics, {_ARGUMENTS}, bool input_gradient, bool target_gradient, "
    "bool scalar_gradients) -> (Tensor, Tensor, Tensor)",
    reference=reference.backward,
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
)
