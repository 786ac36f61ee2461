"""The command line as a user types it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from contract import BACKENDS
from safetensors.torch import load_file, save_file

from kdkernels import cli
from kdkernels.cli import demo, doctor
from kdkernels.inversion import PRESETS
from kdkernels.models import SmallCNN


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "teacher.safetensors"
    save_file(SmallCNN(4).state_dict(), path)
    return ["--model", "kdkernels.models:SmallCNN", "--model-args", '{"width": 4}', "--checkpoint", str(path)]


SHORT = ["--image-shape", "1", "8", "8", "--preset", "digits", "--iterations", "4", "--batch-size", "20"]


def test_doctor_reports_backends_and_the_self_test(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "softmax_divergence" in out
    assert BACKENDS[0] in out
    assert "0 failed" in out


def test_version_and_help():
    for option in ("--version", "--help"):
        result = subprocess.run(
            [sys.executable, "-m", "kdkernels", option], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0
        assert "kdkernels" in result.stdout


def test_commands_import_heavy_modules_only_when_they_run():
    code = (
        "import sys, kdkernels; before = set(sys.modules); from kdkernels import cli; cli._parser();"
        "print(*sys.modules.keys() - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch._dynamo", "sklearn", "matplotlib", "kdkernels.testing.comparison"}
    assert heavy.isdisjoint(result.stdout.split())


def test_invert_writes_images_and_pictures(tmp_path, teacher, capsys):
    output = tmp_path / "images"
    arguments = ["invert", *teacher, *SHORT, "--batches", "2", "--output", str(output), "--classes", "3", "7"]
    assert cli.main(arguments) == 0
    assert "Wrote 2 batches of 20 images" in capsys.readouterr().out
    batch = load_file(output / "batch_00001.safetensors")
    assert batch["images"].shape == (20, 1, 8, 8)
    assert set(batch["labels"].tolist()) == {3, 7}
    for name in ("grid.png", "curves_00001.png", "history_00000.json", "settings.json"):
        assert (output / name).is_file()
    assert len(json.loads((output / "history_00000.json").read_text())["loss"]) == 4
    # The same command has nothing left to do; other settings are refused.
    before = (output / "batch_00001.safetensors").stat().st_mtime_ns
    assert cli.main(arguments) == 0
    assert (output / "batch_00001.safetensors").stat().st_mtime_ns == before
    assert cli.main([*arguments, "--seed", "1"]) == 2
    assert "other settings: seed was 0 and is 1;" in capsys.readouterr().err


RECORDED = {"memory_format": str(torch.contiguous_format), "autocast": "torch.bfloat16", "compile": True}


def test_how_a_synthesis_runs_is_part_of_its_settings(tmp_path, teacher, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    options = ["--autocast", "bf16", "--compile", "--memory-format", "contiguous_format", "--keep", "best_per_image"]
    command = ["invert", *teacher, *SHORT, "--output", str(tmp_path / "images")]
    assert cli.main([*command, *options]) == 0
    assert compiled == [{"dynamic": False}]
    recorded = json.loads((tmp_path / "images/settings.json").read_text())["settings"]
    assert recorded["execution"] == RECORDED
    assert recorded["inversion"]["keep"] == "best_per_image"
    assert cli.main([*command, *options]) == 0
    capsys.readouterr()
    assert cli.main([*command, *options[2:]]) == 2
    assert "other settings: execution.autocast was 'torch.bfloat16' and is not set;" in capsys.readouterr().err


def test_options_of_the_synthesis_reach_both_rounds_of_a_distillation(tmp_path, teacher, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    student = ["--student-model", "kdkernels.models:SmallCNN", "--student-model-args", '{"width": 3}']
    loop = ["--rounds", "2", "--batches", "1", "--epochs", "1", "--output", str(tmp_path / "run")]
    options = ["--autocast", "bf16", "--compile", "--memory-format", "contiguous_format"]
    assert cli.main(["distill", *teacher, *student, *SHORT, *loop, *options]) == 0
    assert json.loads((tmp_path / "run/settings.json").read_text())["settings"]["execution"] == RECORDED
    assert [function.__code__.co_name.split("_")[0] for function in compiled] == ["teacher", "teacher"]


def test_interrupted_invert_resumes(tmp_path, teacher):
    def command(folder):
        options = ["--image-shape", "1", "8", "8", "--preset", "digits", "--iterations", "300", "--batches", "3"]
        return [sys.executable, "-m", "kdkernels", "invert", *teacher, *options, "--output", str(folder)]

    first = tmp_path / "interrupted"
    process = subprocess.Popen(command(first), stderr=subprocess.PIPE, text=True)
    while not (first / "batch_00000.safetensors").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED
    assert "Run the same command again to continue." in err
    assert "Traceback" not in err
    assert not (first / "batch_00002.safetensors").exists()
    subprocess.run(command(first), check=True, capture_output=True)
    subprocess.run(command(tmp_path / "straight"), check=True, capture_output=True)
    for index in range(3):
        name = f"batch_{index:05d}.safetensors"
        assert torch.equal(load_file(first / name)["images"], load_file(tmp_path / "straight" / name)["images"])


def test_an_interrupt_that_a_destructor_swallows_is_raised_again(monkeypatch, capsys):
    class Deaf:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)  # Python drops the KeyboardInterrupt here

    def run(options):
        Deaf()
        time.sleep(30)
        return 0

    monkeypatch.setattr(doctor, "run", run)
    start, before, hook = time.monotonic(), signal.getsignal(signal.SIGINT), sys.unraisablehook
    assert cli.main(["doctor"]) == cli.INTERRUPTED
    assert time.monotonic() - start < 20
    assert signal.getsignal(signal.SIGINT) is before
    assert sys.unraisablehook is hook
    assert capsys.readouterr().err == "\nInterrupted. Run the same command again to continue.\n"


def test_distill_writes_a_student(tmp_path, teacher, capsys):
    output = tmp_path / "run"
    student = ["--student-model", "kdkernels.models:SmallCNN", "--student-model-args", '{"width": 3}']
    loop = ["--rounds", "2", "--batches", "1", "--epochs", "2"]
    assert cli.main(["distill", *teacher, *student, *SHORT, *loop, "--output", str(output)]) == 0
    SmallCNN(3).load_state_dict(load_file(output / "student.safetensors"))
    assert len(json.loads((output / "history.json").read_text())["loss"]) == 4
    assert (output / "grid.png").is_file()
    out = capsys.readouterr().out
    assert f"Wrote the student to {output / 'student.safetensors'}" in out
    shares = json.loads((output / "history.json").read_text())["recognized"]
    assert f"The teacher recognizes {sum(shares) / 2:.0%} of its images, and the student" in out
    assert f"batch 1: the teacher recognizes {shares[0]:.0%} of the images" in out
    # More rounds go on from there.
    assert cli.main(["distill", *teacher, *student, *SHORT, *loop, "--rounds", "3", "--output", str(output)]) == 0
    assert len(json.loads((output / "history.json").read_text())["loss"]) == 6


def test_labels_go_round_in_a_run(tmp_path, teacher):
    output = tmp_path / "images"
    options = ["--batch-size", "4", "--batches", "5", "--output", str(output)]
    assert cli.main(["invert", *teacher, *SHORT, *options]) == 0
    batches = [load_file(path)["labels"] for path in sorted(output.glob("batch_*"))]
    assert sorted(batches[1].tolist()) == [4, 5, 6, 7]
    assert torch.cat(batches).bincount().tolist() == [2] * 10
    assert cli.main(["invert", *teacher, *SHORT, *options, "--batches", "7"]) == 0
    batches = [load_file(path)["labels"] for path in sorted(output.glob("batch_*"))]
    assert torch.cat(batches).bincount().tolist() == [3] * 8 + [2] * 2


def test_a_removed_batch_is_made_again(tmp_path, teacher, capsys):
    output = tmp_path / "images"
    command = ["invert", *teacher, *SHORT, "--batches", "3", "--output", str(output)]
    assert cli.main(command) == 0
    before = {path: path.read_bytes() for path in output.glob("batch_*")}
    (output / "batch_00001.safetensors").unlink()
    assert cli.main(command) == 0
    assert {path: path.read_bytes() for path in output.glob("batch_*")} == before
    (output / "batch_00001.safetensors").write_bytes(b"")
    assert cli.main(command) == 2
    assert "batch_00001.safetensors' is empty" in capsys.readouterr().err


def test_histories_tell_whether_it_worked(tmp_path, teacher):
    output = tmp_path / "images"
    assert cli.main(["invert", *teacher, *SHORT, "--output", str(output)]) == 0
    history = json.loads((output / "history_00000.json").read_text())
    model, batch = SmallCNN(4).eval(), load_file(output / "batch_00000.safetensors")
    model.load_state_dict(load_file(teacher[5]))
    hits = (model(batch["images"]).argmax(1) == batch["labels"]).float().mean().item()
    assert history["recognized"] == pytest.approx(hits)


# The demo

TINY = demo.DemoSettings(
    teacher_width=4, teacher_epochs=1, student_width=3, student_epochs=1, batches=1,
    inversion=replace(PRESETS["digits"].with_iterations(2), batch_size=40),
)  # fmt: skip


def test_demo_writes_its_files(tmp_path):
    metrics = demo.run_demo(tmp_path, seeds=2, settings=TINY, progress=False)
    assert set(metrics["mean"]) == {"teacher", "noise", "prior", "deep_inversion", "real"}
    table = (tmp_path / "table.txt").read_text()
    assert "DeepInversion images" in table
    assert "+-" in table
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        ".lock", "metrics.json", "table.txt",
        "digits_seed_0.png", "digits_seed_1.png", "curves_seed_0.png", "curves_seed_1.png",
    }  # fmt: skip
    assert json.loads((tmp_path / "metrics.json").read_text())["seeds"] == metrics["seeds"]


def test_interrupted_demo_resumes_after_the_last_seed(tmp_path, monkeypatch):
    original = demo.run_seed

    def interrupted(settings, seed, folder, bar):
        if seed == 1:
            raise KeyboardInterrupt
        return original(settings, seed, folder, bar)

    monkeypatch.setattr(demo, "run_seed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, seeds=2, settings=TINY, progress=False)
    ran = []
    monkeypatch.setattr(demo, "run_seed", lambda *a: ran.append(a[1]) or original(*a))
    metrics = demo.run_demo(tmp_path, seeds=2, settings=TINY, progress=False)
    assert ran == [1]
    assert set(metrics["seeds"]) == {"0", "1"}
    assert not (tmp_path / "unfinished.json").exists()


def test_a_damaged_file_of_an_interrupted_demo_is_named(tmp_path):
    (tmp_path / "unfinished.json").write_text('{"settings": {"teach')
    with pytest.raises(ValueError, match=r"unfinished\.json is damaged .*; remove it to start again"):
        demo.run_demo(tmp_path, settings=TINY, progress=False)
    (tmp_path / "unfinished.json").write_text("[]")
    assert set(demo.run_demo(tmp_path, settings=TINY, progress=False)["seeds"]) == {"0"}


@pytest.mark.slow
def test_one_seed_of_the_demo(tmp_path):
    """The bounds are below the claims, which concern the mean of three seeds; the slow test checks those."""
    mean = demo.run_demo(tmp_path, progress=False)["mean"]
    assert mean["teacher"]["accuracy"] >= 0.96
    assert mean["deep_inversion"]["accuracy"] >= 0.86
    assert mean["deep_inversion"]["accuracy"] - mean["noise"]["accuracy"] >= 0.10
    assert mean["deep_inversion"]["accuracy"] - mean["prior"]["accuracy"] >= 0.10


@pytest.mark.slow
def test_three_seeds_of_the_demo(tmp_path):
    mean = demo.run_demo(tmp_path, seeds=3, progress=False)["mean"]
    accuracies = {arm: values["accuracy"] for arm, values in mean.items()}
    assert accuracies["teacher"] >= 0.97
    assert accuracies["deep_inversion"] >= 0.88
    assert accuracies["deep_inversion"] - accuracies["noise"] >= 0.15
    assert accuracies["deep_inversion"] - accuracies["prior"] >= 0.15
