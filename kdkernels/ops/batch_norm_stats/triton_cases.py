"""Variants of the Triton kernels of the batch-norm statistics."""

from collections.abc import Iterator
from typing import Any

from kdkernels.ops._triton_cases import BOTH, SCALAR, WIDE_LOADS, Variant, numbers_of
from kdkernels.ops.batch_norm_stats.triton_kernels import (
    distance_gradient_kernel,
    distance_kernel,
    gradient_kernel,
    merge_kernel,
    moments_kernel,
)

# Strides of samples, positions and channels.
PLANES, CHANNELS_LAST = ("i32", 1, "i32"), (0, "i32", 1)


def _arguments(numbers: str, strides: tuple[Any, ...]) -> dict[str, Any]:
    arguments: dict[str, Any] = dict.fromkeys(("mean", "var", "mean_error", "grad_mean", "grad_var"), "*fp32")
    arguments |= {"partial": "*fp64", **dict.fromkeys(("input", "output", "grad_output"), f"*{numbers}")}
    return arguments | dict.fromkeys(("strides", "input_strides", "output_strides", "grad_strides"), strides)


def variants(capability: int) -> Iterator[Variant]:
    """Yield the variants to compile for a compute capability."""
    for numbers in numbers_of(capability):
        for layout, strides, tile, positions in (
            ("planes", PLANES, {"SAMPLES": 1, "POSITIONS": 4096, "CHANNELS": 1}, 2048),
            ("channels_last", CHANNELS_LAST, {"SAMPLES": 1, "POSITIONS": 64, "CHANNELS": 64}, 32),
        ):
            name, arguments = f"{layout}, {numbers}", _arguments(numbers, strides)
            yield Variant(moments_kernel, name, arguments, {"BY_SAMPLES": False, **tile}, 8, (WIDE_LOADS,))
            yield Variant(gradient_kernel, name, arguments, {**tile, "POSITIONS": positions}, 4, BOTH)
    constants: dict[str, Any] = {"UNBIASED": True, "SPLITS": 64, "CHANNELS": 16}
    yield Variant(merge_kernel, "64 splits", _arguments("fp32", PLANES), constants)
    arguments = {"sizes": ("i32",) * 32, "mean_weight": SCALAR, "spread_weight": SCALAR}
    for mode in ("l2", "l1", "gaussian_kl"):
        constants = {"ROOT": False, "SUM": False, "BLOCK": 256, "MODE": mode}
        for kernel in (distance_kernel, distance_gradient_kernel):
            yield Variant(kernel, mode, arguments, constants)
