"""Variants of the Triton kernel of gradient reversal."""

from collections.abc import Iterator

from kdkernels.ops._triton_cases import BOTH, SCALAR, Variant, numbers_of
from kdkernels.ops.gradient_reversal.triton import scale_kernel


def variants(capability: int) -> Iterator[Variant]:
    """Yield the variants to compile for a compute capability."""
    for numbers in numbers_of(capability):
        arguments = {"output": f"*{numbers}", "input": f"*{numbers}", "lambd": SCALAR}
        yield Variant(scale_kernel, numbers, arguments, {"BLOCK": 2048}, 8, BOTH)
