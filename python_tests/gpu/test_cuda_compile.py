"""CUDA kernels compiled by nvcc without a GPU: no spills, registers and shared memory within budget, 16-byte loads."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
kernel_resources = pytest.importorskip("bench.gpu.kernel_resources", reason="the source tree is not available")

if kernel_resources.nvcc() is None:
    pytest.skip("nvcc is not installed, so the CUDA kernels cannot be compiled", allow_module_level=True)
if kernel_resources.cuobjdump() is None:
    pytest.skip(
        "cuobjdump, which comes with Triton, is not installed, so machine code cannot be inspected",
        allow_module_level=True,
    )


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured():
    return kernel_resources.measure()


def test_kernels_keep_their_budgets(measured):
    usages, wide = measured
    assert {"80", "90"} <= set(kernel_resources.architectures())
    assert len(usages) > 100
    assert kernel_resources.complaints(usages, wide, json.loads(kernel_resources.BUDGETS.read_text())) == []


def test_the_check_can_fail(measured):
    usages, wide = measured
    budgets = json.loads(kernel_resources.BUDGETS.read_text())
    kernel = next(name for name in budgets if name.startswith("backward<Exact32, (Group)1"))
    budgets[kernel] = {"registers": dict.fromkeys(budgets[kernel]["registers"], 8), "shared": 0}
    del budgets[next(name for name in budgets if name.startswith("finish"))]
    spilling = {name: dict(of) for name, of in usages.items()}
    spilling[kernel]["80"] = kernel_resources.Usage(64, 0, 24)
    found = kernel_resources.complaints(spilling, {**wide, kernel: False}, {**budgets, "gone": {}})
    texts = "spills 24 bytes on sm_80", "its budget is 8", "does not load 16 bytes", "has no budget", "no longer exists"
    for text in texts:
        assert any(text in complaint for complaint in found), text
