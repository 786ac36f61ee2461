"""Data-free distillation: images from the teacher, a student from the images, and again against that student."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kdkernels.checkpoints import claim_folder, fingerprint
from kdkernels.distillation.distill import distill
from kdkernels.distillation.pool import ImagePool
from kdkernels.inversion import DeepInversion, InversionConfig


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
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")


def batch_generator(seed: int, index: int) -> torch.Generator:
    """Return the generator of a batch, which depends on nothing but the seed and the index."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)


def balanced_labels(count: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """Return labels in random order whose class counts differ by at most one."""
    labels = torch.arange(count) % num_classes
    return labels[torch.randperm(count, generator=generator)]


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
) -> tuple[ImagePool, dict[str, list[float]]]:
    """Train a student from a trained teacher alone.

    Every round synthesizes images, adds them to a pool, and continues to train the student on the whole pool. If
    ``config.adaptive``, later rounds synthesize images against the student of the previous round. Source: Yin et al.,
    "Dreaming to Distill", arXiv 1912.08795, whose released code ends before the student.

    Args:
        teacher: Classifier with BatchNorm layers; left unchanged.
        student: Network trained in place.
        image_shape: Shape [C, H, W] of an image.
        num_classes: Number of classes of the teacher.
        inversion: Settings of the synthesis.
        config: Settings of the loop and of the student's training.
        seed: Seed of the images and of the order in which the student sees them.
        folder: Folder in which every finished batch and epoch is saved; a call with the same arguments resumes an
            interrupted run from it.
        progress: Whether to show progress bars.
        on_round: Function called after every round with its number and the student.

    Returns:
        The pool of images and the history of the student's training.

    """
    if folder is not None:
        settings = {"inversion": asdict(inversion), "config": asdict(config), "seed": seed, "image_shape": image_shape}
        claim_folder(folder, settings | {"teacher": fingerprint(teacher)})
    pool = ImagePool(None if folder is None else Path(folder) / "images")
    epochs = config.rounds * config.epochs
    optimizer = torch.optim.Adam(student.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    history: dict[str, list[float]] = {"loss": [], "learning_rate": []}
    for number in range(config.rounds):
        checkpoint = None if folder is None else Path(folder) / f"student_round_{number:03d}.pt"
        if checkpoint is None or not _is_finished(checkpoint, config.epochs):
            against = student if config.adaptive and number > 0 else None
            inverter = DeepInversion(teacher, image_shape, inversion, student=against)
            for index in range(len(pool), (number + 1) * config.batches):
                generator = batch_generator(seed, index)
                labels = balanced_labels(inversion.batch_size, num_classes, generator)
                with progress_bar(inversion, f"batch {index + 1}", progress) as advance:
                    result = inverter.synthesize(labels, generator=generator, progress=advance)
                pool.add(result.images, result.labels)
        torch.manual_seed(seed * 1_000_003 + number)
        images = pool.images[: (number + 1) * config.batches * inversion.batch_size]
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(images), batch_size=config.batch_size, shuffle=True
        )
        part = distill(
            student,
            teacher,
            loader,
            epochs=config.epochs,
            optimizer=optimizer,
            scheduler=scheduler,
            temperature=config.temperature,
            checkpoint=checkpoint,
            progress=progress,
        )
        for name, values in part.items():
            history[name] += values
        if on_round is not None:
            on_round(number, student)
    return pool, history


def _is_finished(checkpoint: Path, epochs: int) -> bool:
    """Tell whether a round was already trained to its end."""
    if not checkpoint.is_file():
        return False
    state = torch.load(checkpoint, weights_only=True)
    return len(state["history"]["loss"]) == epochs


@contextmanager
def progress_bar(
    config: InversionConfig, description: str, enabled: bool
) -> Iterator[Callable[[int, dict[str, Tensor]], None]]:
    """Show a progress bar for a synthesis; yield the function to call after every iteration."""
    total = sum(stage.iterations for stage in config.stages)
    with tqdm(total=total, desc=description, unit="it", disable=not enabled, mininterval=0.5) as bar:

        def advance(iteration: int, terms: dict[str, Tensor]) -> None:
            if enabled and iteration % 20 == 0:  # reading the loss waits for the device
                bar.set_postfix(loss=f"{terms['loss'].item():.3f}", refresh=False)
            bar.update()

        yield advance
