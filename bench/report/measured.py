"""What was measured, row by row: ratios, the machine's limits, and growth along a parameter."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from bench.report.data import OURS, Row, bytes_per_second, groups, in_order, is_number, rivals_of, share_of_copy
from bench.report.formatting import NONE, cache_state, milliseconds, percent, ratio_cell, scaled
from bench.report.plots import ratio_plot, roofline_plot, split, sweep_plot
from bench.report.render import Block, Bullets, Cell, Figure, Heading, Paragraph, Table
from bench.report.sweeps import TOO_MUCH, Sweep


def comparison(rows: Sequence[Row]) -> Table:
    rivals = rivals_of(rows)
    cells = [
        (*row.parts, cache_state(row.info), milliseconds(row.seconds[OURS]),
         *(ratio_cell(row.ratios.get(rival), row.not_timed.get(rival, NONE)) for rival in rivals))
        for row in rows
    ]  # fmt: skip
    return Table(("function", "shape", "dtype", "variant", "mode", "cache", "ours, ms", *rivals), cells, words=6)


def operators(rows: Sequence[Row]) -> Iterator[Block]:
    if rows:
        yield Heading(2, "Ops")
        yield Paragraph("Our median, and of every rival how many times as long it takes, with the spread of the ratio.")
    for op, group in groups(rows).items():
        yield Heading(3, op)
        yield comparison(group)
        yield from ratio_figures(op, group)


def ratio_figures(title: str, rows: Sequence[Row]) -> Iterator[Block]:
    for part, caption in split([row for row in rows if row.ratios], title):
        yield Figure(f"{caption}: the time of each rival over ours, median and spread. Right of 1 kdkernels is faster.",
                     partial(ratio_plot, part))  # fmt: skip


def routines(rows: Sequence[Row]) -> Iterator[Block]:
    if rows:
        yield Heading(2, "Routines, end to end")
        yield comparison(rows)
        yield from ratio_figures("Routines", rows)


def roofline(rows: Sequence[Row], measured: Mapping[str, Any]) -> Iterator[Block]:
    columns = ("bytes", "flops", "peak_bytes", "compile_seconds", "launches")
    rows = [row for row in rows if any(row.info.get(column) for column in columns)]
    if not rows:
        return
    yield Heading(2, "Memory, arithmetic and the machine's limits")
    yield Paragraph(
        "Bytes are those of the passes that the documentation of the op states, not counted by the machine. The share "
        "is of the measured bandwidth of a copy; it can exceed 100 % where data is in a cache, or mostly read. Peak "
        "memory is that beyond the inputs."
    )
    copy = measured.get("copy_bytes_per_second")
    moving = [row for row in rows if bytes_per_second(row)]
    per_op = groups(moving).items() if len(moving) > 30 else [("All rows", moving)] if moving else []
    for op, group in per_op:
        for part, caption in split(group, op):
            speeds = [(row, bytes_per_second(row) or 0.0) for row in part]
            yield Figure(f"{caption}: achieved bytes per second against the copy bandwidth.",
                         partial(roofline_plot, speeds, copy if is_number(copy) else None))  # fmt: skip
    yield _roofline_table(rows, measured)


def _roofline_table(rows: Sequence[Row], measured: Mapping[str, Any]) -> Table:
    def of_contenders(key: str, head: str, text: Callable[[Any], str]) -> list[tuple[str, list[str]]]:
        names = in_order(name for row in rows for name in row.info.get(key) or {})
        found = {name: [(row.info.get(key) or {}).get(name) for row in rows] for name in names}
        return [(f"{head} {name}", [text(value) for value in values]) for name, values in found.items()]

    def over(numerator: Any, denominator: Any) -> float | None:
        return numerator / denominator if is_number(numerator) and is_number(denominator) and denominator else None

    peak = measured.get("flops_per_second")
    per_second = [over(row.info.get("flops"), row.seconds[OURS]) for row in rows]
    columns = [
        ("row", [row.label for row in rows]),
        ("cache", [cache_state(row.info) for row in rows]),
        ("passes", [_count(row.info.get("passes")) for row in rows]),
        ("MB", [scaled(row.info.get("bytes"), 1e-6) for row in rows]),
        ("GB/s", [scaled(bytes_per_second(row), 1e-9) for row in rows]),
        ("of copy", [percent(share_of_copy(row, measured)) for row in rows]),
        ("GFLOP/s", [scaled(value, 1e-9) for value in per_second]),
        ("of fp32 peak", [percent(over(value, peak)) for value in per_second]),
        *of_contenders("peak_bytes", "peak MB,", lambda value: scaled(value, 1e-6)),
        *of_contenders("compile_seconds", "seconds to compile,", lambda value: scaled(value, 1.0)),
        *of_contenders("launches", "launches,", _count),
    ]
    columns = [(head, cells) for head, cells in columns if any(cell != NONE for cell in cells)]
    words = 1 + any(head == "cache" for head, _ in columns)
    return Table([head for head, _ in columns], list(zip(*(cells for _, cells in columns), strict=True)), words)


def _count(value: Any) -> str:
    return f"{value:g}" if is_number(value) else NONE


def growth(sweeps: Iterable[Sweep]) -> Iterator[Block]:
    sweeps = [sweep for sweep in sweeps if not sweep.failed]
    if not sweeps:
        return
    yield Heading(2, "Sweeps")
    yield Paragraph(
        "The slope is the exponent of time as a power of the parameter: a least-squares fit of logarithms to the upper "
        "half of the values, since small inputs show overhead. The cost of a doubling is the ratio of medians of "
        "neighbouring values; a step by another factor s is converted to it by the power 1 / log2(s). More than "
        f"{TOO_MUCH} is flagged."
    )
    flags = [
        f"{sweep.name}, {contender}: {step.low:g} to {step.high:g} costs × {step.factor:.2f} per doubling"
        for sweep in sweeps
        for contender in sweep.contenders
        for step in sweep.steps(contender)
        if step.flagged
    ]
    yield Paragraph("Flagged:" if flags else f"No doubling costs more than {TOO_MUCH}.")
    if flags:
        yield Bullets(flags)
    for sweep in sweeps:
        yield Heading(3, sweep.name)
        yield _points(sweep)
        yield _slopes(sweep)
        if sweep.info.get("cold") is False:
            yield Paragraph("Inputs may come from caches.")
        if sweep.not_timed:
            yield Paragraph("Not timed: " + "; ".join(f"{rival}: {why}" for rival, why in sweep.not_timed.items()))
        if any(value > 0 for value in sweep.values):
            yield Figure(f"{sweep.name}: median time against {sweep.axis}, dashed where the slope is fitted.",
                         partial(sweep_plot, sweep))  # fmt: skip


def _points(sweep: Sweep) -> Table:
    rivals = in_order(sweep.ratios)
    rows = [
        (f"{value:g}", milliseconds(sweep.seconds[OURS][value]),
         *(ratio_cell(sweep.ratios[rival].get(value)) for rival in rivals))
        for value in sweep.values
    ]  # fmt: skip
    return Table((sweep.axis, "ours, ms", *rivals), rows, words=0)


def _slopes(sweep: Sweep) -> Table:
    pairs = sorted({(step.low, step.high) for contender in sweep.contenders for step in sweep.steps(contender)})
    expected = NONE if sweep.expected_slope is None else f"{sweep.expected_slope:g}"
    rows = []
    for contender in sweep.contenders:
        slope = sweep.slope(contender)
        costs = {(step.low, step.high): step for step in sweep.steps(contender)}
        cells = [
            NONE if step is None else Cell(f"{step.factor:.2f} (!)", "slower") if step.flagged else f"{step.factor:.2f}"
            for step in map(costs.get, pairs)
        ]
        rows.append((contender, NONE if slope is None else f"{slope:.2f}", expected, *cells))
    return Table(("contender", "slope", "expected slope", *(f"{low:g} → {high:g}" for low, high in pairs)), rows)
