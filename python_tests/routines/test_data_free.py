"""Distillation without data: interruptions, other runs in the folder, and what is checked first."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdkernels import checkpoints as checkpoints_module
from kdkernels.distillation import DataFreeConfig, ImagePool, data_free_distill
from kdkernels.inversion import PRESETS, DeepInversion, Stage
from kdkernels.models import SmallCNN

# Without data

INVERSION = replace(PRESETS["digits"].with_iterations(3), batch_size=20, compete_weight=1.0)
CONFIG = DataFreeConfig(rounds=2, batches=2, epochs=2, batch_size=16)


def data_free(folder, **options):
    torch.manual_seed(0)
    teacher, student = SmallCNN(4).eval(), SmallCNN(3)
    pool, history = data_free_distill(
        teacher, student, (1, 8, 8), 10, inversion=INVERSION, config=CONFIG, seed=5, folder=folder, progress=False,
        **options,
    )  # fmt: skip
    return pool, history, student


def test_data_free_loop(tmp_path):
    rounds = []
    pool, history, student = data_free(None, on_round=lambda number, _: rounds.append(number))
    assert rounds == [0, 1]
    assert len(pool) == 4
    assert len(history["loss"]) == 4
    assert torch.equal(pool.labels[:20].bincount(minlength=10), torch.full((10,), 2))
    # The same in a folder, then again from the finished folder
    for _ in range(2):
        kept, kept_history, kept_student = data_free(tmp_path / "run")
        assert torch.equal(kept.images, pool.images)
        assert kept_history == history
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), kept_student.parameters(), strict=True))


@pytest.mark.parametrize("stop_after", ["batch 1", "round 0"])
def test_interrupted_loop_ends_like_an_uninterrupted_one(tmp_path, monkeypatch, stop_after):
    _, expected, straight = data_free(None)
    folder = tmp_path / "run"
    if stop_after == "batch 1":
        original, calls = ImagePool.add, []

        def add(self, images, labels, **options):
            original(self, images, labels, **options)
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(ImagePool, "add", add)
        with pytest.raises(KeyboardInterrupt):
            data_free(folder)
        monkeypatch.setattr(ImagePool, "add", original)
    else:

        def stop(number, _):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            data_free(folder, on_round=stop)
    _, history, student = data_free(folder)
    assert history == expected
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), student.parameters(), strict=True))


class StopError(Exception):
    pass


def run(folder, *, seed=5, student=None, teacher=None, inversion=INVERSION, **changes):
    """Train with some settings of the loop changed; the networks are the same in every call."""
    torch.manual_seed(0)
    networks = SmallCNN(4).eval(), SmallCNN(3)
    teacher, student = teacher or networks[0], student or networks[1]
    _, history = data_free_distill(
        teacher, student, (1, 8, 8), 10, inversion=inversion, config=replace(CONFIG, **changes), seed=seed,
        folder=folder, progress=False,
    )  # fmt: skip
    return student.state_dict(), history


def assert_equal(one, other):
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_folder_holds_the_student_and_the_history(tmp_path):
    state, history = run(tmp_path)
    assert_equal(state, load_file(tmp_path / "student.safetensors"))
    assert json.loads((tmp_path / "history.json").read_text()) == history
    assert history.keys() == {"loss", "learning_rate", "recognized"}
    assert len(history["recognized"]) == 4
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lock", "settings.json", "history.json", "student.safetensors", "student_round_000.pt",
        "student_round_001.pt", *(f"batch_0000{index}.safetensors" for index in range(4)),
    }  # fmt: skip


def test_the_caller_keeps_its_generator_and_the_networks_are_ready():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    teacher, student = SmallCNN(4), SmallCNN(3)
    state = torch.get_rng_state()
    data_free_distill(teacher, student, (1, 8, 8), 10, inversion=INVERSION, config=CONFIG, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(torch.rand(2), expected)
    assert teacher.training
    assert not student.training


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seed": 6}, "seed was 5 and is 6"),
        ({"temperature": 3.0}, r"config.temperature was 4\.0 and is 3\.0"),
        ({"inversion": replace(INVERSION, learning_rate=0.2)}, r"inversion\.learning_rate was 0\.1 and is 0\.2"),
        ({"inversion": replace(INVERSION, mean=(0.5,), std=(1.0,))}, r"inversion.mean was not set and is \[0\.5\]"),
        ({"teacher": SmallCNN(4)}, "teacher was 'SmallCNN [0-9a-f]{16}' and is 'SmallCNN [0-9a-f]{16}'"),
        ({"student": SmallCNN(3)}, "initial student was 'SmallCNN [0-9a-f]{16}' and is 'SmallCNN [0-9a-f]{16}'"),
        ({"batches": 3}, "config.batches was 2 and is 3"),
        ({"epochs": 3}, "config.epochs was 2 and is 3"),
        ({"rounds": 1}, "config.rounds was 2 and is 1"),
    ],
)
def test_a_folder_of_another_run_is_refused(tmp_path, changes, text):
    run(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"holds a run with other settings: {text};"):
        run(tmp_path, **changes)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_more_rounds_continue_the_run(tmp_path):
    _, two = run(tmp_path)
    kept = ImagePool(tmp_path).images
    _, three = run(tmp_path, rounds=3)
    assert {name: values[:4] for name, values in three.items()} == two
    # The two new epochs follow the cosine of six epochs, from the fifth on.
    expected = [CONFIG.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / 6)) for epoch in (4, 5)]
    assert three["learning_rate"][4:] == pytest.approx(expected, rel=1e-12)
    assert torch.equal(ImagePool(tmp_path).images[:80], kept)


def test_more_epochs_continue_a_run_of_one_round(tmp_path):
    _, two = run(tmp_path, rounds=1)
    _, five = run(tmp_path, rounds=1, epochs=5)
    assert five["loss"][:2] == two["loss"]
    expected = [CONFIG.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / 5)) for epoch in (2, 3, 4)]
    assert five["learning_rate"][2:] == pytest.approx(expected, rel=1e-12)


def test_settings_may_be_numpy_scalars(tmp_path):
    _, expected = run(None)
    _, history = run(tmp_path, seed=np.int64(5), epochs=np.int64(2), learning_rate=np.float64(5e-3))
    assert history == expected
    assert run(tmp_path)[1] == expected  # the same run


def test_a_seed_may_be_as_large_as_the_time_in_nanoseconds():
    assert run(None, seed=10**19)[1]["loss"] != run(None, seed=5)[1]["loss"]


def test_rounds_are_annealed_together():
    _, history = run(None)
    expected = [CONFIG.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert history["learning_rate"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("index", range(4))
def test_a_batch_that_was_removed_is_made_again(tmp_path, index):
    """Also one of the second round, which is synthesized against the student of the first."""
    state, history = run(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("batch_*")}
    (tmp_path / f"batch_{index:05d}.safetensors").unlink()
    again, same = run(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("batch_*")} == files
    assert same == history
    assert_equal(state, again)


def test_checkpoints_that_were_removed_or_damaged(tmp_path):
    state, history = run(tmp_path)
    (tmp_path / "student_round_000.pt").unlink()
    again, same = run(tmp_path)
    assert same == history
    assert_equal(state, again)
    path = tmp_path / "student_round_001.pt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"student_round_001\.pt' is damaged"):
        run(tmp_path)


@pytest.mark.parametrize("kind", ["dropout", "tied weights", "DataParallel"])
@pytest.mark.parametrize("stopped", [1, 3, 5])
def test_students_of_every_kind_resume_bit_for_bit(tmp_path, monkeypatch, kind, stopped):
    torch.manual_seed(1)
    first = student_of(kind)
    expected, history = run(tmp_path / "straight", student=copy.deepcopy(first))
    original, calls = checkpoints_module.save_checkpoint, []

    def interrupted(path, state):
        original(path, state)
        calls.append(path)
        if len(calls) == stopped:
            raise StopError

    monkeypatch.setattr("kdkernels.distillation._saver.save_checkpoint", interrupted)
    with pytest.raises(StopError):
        run(tmp_path / "stopped", student=copy.deepcopy(first))
    monkeypatch.undo()
    state, same = run(tmp_path / "stopped", student=copy.deepcopy(first))
    assert same == history
    assert_equal(expected, state)
    assert_equal(expected, load_file(tmp_path / "stopped" / "student.safetensors"))


def student_of(kind):
    if kind == "dropout":
        return nn.Sequential(SmallCNN(3), nn.Dropout(0.3), nn.Linear(10, 10))
    if kind == "DataParallel":
        return nn.DataParallel(SmallCNN(3))
    model = nn.Sequential(SmallCNN(3), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10))
    model[3].weight = model[1].weight
    return model


# What is checked before the first image


def never(*_, **__):
    raise AssertionError("the synthesis began")


def with_nan(model):
    model[0].weight.data[0] = float("nan")
    return model


class Vectors(nn.Sequential):
    """A student whose batch normalization cannot train on one image."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"teacher": with_nan(SmallCNN(4))}, r"teacher holds values that are not finite in 0\.weight"),
        ({"student": with_nan(SmallCNN(3))}, r"student holds values that are not finite in 0\.weight"),
        ({"student": SmallCNN(3, num_classes=7)}, "the student returns 7 classes, but the teacher returns 10"),
        ({"student": nn.Sequential(SmallCNN(3), nn.Softmax(1))}, "student returns probabilities"),
        ({"student": SmallCNN(3, in_channels=3)}, r"student does not accept images of shape \[1, 8, 8\]"),
        ({"student": SmallCNN(3).requires_grad_(False)}, "no parameter of the student that requires grad"),
        ({"student": Vectors(), "batch_size": 39}, "a batch of 1 images of shape .* cannot be used for training"),
        ({"student": Vectors(), "batch_size": 1}, "a batch of 1 images of shape .* cannot be used for training"),
        ({"student": Vectors(), "batch_size": 79}, "a batch of 1 images of shape .* cannot be used for training"),
    ],
)
def test_what_cannot_work_is_found_before_the_first_image(tmp_path, monkeypatch, options, text):
    monkeypatch.setattr(DeepInversion, "synthesize", never)
    with pytest.raises(ValueError, match=text):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_batch_of_one_that_cannot_occur_is_no_obstacle():
    run(None, student=Vectors(), batch_size=40)
    run(None, student=Vectors(), batch_size=1000)


