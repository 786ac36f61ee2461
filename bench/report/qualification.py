"""What a report on a GPU has beyond that of a benchmark: the steps of the qualification and their results."""

from collections.abc import Iterator, Mapping
from typing import Any

from bench.report.render import Block, Bullets, Cell, Code, Heading, Paragraph, Table

LOOKS = {"failed": "failed", "cut": "tie"}


def title(report: Mapping[str, Any]) -> str:
    if "steps" not in report:
        return "benchmark report"
    return "dry run" if report["dry_run"] else "qualification on a GPU"


def verdict(report: Mapping[str, Any]) -> str:
    bad = [f"{step['name']} {step['state']}" for step in report["steps"] if step["state"] in LOOKS]
    if bad:
        return f"Not passed: {', '.join(bad)}."
    return "Every step passed." if report["finished"] else "Every step so far passed."


def overview(report: Mapping[str, Any]) -> Iterator[Block]:
    if "steps" not in report:
        return
    if report["dry_run"]:
        yield Paragraph("This is a dry run: nothing ran on a device, sizes are tiny, and no number below is a claim.")
    yield Paragraph(verdict(report), strong=True)
    yield Paragraph(f"Begun {report['begun']}; {report['seconds']:.0f} s so far.")
    cells = [
        (step["name"], Cell(step["state"], LOOKS.get(step["state"], "")), step["summary"],
         f"{step['seconds']:.1f}", f"{step['budget']:g}")
        for step in report["steps"]
    ]  # fmt: skip
    yield Table(("step", "state", "summary", "seconds", "budget"), cells, words=3)


def details(report: Mapping[str, Any]) -> Iterator[Block]:
    for step in report.get("steps", ()):
        facts = {key: value for key, value in step["part"].items() if key != "runs"}
        runs, log = step["part"].get("runs", ()), step["log_tail"] if step["state"] in LOOKS else ""
        if facts or runs or log:
            yield Heading(2, f"Step: {step['name']}")
        if facts:
            yield Bullets([f"{name.replace('_', ' ')}: {value}" for name, value in facts.items()])
        yield from test_runs(runs)
        if log:
            yield Paragraph("The end of its log:")
            yield Code(log)


def test_runs(runs: list[Mapping[str, Any]]) -> Iterator[Block]:
    if not runs:
        return
    counts = ("passed", "failed", "skipped", "collected")
    cells = [
        (run["name"], run["target"], Cell(run["state"], LOOKS.get(run["state"], "")),
         *(str(run[key]) for key in counts), f"{run['seconds']:.0f}")
        for run in runs
    ]  # fmt: skip
    yield Table(("tests", "target", "state", *counts, "seconds"), cells, words=3)
    for run in runs:
        notes = [f"FAILED {failure['test']}: {failure['message']}" for failure in run["failures"][:20]]
        notes += [f"and {run['failed'] - 20} more of {run['name']}"] if run["failed"] > 20 else []
        notes += [f"skipped in {run['name']}: {reason}" for reason in run["skip_reasons"][:10]]
        if notes:
            yield Bullets(notes)
        if run["log_tail"]:
            yield Paragraph(f"The end of the log of {run['name']}:")
            yield Code(run["log_tail"])
