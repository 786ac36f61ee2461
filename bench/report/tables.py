"""The contents of the report: what was measured and how, where we lose, goals, failures, then every number."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Any

from bench.report import measured, qualification
from bench.report.data import OURS, Goal, Ratio, Row, goals_of, in_order, rivals_of, rows_of, timed
from bench.report.formatting import NONE, factor, milliseconds, ratio_cell, significant
from bench.report.render import Block, Cell, Heading, Paragraph, Table
from bench.report.sweeps import Sweep, sweeps_of

METHOD = (
    "In every round each contender is called once, in turn, so that changes of the machine's speed affect all of them. "
    "Gradients are set to None before every call. {clock} A contender is timed only if its results agree with the "
    "truth; otherwise it is listed without a speed. Times are medians of the rounds. A ratio is the median, over the "
    "rounds, of a rival's time divided by ours in the same round. Its spread reaches from the 10th to the 90th "
    "percentile; if it straddles 1, the verdict is a tie."
)
HOST_CLOCK = (
    "Each timed call follows an untimed one. Its inputs differ from those of the calls before and come from memory "
    "(cold), unless marked warm."
)
DEVICE_CLOCK = "Times are those of the device's work, between two events, and each call starts from a cold cache."
LABELS = {"memory_bytes": "memory", "torch": "PyTorch", "torch_cuda": "PyTorch's CUDA", "triton": "Triton"}


def contents(report: Mapping[str, Any]) -> list[Block]:
    rows, sweeps = rows_of(report), sweeps_of(report)
    copy = report["roofline"].get("copy_bytes_per_second")
    blocks: list[Block] = [
        Heading(1, f"kdkernels: {qualification.title(report)}"),
        *qualification.overview(report),
        *environment(report["environment"], copy),
    ]
    if rows or sweeps:
        blocks += [
            *summary(rows, sweeps),
            *goals(goals_of(rows, copy)),
            *failures(rows, sweeps),
            *measured.ops(timed(rows, "op")),
            *measured.roofline([row for row in rows if not row.failed], copy),
            *measured.graphs(timed(rows, "op")),
            *measured.routines(timed(rows, "routine")),
            *measured.growth([sweep for sweep in sweeps if not sweep.failed]),
            *accuracy([row for row in rows if not row.failed]),
        ]
    return [*blocks, *qualification.details(report)]


def environment(recorded: Mapping[str, Any], copy: float | None) -> Iterator[Block]:
    yield Heading(2, "Environment and method")
    facts = [(LABELS.get(key, key.replace("_", " ")), _fact(key, value)) for key, value in recorded.items() if value]
    if copy:
        facts.append(("measured copy bandwidth", f"{significant(copy, 1e-9)} GB/s, reads and writes counted"))
    yield Table(("", "value"), facts, words=2)
    clock = HOST_CLOCK if recorded.get("device", "cpu") == "cpu" else DEVICE_CLOCK
    yield Paragraph(METHOD.format(clock=clock))


def _fact(key: str, value: Any) -> str:
    if key == "memory_bytes":
        return f"{value / 2**30:.3g} GiB"
    if key == "caches":
        return ", ".join(f"{name} {size / 2**20:.3g} MiB" for name, size in value.items())
    return ", ".join(f"{name} {version}" for name, version in value.items()) if key == "rivals" else str(value)


def summary(rows: Sequence[Row], sweeps: Sequence[Sweep]) -> Iterator[Block]:
    """Count the comparisons that were won, and list the others."""
    yield Heading(2, "Summary")
    yield Paragraph(
        f"Rows of ops: {len(timed(rows, 'op'))}, rows of routines: {len(timed(rows, 'routine'))}, "
        f"sweeps: {sum(not sweep.failed for sweep in sweeps)}, failed: {sum(bool(o.failed) for o in (*rows, *sweeps))}."
    )
    of_rows = [(row.label, name, row.seconds, ratio) for row in rows for name, ratio in row.rivals.items()]
    of_sweeps = [
        (f"{sweep.name}: {value:g}", rival, seconds, ratio)
        for sweep in sweeps
        for value, (seconds, ratios) in sweep.points.items()
        for rival, ratio in ratios.items()
    ]
    missing = Counter(rival for row in rows if not row.failed for rival in row.not_timed)
    lines = [
        (rival, "rows", *_tally([ratio for _, name, _, ratio in of_rows if name == rival]), str(missing[rival]))
        for rival in rivals_of(rows)
        if any(name == rival for _, name, _, _ in of_rows) or (missing[rival] and not rival.startswith(OURS))
    ]
    lines += [
        (rival, "points of sweeps", *_tally([ratio for _, name, _, ratio in of_sweeps if name == rival]), NONE)
        for rival in in_order(name for _, name, _, _ in of_sweeps)
    ]
    head = ("rival", "compared on", "number", "kdkernels is faster", "ties", "kdkernels is slower", "not timed")
    yield Table(head, lines, words=2)
    yield Heading(2, "Where kdkernels does not win")
    compared = of_rows + of_sweeps
    behind = [comparison for comparison in compared if comparison[3].verdict != "faster"]
    if not behind:
        yield Paragraph("Nowhere in this run.")
        return
    yield Paragraph(f"{len(behind)} of {len(compared)} comparisons, losses first, then ties:")
    cells = [
        (label, rival, milliseconds(seconds[OURS]), milliseconds(seconds[rival]), ratio_cell(ratio))
        for label, rival, seconds, ratio in sorted(behind, key=lambda one: (one[3].verdict, one[3].median))
    ]
    yield Table(("row", "rival", "ours, ms", "rival, ms", "rival / ours"), cells, words=2)


def _tally(ratios: Sequence[Ratio]) -> tuple[str, ...]:
    verdicts = Counter(ratio.verdict for ratio in ratios)
    return (str(len(ratios)), *(str(verdicts[verdict]) for verdict in ("faster", "tie", "slower")))


def goals(judged: Sequence[Goal]) -> Iterator[Block]:
    if not judged:
        return
    yield Heading(2, "Goals")
    counts = Counter(goal.verdict for goal in judged)
    yield Paragraph(
        f"{counts['met']} met, {counts['missed']} missed, {counts['not judged']} not judged. "
        "The goal of being faster than compile is judged by the faster of its modes that were timed."
    )
    order = ("missed", "not judged", "met")
    cells = []
    for goal in sorted(judged, key=lambda goal: order.index(goal.verdict)):
        text = {"missed": f"missed by {100 * goal.short_by:.1f} %", "not judged": f"not judged: {goal.note}"}
        found = (goal.note, factor(goal.measured)) if goal.measured is not None else ("", NONE)
        verdict = Cell(text.get(goal.verdict, "met"), {"missed": "slower", "not judged": "tie"}.get(goal.verdict, ""))
        cells.append((goal.row.label, goal.name, found[0], verdict, factor(goal.wanted), found[1]))
    yield Table(("row", "goal", "against", "verdict", "wanted", "measured"), cells, words=4)


def failures(rows: Sequence[Row], sweeps: Sequence[Sweep]) -> Iterator[Block]:
    yield Heading(2, "Failures, and what was not timed")
    failed = [(one.label if isinstance(one, Row) else one.name, one.failed) for one in (*rows, *sweeps) if one.failed]
    if failed:
        yield Paragraph("These have no speed, because a check failed or the run did not reach them:")
        yield Table(("row", "why"), [(name, Cell(why, "failed")) for name, why in failed], words=2)
    else:
        yield Paragraph("No row failed.")
    reasons = Counter(item for one in (*rows, *sweeps) if not one.failed for item in one.not_timed.items())
    if reasons:
        yield Paragraph("Rivals that were not timed:")
        cells = [(rival, why, str(count)) for (rival, why), count in sorted(reasons.items())]
        yield Table(("rival", "why", "rows and sweeps"), cells, words=2)


def accuracy(rows: Sequence[Row]) -> Iterator[Block]:
    worst: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        for name, error in (row.info.get("errors") or {}).items():
            found = worst.setdefault((row.parts[0], row.parts[2]), {})
            found[name] = max(inf if error is None else error, found.get(name, 0.0))
    if not worst:
        return
    yield Heading(2, "Accuracy")
    yield Paragraph("The largest relative error against the truth, over all rows of a function in a dtype.")
    names = in_order(name for found in worst.values() for name in found)
    cells = [(*key, *(_error(found.get(name)) for name in names)) for key, found in worst.items()]
    yield Table(("function", "dtype", *names), cells, words=2)


def _error(worst: float | None) -> str:
    return NONE if worst is None else "not finite" if worst == inf else f"{worst:.1e}"
