"""The loss and its gradients, a chunk of rows at a time: four matrix products, and the logits never exist whole.

The products of a chunk take many rows, which they need to be fast. The loss of its logits is computed in blocks of a
few rows, each of whose gradients overwrites the logits while they are in a cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kdkernels.ops.linear_distillation import reference
from kdkernels.ops.linear_distillation.arguments import DIFFERENTIABLE, Arguments
from kdkernels.ops.linear_distillation.layers import Layer, Rows
from kdkernels.ops.linear_distillation.losses import LossOfLogits, LossOfTopClasses
from kdkernels.ops.linear_distillation.plan import parts, plan


def _layers(backend: str, given: Arguments, wanted: list[int], counted: Tensor | None) -> tuple[Layer, Layer | None]:
    sizes = plan(given, backend)
    shared = (given.dtype, counted, sizes)
    student = Layer(
        given.input, given.linear_weight, given.linear_bias, given.logit_scale, given.softcap, *shared,
        (0 in wanted, 1 in wanted, 2 in wanted),
    )  # fmt: skip
    if given.target is None or given.target_linear_weight is None:
        return student, None
    return student, Layer(
        given.target, given.target_linear_weight, given.target_linear_bias, given.target_logit_scale,
        given.target_softcap, *shared, (3 in wanted, 4 in wanted, 5 in wanted),
    )  # fmt: skip


@contextmanager
def _positions_from(first: int) -> Iterator[None]:
    """Say where a block begins if its op refuses a position of it."""
    try:
        yield
    except (ValueError, IndexError) as error:
        if first == 0:
            raise
        raise type(error)(f"{error}; positions are counted from {first}") from None


def _run(
    backend: str, given: Arguments, wanted: list[int], grad_output: Tensor | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the losses of the blocks, and the gradients.

    Without an incoming gradient, the gradients are those of the reduced loss; with one, of the loss of each row.
    """
    reference.check_values(given)
    sizes = plan(given, backend)
    student, teacher = _layers(backend, given, wanted, reference.counted_rows(given))
    loss_of = LossOfLogits(given, backend) if given.target_indices is None else LossOfTopClasses(given, backend)
    losses: list[Tensor] = []
    of_student, of_teacher = (any(i in wanted for i in side) for side in ((0, 1, 2), (3, 4, 5)))
    given_target = None if given.target is None or teacher is not None else Rows(given.target)
    by_target = None
    if given_target is not None and of_teacher:
        by_target = given.target.new_empty(given.target.shape, dtype=given.dtype)  # type: ignore[union-attr]
    for begin, end in parts(given.rows, sizes.chunk):
        logits = student.logits(begin, end)
        targets = logits if teacher is None else teacher.logits(begin, end)
        for first, last in parts(end - begin, sizes.block):
            block, rows = logits[first:last], (begin + first, begin + last)
            student.cap_logits(block)
            target = targets[first:last]
            if teacher is not None:
                teacher.cap_logits(target)
            elif given_target is not None:
                target = given_target(*rows)
            if not wanted:
                with _positions_from(rows[0]):
                    losses.append(loss_of.value(block, target, *rows))
                continue
            incoming = None if grad_output is None else grad_output[rows[0] : rows[1]]
            with _positions_from(rows[0]):
                loss, of_block, of_target = loss_of.gradients(block, target, *rows, incoming, of_teacher)
            losses.append(loss)
            if of_student:
                student.pull_back_cap(block, of_block)
            if teacher is not None and of_teacher:
                teacher.pull_back_cap(target, of_target)
            elif by_target is not None:
                by_target.view(given.rows, by_target.shape[-1])[rows[0] : rows[1]].copy_(of_target)
            del of_block, of_target  # before those of the next block exist
        if of_student:
            student.add_gradients(begin, end, logits)
        if teacher is not None and of_teacher:
            teacher.add_gradients(begin, end, targets)
    of_target_side = teacher.gradients if teacher is not None else (by_target, None, None)
    return losses, [*student.gradients, *of_target_side]


def _alone(device_type: str) -> Any:
    """Neither autograd nor autocast sees what a chunk does: its dtypes are chosen already."""
    return torch.autocast(device_type, enabled=False)


def forward(backend: str, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the loss and, as far as wanted, the gradients for an incoming gradient of 1; others are empty."""
    *shared, wanted = arguments
    given = Arguments(*shared)
    with torch.no_grad(), _alone(given.input.device.type):
        losses, gradients = _run(backend, given, wanted, None)
        none = given.input.new_empty(0, dtype=given.dtype)
        if given.reduction == "none":
            loss = torch.cat(losses).view(given.positions) if losses else none.new_empty(given.positions)
        else:
            loss = torch.stack(losses).sum() if losses else none.new_zeros(())
    return loss, *(none.new_empty(0) if gradient is None else gradient for gradient in gradients)


def backward(backend: str, grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients that are wanted, in the dtypes of the inputs; others are empty."""
    *shared, wanted = arguments
    given = Arguments(*shared)
    of_rows = grad_output.reshape(-1) if given.reduction == "none" else None
    with torch.no_grad(), _alone(given.input.device.type):
        _, gradients = _run(backend, given, wanted, of_rows)
        results = []
        for place in range(DIFFERENTIABLE):
            tensor, gradient = given.differentiable[place], gradients[place]
            if tensor is None or gradient is None or place not in wanted:
                results.append(given.input.new_empty(0))
                continue
            scaled = gradient if of_rows is not None else gradient.mul_(grad_output)
            results.append(scaled.to(tensor.dtype))
    return tuple(results)
