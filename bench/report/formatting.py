"""Numbers as a reader wants them."""

from collections.abc import Mapping
from typing import Any

from bench.report.data import is_number
from bench.report.render import Cell
from kdkernels.testing.timing import Ratio

NONE = "–"


def significant(value: float, digits: int = 3) -> str:
    # The alternate form keeps zeros at the end, so that a column has one precision.
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}".removesuffix(".")


def milliseconds(seconds: float | None) -> str:
    return NONE if seconds is None else significant(1e3 * seconds)


def factor(value: float) -> str:
    """A ratio in as many digits as it takes to see on which side of 1 it is."""
    if 0.9 < value < 1.1:
        return f"{value:.3f}" if f"{value:.2f}" == "1.00" else f"{value:.2f}"
    return significant(value, 2)


def ratio_cell(ratio: Ratio | None, otherwise: str = NONE) -> str | Cell:
    if ratio is None:
        return otherwise
    spread = f"({factor(ratio.low)}–{factor(ratio.high)})"
    if ratio.verdict == "tie":
        return Cell(f"tie {spread}", "tie")
    return Cell(f"× {factor(ratio.median)} {spread}{' slower' if ratio.verdict == 'slower' else ''}", ratio.verdict)


def scaled(value: Any, scale: float) -> str:
    return significant(value * scale) if is_number(value) else NONE


def percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"


def cache_state(info: Mapping[str, Any]) -> str:
    return {True: "cold", False: "warm"}.get(info.get("cold"), NONE)
