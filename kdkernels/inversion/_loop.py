"""The iterations of a synthesis, between which the host reads nothing from the device but at intervals."""

from dataclasses import dataclass
from math import cos, pi
from typing import Literal

import torch
from torch import Tensor

from kdkernels._networks import NonFiniteLossError
from kdkernels.inversion._augmentation import Augmentation
from kdkernels.inversion._cuda_graph import CudaGraph, GraphedStep
from kdkernels.inversion._network import compiler_errors_explained
from kdkernels.inversion._objective import Objective
from kdkernels.inversion.config import InversionConfig, Stage

WARM_UP = 100
CHECK_EVERY = 20  # iterations; a check waits for the device
DEAD = "compete_dead"


@dataclass(frozen=True)
class Synthesis:
    """Synthesized images.

    Attributes:
        images: Shape [B, C, H, W], in the teacher's normalized space; fp32 (fp64 for a teacher in fp64).
        labels: Shape [B]; target class of each image.
        history: Weighted terms of the loss and their sum ``"loss"``, one value per iteration. With a competition term
            also ``"compete_dead"``, the share of images for which it is dead: its gradient by the logits of both
            networks is exactly 0, as where the clamps of the published forms bind.

    """

    images: Tensor
    labels: Tensor
    history: dict[str, list[float]]


def learning_rate_at(config: InversionConfig, iteration: int, iterations: int) -> float:
    """Return the learning rate of an iteration, which is counted from 0 within its stage."""
    if config.schedule == "constant":
        return config.learning_rate
    if iteration < WARM_UP:
        return config.learning_rate * (iteration + 1) / WARM_UP
    return 0.5 * config.learning_rate * (1 + cos(pi * (iteration - WARM_UP) / (iterations - WARM_UP)))