def test_teacher_and_student_that_share_parameters_are_refused(monkeypatch):
    monkeypatch.setattr(DeepInversion, "synthesize", never)
    teacher = SmallCNN(4)
    with pytest.raises(ValueError, match="student and teacher share the parameters"):
        run(None, teacher=teacher, student=nn.Sequential(teacher, nn.Linear(10, 10)))


class LargeImages(nn.Sequential):
    """A student that takes no image smaller than 8 pixels."""

    def __init__(self):
        super().__init__(nn.Conv2d(1, 2, 8), nn.Flatten(), nn.LazyLinear(10))
        self(torch.zeros(1, 1, 8, 8))


def test_a_student_that_does_not_accept_the_images_of_a_stage_is_refused(monkeypatch):
    monkeypatch.setattr(DeepInversion, "synthesize", never)
    inversion = replace(INVERSION, stages=(Stage(2, pool=2), Stage(2)))
    with pytest.raises(ValueError, match=r"student does not accept images of shape \[1, 4, 4\]"):
        run(None, student=LargeImages(), inversion=inversion)


def test_a_wrong_number_of_classes_is_refused(monkeypatch):
    monkeypatch.setattr(DeepInversion, "synthesize", never)
    with pytest.raises(ValueError, match="num_classes is 9, but the teacher returns 10 classes"):
        data_free_distill(SmallCNN(4), SmallCNN(3), (1, 8, 8), 9, inversion=INVERSION)


