"""Distillation on given images, including interruptions."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kdkernels.data import load_digits
from kdkernels.distillation import accuracy, distill
from kdkernels.inversion import BatchNormStatistics
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
