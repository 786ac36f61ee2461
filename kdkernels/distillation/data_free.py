"""Data-free distillation: images from the teacher, a student from the images, and again against that student."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import cos, inf, pi, prod
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, TensorDataset

from kdkernels._files import write_json
from kdkernels._networks import check_finite, count_classes, placement
from kdkernels._run_folder import describe, require_space, run_folder
from kdkernels.checkpoints import save_weights, weights_as_bytes
from kdkernels.distillation._rehearsal import check_networks, rehearse
from kdkernels.distillation.distill import accuracy, distill
from kdkernels.distillation.pool import ImagePool
from kdkernels.distillation.synthesis import synthesize_batch
from kdkernels.inversion import DeepInversion, Execution, InversionConfig
from kdkernels.ops._checks import check_integer, check_number


@dataclass(frozen=True)
class DataFreeConfig:
    """Settings of the outer loop of data-free distillation.

    Attributes:
        rounds: Number of rounds; each synthesizes images and trains the student on all images so far.
        batches: Batches of images per round, each of ``InversionConfig.batch_size``.
        epochs: Epochs over the pool per round.
        batch_size: Batch size of the student's training.
        learning_rate: Initial learning rate of the student's Adam, annealed to 0 by a cosine over all rounds.
        weight_decay: Weight decay of the student's Adam.
        temperature: Temperature of the divergence, the student's only loss.
        adaptive: Whether rounds after the first synthesize against the current student, with
            ``InversionConfig.compete_weight``.

    """

    rounds: int = 1
    batches: int = 4
    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 5e-3
    weight_decay: float = 1e-4
    temperature: float = 4.0
    adaptive: bool = True

    def __post_init__(self) -> None:
        for name in ("rounds", "batches", "epochs", "batch_size"):
            check_integer(name, getattr(self, name), minimum=1)
        for name in ("learning_rate", "temperature", "weight_decay"):
            check_number(name, getattr(self, name))
        for name in ("learning_rate", "temperature"):
            if not 0 < getattr(self, name) < inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")
        if not 0 <= self.weight_decay < inf:
            raise ValueError(f"weight_decay is {self.weight_decay}; expected 0 or more")


def data_free_distill(
    teacher: nn.Module,
    student: nn.Module,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    inversion: InversionConfig,
    config: DataFreeConfig = DataFreeConfig(),
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    on_round: Callable[[int, nn.Module], None] | None = None,
    **execution: Unpack[Execution],
) -> tuple[ImagePool, dict[str, list[float]]]:
    """Train a student from a trained teacher alone.

    Every round synthesizes images, adds them to a pool, and continues to train the student on the whole pool. If
    ``config.adaptive``, later rounds synthesize images against the student of the previous round. Everything that can
    be checked is checked before the first image. Source: Yin et al., "Dreaming to Distill", arXiv 1912.08795, whose
    released code ends before the student.

    In a folder, every finished batch and epoch is saved, and a call with the same arguments resumes an interrupted run
    bit for bit; the student is passed as it was at the start. A finished run goes on if it is called with more rounds,
    or, if it has one round, with more epochs. The folder holds ``settings.json``, the images in
    ``batch_*.safetensors``, a checkpoint for each round, and at the end ``student.safetensors`` and ``history.json``.

    Args:
        teacher: Classifier with BatchNorm layers; left unchanged.
        student: Network trained in place; it is returned in eval mode, ready for use.
        image_shape: Shape [C, H, W] of an image.
        num_classes: Number of classes of the teacher.
        inversion: Settings of the synthesis.
        config: Settings of the loop and of the student's training.
        seed: Seed of the images and of the order in which the student sees them.
        folder: Folder of the run; by default nothing is saved.
        progress: Whether to show progress bars, and after each batch the share of its images that the teacher
            recognizes.
        on_round: Function called after every round with its number and the student.
        execution: How the synthesis runs: ``memory_format``, ``autocast``, ``compile`` and ``cuda_graph`` of
            :class:`DeepInversion`.

    Returns:
        The pool of images, and the history: ``"loss"`` and ``"learning_rate"`` of the student's training, one value per
        epoch, and ``"recognized"``, the share of images that the teacher recognizes, one value per batch.

    Raises:
        TypeError: If seed is not an integer.
        ValueError: If a network, its classes or a setting do not fit, or the folder holds another run.
        NonFiniteLossError: If a loss is NaN or infinite; see :meth:`DeepInversion.synthesize` and :func:`distill`.
        OSError: If the folder cannot be written, or its disk has no room for the run.

    Warns:
        UserWarning: If a term of the synthesis keeps the teacher from recognizing the images; it names the weight.

    """
    check_integer("seed", seed)
    inverter = DeepInversion(teacher, image_shape, inversion, **execution)
    _check(inverter, student, num_classes, config)
    loop = _Loop(inverter, student, config, seed, progress, on_round)
    check_networks(student, teacher, loop.optimizer)
    if folder is None:
        return loop.run(None)
    dry_run = weights_as_bytes(student)
    settings: dict[str, Any] = {
        "command": "distill",
        "teacher": describe(teacher),
        "initial student": describe(student),
        "image_shape": list(image_shape),
        "seed": seed,
        "inversion": {name: value for name, value in asdict(inversion).items() if name != "source"},
        "execution": inverter.describe_execution(),
        "config": asdict(config),
    }
    may_grow = {"config.rounds"} if config.rounds > 1 else {"config.epochs"}
    with run_folder(folder, settings, device=placement(student)[0], may_grow=may_grow) as opened:
        images = prod(image_shape) * 4 * inversion.batch_size * config.batches * config.rounds
        require_space(opened, images + (1 + 4 * config.rounds) * len(dry_run))
        return loop.run(opened)


class _Loop:
    """A run of data-free distillation, whose networks and settings were checked."""

    def __init__(
        self,
        inverter: DeepInversion,
        student: nn.Module,
        config: DataFreeConfig,
        seed: int,
        progress: bool,
        on_round: Callable[[int, nn.Module], None] | None,
    ) -> None:
        self.inverter, self.student, self.config = inverter, student, config
        self.seed, self.progress, self.on_round = seed, progress, on_round
        self.optimizer = torch.optim.Adam(
            student.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.scheduler = _Cosine(self.optimizer, config.rounds * config.epochs)

    def run(self, folder: Path | None) -> tuple[ImagePool, dict[str, list[float]]]:
        """Run all rounds."""
        pool = ImagePool(folder)
        history: dict[str, list[float]] = {"loss": [], "learning_rate": []}
        for number in range(self.config.rounds):
            self._synthesize(pool, number)
            for name, values in self._train(pool, number, folder).items():
                history[name] = history.get(name, []) + values
            if self.on_round is not None:
                self.on_round(number, self.student)
        images_of_each = [pool.batch(index) for index in range(self.config.rounds * self.config.batches)]
        history["recognized"] = [accuracy(self.inverter.teacher, *batch) for batch in images_of_each]
        if folder is not None:
            check_finite(self.student, "student")
            save_weights(self.student, folder / "student.safetensors")
            write_json(folder / "history.json", history)
        return pool, history

    def _synthesize(self, pool: ImagePool, number: int) -> None:
        """Add the batches of a round that the pool lacks; the student is as the round before left it."""
        batches = range(number * self.config.batches, (number + 1) * self.config.batches)
        missing = [index for index in batches if index not in pool]
        inverter = self.inverter
        if missing and self.config.adaptive and number > 0:
            inverter = inverter.against(self.student)
        for index in missing:
            result, _ = synthesize_batch(inverter, index, seed=self.seed, progress=self.progress)
            pool.add(result.images, result.labels, index=index)

    def _train(self, pool: ImagePool, number: int, folder: Path | None) -> dict[str, list[float]]:
        """Train the student for a round, or restore it if the round was trained before."""
        images = pool.images[: (number + 1) * self.config.batches * self.inverter.config.batch_size]
        loader = DataLoader(TensorDataset(images), batch_size=self.config.batch_size, shuffle=True)
        device, _ = placement(self.student)
        # The order of the images and dropout draw from torch's generator, which is given back as it was.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed((int(self.seed) * 1_000_003 + number) % 2**63)
            return distill(
                self.student,
                self.inverter.teacher,
                loader,
                epochs=self.config.epochs,
                optimizer=self.optimizer,
                scheduler=self.scheduler,
                temperature=self.config.temperature,
                checkpoint=None if folder is None else folder / f"student_round_{number:03d}.pt",
                progress=self.progress,
            )


class _Cosine(LRScheduler):
    """Anneals the learning rate to 0 by a cosine; a longer run goes on from the value that its own length gives."""

    def __init__(self, optimizer: torch.optim.Optimizer, epochs: int) -> None:
        self.epochs = epochs
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        return [base * 0.5 * (1 + cos(pi * self.last_epoch / self.epochs)) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        for group, value in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = value


def _check(inverter: DeepInversion, student: nn.Module, num_classes: int, config: DataFreeConfig) -> None:
    """Check all that would otherwise be found after the synthesis."""
    if inverter.num_classes != num_classes:
        raise ValueError(f"num_classes is {num_classes}, but the teacher returns {inverter.num_classes} classes")
    check_finite(student, "student")
    found = count_classes(student, inverter.image_shape, "student")
    if found != num_classes:
        raise ValueError(
            f"the student returns {found} classes, but the teacher returns {num_classes}; build a student with as many"
        )
    if config.adaptive and config.rounds > 1:  # the student takes part in the synthesis, at every size of its images
        inverter.against(student)
    counts = [config.batches * inverter.config.batch_size * (number + 1) for number in range(config.rounds)]
    sizes = {size for count in counts for size in (min(count, config.batch_size), count % config.batch_size) if size}
    image = torch.randn(1, *inverter.image_shape, generator=torch.Generator().manual_seed(0))
    images = image.to(placement(student)[0]).expand(max(sizes), -1, -1, -1)
    rehearse(student, inverter.teacher, images, None, sizes, {"temperature": config.temperature})
