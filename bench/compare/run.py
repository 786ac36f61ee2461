"""Time every op of this tree against another git revision, round by round.

    python -m bench.compare.run --base main [--only text]

The base is exported to build/compare/<revision>/ and built there, once. Two versions of the package cannot be loaded in
one process, so each runs in a separate one; they take turns, and the waiting one is idle. Both run the workloads of
this tree, on the CPU, on the same inputs, and speeds are compared only if the results agree. What the base lacks is
reported.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from bench.machine import commit
from bench.report.data import Ratio, pairwise_ratio
from bench.report.formatting import milliseconds, ratio_cell
from bench.report.render import Bullets, Paragraph, Table, markdown

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "build" / "compare"
WORKER = Path(__file__).with_name("worker.py")
THREADS = 2
ROUNDS, SECONDS = 15, 10.0  # limits for each workload
ROUND_SECONDS = 0.05  # approximate length of a turn, much longer than a switch between the processes
TOLERANCE = 1e-4
HEAD = ("workload", "base, ms", "this, ms", "base / this")


class CompareError(Exception):
    """Why the comparison stops, in words for the user."""


class WorkloadError(Exception):
    """A workload that one side cannot run."""


def tail(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.is_file() else ""


def git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise CompareError("git was not found") from None
    except subprocess.CalledProcessError as error:
        raise CompareError(error.stderr.strip() or f"git {arguments[0]} failed") from None
    return done.stdout.strip()


def resolve(base: str) -> str:
    """Return the full name of a revision."""
    if not base.strip():
        raise CompareError("no revision to compare with: make bench-compare BASE=<revision>")
    git("rev-parse", "--git-dir")
    try:
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{base}^{{commit}}")
    except CompareError:
        raise CompareError(f"{base!r} is not a revision of this repository") from None


def export(sha: str, folder: Path) -> None:
    """Write a revision's files to a folder; unlike a worktree, nothing in the repository remembers it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archive = folder / "exported.tar"
    git("archive", "--output", str(archive), sha)
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    archive.unlink()


def build(sha: str, folder: Path) -> None:
    """Export and build a revision, unless that was done before with the same interpreter and the same PyTorch."""
    environment = {"KDKERNELS_BUILD": "cpu", **os.environ}
    environment.pop("PYTHONPATH", None)
    made_with = f"{sha}\n{sys.executable} {sys.version}\n{torch.__version__}\n{environment['KDKERNELS_BUILD']}\n"
    marker, log = folder / ".built", folder / "build.log"
    if marker.is_file() and marker.read_text() == made_with:
        print(f"base: {folder} is built already", flush=True)
        return
    print(f"base: building {folder}: one or two minutes", flush=True)
    export(sha, folder)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    with log.open("w") as output:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise CompareError(f"{tail(log)}\nthe build of the base failed; all of its output is in {log}")
    marker.write_text(made_with)


class Worker:
    """A process that has loaded one version of the package and runs its workloads on request."""

    def __init__(self, name: str, tree: Path, log: Path, script: Path = WORKER) -> None:
        self.name, self._log = name, log
        # By default an idle OpenMP thread keeps a core busy for a while, waiting for work.
        waiting = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
        # By default freed memory goes back to the system, depending on what was allocated before: a tree that imports
        # less would touch new pages in every call.
        memory = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(script), str(THREADS)],
                env={**os.environ, **waiting, **memory, "PYTHONPATH": str(tree)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1,
                start_new_session=True,  # an interrupt reaches the parent only, which stops the worker
            )  # fmt: skip

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for the reply."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait(timeout=10)
            raise CompareError(f"{tail(self._log)}\nthe process of {self.name} ended with status {status} ({command})")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkloadError(f"fails in {self.name}: {reply['error']}")
        return reply

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):  # if a request was not read
                if pipe is not None:
                    pipe.close()
        self._process.wait()


def difference(base: Mapping[str, Tensor], this: Mapping[str, Tensor]) -> str:
    """Return what differs beyond rounding, or an empty string."""
    shapes = [[(name, tensor.shape, tensor.dtype) for name, tensor in side.items()] for side in (base, this)]
    if shapes[0] != shapes[1]:
        return "results differ in number, shape or dtype"
    for name, expected in base.items():
        a, b = expected.double(), this[name].double()
        equal = (a == b) | (a.isnan() & b.isnan())
        gap = (a - b).masked_fill(equal, 0.0).norm() / a.nan_to_num(0.0, 0.0, 0.0).norm().clamp(min=1e-300)
        if not gap <= max(TOLERANCE, 2 * torch.finfo(expected.dtype).eps):
            return f"results differ by {gap:.1e} ({name})"
    return ""


