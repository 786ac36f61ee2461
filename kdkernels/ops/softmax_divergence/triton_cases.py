"""Variants of the Triton kernels of the softmax divergences."""

from collections.abc import Iterator
from typing import Any

from kdkernels.ops._triton_cases import BOTH, SCALAR, WIDE_LOADS, Variant, numbers_of
from kdkernels.ops.softmax_divergence.triton_kernels import backward_kernel, forward_kernel, reduce_kernel

# Strides of the classes, then of the positions from inner to outer.
ROWS, MAPS = (1, "i32", 0, 0), ("i32", 1, "i32", 0)
FORWARD = (
    ("row of 1000", ROWS, True, 1, 1024, 4),
    ("row of 4096", ROWS, True, 1, 4096, 16),
    ("long row", ROWS, False, 1, 2048, 8),
    ("map", MAPS, True, 32, 32, 4),
)
BACKWARD = (("row", ROWS, 1, 1024), ("map", MAPS, 32, 32))


def _arguments(numbers: str, strides: tuple[Any, ...], beta: str = SCALAR) -> dict[str, Any]:
    arguments: dict[str, Any] = dict.fromkeys(("loss", "saved", "grad_output"), "*fp32")
    arguments |= dict.fromkeys(("student", "teacher", "student_gradient", "teacher_gradient"), f"*{numbers}")
    arguments |= dict.fromkeys(("temperature", "divergence_weight", "label_weight", "divisor"), SCALAR)
    sides = ("student", "teacher", "student_gradient", "teacher_gradient")
    return {
        **arguments,
        "labels": "*i64",
        "beta": beta,
        **dict.fromkeys((f"{side}_strides" for side in sides), strides),
    }


def _constants(kind: str, strides: tuple[Any, ...], **constants: Any) -> dict[str, Any]:
    fixed = {"KIND": kind, "CROSS_ENTROPY": True, "LOSS": "sum", "SAVE": True, "ROWS": strides is ROWS}
    return {**fixed, "GRAD_BY_POSITION": False, **constants}


def variants(capability: int) -> Iterator[Variant]:
    """Yield the variants to compile for a compute capability."""
    kinds = ("forward_kl", "js") if capability == 80 else ("forward_kl", "js", "clamped_js")
    for numbers in numbers_of(capability):
        for kind in kinds if numbers == "fp32" else ("forward_kl",):
            every = kind == "forward_kl"
            for shape, strides, whole, positions, classes, warps in FORWARD if every else FORWARD[2:]:
                constants = _constants(kind, strides, WHOLE=whole, POSITIONS=positions, CLASSES=classes)
                name = f"{kind}, {shape}, {numbers}"
                yield Variant(forward_kernel, name, _arguments(numbers, strides), constants, warps, (WIDE_LOADS,))
            for shape, strides, positions, classes in BACKWARD if every else BACKWARD[1:]:
                constants = _constants(kind, strides, POSITIONS=positions, CLASSES=classes)
                name = f"{kind}, {shape}, {numbers}"
                yield Variant(backward_kernel, name, _arguments(numbers, strides), constants, 4, BOTH)
    arguments = _arguments("fp32", ROWS, beta="*fp32")
    constants = _constants("any_js", ROWS, WHOLE=True, POSITIONS=1, CLASSES=1024)
    yield Variant(forward_kernel, "beta on the device", arguments, constants, 4, (WIDE_LOADS,))
    yield Variant(backward_kernel, "beta on the device", arguments, constants, 4, BOTH)
    arguments = {"loss": "*fp32", "partial": "*fp32", "divisor": SCALAR}
    yield Variant(reduce_kernel, "by count", arguments, {"BY_COUNT": True, "BLOCK": 1024})
