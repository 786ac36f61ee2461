"""What every launch needs: scalars on the host or the device, the current device, powers of two."""

import contextlib
import struct
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor


def known_to_host(scalar: Tensor) -> bool:
    """Tell whether a 0-dim tensor is passed by value; others are read by the kernel."""
    return scalar.device.type == "cpu"


def bits_of(number: float) -> int:
    """Return the bits of a double: Triton passes a Python float in 32 bits, but an integer in full."""
    bits: int = struct.unpack("q", struct.pack("d", number))[0]
    return bits


def argument(scalar: Tensor) -> Tensor | int:
    """Return the argument to pass for a 0-dim tensor; the kernel reads it with :func:`scalar_of`."""
    return bits_of(float(scalar)) if known_to_host(scalar) else scalar


def is_zero(scalar: Tensor) -> bool:
    """Tell whether a 0-dim tensor is known to be 0."""
    return known_to_host(scalar) and float(scalar) == 0


@triton.jit
def scalar_of(argument, dtype: tl.constexpr):
    """Read a number that is given as a pointer, or by value as the bits of a double."""
    if argument.dtype.is_ptr():
        number = tl.load(argument).to(dtype)
    else:
        number = argument.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)
    return number


def device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Make a tensor's device the current one, which Triton launches on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def power_of_two(number: int, smallest: int = 1, largest: int = 1 << 20) -> int:
    """Return the smallest power of two not less than a number, within bounds that are powers of two."""
    return min(max(1 << max(number - 1, 0).bit_length(), smallest), largest)
