"""The report of a qualification run: what is on disk is always whole, as JSON and as Markdown."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

MODES = ("forward", "backward", "full")
RIVALS = ("eager", "compile", "compile max-autotune", "liger", "torchmetrics", "kornia", "triton")


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a run that is killed, finds the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.write_text(text)
    new.replace(path)


class Part:
    """What a step has found out so far. It is on disk after every addition, so that a step may be cut at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {}

    def add(self, **values: Any) -> None:
        self.content.update(values)
        write_whole(self.path, json.dumps(self.content, indent=2) + "\n")


def read_part(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    write_whole(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_whole(folder / "report.md", "\n".join(markdown(report)) + "\n")


def markdown(report: Mapping[str, Any]) -> Iterator[str]:
    title = "dry run" if report["dry_run"] else "qualification on a GPU"
    yield f"# kdkernels: {title}"
    yield ""
    if report["dry_run"]:
        yield "This is a dry run: nothing ran on a device, the sizes are tiny, and no number below is a claim."
        yield ""
    yield f"Begun {report['begun']}, {report['seconds']:.0f} s so far. {verdict(report)}"
    yield ""
    yield from table(
        ("step", "state", "seconds", "budget", "summary"),
        [(s["name"], s["state"], f"{s['seconds']:.1f}", f"{s['budget']:g}", s["summary"]) for s in report["steps"]],
    )
    for step in report["steps"]:
        yield ""
        yield f"## {step['name'].capitalize()}"
        yield ""
        yield from SECTIONS.get(step["name"], _plain)(step["part"])
        if step["state"] in {"failed", "cut"} and step["log_tail"]:
            yield from ("", "The end of its log:", "", "```", *step["log_tail"].splitlines(), "```")


def verdict(report: Mapping[str, Any]) -> str:
    bad = [f"{s['name']} {s['state']}" for s in report["steps"] if s["state"] in {"failed", "cut"}]
    if bad:
        return f"**Not passed: {', '.join(bad)}.**"
    return "**Every step passed.**" if report["finished"] else "Every step so far passed."


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    head = tuple(head)
    for row in (head, ("---",) * len(head), *rows):
        yield "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |"


def _plain(part: Mapping[str, Any]) -> Iterator[str]:
    if not part:
        yield "Nothing was found out."
    for name, value in part.items():
        yield f"- {name.replace('_', ' ')}: {value}"


def _correctness(part: Mapping[str, Any]) -> Iterator[str]:
    runs = part.get("runs", [])
    yield from table(
        ("tests", "target", "state", "passed", "failed", "skipped", "collected", "seconds"),
        [
            (r["name"], r["target"], r["state"], r["passed"], r["failed"], r["skipped"], r["collected"],
             f"{r['seconds']:.0f}")
            for r in runs
        ],
    )  # fmt: skip
    for run in runs:
        for failure in run["failures"][:20]:
            yield f"- FAILED {failure['test']}: {failure['message']}"
        if run["log_tail"]:
            yield from ("", f"The end of the log of {run['name']}:", "", "```", *run["log_tail"].splitlines(), "```")
        if len(run["failures"]) > 20:
            yield f"- and {len(run['failures']) - 20} more of {run['name']}"
        for reason in run["skip_reasons"][:10]:
            yield f"- skipped in {run['name']}: {reason}"


def _benchmark(part: Mapping[str, Any]) -> Iterator[str]:
    bandwidth, rows = part.get("copy_bandwidth"), part.get("rows", [])
    if bandwidth:
        yield f"Measured copy bandwidth, reads and writes: {bandwidth / 1e9:.0f} GB/s."
        yield "Bytes are those of the passes over the large tensors that the documentation of the op states."
        yield "Times are medians of interleaved rounds, from a cold cache, of the device's work."
    yield from ("", "Forward and backward, in ms, and how many times as long each rival takes:", "")
    yield from table(
        ("case", "native ms", *(f"x {rival}" for rival in RIVALS), *(f"of copy, {mode}" for mode in MODES)),
        [
            (row["name"], _number(row["seconds"].get("native", {}).get("full"), 1e3, 4),
             *(_ratio(row, rival) for rival in RIVALS),
             *(_share(row["bytes_per_second"].get(m), bandwidth) for m in MODES))
            for row in rows
        ],
    )  # fmt: skip
    graphs = [row for row in rows if row.get("graph")]
    if graphs:
        yield from ("", "Under a CUDA graph, for a forward and a backward:", "")
        heads = ("microseconds", "launches_forward", "launches_backward", "why_not")
        yield from table(
            ("case", "rival", *(head.replace("_", " ") for head in heads)),
            [(row["name"], rival, *(graph.get(head, "-") for head in heads))
             for row in graphs for rival, graph in row["graph"].items()],
        )  # fmt: skip
    targets = [(t["name"], row["name"], t["goal"], t["measured"], t["verdict"]) for row in rows for t in row["targets"]]
    if targets:
        yield from ("", "Targets:", "")
        yield from table(("target", "case", "goal", "measured", "verdict"), targets)
    yield from ("", "Everything that was timed, in ms:", "")
    yield from table(
        ("case", "rival", *MODES, "GB/s, full", "MB beyond the inputs", "relative error", "note"),
        [cells for row in rows for cells in _rivals(row)],
    )
    for name in part.get("not_reached", []):
        yield f"- not reached in the time: {name}"


def _ratio(row: Mapping[str, Any], rival: str) -> str:
    ours, theirs = (row["seconds"].get(name, {}).get("full") for name in ("native", rival))
    if ours and theirs:
        return f"{theirs / ours:.2f}"
    return row["not_timed"].get(rival, "-").partition(":")[0]


def _rivals(row: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    errors = {rival: f"{error:.0e}" for rival, error in row["errors"].items()}
    for rival, seconds in row["seconds"].items():
        times = (_number(seconds.get(mode), 1e3, 4) for mode in MODES)
        speed = row["bytes_per_second"].get("full") if rival == "native" else None
        peak = _number(row["peak_bytes"].get(rival), 1e-6)
        yield (row["name"], rival, *times, _number(speed, 1e-9), peak, errors.get(rival, "-"), "")
    for rival, reason in row["not_timed"].items():
        yield (row["name"], rival, *("-",) * (len(MODES) + 2), errors.get(rival, "-"), reason)


def _number(value: float | None, scale: float, digits: int = 0) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


def _share(value: float | None, bandwidth: float | None) -> str:
    return "-" if value is None or not bandwidth else f"{100 * value / bandwidth:.0f} %"


SECTIONS = {"correctness": _correctness, "benchmark": _benchmark}


def judge(row: Mapping[str, Any], goals: Mapping[str, float], bandwidth: float | None) -> list[dict[str, Any]]:
    """Compare a row with its goals: met, MISSED, or why nothing can be said."""
    verdicts = []
    ours = row["seconds"].get("native", {}).get("full")
    for name, goal in goals.items():
        measured, reason = None, row["not_timed"].get("native")
        at_most = name in {"graph microseconds", "launches forward", "launches backward"}
        if at_most:
            graph = row.get("graph", {}).get("native", {})
            measured = graph.get(name.replace("graph ", "").replace(" ", "_"))
            reason = reason or graph.get("why_not")
        elif name == "share of copy bandwidth":
            speed = row["bytes_per_second"].get("full")
            measured = speed / bandwidth if speed and bandwidth else None
        else:
            rival = name.removeprefix("faster than ")
            # torch.compile is what its faster mode is.
            modes = [times["full"] for name, times in row["seconds"].items() if name.partition(" ")[0] == rival]
            full = min(modes, default=None)
            measured = full / ours if full and ours else None
            reason = reason or row["not_timed"].get(rival)
        met = measured is not None and (measured <= goal if at_most else measured >= goal)
        verdicts.append(
            {
                "name": name,
                "goal": f"{'<=' if at_most else '>='} {goal:g}",
                "measured": "-" if measured is None else f"{measured:.2f}",
                "verdict": f"not judged: {reason or 'not measured'}"
                if measured is None
                else "met"
                if met
                else "MISSED",
            }
        )
    return verdicts
