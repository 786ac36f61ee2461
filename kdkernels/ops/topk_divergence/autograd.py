"""The op of the divergence from a teacher's top classes: schema, fake implementation, and autograd formulas.

What the forward saves beside its arguments is two numbers for each position, the largest logit of the classes that are
not listed and a sum over them, which only the backend that made them reads.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kdkernels.ops import _checks, _registry
from kdkernels.ops.topk_divergence import reference

# Passes over the student's logits in memory, forward and backward: R and R W.
PASSES = {"topk_kl_div_with_logits": (1, 2)}

_ARGUMENTS = (
    "Tensor input, Tensor values, Tensor indices, Tensor? position_weight, Tensor temperature, str tail, bool reverse, "
    "str reduction"
)


def _check_shapes(input: Tensor, values: Tensor, indices: Tensor, weight: Tensor | None) -> None:
    torch._check(input.dim() == values.dim(), lambda: "input and values have different numbers of dimensions")
    for a, b in zip(input.shape[:-1], values.shape[:-1], strict=True):
        torch._check(a == b, lambda: "input and values have different positions")
    torch._check(values.dim() == indices.dim(), lambda: "values and indices have different numbers of dimensions")
    for a, b in zip(values.shape, indices.shape, strict=True):
        torch._check(a == b, lambda: "values and indices have different shapes")
    if weight is not None:
        torch._check(weight.dim() == input.dim() - 1, lambda: "position_weight has the wrong number of dimensions")
        for a, b in zip(weight.shape, input.shape[:-1], strict=True):
            torch._check(a == b, lambda: "position_weight does not have the shape of the positions")


def _fake(
    input: Tensor, values: Tensor, indices: Tensor, weight: Tensor | None, temperature: Tensor, tail: str,
    reverse: bool, reduction: str, masses: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check_shapes(input, values, indices, weight)
    positions = input.shape[:-1]
    loss = values.new_empty(positions if reduction == "none" else ())
    target_mass, input_mass = (values.new_empty(positions if masses else (0,)) for _ in range(2))
    return loss, target_mass, input_mass, values.new_empty(2, math.prod(positions))


def _backward_fake(
    grad_output: Tensor, rest: Tensor, input: Tensor, values: Tensor, indices: Tensor, weight: Tensor | None,
    temperature: Tensor, tail: str, reverse: bool, reduction: str, input_gradient: bool, values_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_shapes(input, values, indices, weight)
    return (
        torch.empty_like(input) if input_gradient else input.new_empty(0),
        values.new_empty(values.shape) if values_gradient else values.new_empty(0),
    )


def _forward_mode(
    input: Tensor, values: Tensor, indices: Tensor, weight: Tensor | None, temperature: Tensor, tail: str,
    reverse: bool, reduction: str, masses: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = [tensor for tensor in (values, indices, weight, temperature) if tensor is not None]
    if all(map(_checks.is_readable, given)):
        reference.check_values(values.detach(), indices, weight, temperature.detach(), tail, input.shape[-1])
    results = reference.loss_of(input, values, indices, weight, temperature, tail, reverse, reduction)
    return (*results, values.new_empty(0))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, tail, reverse, reduction, _masses = inputs
    ctx.options = tail, reverse, reduction
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[3], *tensors)


def _backward(ctx: Any, grad_loss: Tensor | None, *_unused: None) -> tuple[Tensor | None, ...]:
    of_input, of_values, _, _, of_temperature = ctx.needs_input_grad[:5]
    if grad_loss is None or not (of_input or of_values or of_temperature):
        return (None,) * 9
    rest, *tensors = ctx.saved_tensors
    by_input = by_values = by_temperature = None
    if of_temperature:  # it takes another sum over each row
        by_input, by_values, by_temperature = reference.gradients(grad_loss, *tensors, *ctx.options)
        by_temperature = by_temperature.to(tensors[4])
    else:
        by_input, by_values = _BACKWARD.run(ctx.backend, grad_loss, rest, *tensors, *ctx.options, of_input, of_values)
    return by_input if of_input else None, by_values if of_values else None, None, None, by_temperature, *(None,) * 4


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad_output, _rest, *tensors, tail, reverse, reduction, of_input, of_values = inputs
    ctx.wanted, ctx.options = (of_input, of_values), (tail, reverse, reduction)
    ctx.mark_non_differentiable(*(grad for grad, want in zip(output, ctx.wanted, strict=True) if not want))
    ctx.save_for_backward(grad_output, *tensors)


def _backward_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate the gradients, to any order, through the closed forms of the reference."""
    grad_output, input, values, indices, weight, temperature = ctx.saved_tensors
    given = [v if want else None for v, want in zip(cotangents, ctx.wanted, strict=True)]
    if all(v is None for v in given):
        return (None,) * 12

    def gradients(grad_output: Tensor, input: Tensor, values: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
        every = reference.gradients(grad_output, input, values, indices, weight, temperature, *ctx.options)
        return tuple(g for g, v in zip(every[:2], given, strict=True) if v is not None)

    pull_back = torch.func.vjp(gradients, grad_output, input, values, temperature)[1]
    by_grad_output, by_input, by_values, by_temperature = pull_back(tuple(v for v in given if v is not None))
    return by_grad_output, None, by_input, by_values, None, None, by_temperature, *(None,) * 5


FORWARD = _registry.define(
    "topk_divergence",
    f"({_ARGUMENTS}, bool masses) -> (Tensor loss, Tensor target_mass, Tensor input_mass, Tensor rest)",
    reference=reference.forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    forward_mode=_forward_mode,
)
_BACKWARD = _registry.define(
    "topk_divergence_backward",
    f"(Tensor grad_output, Tensor rest, {_ARGUMENTS}, bool input_gradient, bool values_gradient) -> (Tensor, Tensor)",
    reference=reference.backward,
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
)
