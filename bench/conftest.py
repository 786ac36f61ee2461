"""What the benchmarks share: pytest bench [--full] [--threads 2]. `make bench` also writes the report."""

import gc
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / "build/inductor"))

import pytest
import torch

import kdkernels
from bench import rivals, roofline
from bench.ops import suite
from kdkernels.testing.comparison import MODES, SMALL, Contest, enter, peak_bytes
from kdkernels.testing.timing import HostClock, Timed

WARM_UP = 2
FEWEST_ROUNDS, MOST_ROUNDS = 5, 30


def pytest_addoption(parser):
    group = parser.getgroup("kdkernels")
    group.addoption("--full", action="store_true", help="all rows and modes, not the chosen set of a few minutes")
    group.addoption("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of PyTorch (default: 2)")
    group.addoption("--written-as", default="pytest bench", help="the command, for the report")


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc):
    """Run an op's benchmark on its rows, all modes of a row one after the other: what was compiled serves them all."""
    if "row" in metafunc.fixturenames:
        rows = suite.rows(metafunc.config.getoption("--full"))
        pairs = [(row, mode) for row in rows for mode in row.modes]
        metafunc.parametrize(("row", "mode"), pairs, ids=[f"{row.workload.name}: {mode}" for row, mode in pairs])


@pytest.fixture
def bench_set(request):
    """The name of the set that is run."""
    return "full" if request.config.getoption("--full") else "quick"


@pytest.fixture
def race(benchmark):
    """Time calls by turns; the first of them through pytest-benchmark, the rounds of all into its extra_info."""

    def run(
        timed: Mapping[str, Timed], *, cold: bool, rounds: int = MOST_ROUNDS, seconds: float = 5.0, **info: Any
    ) -> dict[str, list[float]]:
        clock = HostClock()
        (first, ours), *others = timed.items()
        taken: dict[str, list[float]] = {name: [] for name in timed}

        def turns_of_others() -> None:
            for name, other in others:
                taken[name].append(clock.measure(other)[0])
            clock.make_ready(ours)

        start = perf_counter()
        turns_of_others()
        ours.call()
        rounds = max(min(rounds, FEWEST_ROUNDS), min(rounds, int(seconds / (perf_counter() - start)) - WARM_UP))
        taken = {name: [] for name in timed}
        collects = gc.isenabled()
        gc.disable()
        try:
            benchmark.pedantic(ours.call, setup=turns_of_others, rounds=rounds, warmup_rounds=WARM_UP, iterations=1)
        finally:
            if collects:
                gc.enable()
        if benchmark.stats is None:  # --benchmark-disable
            return {}
        result = {first: list(benchmark.stats.stats.data)} | {name: taken[name][-rounds:] for name, _ in others}
        benchmark.group = f"{info.get('function', '')} {info.get('shape', '')}".strip() or None
        benchmark.extra_info.update(info, cold=cold, rounds=result)
        return result

    return run


class Contests:
    """The contest of the row at hand: made once for all of its modes."""

    def __init__(self):
        self.name = ""
        self.contest = Contest()

    def of(self, row: suite.Row) -> Contest:
        if row.workload.name != self.name:
            self.contest = Contest()  # gives its memory back before more is taken
            functions, missing = rivals.rivals_of(row.workload, "cpu")
            self.contest = enter(row.workload, "cpu", {"kdkernels": "auto"}, functions)
            self.contest.not_timed |= missing
            self.name = row.workload.name
        return self.contest


@pytest.fixture(scope="session")
def contests():
    return Contests()


@pytest.fixture
def compare(race, benchmark, contests):
    """Time a mode of a row against the rivals, those whose results are right."""

    def run(row: suite.Row, mode: str) -> None:
        workload, contest = row.workload, contests.of(row)
        passes = dict(zip(MODES, (*workload.passes["cpu"], sum(workload.passes["cpu"])), strict=True))[mode]
        info = {
            "kind": "op", "op": workload.op, "function": workload.function, "shape": list(workload.shape),
            "dtype": str(workload.dtype).removeprefix("torch."), "variant": workload.variant, "mode": mode,
            "not_timed": contest.not_timed, "errors": contest.errors, "compile_seconds": contest.compile_seconds,
            "passes": passes, "bytes": passes * workload.tensor_bytes, "goals": row.goals if mode == "full" else {},
        }  # fmt: skip
        if not contest.passes:
            pytest.fail(f"{workload.name}: {contest.not_timed['kdkernels']}")
        timed = {name: one.timed()[mode] for name, one in contest.passes.items()}
        info["peak_bytes"] = {}
        for name, one in timed.items():
            one.prepare()
            info["peak_bytes"][name] = peak_bytes(one.call)
        race(timed, cold=workload.tensor_bytes >= SMALL, seconds=3.0, **info)
        for one in contest.passes.values():
            one.clear()

    return run


FAILURES: list[dict[str, str]] = []


def pytest_runtest_logreport(report):
    """Keep what failed: pytest-benchmark writes nothing of a benchmark that was not timed."""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = (crash.message if crash else str(report.longrepr)).strip().splitlines()
        FAILURES.append({"name": report.nodeid, "reason": reason[0] if reason else "failed"})


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Add what the report says of the machine, and measure what it can do at most."""
    output_json["failures"] = FAILURES
    output_json["environment"] = environment(config)
    output_json["roofline"] = {
        "copy_bytes_per_second": roofline.copy_bandwidth(),
        "flops_per_second": roofline.peak_operations(),
    }


def environment(config) -> dict[str, Any]:
    build = kdkernels.build_info()
    return {
        "command": config.getoption("--written-as"), "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit(), "machine": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "memory_bytes": suite.memory_bytes(), "caches": caches(), "python": platform.python_version(),
        "instruction_set": torch.backends.cpu.get_cpu_capability().lower(), "torch": torch.__version__,
        "kdkernels": kdkernels.__version__, "compiler": str(build.get("compiler", "")), "device": "cpu",
        "rivals": rivals.versions(), "set": "full" if config.getoption("--full") else "quick",
    }  # fmt: skip


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        family = f"family {names.get('cpu family', '?')}, model {names.get('model', '?')}"
        return f"{names.get('model name', platform.machine())} ({family})"
    return platform.processor() or platform.machine()


def caches() -> dict[str, int]:
    units = {"K": 1 << 10, "M": 1 << 20}
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction" and size[-1:] in units:
            found[f"L{level}"] = int(size[:-1]) * units[size[-1]]
    return found
