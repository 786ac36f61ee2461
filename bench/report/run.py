"""Draw a report from its JSON: report.md, and report.html with plots.

    python -m bench.report.run INPUT.json --output FOLDER [--readme README.md]

The input is the report.json of a benchmark or of a qualification of a GPU. With --readme, the table between the two
markers of that file is replaced.
"""

import argparse
import sys
from pathlib import Path

from bench.report.files import load, write


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw a report from its JSON.")
    parser.add_argument("input", type=Path, help="report.json of a benchmark or of a qualification of a GPU")
    parser.add_argument("--output", type=Path, required=True, help="folder of the report")
    parser.add_argument("--readme", type=Path, help="file whose benchmark table is replaced")
    options = parser.parse_args(arguments)
    report = load(options.input)
    print(f"written to {options.output}: {', '.join(write(report, options.output))}")
    if options.readme:
        from bench.report.readme import insert_table  # needs PyTorch, which a report does not

        text = options.readme.read_text(encoding="utf-8")
        options.readme.write_text(insert_table(text, report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
