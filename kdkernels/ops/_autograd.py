"""What autograd formulas share: tensors that may be saved, and second derivatives through the reference."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return the ``apply`` of a function for calls that are neither transformed nor compiled.

    Torch's own looks at signatures first, which takes as long as a small kernel.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return the ``apply`` of a function for calls that are not transformed."""
    plain = plain_apply(function)

    def apply(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return function.apply(*arguments)
        return plain(*arguments)

    return apply


def savable(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy that autograd may save if it was made under ``torch.inference_mode``."""
    if torch.compiler.is_compiling() or not tensor.is_inference() or torch.is_inference_mode_enabled():
        return tensor
    return tensor.clone()


def pull_back(
    gradient: Callable[..., Any], optional: Sequence[Tensor | None], required: Tensor, cotangent: Any
) -> tuple[Tensor | None, ...]:
    """Return the cotangents of a gradient's arguments, None for those that were not given.

    Args:
        gradient: Function of the optional arguments, None for those that were not given, and of the required one.
        optional: Incoming gradients, some of which may be None.
        required: Tensor that the gradient is taken with respect to.
        cotangent: Cotangent of the result, a tuple if that is one.

    """
    given = [tensor for tensor in optional if tensor is not None]

    def of_given(*primals: Tensor) -> Any:
        rest = iter(primals[:-1])
        return gradient(*(None if tensor is None else next(rest) for tensor in optional), primals[-1])

    *by_given, by_required = torch.func.vjp(of_given, *given, required)[1](cotangent)
    found = iter(by_given)
    return (*(None if tensor is None else next(found) for tensor in optional), by_required)
