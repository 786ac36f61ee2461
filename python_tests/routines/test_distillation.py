"""Distillation with and without data, including interruptions."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kdkernels.data import load_digits
from kdkernels.distillation import DataFreeConfig, ImagePool, accuracy, data_free_distill, distill
from kdkernels.distillation.data_free import balanced_labels, batch_generator
from kdkernels.inversion import PRESETS, BatchNormStatistics
from kdkernels.models import SmallCNN


def loader_of(*tensors, batch_size=16):
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, shuffle=True)


def setup(seed=0, epochs=4):
    torch.manual_seed(seed)
    teacher, student = SmallCNN(6), SmallCNN(4)
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    return teacher, student, {"optimizer": optimizer, "scheduler": scheduler, "epochs": epochs, "progress": False}


def test_student_approaches_the_teacher():
    teacher, student, options = setup(epochs=8)
    before = copy.deepcopy(teacher.state_dict())
    history = distill(student, teacher, loader_of(torch.randn(64, 1, 8, 8)), **options)
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    assert len(history["learning_rate"]) == 8
    assert history["learning_rate"][-1] < history["learning_rate"][0]
    assert teacher.training
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_labels_are_used_if_the_loader_gives_them():
    x, y = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))
    losses = []
    for tensors, weights in (((x,), {}), ((x, y), {}), ((x, y), {"kd_weight": 1.0, "ce_weight": 0.0})):
        teacher, student, options = setup(epochs=1)
        losses.append(distill(student, teacher, loader_of(*tensors), **options, **weights)["loss"][0])
    assert losses[0] == pytest.approx(losses[2])
    assert losses[0] != pytest.approx(losses[1])


class InterruptedError(Exception):
    pass


class Interrupting:
    """A loader that stops the run after some batches."""

    def __init__(self, loader, after):
        self.loader, self.left = loader, after

    def __iter__(self):
        for batch in self.loader:
            if self.left == 0:
                raise InterruptedError
            self.left -= 1
            yield batch


def test_interrupted_training_ends_like_an_uninterrupted_one(tmp_path):
    x = torch.randn(48, 1, 8, 8)
    teacher, straight, options = setup()
    expected = distill(straight, teacher, loader_of(x), **options)

    teacher, student, options = setup()
    checkpoint = tmp_path / "run" / "student.pt"
    with pytest.raises(InterruptedError):
        distill(student, teacher, Interrupting(loader_of(x), 7), checkpoint=checkpoint, **options)
    teacher, resumed, options = setup()
    torch.manual_seed(123)  # the generator's state must not matter
    history = distill(resumed, teacher, loader_of(x), checkpoint=checkpoint, **options)
    assert history == expected
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_checkpoint_of_more_epochs_is_refused(tmp_path):
    teacher, student, options = setup(epochs=2)
    checkpoint = tmp_path / "student.pt"
    loader = loader_of(torch.randn(16, 1, 8, 8))
    distill(student, teacher, loader, checkpoint=checkpoint, **options)
    with pytest.raises(ValueError, match=r"epochs is 1, but .* already holds 2 epochs"):
        distill(student, teacher, loader, checkpoint=checkpoint, **{**options, "epochs": 1})
    with pytest.raises(ValueError, match="epochs is -1"):
        distill(student, teacher, loader, **{**options, "epochs": -1})


def test_accuracy_counts_hits():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4, bias=False))
    torch.nn.init.eye_(model[1].weight)
    images = torch.eye(4).view(4, 1, 2, 2)
    assert accuracy(model, images, torch.tensor([0, 1, 2, 0])) == 0.75
    assert accuracy(model, images[:0], torch.zeros(0, dtype=torch.int64)) == 0.0


# The pool


def test_pool_keeps_its_batches(tmp_path):
    pool = ImagePool(tmp_path / "pool")
    batches = [(torch.randn(3, 1, 4, 4), torch.arange(3) + i) for i in range(2)]
    for batch in batches:
        pool.add(*batch)
    found = ImagePool(tmp_path / "pool")
    assert len(found) == len(pool) == 2
    assert torch.equal(found.images, torch.cat([images for images, _ in batches]))
    assert torch.equal(found.labels, torch.cat([labels for _, labels in batches]))
    assert len(next(iter(found.loader(4, labels=True)))) == 2
    assert next(iter(found.loader(4)))[0].shape == (4, 1, 4, 4)


# Without data

INVERSION = replace(PRESETS["digits"].with_iterations(3), batch_size=20, compete_weight=1.0)
CONFIG = DataFreeConfig(rounds=2, batches=2, epochs=2, batch_size=16)


def data_free(folder, **options):
    torch.manual_seed(0)
    teacher, student = SmallCNN(4).eval(), SmallCNN(3)
    pool, history = data_free_distill(
        teacher,
        student,
        (1, 8, 8),
        10,
        inversion=INVERSION,
        config=CONFIG,
        seed=5,
        folder=folder,
        progress=False,
        **options,
    )
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

        def add(self, images, labels):
            original(self, images, labels)
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


def test_a_folder_of_another_run_is_refused(tmp_path):
    data_free(tmp_path / "run")
    other = SmallCNN(4)
    with pytest.raises(ValueError, match=r"holds a run with other settings \(seed, teacher\)"):
        data_free_distill(
            other,
            SmallCNN(3),
            (1, 8, 8),
            10,
            inversion=INVERSION,
            config=CONFIG,
            seed=6,
            folder=tmp_path / "run",
            progress=False,
        )


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="rounds is 0; expected 1 or more"):
        DataFreeConfig(rounds=0)


def test_seeds_of_batches_do_not_collide():
    numbers = {
        tuple(torch.randint(0, 2**31, (4,), generator=batch_generator(seed, index)).tolist())
        for seed in range(5)
        for index in range(20)
    }
    assert len(numbers) == 100
    labels = balanced_labels(25, 10, torch.Generator().manual_seed(0))
    assert labels.bincount().tolist() == [3] * 5 + [2] * 5


# Real data


def test_digits_are_split_and_standardized():
    digits = load_digits()
    assert [len(part[1]) for part in (digits.train, digits.validation, digits.test)] == [1047, 250, 500]
    assert digits.train[0].mean().item() == pytest.approx(0, abs=1e-5)
    assert digits.train[0].std().item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(load_digits().test[1], digits.test[1])
    assert digits.train[0].mul(digits.std).add(digits.mean).min().item() == pytest.approx(0, abs=1e-6)


def test_noise_is_far_from_the_statistics_and_real_images_are_near(digits_teacher):
    """The feature term of Gaussian noise is more than five times that of real images."""
    images = load_digits().validation[0]
    with BatchNormStatistics(digits_teacher) as statistics, torch.no_grad():
        digits_teacher(images)
        real = statistics.loss().item()
        digits_teacher(torch.randn_like(images))
        noise = statistics.loss().item()
    assert noise > 5 * real
