"""The contents of the report: what was measured and how, where we lose, and everything else in tables."""

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Any

from bench.report.data import OURS, Goal, Row, goals_of, in_order, is_number, rivals_of, rows_of, timed
from bench.report.formatting import NONE, factor, milliseconds, ratio_cell, significant
from bench.report.measured import growth, operators, roofline, routines
from bench.report.render import Block, Cell, Heading, Paragraph, Table
from bench.report.sweeps import Sweep, sweeps_of
from kdkernels.testing.timing import Ratio

METHOD = (
    "In every round each contender is called once, in turn, so that a machine's moods hit all of them alike. "
    "Before every call the gradients are set to None. Each timed call follows another of the same that does not count; "
    "its inputs are others than those of the calls before and come from memory (cold), except where marked warm. "
    "A contender is timed only after its results agreed with the truth; one that did not is listed without a speed. "
    "Times are medians of the rounds. "
    "A ratio is the median, over the rounds, of a rival's time divided by ours in the same round, its spread is that "
    "from the 10th to the 90th percentile, and where the spread straddles 1 the verdict is a tie."
)
LABELS = {"memory_bytes": "memory", "torch": "PyTorch", "instruction_set": "instruction set", "triton": "Triton"}


def contents(report: Mapping[str, Any]) -> list[Block]:
    rows, sweeps = rows_of(report), sweeps_of(report)
    return [
        Heading(1, "kdkernels: benchmark report"),
        *environment(report["environment"], report["roofline"]),
        *summary(rows, sweeps),
        *losses(rows, sweeps),
        *goals(goals_of(rows, report["roofline"])),
        *failures(rows, sweeps),
        *operators(timed(rows, "op")),
        *roofline(timed(rows, "op") + timed(rows, "routine"), report["roofline"]),
        *routines(timed(rows, "routine")),
        *growth(sweeps),
        *accuracy([row for row in rows if not row.failed]),
    ]


def environment(recorded: Mapping[str, Any], measured: Mapping[str, Any]) -> Iterator[Block]:
    yield Heading(2, "Environment and method")
    facts = [
        (LABELS.get(key, key.replace("_", " ")), _fact(key, value))
        for key, value in recorded.items()
        if key != "rivals" and value not in (None, "", {})
    ]
    if is_number(measured.get("copy_bytes_per_second")):
        speed = f"{significant(measured['copy_bytes_per_second'] / 1e9)} GB/s, reads and writes counted"
        facts.append(("measured copy bandwidth", speed))
    if is_number(measured.get("flops_per_second")):
        facts.append(("measured fp32 matrix product", f"{significant(measured['flops_per_second'] / 1e9)} GFLOP/s"))
    yield Table(("", "value"), facts, words=2) if facts else Paragraph("The environment was not recorded.")
    rivals = recorded.get("rivals") or {}
    if rivals:
        yield Table(("rival", "version"), [(name, str(version)) for name, version in rivals.items()], words=2)
    yield Paragraph(METHOD)


def _fact(key: str, value: Any) -> str:
    if key == "memory_bytes" and is_number(value):
        return f"{value / 2**30:.3g} GiB"
    if key == "caches" and isinstance(value, Mapping):
        sizes = {name: f"{n / 2**20:.3g} MiB" if is_number(n) else str(n) for name, n in value.items()}
        return ", ".join(f"{name} {size}" for name, size in sizes.items())
    return str(value)


def summary(rows: Sequence[Row], sweeps: Sequence[Sweep]) -> Iterator[Block]:
    yield Heading(2, "Summary")
    counts = {
        "rows of ops": len(timed(rows, "op")),
        "rows of routines": len(timed(rows, "routine")),
        "sweeps": sum(not sweep.failed for sweep in sweeps),
        "failed": sum(bool(one.failed) for one in (*rows, *sweeps)),
    }
    yield Paragraph(f"{', '.join(f'{name}: {count}' for name, count in counts.items())}.")
    lines = []
    for rival in rivals_of(rows):
        found = [row.rivals[rival] for row in rows if rival in row.rivals]
        missing = sum(rival in row.not_timed for row in rows)
        if found or not any(rival in row.ratios for row in rows):
            lines.append((rival, "rows", *_tally(found), str(missing)))
    for rival in in_order(name for sweep in sweeps for name in sweep.ratios):
        found = [ratio for sweep in sweeps for ratio in sweep.ratios.get(rival, {}).values()]
        lines.append((rival, "points of sweeps", *_tally(found), NONE))
    if lines:
        head = ("rival", "compared on", "number", "kdkernels is faster", "ties", "kdkernels is slower", "not timed")
        yield Table(head, lines, words=2)
    else:
        yield Paragraph("Nothing was compared in this run.")


