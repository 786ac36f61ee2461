"""Checks of arguments that several ops share. Each message names the argument, its value, and what is accepted."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels.ops import _tracing

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(name: str, tensor: object) -> None:
    """Raise unless the argument is a tensor of fp16, bf16, fp32 or fp64."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_choice(name: str, value: object, accepted: Sequence[str]) -> None:
    """Raise unless the argument is one of the accepted strings."""
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted are {', '.join(map(repr, accepted))}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless two tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} and {other_name} on {other.device}; they must be on one device")


def check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless two tensors have the same shape; nothing is broadcast."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and {other_name} {tuple(other.shape)}; they must be the same"
        )


def check_scalar(
    name: str, value: object, like: Tensor, *, minimum: float = -math.inf, maximum: float = math.inf, grad: bool = False
) -> None:
    """Raise unless the argument is a number or a 0-dim tensor on the CPU or beside another tensor.

    Args:
        name: Name of the argument.
        value: The argument. A tensor whose value cannot be read here is checked by the CPU kernel.
        like: Tensor that it is used with.
        minimum: Smallest accepted number; 0 with ``maximum=inf`` means positive.
        maximum: Largest accepted number. Infinity and NaN are not accepted.
        grad: Whether the function computes a gradient for it.

    """
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype not in FLOATING:
            raise ValueError(
                f"{name} must be a number or a 0-dim floating-point tensor, got a tensor of shape {tuple(value.shape)} "
                f"and {value.dtype}"
            )
        if value.device.type != "cpu" and value.device != like.device:
            raise ValueError(f"{name} is on {value.device}; expected the CPU or {like.device}")
        if value.requires_grad and not grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, but no gradient is computed for it; detach it")
        if not _readable(value):
            return
        value = float(value.detach())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a 0-dim tensor, got {type(value).__name__}")
    positive = minimum == 0 and maximum == math.inf
    if not (minimum < value if positive else minimum <= value) or not value <= maximum or abs(value) == math.inf:
        accepted = "a finite number"
        if positive:
            accepted = "a positive, finite number"
        elif maximum < math.inf:
            accepted = f"a number in [{minimum:g}, {maximum:g}]"
        raise ValueError(f"{name} is {value!r}; expected {accepted}")


def _readable(scalar: Tensor) -> bool:
    """Tell whether Python may read the value of a tensor: on the CPU, neither traced nor transformed."""
    plain = type(scalar) is Tensor or type(scalar) is torch.nn.Parameter
    traced = _tracing.is_recorded() or _tracing.is_transformed()
    return plain and scalar.device.type == "cpu" and not traced


def scalar_tensor(value: float | Tensor, like: Tensor) -> Tensor:
    """Turn a Python number into the 0-dim tensor that an op takes.

    Inside a compiled graph the tensor comes from a multiplication: a constant would be compiled again for every value.
    """
    if isinstance(value, Tensor):
        return value
    if torch.compiler.is_compiling():
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
        return like.new_ones((), dtype=dtype) * value
    return torch.scalar_tensor(value, dtype=torch.float64, device="cpu")
