"""Qualify kdkernels on a machine with an NVIDIA GPU, within nine minutes: build it, test it, sanitize it, time it.

    python -m bench.gpu.run [--output build/gpu] [--only build,benchmark] [--dry]

It uses the interpreter that starts it and the packages installed there, and needs neither a network nor root rights.
Each step is a separate process with a time budget, after which it is stopped; its results until then are in the
report, which is rewritten after each step: OUTPUT/report.json, report.md, and report.html if matplotlib is installed
(`python -m bench.report.run` draws it from the JSON elsewhere). The package, logs and caches are in a folder beside
OUTPUT. --dry runs what needs no device.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.part import read_part
from bench.report.files import write
from bench.report.qualification import verdict

ROOT = Path(__file__).resolve().parents[2]
# Exit statuses of a step; any other is a failure.
PASSED, CUT, NOT_AVAILABLE = 0, 3, 4
STATES = {PASSED: "passed", CUT: "cut", NOT_AVAILABLE: "not available"}
TOTAL_SECONDS = 525.0
GRACE_SECONDS = 2.0  # from SIGINT to SIGKILL


@dataclass(frozen=True)
class Step:
    """A process with a budget in seconds, which writes its results to the file that KDKERNELS_PART names."""

    name: str
    seconds: float
    command: tuple[str, ...]


def end(process: subprocess.Popen, grace: float = GRACE_SECONDS) -> None:
    """Stop a process and everything that it started, which form a process group."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(grace)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run_step(step: Step, work: Path, environment: dict[str, str], seconds: float) -> dict[str, Any]:
    """Run a step within a number of seconds, and return its entry in the report."""
    part, log = work / f"{step.name}.json", work / f"{step.name}.txt"
    work.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    start = time.monotonic()
    environment = {**environment, "KDKERNELS_PART": str(part), "KDKERNELS_SECONDS": str(seconds)}
    with log.open("w") as output:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            state = STATES.get(process.wait(seconds), "failed")
        except subprocess.TimeoutExpired:
            state = "cut"
        finally:
            end(process)  # including anything that the step left running
    content = read_part(part)
    text = log.read_text(errors="replace").strip()
    summary = content.pop("summary", "") or (text.splitlines() or ["nothing was written"])[-1][:200]
    return {
        "name": step.name,
        "state": state,
        "seconds": round(time.monotonic() - start, 2),
        "budget": step.seconds,
        "summary": summary,
        "part": content,
        "log": str(log),
        "log_tail": "\n".join(text.splitlines()[-25:])[-4000:],
    }


def run_steps(
    steps: Iterable[Step],
    folder: Path,
    work: Path,
    environment: dict[str, str],
    *,
    dry: bool,
    total: float = TOTAL_SECONDS,
) -> dict[str, Any]:
    """Run the steps one after the other, even if some fail; write the report after each step, and return it.

    If the results of a step include an environment, a roofline or benchmarks, these move to the top of the report.
    """
    start, steps = time.monotonic(), tuple(steps)
    report: dict[str, Any] = {
        "dry_run": dry, "begun": time.strftime("%Y-%m-%d %H:%M:%S"), "seconds": 0.0, "finished": False,
        "environment": {}, "roofline": {}, "steps": [], "benchmarks": [],
    }  # fmt: skip
    for step in steps:
        left = total - (time.monotonic() - start)
        print(f"== {step.name}: {min(step.seconds, left):.0f} s at most", flush=True)
        entry = run_step(step, work, environment, max(min(step.seconds, left), 0.1))
        for key in ("environment", "roofline", "benchmarks"):
            report[key] = entry["part"].pop(key, report[key])
        report["steps"].append(entry)
        report["seconds"] = round(time.monotonic() - start, 2)
        report["finished"] = step is steps[-1]
        write(report, folder)
        print(f"   {entry['state']} after {entry['seconds']:.0f} s: {entry['summary']}", flush=True)
        if step.name == "environment" and entry["state"] == "failed":
            break  # nothing can run without PyTorch, or without a GPU
    return report


def passed(report: dict[str, Any]) -> bool:
    return report["finished"] and all(step["state"] in {"passed", "not available"} for step in report["steps"])


def interpreter(dry: bool) -> str:
    """Return this interpreter, or that of `make test` for a dry run if this one has no PyTorch."""
    made = ROOT / ".venv" / "bin" / "python"
    if dry and made.exists() and subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode:
        print(f"{sys.executable} has no PyTorch; the dry run uses {made}", flush=True)
        return str(made)
    return sys.executable


def unpacked_wheels(folder: Path) -> list[str]:
    """Unpack the wheels in the folder KDKERNELS_WHEELS, rivals for the benchmark; return the folders to import from."""
    wheels = os.environ.get("KDKERNELS_WHEELS")
    found = sorted(Path(wheels).glob("*.whl")) if wheels else []
    for wheel in found:
        zipfile.ZipFile(wheel).extractall(folder)
    return [str(folder)] if found else []


def work_beside(folder: Path, dry: bool) -> Path:
    """Return the folder in which the package is built and the steps write their parts and logs."""
    folder.mkdir(parents=True, exist_ok=True)
    parent = folder.parent if os.access(folder.parent, os.W_OK) else ROOT / "build"
    return parent / ("gpu-work-dry" if dry else "gpu-work")


def environment_of(work: Path, python: str, dry: bool) -> dict[str, str]:
    """Return the environment of the steps: the package built here, and caches beside it."""
    paths = [str(work / "site"), *unpacked_wheels(work / "wheels"), str(ROOT)]
    paths += [path for path in (os.environ.get("PYTHONPATH"),) if path]
    return {
        **os.environ,
        "PATH": os.pathsep.join((str(Path(python).parent), os.environ.get("PATH", os.defpath))),  # ninja is beside it
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",  # imports the built package, not the sources in the current folder
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "KDKERNELS_WORK": str(work),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic algorithms need it for matrix products
        "KDKERNELS_DRY": "1" if dry else "0",
    }


def steps_of(python: str, dry: bool) -> list[Step]:
    def step(name: str, seconds: float, module: str = "steps") -> Step:
        return Step(name, seconds, (python, "-m", f"bench.gpu.{module}", name))

    benchmark = step("benchmark", 60 if dry else 150, "benchmark")
    steps = [step("environment", 30), step("build", 120), step("correctness", 90 if dry else 180)]
    return [*steps, benchmark] if dry else [*steps, step("sanitizer", 60), benchmark, step("profile", 20)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Qualify kdkernels on a machine with an NVIDIA GPU.")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build/gpu", help="folder of the report; default: build/gpu"
    )
    parser.add_argument("--only", default="", help="steps to run, separated by commas; an earlier build is kept")
    parser.add_argument("--dry", action="store_true", help="run only what needs no device")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also stops the step
    folder = options.output.resolve()
    python = interpreter(options.dry)
    steps = steps_of(python, options.dry)
    unknown = set(filter(None, options.only.split(","))) - {step.name for step in steps}
    if unknown:
        parser.error(f"no step is called {', '.join(sorted(unknown))}; steps are {', '.join(s.name for s in steps)}")
    if options.only:
        steps = [step for step in steps if step.name in options.only.split(",")]
    work = work_beside(folder, options.dry)
    report = run_steps(steps, folder, work, environment_of(work, python, options.dry), dry=options.dry)
    print(f"{'dry run: ' if options.dry else ''}{verdict(report)} The report: {folder / 'report.md'}", flush=True)
    return 0 if passed(report) else 1


if __name__ == "__main__":
    sys.exit(main())
