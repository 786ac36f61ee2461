"""Plots as SVG text. Each contender has the same colour and marker in all of them."""

import io
import math
from collections.abc import Sequence
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.report.data import OURS, Row, in_order
from bench.report.sweeps import Sweep, fitted_slope

# Okabe and Ito's palette, without its yellow, which is hard to see on white.
LOOKS = {
    OURS: ("#0072B2", "o"),
    "eager": ("#D55E00", "s"),
    "compile": ("#009E73", "D"),
    "compile max-autotune": ("#CC79A7", "^"),
    "kornia": ("#E69F00", "v"),
    "liger": ("#56B4E9", "P"),
    "torchmetrics": ("#000000", "X"),
    "piq": ("#7F7F7F", "<"),
}
OTHERS = (("#5D4A9C", ">"), ("#A6761D", "p"), ("#444444", "h"))
LINE = 0.2  # inches


def look(contender: str) -> tuple[str, str]:
    # The name alone decides, so that a contender looks the same in every figure of every report.
    return LOOKS.get(contender) or OTHERS[sum(contender.encode()) % len(OTHERS)]


def as_svg(figure: Figure) -> str:
    target = io.StringIO()
    # Text stays text: it is small, and can be searched and read aloud. A fixed salt makes the files reproducible.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": OURS}):
        figure.savefig(target, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    return target.getvalue()


def axes_of(width: float, height: float, label: str) -> tuple[Figure, Axes]:
    """Return a figure filled by its axes; labels and legends are outside."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def row_axes(rows: Sequence[Row], line: float, label: str) -> tuple[Figure, Axes]:
    """Return a figure with a line for each row, from the top down."""
    figure, axes = axes_of(6.0, line * len(rows), label)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [row.label.replace("$", r"\$") for row in rows], fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    for number in range(0, len(rows), 2):
        axes.axhspan(number - 0.5, number + 0.5, color="#f5f5f5", linewidth=0, zorder=0)
    return figure, axes


def legend_above(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=8.5, frameon=False, ncols=4)


def log_axis(axes: Axes, which: Literal["x", "y"], values: Sequence[float], margin: float) -> float:
    """Give an axis a logarithmic scale around values, with round numbers; return its low end."""
    low, high = min(values) / margin, max(values) * margin
    decades = math.log10(high / low)
    digits = (1, 1.5, 2, 3, 5, 7) if decades < 0.8 else (1, 2, 5) if decades < 3.2 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in digits]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}" if value >= 1000 else f"{value:g}"))
    return low


def ratio_plot(rows: Sequence[Row]) -> str:
    """Plot the time of each rival divided by ours on a log axis, with the spread and a line at 1."""
    rivals = in_order(rival for row in rows for rival in row.ratios)
    line = LINE + 0.07 * (len(rivals) - 1)
    figure, axes = row_axes(rows, line, "rival's time / time of kdkernels, median and 10–90 % spread")
    for number, rival in enumerate(rivals):
        offset = (number - (len(rivals) - 1) / 2) * 0.76 / len(rivals)
        found = [(place, row.ratios[rival]) for place, row in enumerate(rows) if rival in row.ratios]
        spreads = [(max(0.0, r.median - r.low), max(0.0, r.high - r.median)) for _, r in found]
        colour, marker = look(rival)
        axes.errorbar(
            [ratio.median for _, ratio in found], [place + offset for place, _ in found],
            xerr=list(zip(*spreads, strict=True)), fmt=marker, color=colour, markersize=4.5, elinewidth=1.2,
            label=rival,
        )  # fmt: skip
    ends = [end for row in rows for ratio in row.ratios.values() for end in (ratio.low, ratio.high)]
    low = log_axis(axes, "x", [1.0, *ends], 1.25)
    axes.axvline(1.0, color="#333333", linewidth=1.1)
    axes.axvspan(low, 1.0, color="#D55E00", alpha=0.07, linewidth=0, zorder=0.5)
    legend_above(axes)
    return as_svg(figure)


def sweep_plot(sweep: Sweep) -> str:
    """Plot median times against the parameter, both on log axes, with the expected slope through our last point."""
    figure, axes = axes_of(6.0, 3.8, sweep.axis)
    axes.set_ylabel("median time, ms", fontsize=9)
    axes.grid(color="#dddddd", linewidth=0.6)
    shown: list[float] = []
    for contender in sweep.contenders:
        seconds = sweep.seconds(contender)
        times = [1e3 * taken for taken in seconds.values()]
        colour, marker = look(contender)
        slope = fitted_slope(seconds)
        label = contender if slope is None else f"{contender}, slope {slope:.2f}"
        axes.plot(list(seconds), times, marker + "-", color=colour, markersize=5, linewidth=1.3, label=label)
        shown += times
    values, expected = list(sweep.points), sweep.info["expected_slope"]
    last = 1e3 * sweep.seconds(OURS)[values[-1]]
    guide = [last * (value / values[-1]) ** expected for value in values]
    axes.plot(values, guide, ":", color="#7F7F7F", linewidth=1.2, label=f"expected slope {expected:g}", zorder=1)
    log_axis(axes, "x", values, 1.2)
    log_axis(axes, "y", shown, 1.6)
    legend_above(axes)
    return as_svg(figure)
