"""Benchmarks of a training step of distillation: a student's forward, the loss, the backward, and the optimizer's step.

The teacher's logits are given. "student alone" is not a rival but a floor: the same step with a loss that is free.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.routines.contest import TOLERANCES, CifarResNet, Contender, check_and_race
from kdkernels.functional import distillation_loss
from kdkernels.models import SmallCNN
from kdkernels.testing.comparison import COMPILE

TEMPERATURE, KD_WEIGHT, CE_WEIGHT = 4.0, 0.9, 0.1
FLOOR = "student alone"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A student, the shape of its images, and the number of classes."""

    student: Callable[[], nn.Module]
    model: str
    shape: tuple[int, int, int, int]
    num_classes: int


QUICK = [
    Case(lambda: SmallCNN(8), "SmallCNN", (64, 1, 8, 8), 10),
    Case(lambda: CifarResNet("ResNet-8", 100), "ResNet-8", (64, 3, 32, 32), 100),
]
FULL = [Case(lambda: CifarResNet("ResNet-20", 100), "ResNet-20", (128, 3, 32, 32), 100)]


def our_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return distillation_loss(
        student, teacher, labels, temperature=TEMPERATURE, kd_weight=KD_WEIGHT, ce_weight=CE_WEIGHT
    )


def eager_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The loss of Hinton, Vinyals and Dean, arXiv 1503.02531, as usually written in PyTorch."""
    log_q, log_p = F.log_softmax(student / TEMPERATURE, 1), F.log_softmax(teacher / TEMPERATURE, 1)
    divergence = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return KD_WEIGHT * TEMPERATURE**2 * divergence + CE_WEIGHT * F.cross_entropy(student, labels)


def no_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return student.sum()


class Training:
    """A student trained with a loss, on the same batch in every step."""

    def __init__(self, student: nn.Module, loss: Loss, images: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.student, self.loss = copy.deepcopy(student).to(images.dtype).train(), loss
        self.images, self.logits, self.labels = images, logits, labels
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def step(self) -> Tensor:
        loss = self.loss(self.student(self.images), self.logits, self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss

    def results(self) -> list[Tensor]:
        """Return the loss and the student's gradients."""
        loss = self.step().detach()
        return [loss, torch.cat([parameter.grad.flatten() for parameter in self.student.parameters()])]


def test_training_step(race, case):
    torch.manual_seed(0)
    torch._dynamo.reset()
    student, images = case.student(), torch.randn(case.shape)
    logits = 4 * torch.randn(len(images), case.num_classes)
    labels = torch.randint(0, case.num_classes, (len(images),))
    truth = Training(student, eager_loss, images.double(), logits.double(), labels).results()
    losses: dict[str, Loss] = {"kdkernels": our_loss, "eager": eager_loss}
    losses |= {name: torch.compile(eager_loss, dynamic=False, mode=mode) for name, mode in COMPILE.items()}
    contenders: dict[str, Contender] = {}
    for name, loss in losses.items():
        training = Training(student, loss, images, logits, labels)
        contenders[name] = Contender(training.step, results=training.results, compiled=name in COMPILE)
    contenders[FLOOR] = Contender(Training(student, no_loss, images, logits, labels).step)
    check_and_race(
        race, contenders, truth, TOLERANCES[case.model], op="distillation", function="training step of a student",
        shape=list(case.shape), variant=f"{case.model}, {case.num_classes} classes", floors=[FLOOR],
    )  # fmt: skip
