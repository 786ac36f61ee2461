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
from bench.gpu import report as gpu_report
from bench.gpu import run as gpu
from bench.gpu import workloads as gpu_workloads
from kdkernels.testing.timing import HostClock

ROOT = Path(__file__).resolve().parents[2]
FP32 = torch.float32


def step(name, code, seconds=10.0):
    """A step whose process runs some Python; `part` is its part of the report."""
    head = (
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path\n"
        "from bench.gpu.report import Part; part = Part(Path(os.environ['KDKERNELS_PART']))\n"
    )
    return gpu.Step(name, seconds, (sys.executable, "-c", head + code))


def run(folder, *steps, **options):
    return gpu.run_steps(steps, folder / "out", folder / "work", dict(os.environ), dry=True, **options)


def on_disk(folder):
    return json.loads((folder / "out/report.json").read_text())


def test_a_step_is_cut_at_its_budget_and_what_it_found_is_kept(tmp_path):
    start = time.monotonic()
    sleeping = step("sleeping", "part.add(found=7, summary='half of it'); time.sleep(60)", seconds=1.0)
    report = run(tmp_path, sleeping, step("next", "part.add(summary='ran')"))
    assert time.monotonic() - start < 10
    first, second = report["steps"]
    assert (first["state"], first["part"], first["summary"]) == ("cut", {"found": 7}, "half of it")
    assert (second["state"], second["summary"]) == ("passed", "ran")
    assert not gpu.passed(report)
    assert on_disk(tmp_path) == report


def test_a_step_that_ignores_the_request_to_end_is_ended_with_what_it_started(tmp_path):
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
    gpu_report.write_whole(path, "old")

    def full_disk(self, text):
        with self.open("w") as file:
            file.write(text[:1])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space left"):
        gpu_report.write_whole(path, "new")
    assert path.read_text() == "old"


def measured(case):
    return gpu_benchmark.measure(case, HostClock(), "cpu", compiled={}, seconds=0.05)


@pytest.mark.parametrize("case", list(gpu_workloads.cases(dry=True))[:7], ids=lambda case: case.name)
def test_a_tiny_case_is_checked_and_timed(case):
    row = measured(case)
    assert row["errors"]["native"] <= case.workload.tolerance
    for rival in ("native", "eager"):
        assert all(row["seconds"][rival][mode] > 0 for mode in gpu_report.MODES)
    assert row["not_timed"]["compile"] == "left out"
    assert row["bytes_per_second"]["full"] > 0


def test_nothing_is_timed_where_our_result_is_wrong():
    case = gpu_workloads.case("kl_div_with_logits", (8, 37), FP32)
    right = case.workload
    row = measured(replace(case, workload=replace(right, ours=lambda s, t: 1.01 * right.ours(s, t))))
    assert row["seconds"] == {}
    assert row["not_timed"]["native"].startswith("wrong: relative error 1.0e-02")
    verdicts = gpu_report.judge(row, case.goals, 1e9)
    assert all(v["verdict"].startswith("not judged: ") for v in verdicts)


def test_a_rival_that_is_wrong_or_missing_is_no_win():
    case = gpu_workloads.case("kl_div_with_logits", (8, 37), FP32)
    rivals = {"liger": lambda s, t: 2 * case.workload.eager(s, t)}
    row = measured(replace(case, rivals=rivals, missing={"other": "not installed"}))
    assert row["not_timed"]["liger"].startswith("wrong")
    assert row["not_timed"]["other"] == "not installed"
    verdicts = {v["name"]: v["verdict"] for v in gpu_report.judge(row, {"faster than liger": 1.0}, None)}
    assert verdicts["faster than liger"].startswith("not judged: wrong")


def test_goals_are_met_or_missed():
    row = {
        "seconds": {"native": {"full": 1.0}, "eager": {"full": 5.0}, "compile": {"full": 1.1}},
        "bytes_per_second": {"full": 90.0}, "not_timed": {},
        "graph": {"native": {"microseconds": 12.5, "launches_forward": 2, "launches_backward": 3}},
    }  # fmt: skip
    goals = {**gpu_workloads.FASTER, **gpu_workloads.SHARE, **gpu_workloads.SMALL}
    verdicts = {v["name"]: v["verdict"] for v in gpu_report.judge(row, goals, 100.0)}
    assert verdicts == {
        "faster than eager": "met",
        "faster than compile": "MISSED",
        "share of copy bandwidth": "met",
        "graph microseconds": "met",
        "launches forward": "met",
        "launches backward": "MISSED",
    }


def test_results_of_tests_are_kept_one_by_one(tmp_path):
    """As they are where a run of pytest is cut."""
    (tmp_path / "test_some.py").write_text(
        "import os\ndef test_right():\n    pass\ndef test_wrong():\n    assert 1 == 2\n"
        "def test_crash():\n    os.abort()\ndef test_never():\n    pass\n"
    )
    results = tmp_path / "results.jsonl"
    arguments = ["-q", "-c", os.devnull, "-p", "gpu_test_results", str(tmp_path)]
    code = f"import subprocess; sys.exit(subprocess.call([sys.executable, '-m', 'pytest', *{arguments!r}]))"
    one = step("tests", code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "bench"), "KDKERNELS_TEST_RESULTS": str(results)}
    report = gpu.run_steps([one], tmp_path / "out", tmp_path / "work", environment, dry=True)
    assert report["steps"][0]["state"] == "failed"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert lines[0] == {"collected": 4}
    assert [line["outcome"] for line in lines[1:]] == ["passed", "failed"]
    assert "assert 1 == 2" in lines[2]["message"]
