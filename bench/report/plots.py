"""Plots as SVG text. Every contender has one colour and one marker in all of them, told apart without colour too."""

import io
import math
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.report.data import OURS, Row, in_order
from bench.report.sweeps import Sweep, upper_half

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
    "published": ("#8C564B", "*"),
}
OTHERS = (("#5D4A9C", ">"), ("#A6761D", "p"), ("#444444", "h"))
MOST = 30  # rows that fit in a figure
ACROSS = 4  # names in a line of the legend
LETTER, LINE = 0.078, 0.2  # inches: the width of a letter of a label, the height of a line


def look(contender: str) -> tuple[str, str]:
    # The name alone decides, so that a contender looks the same in all figures and in all reports.
    return LOOKS.get(contender) or OTHERS[sum(contender.encode()) % len(OTHERS)]


def split(rows: Sequence[Row], title: str) -> list[tuple[Sequence[Row], str]]:
    """Return rows in parts that fit in a figure, each with its caption; a function stays together where it fits."""
    parts: list[list[Row]] = [[]]
    by_function: dict[str, list[Row]] = {}
    for row in rows:
        by_function.setdefault(row.parts[0], []).append(row)
    for group in by_function.values():
        if parts[-1] and len(parts[-1]) + len(group) > MOST:
            parts.append([])
        for row in group:
            if len(parts[-1]) == MOST:
                parts.append([])
            parts[-1].append(row)
    parts = [part for part in parts if part]
    if len(parts) == 1:
        return [(parts[0], title)]
    return [(part, f"{title} ({number} of {len(parts)})") for number, part in enumerate(parts, 1)]


def labels(rows: Sequence[Row]) -> tuple[list[str], str]:
    """Return what tells the rows apart, and what they have in common."""
    columns = list(zip(*(row.parts for row in rows), strict=True))
    differs = [len(set(column)) > 1 for column in columns]
    if not any(differs):
        return [row.label for row in rows], ""
    names = [" ".join(p for p, keep in zip(row.parts, differs, strict=True) if p and keep) for row in rows]
    common = " ".join(column[0] for column, keep in zip(columns, differs, strict=True) if column[0] and not keep)
    return [name or row.label for name, row in zip(names, rows, strict=True)], common


def as_svg(figure: Figure) -> str:
    target = io.StringIO()
    # Text stays text: it is small, can be searched and read aloud. A salt gives the same file for the same report.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": OURS}):
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    return target.getvalue()


def row_figure(rows: Sequence[Row], line: float, legend: Sequence[str], axis: str) -> tuple[Figure, Axes]:
    """Return a figure with a line for each row, from the top down, and its legend above them."""
    names, common = labels(rows)
    left, right, bottom = 0.25 + LETTER * max(map(len, names)), 0.3, 0.6
    above = 0.25 + (0.3 if common else 0.0) + 0.24 * math.ceil(len(legend) / ACROSS)
    width, height = left + 6.0 + right, above + line * len(rows) + bottom
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (above + bottom) / height),
    )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [plain(name) for name in names], fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=9)
    axes.set_xlabel(axis, fontsize=9)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    for number in range(0, len(rows), 2):
        axes.axhspan(number - 0.5, number + 0.5, color="#f5f5f5", linewidth=0, zorder=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if common:
        figure.text(left / width, 1 - 0.22 / height, plain(common), fontsize=9.5, fontweight="bold", va="center")
    return figure, axes


def plain(text: str) -> str:
    """Names are no formulas."""
    return text.replace("$", r"\$")


def legend_above(axes: Axes, names: Sequence[str]) -> None:
    if names:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, fontsize=8.5, frameon=False,
            ncols=min(len(names), ACROSS), handletextpad=0.3, columnspacing=1.2,
        )  # fmt: skip


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers in a range, at most about ten of them."""
    decades = math.log10(high / low)
    digits = (1, 1.5, 2, 3, 5, 7) if decades < 0.8 else (1, 2, 5) if decades < 3.2 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in powers for digit in digits if low <= (tick := digit * 10.0**power) <= high]


def log_x(axes: Axes, low: float, high: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(number))


def number(value: float, _: object = None) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:g}"


def ratio_plot(rows: Sequence[Row]) -> str:
    """Plot every rival's time over ours on a log axis, with the spread and a line at 1."""
    rivals = in_order(rival for row in rows for rival in row.ratios)
    line = LINE + 0.07 * max(len(rivals) - 1, 0)
    figure, axes = row_figure(rows, line, rivals, "rival's time / time of kdkernels, median and 10–90 % spread")
    offsets = {rival: (i - (len(rivals) - 1) / 2) * 0.76 / len(rivals) for i, rival in enumerate(rivals)}
    for rival in rivals:
        found = [(place, row.ratios[rival]) for place, row in enumerate(rows) if rival in row.ratios]
        middle = [ratio.median for _, ratio in found]
        below = [max(0.0, ratio.median - ratio.low) for _, ratio in found]
        beyond = [max(0.0, ratio.high - ratio.median) for _, ratio in found]
        colour, marker = look(rival)
        axes.errorbar(
            middle, [place + offsets[rival] for place, _ in found], xerr=(below, beyond), fmt=marker, color=colour,
            markersize=4.5, elinewidth=1.2, label=rival,
        )  # fmt: skip
    ends = [end for row in rows for ratio in row.ratios.values() for end in (ratio.low, ratio.high, ratio.median)]
    low, high = min([1.0, *ends]) / 1.25, max([1.0, *ends]) * 1.25
    axes.axvline(1.0, color="#333333", linewidth=1.1)
    axes.axvspan(low, 1.0, color="#D55E00", alpha=0.07, linewidth=0, zorder=0.5)
    log_x(axes, low, high)
    legend_above(axes, rivals)
    return as_svg(figure)


