"""Variants of Triton kernels that are compiled without a GPU; each op's ``triton_cases.py`` yields its own."""

from dataclasses import dataclass, field
from typing import Any

SCALAR = "i64"  # a number known to the host: the bits of a double
WIDE_LOADS, WIDE_STORES = "LDG.E.128", "STG.E.128"
BOTH = (WIDE_LOADS, WIDE_STORES)


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel.

    Attributes:
        kernel: Kernel to compile.
        name: What distinguishes this compilation from the others.
        arguments: Types of the arguments by name; a number is a compile-time constant, a tuple holds several types.
        constants: Values of the ``constexpr`` parameters.
        warps: Number of warps.
        wide: Instructions that the machine code must contain.

    """

    kernel: Any
    name: str
    arguments: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    wide: tuple[str, ...] = ()


def numbers_of(capability: int) -> tuple[str, ...]:
    """Return the dtypes to compile for: the older architecture shows nothing new in bf16."""
    return ("fp32",) if capability == 80 else ("fp32", "bf16")
