"""The CUDA kernels and their bindings, executed on the CPU by an emulator: see cuda_host/.

The contract of every op runs in processes in which csrc/cuda, compiled for the emulator, stands in for the CPU kernels:
over all cases, and under race detection and undefined-behavior checks with schedules that favour different warps.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from contract import KERNELS, TARGET
from cuda_host import missing

HERE = Path(__file__).resolve().parent

if TARGET != "cpu" or not KERNELS:
    pytest.skip("the emulator runs beside the tests of the CPU kernels", allow_module_level=True)
if reason := missing():
    pytest.skip(reason, allow_module_level=True)

CONTRACT = (
    "equals_reference or inputs_are_not_written or order_of_work or second_backward or no_grad or incoming_gradients "
    "or gradcheck or gradgradcheck or edges or empty or no_channels or nan or inf or huge or strides"
)
# variant of the emulator, file, which of its tests, the least number of them
RUNS = [
    ("plain", "test_softmax_divergence.py", CONTRACT, 700),
    # Labels are not read by the host here, and cannot raise.
    ("plain", "test_softmax_divergence_edges.py", "not wrong_calls and not out_of_range and not compile", 40),
    ("plain", "test_batch_norm_stats.py", CONTRACT, 400),
    ("plain", "test_total_variation.py", CONTRACT, 600),
    ("plain", "test_gradient_reversal.py", CONTRACT, 100),
    ("plain", "emulated_edges.py", "", 300),
    *(
        (variant, file, "order_of_work or (equals_reference and float32)", least)
        for variant in ("race", "undefined")
        for file, least in (
            ("test_softmax_divergence.py", 280),
            ("test_batch_norm_stats.py", 160),
            ("test_total_variation.py", 200),
            ("test_gradient_reversal.py", 40),
        )
    ),
    ("undefined", "emulated_edges.py", "", 300),
]


def run(variant, file, keyword, _least):
    emulated = {"KDKERNELS_TEST_TARGET": "emulated", "KDKERNELS_TEST_VARIANT": variant, "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **emulated}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", keyword, "-p", "no:cacheprovider"]
    command.append(str(HERE if file == "emulated_edges.py" else HERE.parent / "ops") + "/" + file)
    return subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def results():
    """All runs, one on each processor at a time. The first of each variant compiles."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        ordered = sorted(RUNS, key=lambda r: r[1] != "test_gradient_reversal.py")
        return dict(zip(ordered, pool.map(lambda arguments: run(*arguments), ordered), strict=True))


@pytest.mark.parametrize("arguments", RUNS, ids=lambda r: f"{r[0]}, {r[1]}")
def test_emulated(results, arguments):
    result = results[arguments]
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed, result.stdout[-1000:]
    assert int(passed.group(1)) >= arguments[3]
