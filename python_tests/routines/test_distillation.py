"""Distillation on given images, including interruptions."""

import copy

import pytest
import torch
from distilled import loader_of, setup, train
from torch import nn
from torch.utils.data import DataLoader

from kdkernels.data import load_digits
from kdkernels.distillation import accuracy, distill
from kdkernels.inversion import BatchNormStatistics, NonFiniteLossError


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


def test_accuracy_counts_hits():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4, bias=False))
    torch.nn.init.eye_(model[1].weight)
    images = torch.eye(4).view(4, 1, 2, 2)
    assert accuracy(model, images, torch.tensor([0, 1, 2, 0])) == 0.75
    assert accuracy(model, images[:0], torch.zeros(0, dtype=torch.int64)) == 0.0


# Schedules


def test_a_plateau_scheduler_gets_the_loss_of_the_epoch():
    teacher, student, options = setup(epochs=4)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        options["optimizer"], factor=0.5, patience=0, threshold=1e9, threshold_mode="abs"
    )
    options["scheduler"] = scheduler  # no epoch improves by so much
    history = distill(student, teacher, loader_of(torch.randn(16, 1, 8, 8)), **options)
    assert history["learning_rate"] == [5e-3, 5e-3, 2.5e-3, 1.25e-3]
    assert scheduler.best == history["loss"][0]
    with pytest.raises(ValueError, match="ReduceLROnPlateau needs the loss of an epoch"):
        distill(student, teacher, [torch.randn(16, 1, 8, 8)], **options, scheduler_interval="step")


@pytest.mark.parametrize(("interval", "steps"), [("step", 6), ("epoch", 2), (None, 2)])
def test_a_scheduler_is_stepped_at_its_interval(interval, steps):
    teacher, student, options = setup(epochs=2)
    options["scheduler"] = scheduler = torch.optim.lr_scheduler.LambdaLR(options["optimizer"], lambda i: 0.5**i)
    distill(student, teacher, loader_of(torch.randn(48, 1, 8, 8)), **options, scheduler_interval=interval)
    assert scheduler.last_epoch == steps


def test_one_cycle_is_stepped_by_batch_and_must_be_long_enough():
    teacher, student, options = setup(epochs=2)
    loader = loader_of(torch.randn(48, 1, 8, 8))
    options["scheduler"] = scheduler = torch.optim.lr_scheduler.OneCycleLR(options["optimizer"], 0.1, total_steps=5)
    with pytest.raises(ValueError, match=r"scheduler has 5 steps, but 6 are needed for 2 epochs; .*total_steps=6"):
        distill(student, teacher, loader, **options)
    options["scheduler"] = scheduler = torch.optim.lr_scheduler.OneCycleLR(options["optimizer"], 0.1, total_steps=6)
    distill(student, teacher, loader, **options)
    assert scheduler.last_epoch == 6


# Losses that are not finite


def test_a_loss_that_is_not_finite_stops_the_run_and_restores_the_student():
    teacher, student, options = setup(epochs=3)
    images = torch.randn(60 * 4, 1, 8, 8)
    images[57 * 4] = float("nan")
    loader = DataLoader(images, 4)  # checked after batch 50 and after the epoch
    reached = []
    student.register_forward_pre_hook(lambda module, _: reached.append(copy.deepcopy(module.state_dict())))
    with pytest.raises(NonFiniteLossError, match=r"the teacher's logits hold NaN .* in batch 58 of epoch 1 of 3") as e:
        distill(student, teacher, loader, **options)
    assert (e.value.term, e.value.iteration) == ("teacher's logits", 58)
    assert not student.training
    # The state after batch 50 is the one before the 51st; the first call was a rehearsal.
    for name, value in student.state_dict().items():
        assert torch.equal(value, reached[51][name])


def test_a_student_that_diverges_is_named_and_its_checkpoint_stays_finite(tmp_path):
    teacher, student, options = setup(epochs=8)
    options["optimizer"] = torch.optim.SGD(student.parameters(), lr=1.0)
    options["scheduler"] = torch.optim.lr_scheduler.LambdaLR(options["optimizer"], lambda i: 0.0 if i < 2 else 1e38)
    with pytest.raises(NonFiniteLossError) as caught:
        distill(student, teacher, loader_of(torch.randn(64, 1, 8, 8)), checkpoint=tmp_path / "c.pt", **options)
    assert caught.value.term in ("student's logits", "gradient")
    assert len(caught.value.state["loss"]) == 2
    assert all(value.isfinite().all() for value in student.state_dict().values())
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert len(saved["history"]["loss"]) == 2
    assert all(value.isfinite().all() for value in saved["student"].values())


def test_networks_that_are_not_finite_are_refused():
    teacher, student, options = setup(epochs=1)
    teacher[1].running_var[0] = float("inf")
    with pytest.raises(ValueError, match=r"teacher holds values that are not finite in 1\.running_var"):
        distill(student, teacher, [torch.randn(4, 1, 8, 8)], **options)


# Networks of other kinds


def test_tied_weights_are_trained_and_saved(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Linear(10, 64), nn.Linear(64, 10)
            self.down.weight = nn.Parameter(self.up.weight.t().detach().clone().t().contiguous().t())
            self.up.weight = self.down.weight

        def forward(self, x):
            return x.flatten(1) @ self.up.weight

    teacher, _, options = setup(epochs=2)
    student = Tied()
    options["optimizer"] = torch.optim.Adam(student.parameters(), lr=1e-2)
    options["scheduler"] = None
    history = distill(student, teacher, [torch.randn(8, 1, 8, 8)], checkpoint=tmp_path / "c.pt", **options)
    assert history["loss"][1] < history["loss"][0]
    assert student.up.weight is student.down.weight


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)])
def test_student_and_teacher_of_different_dtypes(dtypes):
    teacher, student, options = setup(epochs=2)
    teacher, student = teacher.to(dtypes[0]), student.to(dtypes[1])
    options["optimizer"], options["scheduler"] = torch.optim.SGD(student.parameters(), lr=0.1), None
    history = distill(student, teacher, [torch.randn(16, 1, 8, 8)], **options)
    assert history["loss"][1] < history["loss"][0]
    assert accuracy(student, torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)) >= 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_inside_other_modes(mode):
    expected = train()
    with mode():
        images = torch.randn(20, 1, 8, 8)
    teacher, student, options = setup(epochs=2)
    torch.randn(20, 1, 8, 8)
    with mode():
        found = distill(student, teacher, loader_of(images), **options)
    assert len(found["loss"]) == len(expected["loss"])
    assert found["loss"][1] < found["loss"][0]


def test_the_student_comes_back_in_eval_mode():
    teacher, student, options = setup(epochs=1)
    distill(student, teacher, [torch.randn(16, 1, 8, 8)], **options)
    assert not any(module.training for module in student.modules())
    assert teacher.training


def test_dense_logits_need_their_class_dimension():
    teacher, student = (nn.Conv2d(1, classes, 1) for classes in (5, 5))
    options = {"epochs": 2, "optimizer": torch.optim.SGD(student.parameters(), lr=0.5), "progress": False}
    x, y = torch.randn(2, 1, 6, 6), torch.randint(0, 5, (2, 6, 6))
    with pytest.raises(ValueError, match="dim is required"):
        distill(student, teacher, [(x, y)], **options)
    history = distill(student, teacher, [(x, y)], dim=1, **options)
    assert history["loss"][1] < history["loss"][0]


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
