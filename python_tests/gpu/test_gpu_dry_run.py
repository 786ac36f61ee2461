"""`make gpu` as far as it goes without a GPU: budgets, failures, the report, and the benchmark on tiny cases."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("bench", reason="the tests run without the source tree")

import torch

from bench.gpu import benchmark as gpu_benchmark
from bench.gpu import run as gpu
from bench.gpu import workloads as gpu_workloads
from bench.gpu.part import Part
from bench.report.data import goals_of, rows_of
from bench.report.files import load, write_whole
from bench.report.run import main as draw
from kdkernels.ops._cases import Benchmark
from kdkernels.testing.comparison import MODES, Contest
from kdkernels.testing.timing import HostClock

ROOT = Path(__file__).resolve().parents[2]
FP32 = torch.float32


def step(name, code, seconds=10.0):
    """Return a step that runs some Python code, in which `part` is its part of the report."""
    head = (
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path\n"
        "from bench.gpu.part import Part; part = Part(Path(os.environ['KDKERNELS_PART']))\n"
    )
    return gpu.Step(name, seconds, (sys.executable, "-c", head + code))


def run(folder, *steps, **options):
    return gpu.run_steps(steps, folder / "out", folder / "work", dict(os.environ), dry=True, **options)


def on_disk(folder):
    return json.loads((folder / "out/report.json").read_text())


def test_a_step_is_cut_at_its_budget_and_keeps_its_results(tmp_path):
    start = time.monotonic()
    sleeping = step("sleeping", "part.add(found=7, summary='half of it'); time.sleep(60)", seconds=1.0)
    report = run(tmp_path, sleeping, step("next", "part.add(summary='ran')"))
    assert time.monotonic() - start < 10
    first, second = report["steps"]
    assert (first["state"], first["part"], first["summary"]) == ("cut", {"found": 7}, "half of it")
    assert (second["state"], second["summary"]) == ("passed", "ran")
    assert not gpu.passed(report)
    assert on_disk(tmp_path) == report


def test_a_step_that_ignores_the_interrupt_is_killed_with_its_children(tmp_path):
    marker = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(marker)!r}).touch()"
    code = (
        "import signal, subprocess; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    start = time.monotonic()
    report = run(tmp_path, step("stubborn", code, seconds=0.5))
    assert report["steps"][0]["state"] == "cut"
    time.sleep(max(0.0, 4.0 - (time.monotonic() - start)))
    assert not marker.exists()


def test_a_failure_does_not_stop_the_next_step_and_is_shown(tmp_path):
    report = run(
        tmp_path,
        step("build", "raise RuntimeError('no such luck')"),
        step("tool", f"part.add(summary='not installed'); sys.exit({gpu.NOT_AVAILABLE})"),
        step("benchmark", "part.add(summary='ran')"),
    )
    assert [s["state"] for s in report["steps"]] == ["failed", "not available", "passed"]
    assert not gpu.passed(report)
    text = (tmp_path / "out/report.md").read_text()
    assert "dry run" in text
    assert "**Not passed: build failed.**" in text
    assert "RuntimeError: no such luck" in text


def test_steps_share_the_time_of_the_run(tmp_path):
    report = run(tmp_path, step("first", "time.sleep(60)", 0.6), step("second", "time.sleep(60)", 60.0), total=1.5)
    assert [s["state"] for s in report["steps"]] == ["cut", "cut"]
    assert report["seconds"] < 10


def test_a_report_is_replaced_at_once(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_whole(path, "old")

    def full_disk(self, text, **options):
        with self.open("w") as file:
            file.write(text[:1])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"


@pytest.fixture(autouse=True)
def _memory_is_kept(monkeypatch):
    """Collecting garbage after each contender takes longer than a tiny case."""
    monkeypatch.setattr(gpu_benchmark, "_free", lambda: None)


def measured(case):
    return rows_of({"benchmarks": gpu_benchmark.measure(case, HostClock(), "cpu", compiled={}, seconds=0.05)})


@pytest.mark.parametrize("case", list(gpu_workloads.cases(dry=True))[:7], ids=lambda case: case.name)
def test_a_tiny_case_is_checked_and_timed(case):
    rows = measured(case)
    assert [row.info["mode"] for row in rows] == list(MODES)
    for row in rows:
        assert row.info["errors"]["kdkernels"] <= case.workload.tolerance
        assert row.seconds["kdkernels"] > 0
        assert row.ratios["eager"].median > 0
        assert row.not_timed["compile"] == "left out"
    assert rows[-1].bytes_per_second > 0
    assert rows[-1].info["peak_bytes"]["kdkernels"] > 0
    assert [row.info["goals"] for row in rows] == [{}, {}, case.goals]


def test_nothing_is_timed_if_our_result_is_wrong():
    case = gpu_workloads.case(Benchmark("kl_div_with_logits", (8, 37)))
    right = case.workload
    (row,) = measured(replace(case, workload=replace(right, ours=lambda s, t: 1.01 * right.ours(s, t))))
    assert row.seconds == {}
    assert row.failed.startswith("wrong: relative error 1.0e-02")
    judged = goals_of([row], 1e9)
    assert len(judged) == len(case.goals) > 0
    assert all(goal.verdict == "not judged" and goal.note == row.failed for goal in judged)


def test_a_rival_that_is_wrong_or_missing_is_no_win():
    case = gpu_workloads.case(Benchmark("kl_div_with_logits", (8, 37)))
    rivals = {"liger": lambda s, t: 2 * case.workload.eager(s, t)}
    case = replace(case, rivals=rivals, missing={"other": "not installed"}, goals={"faster than liger": 1.0})
    row = measured(case)[-1]
    assert row.not_timed["liger"].startswith("wrong")
    assert row.not_timed["other"] == "not installed"
    (goal,) = goals_of([row], None)
    assert goal.verdict == "not judged"
    assert goal.note.startswith("wrong")


def test_goals_are_met_or_missed():
    case = gpu_workloads.case(Benchmark("distillation_loss", (128, 100)))
    contest = Contest(not_timed={"liger": "not installed"})
    info = gpu_benchmark.rows_of_case(case, contest, "cuda")["full"]["extra_info"]
    info["rounds"] = {"kdkernels": [1.0], "eager": [5.0], "compile": [1.1]}
    info["bytes"] = 90.0
    info["graph"] = {"kdkernels": {"microseconds": 12.5, "launches_forward": 2, "launches_backward": 3}}
    info["goals"] = {**gpu_workloads.FASTER, **gpu_workloads.SHARE, **gpu_workloads.LAUNCHES}
    rows = rows_of({"benchmarks": [{"name": case.name, "extra_info": info}]})
    assert {goal.name: goal.verdict for goal in goals_of(rows, 100.0)} == {
        "faster than eager": "met",
        "faster than compile": "missed",
        "share of copy bandwidth": "met",
        "graph microseconds": "met",
        "launches forward": "met",
        "launches backward": "missed",
    }


def test_the_benchmark_is_part_of_the_report_even_if_it_is_cut(tmp_path, monkeypatch):
    """Measured rows are kept and the rest are listed as not reached; the report can be redrawn from its JSON."""
    monkeypatch.setattr(gpu_benchmark, "DRY", True)
    cases = list(gpu_workloads.cases(dry=True))[2:5]
    monkeypatch.setattr(gpu_benchmark, "cases", lambda dry: [replace(case, rivals={}) for case in cases])
    monkeypatch.setattr(gpu_benchmark, "seconds_left", iter([60.0, 60.0, 0.0, 0.0]).__next__)
    monkeypatch.setattr(gpu_benchmark, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(gpu_workloads.GpuCase, "compiled", {})
    part = Part(tmp_path / "part.json")
    assert gpu_benchmark.benchmark(part) == gpu.CUT
    assert part.content["summary"] == "1 cases, 2 not reached; no number is a claim"
    code = f"import shutil; shutil.copy({str(part.path)!r}, os.environ['KDKERNELS_PART']); sys.exit({gpu.CUT})"
    report = run(tmp_path, step("benchmark", code), step("next", "part.add(runs=[])"))
    assert report["steps"][0]["part"] == {}
    rows = rows_of(load(tmp_path / "out/report.json"))
    assert [row.failed for row in rows] == ["", "", "", *["not reached in the time"] * 2]
    text = (tmp_path / "out/report.md").read_text()
    assert "**Not passed: benchmark cut.**" in text
    assert "| kl_div_with_logits | 8×37 | float32 |  | full | warm |" in text
    draw([str(tmp_path / "out/report.json"), "--output", str(tmp_path / "again")])
    assert (tmp_path / "again/report.md").read_text() == text


def test_results_of_tests_are_kept_one_by_one(tmp_path):
    """A run of pytest that is cut keeps the results so far."""
    (tmp_path / "test_some.py").write_text(
        "import os\ndef test_right():\n    pass\ndef test_wrong():\n    assert 1 == 2\n"
        "def test_crash():\n    os.abort()\ndef test_never():\n    pass\n"
    )
    results = tmp_path / "results.jsonl"
    arguments = ["-q", "-c", os.devnull, "-p", "bench.gpu.results_plugin", str(tmp_path)]
    code = f"import subprocess; sys.exit(subprocess.call([sys.executable, '-m', 'pytest', *{arguments!r}]))"
    one = step("tests", code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KDKERNELS_TEST_RESULTS": str(results)}
    report = gpu.run_steps([one], tmp_path / "out", tmp_path / "work", environment, dry=True)
    assert report["steps"][0]["state"] == "failed"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert lines[0] == {"collected": 4}
    assert [line["outcome"] for line in lines[1:]] == ["passed", "failed"]
    assert "assert 1 == 2" in lines[2]["message"]
