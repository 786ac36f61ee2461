"""Distillation from a teacher to a student on given images."""

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from types import GeneratorType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from tqdm import tqdm

from kdkernels._networks import NonFiniteLossError, as_input_of, frozen, placement
from kdkernels.checkpoints import fingerprint
from kdkernels.distillation._rehearsal import (
    Batch,
    Unpack,
    batch_sizes,
    check_networks,
    check_options,
    length_of,
    rehearse,
    unpacked,
)
from kdkernels.distillation._saver import Saver, plain
from kdkernels.functional import distillation_loss
from kdkernels.ops._checks import check_integer

CHECK_EVERY = 50  # batches; a check waits for the device
BY_STEP = (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR)

Scheduler = lr_scheduler.LRScheduler | lr_scheduler.ReduceLROnPlateau


def distill(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Batch],
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler | None = None,
    scheduler_interval: Literal["epoch", "step"] | None = None,
    unpack: Unpack | None = None,
    temperature: float = 4.0,
    kd_weight: float | None = None,
    ce_weight: float | None = None,
    divergence: Literal["forward_kl", "reverse_kl", "js"] = "forward_kl",
    dim: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, list[float]]:
    """Train a student to reproduce the teacher's outputs.

    The loss is :func:`kdkernels.functional.distillation_loss`: the divergence of the softened outputs, plus the
    cross-entropy if the loader gives labels. Source: Hinton, Vinyals and Dean, arXiv 1503.02531.

    What can be checked is checked before the first step: the networks, the shapes of the first batch, the size of the
    last one, the options of the loss, the length of the schedule, and that a checkpoint can be written and read.
    Images are moved to the device and converted to the dtype of each network.

    Args:
        student: Network trained in place, in train mode; it is returned in eval mode, ready for use.
        teacher: Network held in eval mode and left unchanged.
        loader: Batches: images, (images,), or (images, labels).
        epochs: Number of passes over the loader.
        optimizer: Optimizer of the student's parameters.
        scheduler: Learning-rate scheduler. ``ReduceLROnPlateau`` gets the mean loss of the epoch.
        scheduler_interval: When the scheduler is stepped: after every ``"epoch"``, or after every optimizer
            ``"step"``, the default for ``OneCycleLR`` and ``CyclicLR``.
        unpack: Function from a batch of another form, such as a dict, to images or (images, labels).
        temperature: Temperature that softens both outputs.
        kd_weight: Weight of the divergence; defaults to 0.9 with labels and 1 without.
        ce_weight: Weight of the cross-entropy; defaults to 0.1 with labels.
        divergence: Divergence of the outputs; see :func:`kdkernels.functional.distillation_loss`.
        dim: Class dimension of logits with more than 2 dimensions.
        checkpoint: File written after every epoch. If it exists, training resumes after its last epoch, with the same
            batches as if it had not stopped. More epochs than before may be asked for.
        progress: Whether to show a progress bar with the loss of the latest batches.

    Returns:
        The history, one value per epoch: ``"loss"``, averaged over the images, and ``"learning_rate"``.

    Raises:
        TypeError: If a batch is not one of the accepted forms, or scheduler is not a scheduler.
        ValueError: If an argument is not accepted, student and teacher share parameters or running statistics,
            scheduler is that of another optimizer, an epoch has no batch, or the checkpoint holds another run or more
            epochs than requested. The message says which value differs.
        NonFiniteLossError: If a loss or a parameter is NaN or infinite, noticed within 50 batches. The student and the
            optimizer are then in their last checked state; ``state`` is the history of the finished epochs.
        KeyboardInterrupt: If interrupted; the checkpoint holds all finished epochs.

    """
    options: dict[str, Any] = {
        "temperature": temperature, "kd_weight": kd_weight, "ce_weight": ce_weight, "divergence": divergence,
        "dim": dim,
    }  # fmt: skip
    check_integer("epochs", epochs, minimum=0)
    if isinstance(loader, GeneratorType) and epochs > 1:
        raise ValueError(
            f"loader is a generator, which can be read once, but epochs is {epochs}; pass a DataLoader or a list"
        )
    check_options(options)
    check_networks(student, teacher, optimizer)
    steps = length_of(loader)
    by_step = _steps_by_step(scheduler, scheduler_interval, optimizer, steps, epochs)
    parts: dict[str, Any] = {"student": student, "optimizer": optimizer}
    if scheduler is not None:
        parts["scheduler"] = scheduler
    saver = None
    history: dict[str, list[float]] = {"loss": [], "learning_rate": []}
    if checkpoint is not None:
        settings = {name: plain(value) for name, value in options.items()}
        settings |= {"teacher": fingerprint(teacher), "seed": torch.initial_seed()}
        settings |= {name: type(part).__name__ for name, part in parts.items()}
        settings |= {f"optimizer's {name}": plain(value) for name, value in optimizer.defaults.items()}
        settings |= {"batch_size": getattr(loader, "batch_size", None), "batches": steps}
        saver = Saver(Path(checkpoint), parts, settings, loader)
        history = saver.resume(epochs) or history
    done = len(history["loss"])
    step = _Step(student, teacher, optimizer, scheduler if by_step else None, options, unpack)
    try:
        grad_mode = (torch.inference_mode(False), torch.enable_grad())  # also where the caller has neither
        with (
            grad_mode[0],
            grad_mode[1],
            frozen(teacher),
            tqdm(total=None if steps is None else steps * epochs, desc="distill", disable=not progress) as bar,
        ):
            bar.update((steps or 0) * done)
            for epoch in range(done, epochs):
                loss = _epoch(step, loader, epoch, epochs, bar, history)
                history["loss"].append(loss)
                history["learning_rate"].append(float(optimizer.param_groups[0]["lr"]))
                if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(loss)
                elif scheduler is not None and not by_step:
                    scheduler.step()
                if saver is not None:
                    saver.save(history)
    finally:
        student.eval()
    return history


