"""Variants of the Triton kernels of total variation and the image priors."""

from collections.abc import Iterator
from typing import Any

from kdkernels.ops._triton_cases import BOTH, SCALAR, WIDE_LOADS, Variant, numbers_of
from kdkernels.ops.total_variation.triton_kernels import (
    gradient_kernel,
    image_kernel,
    priors_kernel,
    sums_kernel,
    variation_kernel,
)


def _arguments(numbers: str) -> dict[str, Any]:
    arguments: dict[str, Any] = dict.fromkeys(("image", "output"), f"*{numbers}")
    arguments |= dict.fromkeys(("grad_l1", "grad_l2", "grad_norm", "norms", "tv_l1", "tv_l2", "l2", "loss"), "*fp32")
    arguments |= dict.fromkeys(("partial", "sums", "result"), "*fp64")
    arguments |= dict.fromkeys(("strides", "output_strides"), ("i32", "i32", "i32"))
    return arguments | {"eps": SCALAR, "step": 1}


def variants(capability: int) -> Iterator[Variant]:
    """Yield the variants to compile for a compute capability."""
    fixed = {"REDUCTION": "sum", "MEAN_OF_PAIRS": False}
    for numbers in numbers_of(capability):
        kinds = (("priors", 4), ("l1", 2), ("isotropic", 2)) if numbers == "fp32" else (("priors", 4),)
        for kind, directions in kinds:
            constants = {**fixed, "KIND": kind, "DIRECTIONS": directions, "ROWS": 8, "NUMBERS": 256}
            name, arguments = f"{kind}, {numbers}", _arguments(numbers)
            yield Variant(sums_kernel, name, arguments, constants, 4, (WIDE_LOADS,))
            yield Variant(gradient_kernel, name, arguments, constants, 8, BOTH)
    arguments = _arguments("fp32")
    yield Variant(image_kernel, "parts", arguments, {**fixed, "BLOCK": 1024})
    yield Variant(priors_kernel, "fp32", arguments, {**fixed, "BLOCK": 256})
    yield Variant(variation_kernel, "fp32", arguments, {**fixed, "BLOCK": 256, "ROOT": True, "BY_IMAGE": False})
