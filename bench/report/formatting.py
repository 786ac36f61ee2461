"""Numbers formatted for readers."""

from collections.abc import Mapping
from typing import Any

from bench.report.data import Ratio
from bench.report.render import Cell

NONE = "–"


def significant(value: float | None, scale: float = 1.0, digits: int = 3) -> str:
    if value is None:
        return NONE
    value *= scale
    # The alternate form keeps zeros at the end, so that a column has one precision.
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}".removesuffix(".")


def milliseconds(seconds: float) -> str:
    return significant(seconds, 1e3)


def factor(value: float) -> str:
    """Return a ratio with enough digits to show which side of 1 it is on."""
    if 0.9 < value < 1.1:
        return f"{value:.3f}" if f"{value:.2f}" == "1.00" else f"{value:.2f}"
    return significant(value, digits=2)


def ratio_cell(ratio: Ratio | None, otherwise: str = NONE) -> str | Cell:
    if ratio is None:
        return otherwise
    spread = f"({factor(ratio.low)}–{factor(ratio.high)})"
    if ratio.verdict == "tie":
        return Cell(f"tie {spread}", "tie")
    return Cell(f"× {factor(ratio.median)} {spread}{' slower' if ratio.verdict == 'slower' else ''}", ratio.verdict)


def percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"


def cache_state(info: Mapping[str, Any]) -> str:
    return {True: "cold", False: "warm"}.get(info.get("cold"), NONE)
