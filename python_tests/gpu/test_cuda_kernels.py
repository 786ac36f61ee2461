"""The CUDA kernels and their bindings, executed on the CPU by an emulator: see cuda_host/.

The tests of every op run in processes in which the CUDA half of csrc, compiled for the emulator, stands in for the CPU
kernels: over the core grid, and in the exhaustive run over all cases, then under race detection and checks of undefined
behavior with schedules that favour different warps.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
from contract import KERNELS, ROOT, TARGET
from cuda_host import missing

from kdkernels.ops._cases import DTYPES, registry

HERE = Path(__file__).resolve().parent

if TARGET != "cpu" or not KERNELS:
    pytest.skip("the emulator runs beside the tests of the CPU kernels", allow_module_level=True)
if reason := missing():
    pytest.skip(reason, allow_module_level=True)

CONTRACT = (
    "equals_reference or inputs_are_not_written or order_of_work or second_backward or no_grad or incoming_gradients "
    "or gradcheck or gradgradcheck or edges or empty or no_channels or nan or inf or huge or strides"
)
CHECKED = "order_of_work or (equals_reference and float32)"
# The host does not read labels here, so they cannot raise.
BESIDE_THE_CONTRACT = "not wrong_calls and not out_of_range and not compile"


@dataclass(frozen=True)
class Run:
    """A test file to run in a separate process: a build of the emulator, a grid, and the least number of tests."""

    variant: str
    file: Path
    keyword: str
    least: int
    grid: str = "full"

    def __str__(self):
        return f"{self.variant}, {self.file.name}"

    def passed(self):
        """Run the tests; return how many passed."""
        environment = {**os.environ, "KDKERNELS_TEST_TARGET": "emulated", "KDKERNELS_TEST_VARIANT": self.variant}
        environment |= {"OMP_NUM_THREADS": "1", "KDKERNELS_TEST_GRID": self.grid}
        options = ["-q", "-m", "not slow", "-k", self.keyword, "-p", "no:cacheprovider", "-p", "no:xdist"]
        command = [sys.executable, "-m", "pytest", *options, str(self.file)]
        result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
        return int(re.search(r"(\d+) passed", result.stdout).group(1))


def count(op, dtypes=DTYPES):
    return sum(1 for dtype in dtypes for _ in registry()[op].accuracy(dtype, "cpu"))


def core_count(op):
    grids = (islice(registry()[op].accuracy(dtype, "cpu"), first, None, 5) for first, dtype in enumerate(DTYPES))
    return sum(1 for grid in grids for _ in grid)


def of_cpu_kernels_alone(file):
    """Tell whether a file tests ops that have kernels on the CPU alone, in which no CUDA kernel would run."""
    return re.search(r"\bOnTheCPU\b|\bcpu_backend\b|^pytestmark = of_cpu$", file.read_text(), re.MULTILINE) is not None


def runs():
    """Yield the runs over every op with CUDA kernels; the first run of each build compiles it."""
    ops = [op for op in registry() if (ROOT / "csrc" / op / "cuda.cpp").is_file()]
    tests = HERE.parent / "ops"
    for op in ops:
        yield Run("plain", tests / f"test_{op}.py", CONTRACT, 3 * count(op))
        for file in sorted(tests.glob(f"test_{op}_*.py")):
            if not of_cpu_kernels_alone(file):
                yield Run("plain", file, BESIDE_THE_CONTRACT, 1)
        for file in tests.glob(f"emulated_{op}.py"):
            yield Run("plain", file, "", 1)
            yield Run("undefined", file, "", 1)
        for variant in ("race", "undefined"):
            yield Run(variant, tests / f"test_{op}.py", CHECKED, count(op) + count(op, DTYPES[:1]))
    cases = sum(map(count, ops))
    for variant in ("plain", "undefined"):
        yield Run(variant, HERE / "emulated_edges.py", "", cases)


def core_runs():
    for op in registry():
        if (ROOT / "csrc" / op / "cuda.cpp").is_file():
            yield Run("plain", HERE.parent / f"ops/test_{op}.py", "equals_reference", core_count(op), "core")


def outcomes(several):
    """Return the futures of all runs, which run one per processor at a time."""
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    return {run: pool.submit(run.passed) for run in several}


@pytest.fixture(scope="module")
def results():
    # The shortest files first: the first run of each build compiles it.
    ordered = sorted(runs(), key=lambda run: run.least)
    return outcomes(ordered)


@pytest.mark.xdist_group("emulator")
@pytest.mark.parametrize("run", list(core_runs()), ids=str)
def test_core_grid(run):
    assert run.passed() >= run.least


@pytest.mark.slow
@pytest.mark.xdist_group("emulator")
@pytest.mark.parametrize("run", list(runs()), ids=str)
def test_emulated(results, run):
    assert results[run].result() >= run.least