class Loop:
    """A synthesis under way; the networks of its objective are ready as long as it runs.

    An iteration reads and writes tensors of the device alone: the numbers of the iteration in the stage and in all,
    and what was drawn and scheduled for each of them before the stage.

    Args:
        objective: Loss.
        images: Initial images, contiguous, in the dtype of the optimization.
        labels: Labels, on the device of the images.
        generator: Generator of the jitter and the flips.
        scaled: Whether the loss is scaled for the backward, whose gradients of a mean over all pixels would underflow
            in fp16.
        cuda_graph: Whether a step is captured in a CUDA graph; ``"auto"`` goes on without one where that fails.

    Attributes:
        total: Number of iterations in all stages.
        done: Number of iterations taken.

    """

    def __init__(
        self,
        objective: Objective,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None,
        *,
        scaled: bool,
        cuda_graph: bool | Literal["auto"],
    ) -> None:
        self.objective, self.config = objective, objective.config
        self.labels, self.generator, self.cuda_graph = labels, generator, cuda_graph
        self.images = images.requires_grad_()
        self.device, dtype = images.device, images.dtype
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.total = sum(stage.iterations for stage in self.config.stages)
        self.done = self.checked = 0
        self._waiting = list(self.config.stages)
        self._left = 0  # iterations of the stage under way
        self.names = [*objective.names, "loss"]
        if objective.student is not None:
            self.names.append(DEAD)
        self._history = torch.zeros(self.total, len(self.names), device=self.device, dtype=dtype)
        self._number = torch.zeros(1, device=self.device, dtype=torch.int64)  # of the iteration in all stages
        self._in_stage = torch.zeros_like(self._number)
        shape = labels.shape if self.config.keep == "best_per_image" else ()
        self._best_loss = torch.full(shape, float("inf"), device=self.device, dtype=dtype)
        self._best_images = images.detach().clone()
        self._finite_images = images.detach().clone()  # those of the last finite loss
        self._bounds: tuple[Tensor, Tensor] | None = None
        if self.config.clip:
            mean, std = (
                torch.tensor(values, dtype=dtype, device=self.device).view(-1, 1, 1)
                for values in (self.config.mean, self.config.std)
            )
            self._bounds = -mean / std, (1 - mean) / std  # the range of normalized pixels

    def _begin(self, stage: Stage) -> None:
        """Prepare a stage: its draws, its learning rates, its optimizer, and how its steps are taken."""
        self.stage, self._left = stage, stage.iterations
        height, width = (size // stage.pool for size in self.images.shape[2:])
        self.augmentation = Augmentation(self.config, stage, (height, width), self.generator, self.device)
        self.rates: Tensor | None = None
        if self.config.schedule != "constant":
            rates = [learning_rate_at(self.config, i, stage.iterations) for i in range(stage.iterations)]
            # On a GPU the optimizer reads a float.
            dtype = torch.float64 if self.device.type == "cpu" else torch.float32
            self.rates = torch.tensor(rates, dtype=dtype, device=self.device)
        self.optimizer = torch.optim.Adam(
            [self.images], lr=self.config.learning_rate, betas=self.config.betas, fused=True,
            capturable=self.device.type == "cuda",
        )  # fmt: skip
        self._best_loss.fill_(float("inf"))
        self._in_stage.zero_()
        self._graph: GraphedStep | None = None
        if self.cuda_graph:
            self._graph = GraphedStep(CudaGraph(self.device), required=self.cuda_graph is True)

    def step(self) -> None:
        """Take an iteration, and check now and then that the loss is finite.

        Raises:
            RuntimeError: If all were taken.
            NonFiniteLossError: If it was not in one of the last iterations.

        """
        if self.done == self.total:
            raise RuntimeError(f"the {self.total} iterations of the synthesis are done; start another one")
        if self._left == 0:
            self._begin(self._waiting.pop(0))
        if self._graph is None:
            self.iterate()
        else:
            self._graph(self.iterate)
        self._left -= 1
        self.done += 1
        if self.done % CHECK_EVERY == 0 or self.done == self.total:
            self._check_finite()

    def iterate(self) -> None:
        """Take an iteration, all on the device."""
        keep = self.config.keep
        with compiler_errors_explained(self.objective.teacher.compile):
            evaluation = self.objective(
                self.images, self.labels, self.stage.pool, self.augmentation.at(self._in_stage),
                of_images=keep == "best_per_image", dead=self.objective.student is not None,
            )  # fmt: skip
            (self.images.grad,) = torch.autograd.grad(self.scaler.scale(evaluation.loss), self.images)
        with torch.no_grad():
            # Before the step, while the images have this loss.
            loss = evaluation.loss.detach()
            torch.where(loss.isfinite(), self.images, self._finite_images, out=self._finite_images)
            if keep != "last":
                losses = loss if evaluation.of_images is None else evaluation.of_images
                better = losses < self._best_loss
                torch.where(better, losses, self._best_loss, out=self._best_loss)
                torch.where(better.view(-1, 1, 1, 1), self.images, self._best_images, out=self._best_images)
            row = [evaluation.terms, loss[None]] + ([] if evaluation.dead is None else [evaluation.dead[None]])
            self._history.index_copy_(0, self._number, torch.cat(row)[None])
        if self.rates is not None:
            self.optimizer.param_groups[0]["lr"] = self.rates.index_select(0, self._in_stage)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            if self._bounds is not None:
                self.images.clamp_(*self._bounds)
            self._in_stage += 1
            self._number += 1

    def terms(self) -> dict[str, Tensor]:
        """Return the terms of the last iteration, which the host has not waited for."""
        return dict(zip(self.names, self._history[self.done - 1].unbind(), strict=True))

    def _check_finite(self) -> None:
        """Raise if a loss since the last check was not finite, or the last step left images that are not."""
        losses = self._history[self.checked : self.done, self.names.index("loss")]
        images_finite = self.images.detach().isfinite().all()
        finite = torch.cat([losses.isfinite(), images_finite[None]]).tolist()
        # Every step whose gradient is not finite halves the scale; one below 1 has nothing to do with fp16.
        finite[-1] = finite[-1] and not (self.scaler.is_enabled() and self.scaler.get_scale() < 1)
        if all(finite):
            self.checked = self.done
            return
        first = self.checked + finite.index(False)  # counted from 0; past the history if only the images are not finite
        term, iteration = "gradient", first
        if first < self.done:
            values = dict(zip(self.names, self._history[first].tolist(), strict=True))
            term = next(name for name, value in values.items() if not abs(value) < float("inf"))
            iteration = first + 1
            described = f"the term {term!r} of the loss is {values[term]}"
        else:
            described = "the gradient of the loss is not finite, although the loss is,"
        raise NonFiniteLossError(
            f"{described} in iteration {iteration} of {self.total}; lower the learning rate or the weight of the term",
            term=term,
            iteration=iteration,
            state=self._synthesis(self._finite_images, first),
        )

    def result(self) -> Synthesis:
        """Return the images to keep."""
        return self._synthesis(self.images.detach() if self.config.keep == "last" else self._best_images, self.done)

    def _synthesis(self, images: Tensor, iterations: int) -> Synthesis:
        columns = self._history[:iterations].T.tolist()
        return Synthesis(images, self.labels, dict(zip(self.names, columns, strict=True)))
