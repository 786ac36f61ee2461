"""Write the report of the benchmark suite: report.md, report.html and report.json.

    python -m bench.report.run INPUT.json --output FOLDER [--readme README.md]

The input is what pytest-benchmark wrote with --benchmark-json, or an earlier report.json, which gives the same report.
With --readme the table between the two markers in that file is replaced.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.report.data import dump, load
from bench.report.readme import insert_table
from bench.report.render import markdown, page
from bench.report.tables import contents


def write(report: Mapping[str, Any], folder: Path) -> None:
    blocks = contents(report)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(dump(report), encoding="utf-8")
    (folder / "report.md").write_text(markdown(blocks), encoding="utf-8")
    (folder / "report.html").write_text(page("kdkernels: benchmark report", blocks), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the report of the benchmark suite.")
    parser.add_argument("input", type=Path, help="of pytest-benchmark's --benchmark-json, or an earlier report.json")
    parser.add_argument("--output", type=Path, required=True, help="the folder of the report")
    parser.add_argument("--readme", type=Path, help="the file whose benchmark table is replaced")
    options = parser.parse_args(arguments)
    report = load(options.input)
    write(report, options.output)
    print(f"written to {options.output}: report.md, report.html, report.json")
    if options.readme:
        text = options.readme.read_text(encoding="utf-8")
        options.readme.write_text(insert_table(text, report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