def roofline_plot(speeds: Sequence[tuple[Row, float]], copy: float | None) -> str:
    """Plot the bytes per second that rows achieve, and what a copy does."""
    figure, axes = row_figure([row for row, _ in speeds], LINE, ["copy"] if copy else [], "GB/s")
    colour, marker = look(OURS)
    for place, (_, speed) in enumerate(speeds):
        axes.plot([0, 1e-9 * speed], [place, place], color=colour, linewidth=1.2, alpha=0.5)
    reached = [1e-9 * speed for _, speed in speeds]
    axes.plot(reached, range(len(reached)), marker, color=colour, markersize=5, label=OURS)
    names = [OURS]
    if copy:
        names.append(f"measured copy, {1e-9 * copy:.3g} GB/s")
        axes.axvline(1e-9 * copy, color="#333333", linewidth=1.2, linestyle="--", label=names[-1])
    axes.set_xlim(0, 1.08 * max([*reached, 1e-9 * (copy or 0.0)]))
    legend_above(axes, names if copy else [])
    return as_svg(figure)


def sweep_plot(sweep: Sweep) -> str:
    """Plot median times along the parameter, both on log axes, with the fitted slopes."""
    figure = Figure(figsize=(7.6, 4.6), facecolor="white")
    axes = figure.add_axes((0.1, 0.13, 0.62, 0.82))
    shown: list[float] = []
    for contender in reversed(sweep.contenders):  # ours is drawn last, on top
        times = {value: 1e3 * t for value, t in sweep.seconds[contender].items() if value > 0}
        if not times:
            continue
        colour, marker = look(contender)
        slope = sweep.slope(contender)
        name = contender if slope is None else f"{contender}\nslope {slope:.2f}"
        axes.plot(times.keys(), times.values(), marker + "-", color=colour, markersize=5, linewidth=1.3, label=name)
        shown += times.values()
        if slope is not None:
            fitted = upper_half(list(times))
            middle = math.fsum(math.log(value) for value in fitted) / len(fitted)
            level = math.fsum(math.log(times[value]) for value in fitted) / len(fitted)
            line = [math.exp(level + slope * (math.log(value) - middle)) for value in fitted]
            axes.plot(fitted, line, "--", color="#333333", linewidth=0.9, zorder=4)
    values = [value for value in sweep.values if value > 0]
    log_axes(axes, values, shown)
    axes.set_xlabel(plain(sweep.axis), fontsize=9)
    axes.set_ylabel("median time, ms", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(color="#dddddd", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if sweep.expected_slope is not None:
        guide(axes, values, sweep)
    handles, names = axes.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda i: i if names[i].startswith("expected") else -1 - i)
    axes.legend([handles[i] for i in order], [names[i] for i in order], loc="upper left", bbox_to_anchor=(1.02, 1),
                borderaxespad=0, fontsize=8.5, frameon=False, labelspacing=0.8)  # fmt: skip
    return as_svg(figure)


def guide(axes: Axes, values: Sequence[float], sweep: Sweep) -> None:
    """Draw the expected slope through our last point."""
    last = values[-1]
    level, slope = 1e3 * sweep.seconds[OURS][last], sweep.expected_slope or 0.0
    axes.plot(values, [level * (value / last) ** slope for value in values], ":", color="#7F7F7F", linewidth=1.2,
              label=f"expected slope {slope:g}", scaley=False, zorder=1)  # fmt: skip


def log_axes(axes: Axes, values: Sequence[float], times: Sequence[float]) -> None:
    low, high = min(times) / 1.6, max(times) * 1.6
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(number))
    axes.set_xscale("log")
    axes.set_xlim(values[0] / 1.2, values[-1] * 1.2)
    axes.xaxis.set_major_locator(FixedLocator(apart(values)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def apart(values: Sequence[float], share: float = 0.09) -> list[float]:
    """Return those values whose labels do not meet on a log axis."""
    width = math.log(values[-1] / values[0]) + math.log(1.2**2)
    kept: list[float] = []
    for value in reversed(values):
        if not kept or math.log(kept[-1] / value) > share * width:
            kept.append(value)
    return kept[::-1]
