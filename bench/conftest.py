"""Shared by the benchmarks: pytest bench [--full] [--threads 2] [--no-compile]. `make bench` also draws the report."""

import gc
import os
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / "build/inductor"))

import pytest
import torch

import kdkernels
from bench import machine, rivals
from bench.ops import suite
from bench.roofline import copy_bandwidth
from kdkernels.testing.comparison import peak_bytes
from kdkernels.testing.timing import HostClock, Timed

WARM_UP = 2
FEWEST_ROUNDS, MOST_ROUNDS = 5, 30
FAILURES: list[dict[str, Any]] = []


def pytest_addoption(parser):
    group = parser.getgroup("kdkernels")
    group.addoption("--full", action="store_true", help="run all rows and modes instead of the quick set")
    group.addoption("--threads", type=int, default=min(2, os.cpu_count() or 1), help="PyTorch threads (default: 2)")
    group.addoption("--no-compile", action="store_true", help="time ops without torch.compile")
    group.addoption("--written-as", default="pytest bench", help="command that the report names")


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc):
    """Run an op on its rows, one at a time, since the modes of a row share compiled code; a routine on its cases."""
    full = metafunc.config.getoption("--full")
    if "row" in metafunc.fixturenames:
        pairs = [(row, mode) for row in suite.rows(full) for mode in row.modes]
        names = [f"{row.workload.op}: {row.workload.name}: {mode}" for row, mode in pairs]
        metafunc.parametrize(("row", "mode"), pairs, ids=names)
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.QUICK + (metafunc.module.FULL if full else [])
        metafunc.parametrize("case", cases, ids=lambda case: f"{case.model} {list(case.shape)}")


@pytest.fixture
def full(request) -> bool:
    """Whether the full set is run."""
    return request.config.getoption("--full")


@pytest.fixture
def race(benchmark):
    """Time calls in turn, the first through pytest-benchmark; its extra_info holds the rounds of all."""

    def run(
        timed: Mapping[str, Timed], *, cold: bool, rounds: int = MOST_ROUNDS, seconds: float = 5.0, **info: Any
    ) -> dict[str, list[float]]:
        if info["kind"] != "sweep":
            info["peak_bytes"] = peaks(timed)
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
        gc.disable()
        try:
            benchmark.pedantic(ours.call, setup=turns_of_others, rounds=rounds, warmup_rounds=WARM_UP, iterations=1)
        finally:
            gc.enable()
        result = {first: list(benchmark.stats.stats.data)} | {name: taken[name][-rounds:] for name, _ in others}
        benchmark.extra_info.update(info, cold=cold, rounds=result)
        return result

    return run


def peaks(timed: Mapping[str, Timed]) -> dict[str, int]:
    """Return the peak memory of each call."""
    found = {}
    for name, one in timed.items():
        one.prepare()
        found[name] = peak_bytes(one.call)
    return found


def pytest_runtest_logreport(report):
    """Record failures: pytest-benchmark writes nothing about a benchmark that was not timed."""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = (crash.message if crash else str(report.longrepr)).strip().splitlines()[0]
        FAILURES.append({"name": report.nodeid, "extra_info": {"failed": reason}})


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Write the form that the report reads: see bench/report/data.py."""
    rows = [{key: benchmark[key] for key in ("name", "extra_info")} for benchmark in output_json["benchmarks"]]
    output_json.clear()
    output_json["environment"] = {
        **machine.facts(config.getoption("--written-as")),
        "threads": torch.get_num_threads(), "memory_bytes": suite.memory_bytes(), "caches": machine.caches(),
        "instruction_set": torch.backends.cpu.get_cpu_capability().lower(), "torch": torch.__version__,
        "kdkernels": kdkernels.__version__, "compiler": str(kdkernels.build_info().get("compiler", "")),
        "device": "cpu", "rivals": rivals.versions(), "set": "full" if config.getoption("--full") else "quick",
    }  # fmt: skip
    output_json["roofline"] = {"copy_bytes_per_second": copy_bandwidth()}
    output_json["benchmarks"] = rows + FAILURES
