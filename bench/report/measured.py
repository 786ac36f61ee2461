"""Every number, row by row: ratios, memory and bandwidth, CUDA graphs, and growth with a parameter."""

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from bench.report.data import OURS, Row, by_op, in_order, rivals_of
from bench.report.formatting import NONE, cache_state, milliseconds, percent, ratio_cell, significant
from bench.report.render import Block, Bullets, Cell, Figure, Heading, Paragraph, Table
from bench.report.sweeps import TOO_MUCH, Sweep, doublings, fitted_slope

MOST = 30  # rows that fit in a figure


def figure(caption: str, plot: str, *arguments: Any) -> Figure:
    """Return a figure of plots.py, which is imported only to draw it: not every machine has matplotlib."""
    return Figure(caption, lambda: getattr(import_module("bench.report.plots"), plot)(*arguments))


def comparison(title: str, rows: Sequence[Row]) -> Iterator[Block]:
    rivals = rivals_of(rows)
    cells = [
        (*row.parts, cache_state(row.info), milliseconds(row.seconds[OURS]),
         *(ratio_cell(row.ratios.get(rival), row.not_timed.get(rival, NONE)) for rival in rivals))
        for row in rows
    ]  # fmt: skip
    yield Table(("function", "shape", "dtype", "variant", "mode", "cache", "ours, ms", *rivals), cells, words=6)
    caption = f"{title}: time of each rival over ours, median and spread. Right of 1 kdkernels is faster."
    rows = [row for row in rows if row.ratios]
    for first in range(0, len(rows), MOST):
        yield figure(caption, "ratio_plot", rows[first : first + MOST])


def ops(rows: Sequence[Row]) -> Iterator[Block]:
    if rows:
        yield Heading(2, "Ops")
        yield Paragraph("Our median time, and how many times as long each rival takes, with the spread of that ratio.")
    for op, group in by_op(rows).items():
        yield Heading(3, op)
        yield from comparison(op, group)


def routines(rows: Sequence[Row]) -> Iterator[Block]:
    if rows:
        yield Heading(2, "Routines, end to end")
        yield from comparison("Routines", rows)


def roofline(rows: Sequence[Row], copy: float | None) -> Iterator[Block]:
    columns: list[tuple[str, list[str]]] = [
        ("row", [row.label for row in rows]),
        ("cache", [cache_state(row.info) for row in rows]),
        ("passes", [NONE if row.info.get("passes") is None else f"{row.info['passes']:g}" for row in rows]),
        ("MB", [significant(row.info.get("bytes"), 1e-6) for row in rows]),
        ("GB/s", [significant(row.bytes_per_second, 1e-9) for row in rows]),
        ("of copy", [percent(row.share_of(copy)) for row in rows]),
        *_of_contenders(rows, "peak_bytes", "peak MB,", 1e-6),
        *_of_contenders(rows, "compile_seconds", "seconds to compile,", 1.0),
    ]
    columns = [(head, cells) for head, cells in columns if any(cell != NONE for cell in cells)]
    if len(columns) < 2:
        return
    yield Heading(2, "Memory and bandwidth")
    yield Paragraph(
        "Bytes follow from the passes over memory that the op's documentation states; they are not measured. The share "
        "is of the measured bandwidth of a copy. It can exceed 100 % if data is in a cache or mostly read. Peak memory "
        "does not include the inputs."
    )
    yield Table([head for head, _ in columns], list(zip(*(cells for _, cells in columns), strict=True)))


def _of_contenders(rows: Sequence[Row], key: str, head: str, scale: float) -> Iterator[tuple[str, list[str]]]:
    for name in in_order(name for row in rows for name in row.info.get(key) or {}):
        yield f"{head} {name}", [significant((row.info.get(key) or {}).get(name), scale) for row in rows]


def graphs(rows: Sequence[Row]) -> Iterator[Block]:
    heads = ("microseconds", "launches_forward", "launches_backward", "why_not")
    cells = [
        (row.label, contender, *(str(graph.get(head, NONE)) for head in heads))
        for row in rows
        for contender, graph in (row.info.get("graph") or {}).items()
    ]
    if cells:
        yield Heading(2, "Under a CUDA graph")
        yield Paragraph("A forward and a backward, captured together many times, and the launches of each.")
        yield Table(("row", "contender", *(head.replace("_", " ") for head in heads)), cells, words=2)


def growth(sweeps: Sequence[Sweep]) -> Iterator[Block]:
    if not sweeps:
        return
    yield Heading(2, "Sweeps")
    yield Paragraph(
        "The slope is the exponent of time as a power of the parameter: a least-squares fit of logarithms to the upper "
        "half of the values, since small inputs show overhead. The cost of a doubling is the ratio of the medians of "
        "neighbouring values; for a step by another factor s, it is raised to the power 1 / log2(s). More than "
        f"{TOO_MUCH} is flagged."
    )
    flags = [
        f"{sweep.name}, {contender}: the step to {value:g} costs × {cost:.2f} per doubling"
        for sweep in sweeps
        for contender in sweep.contenders
        for value, cost in doublings(sweep.seconds(contender)).items()
        if cost > TOO_MUCH
    ]
    yield Paragraph("Flagged:" if flags else f"No doubling costs more than {TOO_MUCH}.")
    if flags:
        yield Bullets(flags)
    for sweep in sweeps:
        yield Heading(3, sweep.name)
        yield _points(sweep)
        slopes = {name: fitted_slope(sweep.seconds(name)) for name in sweep.contenders}
        text = ", ".join(f"{name} {NONE if slope is None else f'{slope:.2f}'}" for name, slope in slopes.items())
        warm = " Inputs may come from caches." if sweep.info.get("cold") is False else ""
        yield Paragraph(f"Slopes: {text}; expected {sweep.info['expected_slope']:g}.{warm}")
        yield figure(f"{sweep.name}: median time against {sweep.axis}.", "sweep_plot", sweep)


def _points(sweep: Sweep) -> Table:
    costs = {name: doublings(sweep.seconds(name)) for name in sweep.contenders}
    rivals = [name for name in sweep.contenders if name != OURS]
    rows = []
    for value, (seconds, ratios) in sweep.points.items():
        cells: list[str | Cell] = [f"{value:g}", milliseconds(seconds[OURS]), *(ratio_cell(ratios[r]) for r in rivals)]
        for cost in (costs[name].get(value) for name in sweep.contenders):
            flagged = cost is not None and cost > TOO_MUCH
            cells.append(Cell(f"{cost:.2f} (!)", "slower") if flagged else NONE if cost is None else f"{cost:.2f}")
        rows.append(cells)
    doubled = (f"doubling, {name}" for name in sweep.contenders)
    return Table((sweep.axis, "ours, ms", *rivals, *doubled), rows, words=0)