def _tally(ratios: Sequence[Ratio]) -> tuple[str, ...]:
    verdicts = [ratio.verdict for ratio in ratios]
    return (str(len(ratios)), *(str(verdicts.count(verdict)) for verdict in ("faster", "tie", "slower")))


def losses(rows: Sequence[Row], sweeps: Sequence[Sweep]) -> Iterator[Block]:
    yield Heading(2, "Where kdkernels does not win")
    compared = [
        (row.label, rival, row.seconds[OURS], row.seconds[rival], ratio)
        for row in rows
        for rival, ratio in row.rivals.items()
    ] + [
        (f"{sweep.name}: {sweep.parameter} = {value:g}", rival, sweep.seconds[OURS][value],
         sweep.seconds[rival][value], ratio)
        for sweep in sweeps
        for rival, ratios in sweep.ratios.items()
        for value, ratio in ratios.items()
    ]  # fmt: skip
    behind = sorted((c for c in compared if c[4].verdict != "faster"), key=lambda c: (c[4].verdict, c[4].median))
    if not behind:
        yield Paragraph("Nowhere in this run." if compared else "Nothing was compared in this run.")
        return
    yield Paragraph(f"All {len(behind)} of {len(compared)} comparisons, losses first, then ties:")
    cells = [(name, rival, milliseconds(ours), milliseconds(theirs), ratio_cell(r))
             for name, rival, ours, theirs, r in behind]  # fmt: skip
    yield Table(("row", "rival", "ours, ms", "rival, ms", "rival / ours"), cells, words=2)


def goals(judged: Sequence[Goal]) -> Iterator[Block]:
    if not judged:
        return
    yield Heading(2, "Goals")
    known, missed = [g for g in judged if g.measured is not None], [g for g in judged if g.missed]
    open_goals = [g for g in judged if g.measured is None]
    yield Paragraph(
        f"{len(known) - len(missed)} met, {len(missed)} missed, {len(open_goals)} not judged. "
        "Faster than compile means: than the faster of its modes that were timed."
    )
    if missed:
        cells = [
            (g.row.label, g.name, g.note, factor(g.wanted), factor(g.measured or 0.0),
             f"{100 * (1 - (g.measured or 0.0) / g.wanted):.1f} %")
            for g in missed
        ]  # fmt: skip
        yield Table(("row", "goal", "against", "wanted", "measured", "short by"), cells, words=3)
    if open_goals:
        yield Paragraph("Not judged:")
        yield Table(("row", "goal", "why"), [(g.row.label, g.name, g.note) for g in open_goals], words=3)


def failures(rows: Sequence[Row], sweeps: Sequence[Sweep]) -> Iterator[Block]:
    yield Heading(2, "Failures, and what was not timed")
    failed = [(one.label if isinstance(one, Row) else one.name, one.failed) for one in (*rows, *sweeps) if one.failed]
    if failed:
        yield Paragraph("These have no speed, because a check failed or the run did not get to it:")
        yield Table(("row", "why"), [(name, Cell(why, "failed")) for name, why in failed], words=2)
    else:
        yield Paragraph("No row failed.")
    reasons: dict[tuple[str, str], int] = {}
    for one in (*rows, *sweeps):
        for item in one.not_timed.items():
            reasons[item] = reasons.get(item, 0) + 1
    if reasons:
        yield Paragraph("Rivals that were not timed:")
        cells = [(rival, why, str(count)) for (rival, why), count in sorted(reasons.items())]
        yield Table(("rival", "why", "rows and sweeps"), cells, words=2)


def accuracy(rows: Sequence[Row]) -> Iterator[Block]:
    rows = [row for row in rows if row.info.get("errors")]
    if not rows:
        return
    yield Heading(2, "Accuracy")
    yield Paragraph("The largest relative error against the truth, over all rows of a function in a dtype.")
    names = in_order(name for row in rows for name in row.info["errors"])
    worst: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        found = worst.setdefault((row.parts[0], row.parts[2]), {})
        for name, error in row.info["errors"].items():
            found[name] = max(error if is_number(error) else inf, found.get(name, 0.0))
    cells = [(*key, *(_error(found.get(name)) for name in names)) for key, found in worst.items()]
    yield Table(("function", "dtype", *names), cells, words=2)


def _error(worst: float | None) -> str:
    return NONE if worst is None else "not finite" if worst == inf else f"{worst:.1e}"
