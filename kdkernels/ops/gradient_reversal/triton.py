"""Gradient reversal: its backward is one multiplication; the forward is a view."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.ops._triton_launch import argument, device_of, scalar_of

BLOCK = 2048


@triton.jit(do_not_specialize=["lambd"])
def scale_kernel(output, input, lambd, count, BLOCK: tl.constexpr):
    """Multiply numbers by -lambd, in fp32 if they have 16 bits."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(input + at, mask=at < count)
    dtype: tl.constexpr = tl.float64 if x.dtype == tl.float64 else tl.float32
    tl.store(output + at, x.to(dtype) * -scalar_of(lambd, dtype), mask=at < count)


def gradient_reversal_backward(grad_output: Tensor, lambd: Tensor) -> Tensor:
    """Return -lambd * grad_output."""
    result = torch.empty_like(grad_output)
    # Memory without gaps is one row of numbers for any order of the dimensions.
    steps = ((size, a, b) for size, a, b in zip(result.shape, result.stride(), grad_output.stride(), strict=True))
    if any(a != b for size, a, b in steps if size > 1):
        grad_output = torch.empty_like(result).copy_(grad_output)
    if result.numel() > 0:
        with device_of(result):
            grid = (triton.cdiv(result.numel(), BLOCK),)
            scale_kernel[grid](result, grad_output, argument(lambd), result.numel(), BLOCK=BLOCK, num_warps=8)
    return result


def gradient_reversal_copy(input: Tensor, lambd: Tensor) -> Tensor:
    """Return a copy of the input."""
    return torch.empty_like(input).copy_(input)
