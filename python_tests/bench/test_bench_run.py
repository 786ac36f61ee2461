"""The benchmark suite from end to end: its cheapest row, one thread, and none of the packages it compares with."""

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


def test_a_run_without_rivals_writes_a_report(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_RIVALS)
    output = tmp_path / "out"
    command = [
        sys.executable, "-m", "bench.run", "--threads", "1", "--only",
        "total_variation and image_prior and 128", "--output", str(output),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((output / "report.json").read_text())
    assert report["environment"]["threads"] == 1
    assert report["roofline"]["copy_bytes_per_second"] > 0
    (row,) = report["benchmarks"]
    info = row["extra_info"]
    assert {"kdkernels", "eager", "compile", "compile max-autotune"} == set(info["rounds"])
    assert len({len(rounds) for rounds in info["rounds"].values()}) == 1
    assert info["bytes"] == 3 * 4 * 64 * 3 * 128 * 128
    assert info["peak_bytes"]["kdkernels"] < info["peak_bytes"]["eager"]
    for name in ("report.md", "report.html", "benchmark.json"):
        assert (output / name).stat().st_size > 1000