def _steps_by_step(
    scheduler: Scheduler | None,
    interval: str | None,
    optimizer: torch.optim.Optimizer,
    steps: int | None,
    epochs: int,
) -> bool:
    """Tell whether the scheduler is stepped after every batch.

    Raises:
        TypeError: If it is not a scheduler.
        ValueError: If it cannot be, is that of another optimizer, or ends before the training.

    """
    if scheduler is not None and not hasattr(scheduler, "step"):
        raise TypeError(
            f"scheduler is a {type(scheduler).__name__}; expected one of torch.optim.lr_scheduler: a function becomes "
            "one by LambdaLR, and several become one by ChainedScheduler or SequentialLR"
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("scheduler is that of another optimizer; build it with the optimizer that is passed")
    if interval not in (None, "epoch", "step"):
        raise ValueError(f"scheduler_interval is {interval!r}; accepted are 'epoch' and 'step'")
    if interval is not None and scheduler is None:
        raise ValueError(f"scheduler_interval is {interval!r}, but no scheduler was given")
    plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    if plateau and interval == "step":
        raise ValueError("scheduler_interval is 'step', but ReduceLROnPlateau needs the loss of an epoch; use 'epoch'")
    by_step = interval == "step" or (interval is None and isinstance(scheduler, BY_STEP))
    total = getattr(scheduler, "total_steps", None)
    if total is not None and (not by_step or steps is not None):
        needed = epochs * (steps or 0) if by_step else epochs
        if needed > total:
            raise ValueError(
                f"scheduler has {total} steps, but {needed} are needed for {epochs} epochs; build it with "
                f"total_steps={needed}"
            )
    return by_step


class _Step:
    """A training step, the losses since the last check, and the last state that was found finite."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        options: dict[str, Any],
        unpack: Unpack | None,
    ) -> None:
        self.student, self.teacher, self.optimizer, self.scheduler = student, teacher, optimizer, scheduler
        self.options, self.unpack = options, unpack
        self.device = placement(student)[0]
        self.rehearsed = False
        self.recent: list[Tensor] = []

    def __call__(self, batch: Batch, sizes: set[int]) -> tuple[Tensor, int]:
        """Train on a batch; return the loss, which the host has not waited for, and the number of images."""
        images, labels = unpacked(batch, self.unpack)
        images = images.to(self.device)
        if images.is_inference():
            images = images.clone()  # a layer saves its input for the backward
        labels = None if labels is None else labels.to(self.device)
        if not self.rehearsed:
            rehearse(self.student, self.teacher, images, labels, sizes, self.options)
            self.rehearsed = True
            self.student.train()
            self._keep()
        with torch.no_grad():
            target = self.teacher(as_input_of(self.teacher, images)).to(self.device)
        output = self.student(as_input_of(self.student, images))
        loss = distillation_loss(output, target, labels, **self.options)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        finite = (output.detach().isfinite().all(), target.isfinite().all())
        self.recent.append(torch.stack([loss.detach().isfinite(), *finite]))
        return loss.detach() * len(images), len(images)

    def check(self, done: int, epoch: int, epochs: int, history: dict[str, list[float]]) -> None:
        """Raise if a loss since the last check, or now a parameter, is not finite; else keep this state."""
        if not self.recent:
            return
        parameters = torch.stack([p.detach().isfinite().all() for p in self.student.parameters()]).all()
        *losses, (fine, _, _) = torch.stack([*self.recent, parameters.expand(3)]).tolist()
        wrong = next((i for i, (loss, _, _) in enumerate(losses) if not loss), None)
        if wrong is None and fine:
            self._keep()
            self.recent = []
            return
        if wrong is None:
            term, what, wrong = "gradient", "a parameter is not finite, although the loss is,", len(losses) - 1
        else:
            _, output, target = losses[wrong]
            term = "loss" if output and target else "student's logits" if target else "teacher's logits"
            what = f"the loss is not finite: the {term} {'overflowed' if term == 'loss' else 'hold NaN or infinity'}"
        iteration = done - len(losses) + wrong + 1
        self.student.load_state_dict(self.kept["student"])
        self.optimizer.load_state_dict(self.kept["optimizer"])
        raise NonFiniteLossError(
            f"{what} in batch {iteration} of epoch {epoch + 1} of {epochs}. The student is back in the state after "
            f"batch {done - len(losses)} of that epoch; lower the learning rate, or look at that batch",
            term=term,
            iteration=iteration,
            state=history,
        )

    def _keep(self) -> None:
        parts = {"student": self.student.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.kept = copy.deepcopy(parts)


def _epoch(
    step: _Step,
    loader: Iterable[Batch],
    epoch: int,
    epochs: int,
    bar: "tqdm[Any]",
    history: dict[str, list[float]],
) -> float:
    """Train for one pass over the loader and return the mean loss."""
    losses: list[Tensor] = []
    counts: list[int] = []
    sizes = set() if step.rehearsed else batch_sizes(loader, step.unpack)

    def show(latest: int) -> None:
        step.check(len(losses), epoch, epochs, history)
        mean = torch.stack(losses[-latest:]).sum().item() / sum(counts[-latest:])
        bar.set_postfix(epoch=epoch + 1, loss=f"{mean:.4f}")

    for batch in loader:
        loss, count = step(batch, sizes)
        losses.append(loss)
        counts.append(count)
        bar.update()
        if len(losses) % CHECK_EVERY == 0:
            show(CHECK_EVERY)
    if not losses:
        again = "; a generator can be read once, so pass a DataLoader or a list" if epoch > 0 else ""
        raise ValueError(f"loader gave no batch in epoch {epoch + 1}{again}")
    show(len(losses))
    return torch.stack(losses).sum().item() / sum(counts)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 512) -> float:
    """Return the share of images that a classifier recognizes, in [0, 1]; the model is left unchanged."""
    with frozen(model):
        hits = [
            (model(as_input_of(model, x)).argmax(1).cpu() == y.cpu()).sum()
            for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
        ]
    return torch.stack(hits).sum().item() / max(len(labels), 1) if hits else 0.0
