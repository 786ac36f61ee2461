"""Run the benchmarks on this machine's CPU, then write the report.

    python -m bench.run [--full] [--threads 2] [--only text] [--output build/bench]

What pytest-benchmark measured is kept even if some of the benchmarks failed: they are in the report.
"""

import argparse
import sys
from pathlib import Path

import pytest

from bench.report import run as report

BENCH = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description="Time kdkernels against its rivals and write a report.")
    parser.add_argument("--full", action="store_true", help="all rows and modes, not the chosen set")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: two, or one where there is no second core)")
    parser.add_argument("--only", default="", help="benchmarks that match, as with pytest -k")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="default: build/bench")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    measured = options.output / "benchmark.json"
    measured.unlink(missing_ok=True)
    command = "make bench-full" if options.full else "make bench"
    if options.only or options.threads:
        command = " ".join(["python -m bench.run", *sys.argv[1:]])
    arguments = [
        str(BENCH), "-q", "-c", str(BENCH / "pytest.ini"), "--rootdir", str(BENCH), f"--benchmark-json={measured}",
        f"--written-as={command}", "-p", "no:cacheprovider", "--benchmark-warmup=off", "--benchmark-columns=median",
    ]  # fmt: skip
    arguments += ["--full"] if options.full else []
    arguments += [f"--threads={options.threads}"] if options.threads else []
    arguments += ["-k", options.only] if options.only else []
    status = int(pytest.main(arguments))
    if not measured.exists():
        print("nothing was measured", file=sys.stderr)
        return status or 1
    written = report.main([str(measured), "--output", str(options.output)])
    return status or written


if __name__ == "__main__":
    sys.exit(main())
