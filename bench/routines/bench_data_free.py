"""Benchmarks of a short round of data-free distillation on the digits: synthesize images, then train a student.

"eager" synthesizes with the published iteration and trains with the eager loss; "compile" compiles both. "reference
backend" is our own routine in plain PyTorch, which shows what the kernels alone save.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kdkernels
from bench.routines.contest import Contender, check_and_race
from bench.routines.published_inversion import PublishedInversion
from kdkernels.cli.demo import IMAGE_SHAPE, NUM_CLASSES, DemoSettings, train_teacher
from kdkernels.data import load_digits
from kdkernels.distillation import DataFreeConfig, data_free_distill
from kdkernels.distillation.synthesis import balanced_labels, batch_generator
from kdkernels.inversion import InversionConfig
from kdkernels.models import SmallCNN

Run = Callable[[nn.Module, nn.Module], Tensor]  # takes a teacher and a student to train; returns the images
TOLERANCE = 1e-4  # for the images and the student's parameters
INVERSION = replace(InversionConfig.preset("digits"), batch_size=64).with_iterations(10)
CONFIG = DataFreeConfig(rounds=1, batches=1, epochs=4)
ONE_COMPILED = "compiling takes longer than the round; the benchmark of the iteration times the compiled code"


def eager_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = (torch.log_softmax(logits / CONFIG.temperature, 1) for logits in (student, teacher))
    divergence = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return CONFIG.temperature**2 * divergence


def our_round(teacher: nn.Module, student: nn.Module) -> Tensor:
    """Train the student in place, and return the images."""
    pool, _ = data_free_distill(
        teacher, student, IMAGE_SHAPE, NUM_CLASSES, inversion=INVERSION, config=CONFIG, progress=False
    )
    return pool.images


def reference_round(teacher: nn.Module, student: nn.Module) -> Tensor:
    with kdkernels.set_backend("reference"):
        return our_round(teacher, student)


def published_round(teacher: nn.Module, compile_mode: str | None = None) -> Run:
    """Return a round with the published iteration and an eager loss, as a user would combine them.

    It draws the same random numbers as our round.
    """
    inverter = PublishedInversion(teacher, INVERSION, freeze=compile_mode is not None, compile_mode=compile_mode)
    loss = eager_divergence if compile_mode is None else torch.compile(eager_divergence, dynamic=False)

    def run(teacher: nn.Module, student: nn.Module) -> Tensor:
        generator = batch_generator(0, 0)
        labels = balanced_labels(0, INVERSION.batch_size, NUM_CLASSES, generator)
        images = torch.randn(len(labels), *IMAGE_SHAPE, generator=generator).to(next(teacher.parameters()).dtype)
        images = inverter.synthesize(images, labels, generator)
        optimizer = torch.optim.Adam(student.parameters(), lr=CONFIG.learning_rate, weight_decay=CONFIG.weight_decay)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, CONFIG.epochs)
        torch.manual_seed(0)
        loader = DataLoader(TensorDataset(images), batch_size=CONFIG.batch_size, shuffle=True)
        student.train()
        for _ in range(CONFIG.epochs):
            for (batch,) in loader:
                with torch.no_grad():
                    target = teacher(batch)
                optimizer.zero_grad()
                loss(student(batch), target).backward()
                optimizer.step()
            scheduler.step()
        return images

    return run


class Round:
    """A round that can be repeated, with a new copy of the student each time."""

    def __init__(self, run: Run, teacher: nn.Module, student: nn.Module) -> None:
        self.run, self.teacher, self.first = run, teacher, student

    def prepare(self) -> None:
        self.student = copy.deepcopy(self.first)

    def call(self) -> Tensor:
        return self.run(self.teacher, self.student)

    def results(self) -> list[Tensor]:
        """Return the images and the student's parameters."""
        self.prepare()
        images = self.call()
        return [images, torch.cat([parameter.detach().flatten() for parameter in self.student.parameters()])]


def test_round(race):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    digits = load_digits()
    torch._dynamo.reset()
    teacher = train_teacher(DemoSettings(teacher_epochs=5), *digits.train, seed=0)
    torch.manual_seed(0)
    student = SmallCNN(DemoSettings().student_width, NUM_CLASSES)
    exact, exact_student = copy.deepcopy(teacher).double(), copy.deepcopy(student).double()
    truth = Round(published_round(exact), exact, exact_student).results()
    rounds = {"kdkernels": our_round, "eager": published_round(teacher), "reference backend": reference_round}
    rounds["compile"] = published_round(teacher, "default")
    contenders = {}
    for name, run in rounds.items():
        one = Round(run, teacher, student)
        contenders[name] = Contender(one.call, one.prepare, one.results, compiled=name == "compile")
    check_and_race(
        race, contenders, truth, TOLERANCE, op="data_free", function="round of data-free distillation",
        shape=[INVERSION.batch_size, *IMAGE_SHAPE], not_timed={"compile max-autotune": ONE_COMPILED},
        variant=f"digits, {INVERSION.stages[0].iterations} iterations, {CONFIG.epochs} epochs",
        goals={"faster than eager": 1.0},
    )  # fmt: skip
