"""What only an emulator can show about the CUDA kernels; test_cuda_kernels.py runs this in a process that has one."""

import ctypes
import mmap

import pytest
import torch
from contract import TARGET

from kdkernels.ops._cases import registry
from kdkernels.testing.selftest import results_of

assert TARGET == "emulated"

NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux
PAGE = mmap.PAGESIZE
protect = ctypes.CDLL(None, use_errno=True).mprotect


def memory_of(size):
    """Return memory that is allocated when it is touched."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)


def between_guards(tensor, *, at_end):
    """Return a copy with the same strides that begins or ends at a page that must not be touched."""
    if tensor.numel() == 0:
        return tensor
    size = (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.element_size()
    pages = -(-size // PAGE) * PAGE
    memory = memory_of(pages + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (address, address + PAGE + pages):
        assert protect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) == 0
    offset = PAGE + (pages - size if at_end else 0)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=size // tensor.element_size(), offset=offset)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


SMALL = [
    (name, dtype, case)
    for name, op in registry().items()
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    for case in op.accuracy(dtype, "cpu")
    if max(t.numel() for t in case.samples[0]) <= 70000 and not any(0 in t.stride() for t in case.samples[0])
]


@pytest.mark.parametrize("at_end", [False, True], ids=["begins at a guard", "ends at a guard"])
@pytest.mark.parametrize(("op", "dtype", "case"), SMALL, ids=lambda value: str(value))
def test_nothing_outside_the_inputs_is_read(op, dtype, case, at_end):
    plain = results_of(case.function, case.samples[0], case.differentiable)
    guarded = tuple(between_guards(t, at_end=at_end) for t in case.samples[0])
    for a, b in zip(plain, results_of(case.function, guarded, case.differentiable), strict=True):
        # With another alignment of memory, sums are grouped differently.
        torch.testing.assert_close(a, b, equal_nan=True)


def far_apart(tensor, dim):
    """Return a copy whose slices along a dimension lie more than 2^31 elements apart."""
    stride = list(tensor.contiguous().stride())
    stride[dim] = 2**31 + 16
    count = tensor.shape[dim] * stride[dim]
    flat = torch.frombuffer(memory_of(count * tensor.element_size()), dtype=tensor.dtype, count=count)
    return flat.as_strided(tensor.shape, stride).copy_(tensor)


FAR_CALLS = [(f"{name} {call.shape}", call) for name, op in registry().items() for call in op.far_calls]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", [call for _, call in FAR_CALLS], ids=[name for name, _ in FAR_CALLS])
def test_offsets_past_two_billion_elements(call, dtype):
    tensors = tuple(torch.randn(call.shape).to(dtype) for _ in range(call.inputs))
    far = tuple(far_apart(t, call.dim) for t in tensors)
    differentiable = tuple(range(call.inputs))
    expected = results_of(call.function, tensors, differentiable)
    for a, b in zip(expected, results_of(call.function, far, differentiable), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
