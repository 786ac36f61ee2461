"""The op: schema, fake implementation, and autograd formulas to the second order.

The forward of a reduced loss computes the gradients for an incoming gradient of 1 while it has the logits; they are
kept in the dtype that is computed in, and the backward scales and rounds them. Otherwise the backward computes the
logits again.
"""

from typing import Any

import torch
from torch import Tensor

from kdkernels.ops import _registry, _tracing
from kdkernels.ops.linear_distillation import chunks, reference
from kdkernels.ops.linear_distillation.arguments import COUNT, DIFFERENTIABLE, SIGNATURE, TENSORS, Arguments


def _check_shapes(given: Arguments) -> None:
    torch._check(given.linear_weight.dim() == 2, lambda: "linear_weight has the wrong number of dimensions")
    torch._check(given.input.shape[-1] == given.linear_weight.shape[1], lambda: "input and linear_weight do not fit")
    if given.target is not None:
        torch._check(given.target.dim() == given.input.dim(), lambda: "input and target differ in dimensions")
        for a, b in zip(given.positions, given.target.shape[:-1], strict=True):
            torch._check(a == b, lambda: "input and target have different positions")
    for name, tensor in (("labels", given.labels), ("position_weight", given.position_weight)):
        if tensor is None or (tensor is given.labels and given.soft_labels):
            continue
        torch._check(tensor.dim() == len(given.positions), lambda name=name: f"{name} has the wrong shape")
        for a, b in zip(given.positions, tensor.shape, strict=True):
            torch._check(a == b, lambda name=name: f"{name} has the wrong shape")


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    *shared, wanted = arguments
    given = Arguments(*shared)
    _check_shapes(given)
    dtype = given.dtype
    loss = given.input.new_empty(given.positions if given.reduction == "none" else (), dtype=dtype)
    return loss, *(
        given.input.new_empty(tensor.shape if i in wanted and tensor is not None else (0,), dtype=dtype)
        for i, tensor in enumerate(given.differentiable)
    )


def _backward_fake(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *shared, wanted = arguments
    given = Arguments(*shared)
    _check_shapes(given)
    return tuple(
        tensor.new_empty(tensor.shape) if i in wanted and tensor is not None else given.input.new_empty(0)
        for i, tensor in enumerate(given.differentiable)
    )


def _forward_mode(*arguments: Any) -> tuple[Tensor, ...]:
    loss = reference.loss_of(Arguments(*arguments[:-1]))
    return loss, *(loss.new_empty(0) for _ in range(DIFFERENTIABLE))


def _save(ctx: Any, tensors: tuple[Tensor | None, ...]) -> None:
    """Save tensors; those made under ``torch.inference_mode``, which autograd refuses, are held by themselves."""
    ctx.held = {i: tensor for i, tensor in enumerate(tensors) if tensor is not None and tensor.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.held else tensor for i, tensor in enumerate(tensors)))


def _restored(ctx: Any) -> list[Any]:
    return [ctx.held.get(i, tensor) for i, tensor in enumerate(ctx.saved_tensors)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *arguments, wanted = inputs
    ctx.options = arguments[TENSORS:]
    ctx.mark_non_differentiable(*output[1:])
    _save(ctx, tuple(arguments[:TENSORS]))
    ctx.gradients = [output[1:]] if wanted else []


def _scaled(gradient: Tensor, like: Tensor, factor: Tensor) -> Tensor:
    """Multiply a gradient that nothing else uses, in place where that is possible."""
    batched = torch._C._functorch.is_legacy_batchedtensor(factor)  # is_grads_batched, which is no transform
    if batched or _tracing.is_transformed() or not _tracing.has_values():
        return (gradient * factor).to(like.dtype)
    return gradient.mul_(factor).to(like.dtype)


def _backward(ctx: Any, grad_loss: Tensor | None, *_grads: None) -> tuple[Tensor | None, ...]:
    wanted = [i for i in range(DIFFERENTIABLE) if ctx.needs_input_grad[i]]
    by_tensor: list[Tensor | None] = [None] * (COUNT + 1)
    if grad_loss is None or not wanted:
        return tuple(by_tensor)
    arguments = (*_restored(ctx), *ctx.options)
    # The saved gradients are constants to autograd; a backward that is differentiated itself starts from the inputs.
    if ctx.gradients and not torch.is_grad_enabled():
        saved = ctx.gradients.pop()
        grads = {i: _scaled(saved[i], arguments[i], grad_loss) for i in wanted}
    else:
        grads = _BACKWARD.run(ctx.backend, grad_loss, *arguments, wanted)
    for i in wanted:
        by_tensor[i] = grads[i]
    return tuple(by_tensor)


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_output, *arguments, ctx.wanted = inputs
    ctx.options = arguments[TENSORS:]
    ctx.mark_non_differentiable(*(grad for i, grad in enumerate(output) if i not in ctx.wanted))
    _save(ctx, (grad_output, *arguments[:TENSORS]))


def _backward_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate the gradients, to any order, through whole logits."""
    grad_output, *tensors = _restored(ctx)
    given = [i for i in ctx.wanted if cotangents[i] is not None]
    if not given:
        return (None,) * (COUNT + 2)
    places = [i for i in range(DIFFERENTIABLE) if tensors[i] is not None]

    # Not torch.func.vjp: it leaves its level before it pulls back, where autograd functions do not work.
    def product(grad_output: Tensor, *primals: Tensor) -> Tensor:
        every = list(tensors)
        for place, primal in zip(places, primals, strict=True):
            every[place] = primal
        grads = reference.gradients(grad_output, Arguments(*every, *ctx.options), given)
        return torch.stack([(grad * cotangents[i]).sum() for i, grad in zip(given, grads, strict=True)]).sum()

    of_every = tuple(range(1 + len(places)))
    by_grad_output, *by_primals = torch.func.grad(product, of_every)(grad_output, *(tensors[i] for i in places))
    by_tensor: list[Tensor | None] = [None] * (COUNT + 1)
    for place, by_primal in zip(places, by_primals, strict=True):
        by_tensor[place] = by_primal
    return by_grad_output, *by_tensor


FORWARD = _registry.define(
    "linear_distillation",
    f"({SIGNATURE}, int[] wanted) -> (Tensor loss, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=chunks.forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    forward_mode=_forward_mode,
    composed_of="softmax_loss",
)
_BACKWARD = _registry.define(
    "linear_distillation_backward",
    f"(Tensor grad_output, {SIGNATURE}, int[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=chunks.backward,
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    composed_of="softmax_loss",
)


def wanted_in_forward(given: Arguments) -> list[int]:
    """Return the places of the tensors whose gradients the forward computes.

    None where it would be in vain: without grad mode, during export, and under the transforms of ``torch.func``.
    """
    if given.reduction == "none" or not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return []
    if _tracing.is_transformed() or _tracing.is_jit_traced() or _tracing.in_forward_mode():
        return []
    return [i for i, tensor in enumerate(given.differentiable) if tensor is not None and tensor.requires_grad]