class ExtraState(nn.Linear):
    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        pass


def test_a_student_that_cannot_be_saved_is_refused_before_the_first_image(tmp_path, monkeypatch):
    monkeypatch.setattr(DeepInversion, "synthesize", never)
    student = nn.Sequential(SmallCNN(3), ExtraState(10, 10))
    with pytest.raises(ValueError, match=r"a state that is not a tensor in 1\._extra_state"):
        run(tmp_path / "run", student=student)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_networks_of_different_dtypes(tmp_path, dtypes):
    torch.manual_seed(0)
    teacher, student = SmallCNN(4).to(dtypes[0]), SmallCNN(3).to(dtypes[1])
    state, history = run(tmp_path, teacher=teacher, student=student)
    assert all(math.isfinite(value) for value in history["loss"])
    assert_equal(state, load_file(tmp_path / "student.safetensors"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rounds": 0}, "rounds is 0; expected 1 or more"),
        ({"batch_size": -1}, "batch_size is -1; expected 1 or more"),
        ({"learning_rate": "1e-3"}, "learning_rate must be a number, got '1e-3'"),
        ({"temperature": 0.0}, r"temperature is 0\.0; expected a positive number"),
        ({"learning_rate": math.nan}, "learning_rate is nan; expected a positive number"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001; expected 0 or more"),
    ],
)
def test_wrong_settings_are_refused(options, text):
    with pytest.raises((ValueError, TypeError), match=text):
        DataFreeConfig(**options)
