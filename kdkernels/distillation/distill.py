"""Distillation from a teacher to a student on given images."""

import os
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kdkernels._networks import frozen
from kdkernels.checkpoints import load_checkpoint, save_checkpoint
from kdkernels.functional import distillation_loss

Batch = Tensor | tuple[Tensor, ...] | list[Tensor]


def distill(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Batch],
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    temperature: float = 4.0,
    kd_weight: float | None = None,
    ce_weight: float | None = None,
    divergence: Literal["forward_kl", "reverse_kl", "js"] = "forward_kl",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, list[float]]:
    """Train a student to reproduce the teacher's outputs.

    The loss is :func:`kdkernels.functional.distillation_loss`: the divergence of the softened outputs, plus the
    cross-entropy if the loader gives labels. Source: Hinton, Vinyals and Dean, arXiv 1503.02531.

    Args:
        student: Network trained in place, in train mode.
        teacher: Network held in eval mode and left unchanged.
        loader: Batches: images, (images,), or (images, labels).
        epochs: Number of passes over the loader.
        optimizer: Optimizer of the student's parameters.
        scheduler: Scheduler stepped after every epoch.
        temperature: Temperature that softens both outputs.
        kd_weight: Weight of the divergence; defaults to 0.9 with labels and 1 without.
        ce_weight: Weight of the cross-entropy; defaults to 0.1 with labels.
        divergence: Divergence of the outputs; see :func:`kdkernels.functional.distillation_loss`.
        checkpoint: File written after every epoch. If it exists, training resumes after its last epoch.
        progress: Whether to show a progress bar.

    Returns:
        The history, one value per epoch: ``"loss"``, averaged over the images, and ``"learning_rate"``.

    Raises:
        ValueError: If epochs is negative, or the checkpoint holds more epochs than requested.
        KeyboardInterrupt: If interrupted; the checkpoint holds all finished epochs.

    """
    if epochs < 0:
        raise ValueError(f"epochs is {epochs}; expected 0 or more")
    device = next(student.parameters()).device
    history: dict[str, list[float]] = {"loss": [], "learning_rate": []}
    parts: dict[str, Any] = {"student": student, "optimizer": optimizer}
    if scheduler is not None:
        parts["scheduler"] = scheduler
    state = None if checkpoint is None else load_checkpoint(checkpoint)
    if state is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        history = state["history"]
        if len(history["loss"]) > epochs:
            done = len(history["loss"])
            raise ValueError(
                f"epochs is {epochs}, but {checkpoint} already holds {done} epochs; expected {done} or more"
            )
    options: dict[str, Any] = {
        "temperature": temperature,
        "kd_weight": kd_weight,
        "ce_weight": ce_weight,
        "divergence": divergence,
    }
    student.train()
    with frozen(teacher), tqdm(total=epochs, desc="distill", unit="epoch", disable=not progress) as bar:
        bar.update(len(history["loss"]))
        for _ in range(len(history["loss"]), epochs):
            loss = _epoch(student, teacher, loader, optimizer, device, options)
            history["loss"].append(loss)
            history["learning_rate"].append(float(optimizer.param_groups[0]["lr"]))
            if scheduler is not None:
                scheduler.step()
            if checkpoint is not None:
                save_checkpoint(checkpoint, {n: p.state_dict() for n, p in parts.items()} | {"history": history})
            bar.set_postfix(loss=f"{loss:.4f}")
            bar.update()
    return history


def _epoch(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    options: dict[str, Any],
) -> float:
    """Train for one pass over the loader and return the mean loss; the host waits for the device once."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    losses: list[Tensor] = []
    for batch in loader:
        images, *rest = (batch,) if isinstance(batch, Tensor) else batch
        images = images.to(device)
        labels = rest[0].to(device) if rest else None
        with torch.no_grad():
            target = teacher(images)
        loss = distillation_loss(student(images), target, labels, **options)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach() * len(images))
        count += len(images)
    if losses:
        total = torch.stack(losses).sum()
    return total.item() / max(count, 1)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 512) -> float:
    """Return the share of images that a classifier recognizes, in [0, 1]; the model is left unchanged."""
    device = next(model.parameters()).device
    with frozen(model):
        hits = [
            (model(x.to(device)).argmax(1).cpu() == y.cpu()).sum()
            for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
        ]
    return torch.stack(hits).sum().item() / max(len(labels), 1) if hits else 0.0
