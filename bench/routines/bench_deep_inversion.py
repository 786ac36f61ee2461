"""Benchmarks of an iteration of DeepInversion: loss, gradient, and the step of Adam, against the published code.

"eager" is the published iteration, "eager, teacher frozen" the same without the gradients of the teacher's parameters,
and "compile" that one under torch.compile. "network alone" is not a rival but a floor that every iteration contains:
the teacher's forward, and its backward to the images.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.ops import suite
from bench.routines.contest import ONLY_IN_FULL, TOLERANCES, CifarResNet, Contender, check_and_race, with_statistics
from bench.routines.published_inversion import PublishedInversion, Terms, draw_augmentation
from kdkernels.inversion import DeepInversion, InversionConfig
from kdkernels.inversion.deep_inversion import learning_rate_at
from kdkernels.testing.comparison import COMPILE, relative_error

EXACT = 1e-9  # tolerance for the loss and the images' gradient in fp64
FLOOR = "network alone"


@dataclass(frozen=True)
class Case:
    """A network and the shape of its images."""

    model: str
    shape: tuple[int, int, int, int]
    preset: str
    memory: int = 0  # bytes of memory that it needs
    rounds: int = 15


QUICK = [Case("ResNet-8", (32, 3, 32, 32), "nvlabs-cifar10")]
FULL = [
    Case("ResNet-20", (64, 3, 32, 32), "nvlabs-cifar10", memory=8 << 30, rounds=7),
    Case("ResNet-18", (32, 3, 32, 32), "nvlabs-cifar10", memory=8 << 30, rounds=5),
    Case("ResNet-50", (8, 3, 224, 224), "nvlabs-imagenet-1", memory=16 << 30, rounds=3),
]


class OurIteration:
    """The loop body of ``DeepInversion.synthesize``, one iteration per call; use it inside ``watching``."""

    def __init__(self, inverter: DeepInversion, images: Tensor, labels: Tensor, *, compiled: bool = False) -> None:
        self.inverter, self.config, self.labels = inverter, inverter.config, labels
        self.images = images.detach().clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.images], lr=self.config.learning_rate, betas=self.config.betas)
        self.best_loss, self.best_images = torch.full((), float("inf")), self.images.detach().clone()
        self.watching = inverter._watching
        self.compiled = torch.compile(inverter._terms, dynamic=False) if compiled else None
        self.done = 0

    def loss_terms(self, images: Tensor, labels: Tensor, offsets: tuple[int, int], flip: bool) -> Terms:
        if self.compiled is None:
            return self.inverter._terms(images, labels, 1, offsets, flip)
        # The augmentation is not compiled, as in the published code: each roll would be a new graph for the compiler.
        augmented = torch.roll(images, offsets, (2, 3))
        return self.compiled(augmented.flip(3) if flip else augmented, labels, 1, (0, 0), False)

    def iteration(self, offsets: tuple[int, int], flip: bool) -> None:
        iterations = self.config.stages[0].iterations
        self.optimizer.param_groups[0]["lr"] = learning_rate_at(self.config, self.done, iterations)
        loss = self.loss_terms(self.images, self.labels, offsets, flip)["loss"]
        (self.images.grad,) = torch.autograd.grad(loss, self.images)
        if self.config.keep == "best":
            better = loss.detach() < self.best_loss
            self.best_loss = torch.where(better, loss.detach(), self.best_loss)
            self.best_images = torch.where(better, self.images.detach(), self.best_images)
        self.optimizer.step()
        self.inverter._clip(self.images)
        self.done += 1


def network_of(case: Case) -> nn.Module:
    torch.manual_seed(0)
    if case.model == "ResNet-50":
        models = pytest.importorskip("torchvision.models", reason="torchvision, which has ResNet-50, is not installed")
        model = models.resnet50(weights=None)
    else:
        model = CifarResNet(case.model)
    return with_statistics(model, torch.randn(case.shape))


def results_of(
    loss_terms: Callable[..., Terms], images: Tensor, labels: Tensor, offsets: tuple[int, int], flip: bool
) -> list[Tensor]:
    """Return the loss and the images' gradient."""
    images = images.detach().clone().requires_grad_()
    loss = loss_terms(images, labels, offsets, flip)["loss"]
    return [loss.detach(), *torch.autograd.grad(loss, images)]


def stepping(config: InversionConfig, iteration: Callable[..., object]) -> Callable[[], None]:
    """Return a step with a randomly drawn augmentation, the same for all contenders."""
    generator = torch.Generator().manual_seed(1)
    return lambda: iteration(*draw_augmentation(config, generator))


def test_iteration(race, full, case):
    if case.memory > suite.memory_bytes():
        pytest.skip(f"needs a machine with {case.memory >> 30} GB of memory")
    teacher = network_of(case)
    torch._dynamo.reset()
    config = replace(InversionConfig.preset(case.preset), flip=0.5)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.shape, generator=generator)
    labels = torch.randint(0, 10, case.shape[:1], generator=generator)
    example = (labels, (1, -2), True)
    exact = copy.deepcopy(teacher).double()
    truth = results_of(PublishedInversion(exact, config).loss_terms, images.double(), *example)
    wide = OurIteration(DeepInversion(exact, case.shape[1:], config), images.double(), labels)
    with wide.watching():
        gap = relative_error(results_of(wide.loss_terms, images.double(), *example), truth)
    assert gap <= EXACT, f"ours and the published iteration differ by {gap:.1e} in fp64"

    def ours(compiled: bool = False) -> OurIteration:
        inverter = DeepInversion(copy.deepcopy(teacher), case.shape[1:], config)
        return OurIteration(inverter, images, labels, compiled=compiled)

    def published(freeze: bool = True, compile_mode: str | None = None) -> PublishedInversion:
        runner = PublishedInversion(teacher, config, freeze=freeze, compile_mode=compile_mode)
        runner.begin(images, labels)
        return runner

    plain, compiled = ours(), ours(compiled=True)
    runners = {
        "kdkernels": plain, "eager": published(freeze=False), "eager, teacher frozen": published(),
        "compile": published(compile_mode="default"),
    }  # fmt: skip
    if full:
        runners["compile max-autotune"] = published(compile_mode=COMPILE["compile max-autotune"])
        runners["kdkernels, compiled"] = compiled
    contenders = {
        name: Contender(
            stepping(config, runner.iteration),
            results=partial(results_of, runner.loss_terms, images, *example),
            compiled="compile" in name,
        )
        for name, runner in runners.items()
    }
    contenders[FLOOR] = Contender(network_alone(teacher, images, labels))
    with plain.watching(), compiled.watching():
        check_and_race(
            race, contenders, truth, TOLERANCES[case.model], rounds=case.rounds, op="deep_inversion",
            function="DeepInversion iteration", shape=list(case.shape), variant=f"{case.model}, {case.preset}",
            not_timed={} if full else dict.fromkeys(("compile max-autotune", "kdkernels, compiled"), ONLY_IN_FULL),
            goals={"faster than eager": 1.0}, floor=FLOOR,
        )  # fmt: skip


def network_alone(teacher: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Return a forward of a frozen network, and a backward to the images."""
    teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
    images = images.detach().clone().requires_grad_()
    return lambda: torch.autograd.grad(F.cross_entropy(teacher(images), labels), images)
