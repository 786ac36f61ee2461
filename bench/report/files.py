"""A report on disk: report.json, which is the record, and report.md and report.html, which are drawn from it."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.report.render import markdown, page
from bench.report.tables import contents


def write_whole(path: Path, text: str) -> None:
    """Replace a file atomically: a reader sees the old text or the new one, even if the run is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def rounded(value: Any) -> Any:
    """Return every number with four significant digits, and null for those that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def dump(report: Mapping[str, Any]) -> str:
    """Return a report as JSON with one benchmark per line, so that versions of it can be compared."""
    head = (
        f'"{key}": {json.dumps(value, ensure_ascii=False)},\n' for key, value in report.items() if key != "benchmarks"
    )
    lines = ",\n".join(json.dumps(benchmark, ensure_ascii=False) for benchmark in report["benchmarks"])
    return "{\n" + "".join(head) + '"benchmarks": [\n' + lines + "\n]\n}\n"


def write(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Write a report and return the names of its files; the HTML page is left out without matplotlib."""
    report = {**report, "benchmarks": rounded(report["benchmarks"])}
    blocks = contents(report)
    write_whole(folder / "report.json", dump(report))
    write_whole(folder / "report.md", markdown(blocks))
    try:
        write_whole(folder / "report.html", page(blocks))
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return ["report.md", "report.json"]
    return ["report.md", "report.html", "report.json"]
