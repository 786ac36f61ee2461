"""Run the benchmarks on this machine's CPU, then draw the report.

    python -m bench.run [--full] [--threads 2] [--only text] [--no-compile] [--output build/bench]

Measurements are kept even if some benchmarks fail; the report lists the failures.
"""

import argparse
import shlex
import sys
from pathlib import Path

import pytest

from bench.report import run as report

BENCH = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description="Time kdkernels against its rivals and write a report.")
    parser.add_argument("--full", action="store_true", help="run all rows and modes instead of the quick set")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: two, or one on a single core)")
    parser.add_argument("--only", default="", help="benchmarks that match, as with pytest -k")
    parser.add_argument("--no-compile", action="store_true", help="time ops without torch.compile")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="default: build/bench")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    measured = options.output / "report.json"
    measured.unlink(missing_ok=True)
    command = shlex.join(["python", "-m", "bench.run", *sys.argv[1:]])
    arguments = [
        str(BENCH), "-q", "-c", str(BENCH / "pytest.ini"), "--rootdir", str(BENCH), f"--benchmark-json={measured}",
        f"--written-as={command}", "-p", "no:cacheprovider", "--benchmark-warmup=off", "--benchmark-columns=median",
        *["--full"] * options.full, *["--no-compile"] * options.no_compile,
    ]  # fmt: skip
    arguments += [f"--threads={options.threads}"] if options.threads else []
    arguments += ["-k", options.only] if options.only else []
    status = int(pytest.main(arguments))
    if not measured.exists():
        print("nothing was measured", file=sys.stderr)
        return status or 1
    report.main([str(measured), "--output", str(options.output)])
    return status


if __name__ == "__main__":
    sys.exit(main())
