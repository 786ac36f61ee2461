"""The benchmark suite from end to end: a cheap row, one thread, and no rival packages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "bench/run.py").is_file():
    pytest.skip("the tests run without the source tree", allow_module_level=True)

NO_RIVALS = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("kornia", "piq", "torchmetrics", "liger_kernel"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""


def run_of(folder, *arguments):
    """Return the report of a run with the given arguments."""
    (folder / "sitecustomize.py").write_text(NO_RIVALS)
    output = folder / "out"
    command = [sys.executable, "-m", "bench.run", "--threads", "1", "--output", str(output), *arguments]
    # pytest-benchmark measures nothing in a worker of pytest-xdist.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**outside, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name in ("report.md", "report.html", "report.json"):
        assert (output / name).stat().st_size > 1000
    return json.loads((output / "report.json").read_text())


def assert_complete(report, contenders, moved):
    assert report["environment"]["threads"] == 1
    assert report["roofline"]["copy_bytes_per_second"] > 0
    (row,) = report["benchmarks"]
    info = row["extra_info"]
    assert set(info["rounds"]) == contenders
    assert len({len(rounds) for rounds in info["rounds"].values()}) == 1
    assert info["bytes"] == moved
    assert info["peak_bytes"]["kdkernels"] < info["peak_bytes"]["eager"]
    assert set(info["errors"]) == contenders


def test_a_run_without_rivals_and_compiler_writes_a_report(tmp_path):
    report = run_of(tmp_path, "--no-compile", "--only", "distillation_loss and 128")
    assert_complete(report, {"kdkernels", "eager"}, 3 * 4 * 128 * 100)
    assert report["benchmarks"][0]["extra_info"]["not_timed"]["compile"] == "left out"


@pytest.mark.slow
def test_a_run_without_rivals_writes_a_report(tmp_path):
    report = run_of(tmp_path, "--only", "total_variation and image_prior and 128")
    assert_complete(report, {"kdkernels", "eager", "compile", "compile max-autotune"}, 3 * 4 * 64 * 3 * 128 * 128)