@dataclass(frozen=True)
class Row:
    """The times of a workload and their ratio, or why there are none."""

    name: str
    base: float = math.nan
    this: float = math.nan
    ratio: Ratio | None = None
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        if self.ratio is None:
            return self.name, "", "", self.note
        cell = ratio_cell(self.ratio)
        return self.name, milliseconds(self.base), milliseconds(self.this), cell if isinstance(cell, str) else cell.text


def take_turns(base: Worker, this: Worker, rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each round for the base and for this tree, which alternate in going first."""
    times: dict[str, list[float]] = {base.name: [], this.name: []}
    slowest = max(worker.ask("round", calls=1)["seconds"] for worker in (base, this))
    calls = min(max(round(ROUND_SECONDS / slowest), 2), 200)
    start = time.perf_counter()
    for number in range(1 + rounds):
        if number > 5 and time.perf_counter() - start > SECONDS:
            break
        for worker in (base, this) if number % 2 else (this, base):
            taken = worker.ask("round", calls=calls)["seconds"]
            if number > 0:  # the first round warms up
                times[worker.name].append(taken)
    return times[base.name], times[this.name]


def compare(name: str, base: Worker, this: Worker, rounds: int) -> Row:
    """Measure a workload if both sides can run it with the same results."""
    try:
        with tempfile.TemporaryDirectory(prefix="kdkernels-") as folder:
            path = str(Path(folder) / "workload.pt")
            this.ask("save", workload=name, path=path)
            results = [str(Path(folder) / f"{side}.pt") for side in ("base", "this")]
            for worker, file in zip((base, this), results, strict=True):
                worker.ask("load", path=path, results=file)
            differs = difference(*(torch.load(file, weights_only=True) for file in results))
        if differs:
            return Row(name, note=differs)
        before, now = take_turns(base, this, rounds)
    except WorkloadError as error:
        return Row(name, note=str(error))
    return Row(name, median(before), median(now), pairwise_ratio(now, before))


def loaded_from(worker: Worker, tree: Path) -> list[str]:
    """Return notes about a worker's package, which must come from its tree."""
    side = worker.ask("describe")
    if Path(side["package"]).parent != tree.resolve():
        raise CompareError(f"{worker.name} loaded {side['package']}, not the package in {tree}")
    return [] if side["compiled"] else [f"{worker.name} runs without compiled CPU kernels"]


def run(base: Worker, this: Worker, only: str, rounds: int = ROUNDS) -> list[Row]:
    """Return a row for each workload of this tree."""
    rows = []
    for name in this.ask("list")["workloads"]:
        if only in name:
            rows.append(compare(name, base, this, rounds))
            print(" | ".join(filter(None, rows[-1].cells())), flush=True)
    if not rows:
        raise CompareError(f"no workload has {only!r} in its name")
    return rows


def report(rows: Sequence[Row], notes: Sequence[str], title: str) -> str:
    """Return the table in Markdown."""
    return markdown([Paragraph(title), Table(HEAD, [row.cells() for row in rows]), *[Bullets(notes)] * bool(notes)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time this tree against another git revision.")
    parser.add_argument("--base", default="", help="revision to compare with")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    options = parser.parse_args(arguments)
    try:
        sha = resolve(options.base)
        folder = OUTPUT / sha[:12]
        build(sha, folder)
        with ExitStack() as stack:
            base, this = (
                stack.enter_context(Worker(name, tree, OUTPUT / f"{log}.stderr"))
                for name, tree, log in (("the base", folder, "base"), ("this tree", ROOT, "this"))
            )
            notes = loaded_from(base, folder) + loaded_from(this, ROOT)
            rows = run(base, this, options.only)
    except (CompareError, WorkloadError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compare: interrupted", file=sys.stderr)
        return 130
    title = f"This tree ({commit()}) against {options.base} ({sha[:12]}), {THREADS} threads; above 1 it is faster."
    text = report(rows, notes, title)
    (OUTPUT / "report.md").write_text(text)
    print(f"\n{text}\nwritten to {OUTPUT / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
