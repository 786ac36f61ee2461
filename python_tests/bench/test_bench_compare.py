"""`make bench-compare` without a build: verdicts, failures, and the two processes that take turns."""

import math
import os
import time
from pathlib import Path

import pytest
import torch

from bench.compare import run as compare

ROOT = Path(__file__).resolve().parents[2]

FAKE = """
import json, os, shutil, sys, time
print("started", file=sys.stderr, flush=True)
for line in sys.stdin:
    request = json.loads(line)
    match request["command"]:
        case "describe":
            reply = {"package": os.environ["PYTHONPATH"] + "/kdkernels", "compiled": False}
        case "list":
            reply = {"workloads": ["one", "two", "other"]}
        case "load":
            reply = {}
            shutil.copy(os.environ["RESULTS"], request["results"])
        case "round":
            reply = {"seconds": 0.01}
        case "fail":
            reply = {"error": "ValueError: no"}
        case "die":
            print("out of luck", file=sys.stderr, flush=True)
            sys.exit(3)
        case _:
            reply = {}
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    for factor in (1.0, 1.5):
        torch.save({"gradient": factor * torch.ones(3)}, tmp_path / f"{factor}.pt")
    monkeypatch.setenv("RESULTS", str(tmp_path / "1.0.pt"))
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    return lambda name: compare.Worker(name, tmp_path, tmp_path / f"{name}.stderr", script=script)


def row(name, base, this):
    return compare.Row(name, base[0], this[0], compare.pairwise_ratio(this, base))


def test_report():
    rows = [
        row("better", [0.2, 0.21, 0.2], [0.1, 0.1, 0.1]),
        row("worse", [0.1, 0.1, 0.1], [0.2, 0.21, 0.2]),
        row("same", [0.1, 0.2, 0.1], [0.2, 0.1, 0.1]),
        compare.Row("wrong", note="results differ by 3.0e-01 (gradient)"),
    ]
    text = compare.report(rows, ["the base runs without compiled CPU kernels"], "title")
    cells = {line.split(" | ")[0].removeprefix("| "): line.rstrip(" |").split(" | ") for line in text.splitlines()}
    assert cells["better"] == ["| better", "200", "100", "× 2.0 (2.0–2.1)"]
    assert cells["worse"][3] == "× 0.50 (0.48–0.50) slower"
    assert cells["same"][3].startswith("tie (")
    assert "results differ by 3.0e-01 (gradient)" in text
    assert text.endswith("- the base runs without compiled CPU kernels\n")


def test_difference():
    ones = torch.ones(5)

    def differs(base, this):
        return compare.difference({"output 0": ones, "gradient": base}, {"output 0": ones, "gradient": this})

    assert differs(ones, ones * (1 + 1e-5)) == ""
    assert differs(ones, 1.1 * ones) == "results differ by 1.0e-01 (gradient)"
    assert differs(ones, ones * torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0])).startswith("results differ by 8.9e-01")
    assert differs(torch.zeros(3), torch.zeros(3)) == ""
    assert differs(ones.bfloat16(), 1.01 * ones.bfloat16()) == ""
    special = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert differs(special, special.clone()) == ""
    assert differs(ones, ones * math.nan) == "results differ by nan (gradient)"
    assert differs(ones, ones * math.inf) == "results differ by inf (gradient)"
    for other in (ones[:3], ones.double()):
        assert differs(ones, other) == "results differ in number, shape or dtype"
    assert compare.difference({"gradient": ones}, {}) == "results differ in number, shape or dtype"


def test_unknown_revision(capsys):
    for base, message in (
        ("no-such-revision", "'no-such-revision' is not a revision of this repository"),
        ("", "no revision to compare with: make bench-compare BASE=<revision>"),
    ):
        assert compare.main(["--base", base]) == 2
        found = capsys.readouterr().err
        # A source distribution has no repository at all.
        assert found == f"compare: {message}\n" or "not a git repository" in found


def test_failed_build_shows_the_end_of_its_log(tmp_path, monkeypatch):
    def export(sha, folder):
        folder.mkdir()
        (folder / "setup.py").write_text("print('compiling'); raise SystemExit('error: no such header')")

    monkeypatch.setattr(compare, "export", export)
    with pytest.raises(compare.CompareError, match=r"no such header(.|\n)*build\.log"):
        compare.build("0" * 40, tmp_path / "base")
    assert not (tmp_path / "base" / ".built").exists()


def test_build_is_reused(tmp_path, monkeypatch):
    exported = []

    def export(sha, folder):
        exported.append(sha)
        folder.mkdir(exist_ok=True)
        (folder / "setup.py").write_text("")

    monkeypatch.setattr(compare, "export", export)
    monkeypatch.setenv("KDKERNELS_BUILD", "cpu")
    for _ in range(2):
        compare.build("1" * 40, tmp_path / "base")
    assert len(exported) == 1
    monkeypatch.setenv("KDKERNELS_BUILD", "none")
    compare.build("1" * 40, tmp_path / "base")
    assert len(exported) == 2


def test_turns(fake):
    asked = []

    def recorded(worker):
        ask = worker.ask
        worker.ask = lambda command, **rest: asked.append((worker.name, command)) or ask(command, **rest)
        return worker

    with fake("base") as base, fake("this") as this:
        rows = compare.run(recorded(base), recorded(this), "o", rounds=4)
    assert [row.name for row in rows] == ["one", "two", "other"]
    assert all(row.ratio.verdict == "tie" and row.base == 0.01 for row in rows)
    turns = [name for name, command in asked if command == "round"][:12]
    assert turns[2:] == ["this", "base", "base", "this", "this", "base", "base", "this", "this", "base"]


def test_results_that_differ_get_no_speed(fake, tmp_path, monkeypatch):
    with fake("base") as base:
        base.ask("describe")
        monkeypatch.setenv("RESULTS", str(tmp_path / "1.5.pt"))
        with fake("this") as this:
            (found,) = compare.run(base, this, "two", rounds=3)
    assert found.ratio is None
    assert found.cells()[-1] == "results differ by 5.0e-01 (gradient)"


def test_worker_that_fails_or_dies(fake, tmp_path):
    with fake("base") as worker:
        with pytest.raises(compare.WorkloadError, match="fails in base: ValueError: no"):
            worker.ask("fail")
        assert compare.loaded_from(worker, tmp_path) == ["base runs without compiled CPU kernels"]
        with pytest.raises(compare.CompareError, match="base loaded"):
            compare.loaded_from(worker, ROOT)
        with pytest.raises(compare.CompareError, match=r"out of luck\nthe process of base ended with status 3 \(die\)"):
            worker.ask("die")
        with pytest.raises(compare.CompareError, match="status 3"):
            worker.ask("describe")


def test_interrupt_ends_the_workers(fake):
    worker = fake("base")

    def interrupted():
        with worker:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert worker._process.poll() is not None


def test_this_tree_against_itself(tmp_path):
    """The real worker, on the smallest workload; while it waits it uses no processor time."""
    with compare.Worker("this tree", ROOT, tmp_path / "stderr") as worker:
        assert Path(worker.ask("describe")["package"]) == ROOT / "kdkernels"
        name = "js_div_with_logits [256, 1000] fp32"
        assert name in worker.ask("list")["workloads"]
        path = str(tmp_path / "workload.pt")
        worker.ask("save", workload=name, path=path)
        results = [tmp_path / "first.pt", tmp_path / "second.pt"]
        for file in results:
            worker.ask("load", path=path, results=str(file))
        first, second = (torch.load(file, weights_only=True) for file in results)
        assert list(first) == ["output 0", "gradient"]
        assert compare.difference(first, second) == ""
        assert worker.ask("round", calls=2)["seconds"] > 0
        if Path("/proc/self/stat").exists():
            time.sleep(0.05)
            before = processor_seconds(worker._process.pid)
            time.sleep(0.5)
            assert processor_seconds(worker._process.pid) - before <= 0.1
        with pytest.raises(compare.WorkloadError, match="FileNotFoundError"):
            worker.ask("load", path=str(tmp_path / "missing"), results=str(results[0]))
        assert "FileNotFoundError" in (tmp_path / "stderr").read_text()


def processor_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
