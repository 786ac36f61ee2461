"""Checks of arguments that several ops share. Each message names the argument, its value, and what is accepted."""

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels.ops import _tracing

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise unless a tensor is an ordinary one in this process, neither sparse nor nested."""
    if type(tensor) is not Tensor and hasattr(type(tensor), "to_local"):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}; expected a plain tensor: pass {name}.to_local() if the shards can "
            f"be computed separately, else {name}.full_tensor()"
        )
    if tensor.is_nested:
        raise TypeError(
            f"{name} is a nested tensor; expected a dense one: pass {name}.values() if it is jagged, or pad it with "
            f"{name}.to_padded_tensor(padding)"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} has the layout {tensor.layout}; expected a dense tensor: pass {name}.to_dense()")


def check_floating(name: str, tensor: object) -> None:
    """Raise unless the argument is a dense tensor of fp16, bf16, fp32 or fp64."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    check_dense(name, tensor)
    if tensor.dtype not in FLOATING:
        remedy = f"; pass {name}.dequantize()" if tensor.is_quantized else ""
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}{remedy}")


def check_choice(name: str, value: object, accepted: Sequence[str]) -> None:
    """Raise unless the argument is one of the accepted strings."""
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted are {', '.join(map(repr, accepted))}")


def check_number(name: str, value: object) -> None:
    """Raise unless the argument is a number, of Python or in a scalar."""
    symbolic = isinstance(value, (torch.SymFloat, torch.SymInt))  # which torch.compile looks into with isinstance alone
    if not symbolic and not isinstance(value, (int, float)) and not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_integer(name: str, value: object, *, minimum: float = -math.inf) -> None:
    """Raise unless the argument is an integer, of Python or in a scalar, and not smaller than the minimum."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < minimum:
        raise ValueError(f"{name} is {number}; expected {minimum} or more")


def checked_distance(
    mode: str, moment: str, reduction: str | None, mean_weight: object, var_weight: object
) -> tuple[str, str, str, float, float]:
    """Return the options of a distance between statistics in the form in which they may be computed with, or raise."""
    check_choice("mode", mode, ("l2", "l1", "squared", "gaussian_kl"))
    check_choice("moment", moment, ("var", "std"))
    if mode == "gaussian_kl" and moment != "var":
        raise ValueError("moment='std' applies to the modes 'l2', 'l1' and 'squared'; 'gaussian_kl' takes roots itself")
    if reduction is not None:
        check_choice("reduction", reduction, ("mean", "sum"))
        if mode == "l2":
            raise ValueError(
                f"reduction is {reduction!r}, but mode='l2' is a norm over the channels, which is not reduced; leave "
                "reduction out, or choose mode='l1' or 'squared'"
            )
    weights = _distance_weight("mean_weight", mean_weight, mode), _distance_weight("var_weight", var_weight, mode)
    return mode, moment, reduction or "mean", *weights


def _distance_weight(name: str, weight: object, mode: str) -> float:
    number = weight
    if type(number) is not float:  # compiled code asks a float nothing else
        if isinstance(number, Tensor):
            raise TypeError(f"{name} is a tensor; expected a number, such as float({name})")
        check_number(name, number)
        number = float(number)  # type: ignore[arg-type]
    if not abs(number) < math.inf:
        raise ValueError(f"{name} is {number!r}; expected a finite number")
    if mode == "gaussian_kl" and number != 1:
        raise ValueError(
            f"{name} is {number!r}, but mode='gaussian_kl' is one formula of mean and variance together; leave it at "
            "1, or choose another mode"
        )
    return number


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
) -> float | Tensor:
    """Return a number or a 0-dim tensor in the form in which it may be computed with, or raise.

    NumPy scalars become tensors. Tensors of integers or of 16 bits become fp32, so that a product such as the square of
    a temperature does not overflow.

    Args:
        name: Name of the argument.
        value: The argument. A tensor whose value cannot be read here is checked by the CPU kernel.
        like: Tensor that it is used with; a tensor must be on its device or on the CPU.
        minimum: Smallest accepted number; 0 with ``maximum=inf`` means positive.
        maximum: Largest accepted number. Infinity and NaN are not accepted.
        grad: Whether the function computes a gradient for it.

    """
    number = value
    if type(value) is not float:
        if not isinstance(value, Tensor) and getattr(value, "shape", None) == ():
            value = torch.as_tensor(value, device="cpu")  # a scalar or a 0-dim array of NumPy
        if isinstance(value, Tensor):
            value = _checked_tensor(name, value, like, grad)
            if not is_readable(value):
                return value
            number = float(value.detach())
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a number or a 0-dim tensor, got {type(number).__name__}")
    positive = minimum == 0 and maximum == math.inf
    if not (minimum < number if positive else minimum <= number) or not number <= maximum or abs(number) == math.inf:
        accepted = "a finite number"
        if positive:
            accepted = "a positive, finite number"
        elif maximum < math.inf:
            accepted = f"a number in [{minimum:g}, {maximum:g}]"
        raise ValueError(f"{name} is {number!r}; expected {accepted}")
    return value if isinstance(value, Tensor) else number


def _checked_tensor(name: str, value: Tensor, like: Tensor, grad: bool) -> Tensor:
    check_dense(name, value)
    if value.dim() != 0:
        remedy = f"; pass {name}.squeeze()" if value.numel() == 1 else ""
        raise ValueError(
            f"{name} must be a number or a 0-dim tensor, got a tensor of shape {tuple(value.shape)}{remedy}"
        )
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must be a real number or a 0-dim tensor of real numbers, got {value.dtype}")
    if value.device.type != "cpu" and value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; expected the CPU or {like.device}")
    if value.requires_grad and not grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but no gradient is computed for it; detach it")
    if not torch.compiler.is_compiling() and value.is_inference() and not torch.is_inference_mode_enabled():
        value = value.clone()  # autograd saves no inference tensor
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def number_of(value: object) -> object:
    """Return the number in a 0-dim tensor, "a tensor" if it cannot be read, and anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return float(value.detach()) if value.dim() == 0 and is_readable(value) else "a tensor"


def is_readable(tensor: Tensor) -> bool:
    """Tell whether Python may read the value of a tensor: on the CPU, neither traced nor transformed."""
    if not _tracing.has_values() or tensor.device.type != "cpu":
        return False
    plain = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def scalar_tensor(value: float | Tensor, like: Tensor) -> Tensor:
    """Turn a checked number into the 0-dim tensor that an op takes.

    Inside a compiled graph the tensor comes from a multiplication: a constant would be compiled again for every value.
    """
    if isinstance(value, Tensor):
        return value
    if torch.compiler.is_compiling():
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
        return like.new_ones((), dtype=dtype) * value
    return torch.scalar_tensor(value, dtype=torch.float64, device="cpu")
