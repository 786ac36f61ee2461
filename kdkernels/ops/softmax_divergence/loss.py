"""The op of the losses with every option: schema, fake implementation, and autograd formulas to the second order.

The kernels compute the gradients of logits. Those of a learned temperature, of soft labels, and of a teacher that is
not given by logits are computed in PyTorch.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kdkernels.ops import _checks, _registry
from kdkernels.ops._numerics import compute_dtype
from kdkernels.ops.softmax_divergence import loss_reference, reference, terms
from kdkernels.ops.softmax_divergence.autograd import restored, save_tensors
from kdkernels.ops.softmax_divergence.loss_reference import Arguments
from kdkernels.ops.softmax_divergence.saved import fake_saved, scaled

_ARGUMENTS = (
    "Tensor input, Tensor target, Tensor? labels, Tensor? position_weight, Tensor? class_weight, Tensor temperature, "
    "Tensor divergence_weight, Tensor label_weight, Tensor beta, Tensor label_smoothing, int dim, str divergence, "
    "str target_type, str reduction, int ignore_index, bool ignored_by_divergence"
)
_TENSORS = 10  # of them
_OPTIONS = loss_reference.COUNT - _TENSORS


def _check_shapes(given: Arguments) -> None:
    torch._check(given.input.dim() == given.target.dim(), lambda: "input and target differ in dimensions")
    for a, b in zip(given.input.shape, given.target.shape, strict=True):
        torch._check(a == b, lambda: "input and target have different shapes")
    positions = given.positions
    for name, tensor in (("labels", given.labels), ("position_weight", given.position_weight)):
        if tensor is None:
            continue
        expected = given.input.shape if name == "labels" and given.soft_labels else positions
        torch._check(tensor.dim() == len(expected), lambda name=name: f"{name} has the wrong number of dimensions")
        for a, b in zip(tensor.shape, expected, strict=True):
            torch._check(a == b, lambda name=name: f"{name} has the wrong shape")


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *shared, parts, save = arguments
    given = Arguments(*shared)
    _check_shapes(given)
    dtype = compute_dtype(given.input, given.target)
    loss = given.input.new_empty(given.positions if given.reduction == "none" else (), dtype=dtype)
    saved = fake_saved(save, given.input, loss, math.prod(given.positions))
    shape = (len(loss_reference.PARTS), *given.positions) if parts else (0,)
    return loss, saved, given.input.new_empty(shape, dtype=dtype)


def _backward_fake(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *shared, input_gradient, target_gradient = arguments
    given = Arguments(*shared)
    _check_shapes(given)
    return (
        torch.empty_like(given.input) if input_gradient else given.input.new_empty(0),
        torch.empty_like(given.target) if target_gradient else given.target.new_empty(0),
    )


def _forward_mode(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *shared, parts, _save = arguments
    given = Arguments(*shared)
    if given.labels is not None and not given.soft_labels and _checks.is_readable(given.labels):
        reference.check_labels(given.labels, given.input.shape[given.dim], given.ignore_index)
    loss, every_part = loss_reference.loss_of(given)
    return loss, loss.new_empty(0), every_part if parts else loss.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, ctx.options, ctx.save = inputs[:_TENSORS], inputs[_TENSORS:-2], inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    save_tensors(ctx, tensors, 0)
    ctx.gradient = [output[1]] if ctx.save == "gradient" else []


def _backward(ctx: Any, grad_loss: Tensor | None, *_grads: None) -> tuple[Tensor | None, ...]:
    wanted = dict(enumerate(ctx.needs_input_grad[:_TENSORS]))
    if grad_loss is None or not any(wanted.values()):
        return (None,) * (_TENSORS + _OPTIONS + 2)
    arguments = (*restored(ctx), *ctx.options)
    given = Arguments(*arguments)
    by_tensor: list[Tensor | None] = [None] * _TENSORS
    in_kernel = given.target_type == "logits" and terms.kernel_differentiates_target(given.divergence)
    if wanted[0] or (wanted[1] and in_kernel):
        # The saved gradient is a constant to autograd; a backward that is differentiated itself starts from the logits.
        if ctx.gradient and not any(wanted[i] for i in range(1, _TENSORS)) and not torch.is_grad_enabled():
            by_tensor[0] = scaled(ctx.gradient.pop(), grad_loss, given.dim, given.reduction)
        else:
            sides = (wanted[0], wanted[1] and in_kernel)
            grads = _BACKWARD.run(ctx.backend, grad_loss, *arguments, *sides)
            by_tensor[:2] = (grad if want else None for grad, want in zip(grads, sides, strict=True))
    if (wanted[1] and not in_kernel) or any(wanted[i] for i in range(2, _TENSORS)):
        _, by_target, by_labels, scalars = loss_reference.gradients(grad_loss, given)
        if wanted[1] and not in_kernel:
            by_tensor[1] = by_target
        by_tensor[2] = by_labels if wanted[2] else None
        by_tensor[5] = scalars[0].to(given.temperature) if wanted[5] else None
        by_tensor[6] = scalars[1].to(given.divergence_weight) if wanted[6] else None
    return (*by_tensor, *(None,) * (_OPTIONS + 2))


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options, ctx.wanted = inputs[1 + _TENSORS : -2], inputs[-2:]
    ctx.mark_non_differentiable(*(grad for grad, want in zip(output, ctx.wanted, strict=True) if not want))
    save_tensors(ctx, inputs[: 1 + _TENSORS], 1)


def _backward_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate the gradients, to any order, through the closed forms of the reference."""
    grad_output, *tensors = restored(ctx)
    given = [v if want else None for v, want in zip(cotangents, ctx.wanted, strict=True)]
    if all(v is None for v in given):
        return (None,) * (1 + _TENSORS + _OPTIONS + 2)
    places = [i for i in (0, 1, 2, 5, 6) if tensors[i] is not None and tensors[i].is_floating_point()]

    def of(grad_output: Tensor, *primals: Tensor) -> tuple[Tensor, ...]:
        every = list(tensors)
        for place, primal in zip(places, primals, strict=True):
            every[place] = primal
        student, teacher, *_ = loss_reference.gradients(grad_output, Arguments(*every, *ctx.options))
        return tuple(g for g, v in zip((student, teacher), given, strict=True) if v is not None)

    pull_back = torch.func.vjp(of, grad_output, *(tensors[place] for place in places))[1]
    by_grad_output, *by_primals = pull_back(tuple(v for v in given if v is not None))
    by_tensor: list[Tensor | None] = [None] * _TENSORS
    for place, by_primal in zip(places, by_primals, strict=True):
        by_tensor[place] = by_primal
    return (by_grad_output, *by_tensor, *(None,) * (_OPTIONS + 2))


LOSS = _registry.define(
    "softmax_loss",
    f"({_ARGUMENTS}, bool parts, str save) -> (Tensor loss, Tensor saved, Tensor parts)",
    reference=loss_reference.forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    forward_mode=_forward_mode,
    triton=False,
)
_BACKWARD = _registry.define(
    "softmax_loss_backward",
    f"(Tensor grad_output, {_ARGUMENTS}, bool input_gradient, bool target_gradient) -> (Tensor, Tensor)",
    reference=loss_reference.backward,
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    triton=False,
)
