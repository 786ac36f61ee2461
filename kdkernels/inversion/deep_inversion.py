"""Images synthesized from a trained network."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import cos, pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels._networks import frozen
from kdkernels.functional import image_prior_losses, js_div_with_logits
from kdkernels.inversion.batch_norm_statistics import BatchNormStatistics
from kdkernels.inversion.config import InversionConfig

COMPETE_TEMPERATURE = 3.0
WARM_UP = 100


@dataclass(frozen=True)
class Synthesis:
    """Synthesized images.

    Attributes:
        images: Shape [B, C, H, W], in the teacher's normalized space.
        labels: Shape [B]; target class of each image.
        history: Weighted terms of the loss and their sum ``"loss"``, one value per iteration.

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


class DeepInversion:
    """Synthesizes images that a trained network recognizes and whose features match its BatchNorm statistics.

    Source: Yin et al., arXiv 1912.08795; each preset names its own.

    Args:
        teacher: Classifier with BatchNorm layers; left unchanged.
        image_shape: Shape [C, H, W] of an image.
        config: Settings: a preset, changed with ``dataclasses.replace`` if needed.
        student: Network of the adaptive form, which prefers images on which teacher and student disagree, with
            ``config.compete_weight``; frozen during the synthesis.

    Raises:
        ValueError: If the teacher has no BatchNorm layer, image_shape is not [C, H, W], or the normalization in config
            is missing although ``config.clip`` is set, or does not match the channels.

    """

    def __init__(
        self,
        teacher: nn.Module,
        image_shape: tuple[int, int, int],
        config: InversionConfig,
        *,
        student: nn.Module | None = None,
    ) -> None:
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape is {image_shape!r}; expected [C, H, W]")
        if config.clip and config.mean is None:
            raise ValueError("config.clip is True, which needs config.mean and config.std; they are None")
        if (
            config.mean is not None
            and config.std is not None
            and {len(config.mean), len(config.std)} != {image_shape[0]}
        ):
            raise ValueError(
                f"config.mean and config.std have {len(config.mean)} and {len(config.std)} values; expected "
                f"{image_shape[0]}, one per channel"
            )
        self.teacher = teacher
        self.image_shape = image_shape
        self.config = config
        self.student = student
        self.statistics = BatchNormStatistics(teacher, mode=config.mode, moment=config.moment)
        self.layer_weights = [config.first_layer_weight] + [1.0] * (len(self.statistics.layers) - 1)

    def objective(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        pool: int = 1,
        shift: tuple[int, int] = (0, 0),
        flip: bool = False,
    ) -> dict[str, Tensor]:
        """Return the weighted terms of the loss and their sum ``"loss"``.

        Args:
            images: Shape [B, C, H, W].
            labels: Shape [B].
            pool: Factor of the average pooling in front of the network.
            shift: Pixels by which the pooled batch is rolled down and to the right.
            flip: Whether to flip the batch left to right.

        """
        with self._watching():
            return self._terms(images, labels, pool, shift, flip)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Freeze the networks, and tap the teacher's BatchNorm layers if a term needs them."""
        with ExitStack() as stack:
            stack.enter_context(self.statistics if self.config.feature_weight != 0 else frozen(self.teacher))
            if self.student is not None:
                stack.enter_context(frozen(self.student))
            yield

    def _terms(
        self, images: Tensor, labels: Tensor, pool: int, shift: tuple[int, int], flip: bool
    ) -> dict[str, Tensor]:
        config = self.config
        augmented = F.avg_pool2d(images, pool) if pool > 1 else images
        if shift != (0, 0):
            augmented = torch.roll(augmented, shift, (2, 3))
        if flip:
            augmented = augmented.flip(3)
        logits = self.teacher(augmented)
        terms: dict[str, Tensor] = {}
        if config.ce_weight != 0:
            terms["cross_entropy"] = config.ce_weight * F.cross_entropy(logits, labels)
        if config.feature_weight != 0:
            terms["features"] = config.feature_weight * self.statistics.loss(self.layer_weights)
        terms |= self._priors(images if config.prior_of == "plain" else augmented)
        if self.student is not None and config.compete_weight != 0:
            terms["compete"] = config.compete_weight * self._compete(self.student(augmented), logits)
        terms["loss"] = torch.stack(list(terms.values())).sum()
        return terms

    def _priors(self, images: Tensor) -> dict[str, Tensor]:
        config = self.config
        if config.tv_l1 == config.tv_l2 == config.l2 == 0:
            return {}
        tv_l1, tv_l2, l2 = image_prior_losses(images)
        if config.l2 != 0 and config.l2_norm == "batch":
            l2 = torch.linalg.vector_norm(images)
        weighted = {"tv_l1": (config.tv_l1, tv_l1), "tv_l2": (config.tv_l2, tv_l2), "l2": (config.l2, l2)}
        return {name: weight * term for name, (weight, term) in weighted.items() if weight != 0}

    def _compete(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.config.compete == "js":
            return 1 - js_div_with_logits(student, teacher, temperature=COMPETE_TEMPERATURE)
        j = js_div_with_logits(student, teacher, temperature=COMPETE_TEMPERATURE, legacy_clamp=True)
        return 1 - j.clamp(0, 1) if self.config.compete == "nvlabs" else -j

    def synthesize(
        self,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
        progress: Callable[[int, dict[str, Tensor]], None] | None = None,
    ) -> Synthesis:
        """Synthesize one image for each label.

        Args:
            labels: Class indices [B], int64. Norms over the batch in the loss depend on B; the coefficients were chosen
                for ``config.batch_size``.
            generator: CPU generator of the initial images, the jitter and the flips, so that a seed gives the same
                values on every device; torch's default generator if None.
            progress: Function called after every iteration with its number and the terms of the loss, as tensors that
                the host has not waited for.

        Raises:
            ValueError: If labels are not [B] of int64, or are empty.

        """
        if labels.dim() != 1 or labels.dtype != torch.int64 or len(labels) == 0:
            raise ValueError(f"labels must be a non-empty [B] of int64, got {list(labels.shape)} of {labels.dtype}")
        parameter = next(self.teacher.parameters())
        device, dtype = parameter.device, parameter.dtype
        labels = labels.to(device)
        images = torch.randn(len(labels), *self.image_shape, generator=generator).to(device, dtype).requires_grad_()
        best_loss, best_images = torch.full((), float("inf"), device=device), images.detach().clone()
        history: list[dict[str, Tensor]] = []
        with self._watching():
            for stage in self.config.stages:
                optimizer = torch.optim.Adam([images], lr=self.config.learning_rate, betas=self.config.betas)
                best_loss.fill_(float("inf"))
                for iteration in range(stage.iterations):
                    optimizer.param_groups[0]["lr"] = learning_rate_at(self.config, iteration, stage.iterations)
                    terms = self._terms(images, labels, stage.pool, *self._augmentation(stage.pool, generator))
                    (images.grad,) = torch.autograd.grad(terms["loss"], images)
                    if self.config.keep == "best":
                        # Before the step, while the images have this loss. The device decides; the host does not wait.
                        better = terms["loss"].detach() < best_loss
                        best_loss = torch.where(better, terms["loss"].detach(), best_loss)
                        best_images = torch.where(better, images.detach(), best_images)
                    optimizer.step()
                    self._clip(images)
                    history.append({name: term.detach() for name, term in terms.items()})
                    if progress is not None:
                        progress(len(history), history[-1])
        return Synthesis(
            best_images if self.config.keep == "best" else images.detach(),
            labels,
            {name: torch.stack([terms[name] for terms in history]).tolist() for name in history[0]},
        )

    def _augmentation(self, pool: int, generator: torch.Generator | None) -> tuple[tuple[int, int], bool]:
        """Draw the roll and the flip of an iteration, shared by the whole batch."""
        jitter = self.config.jitter // pool
        down, right = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
        flip = self.config.flip > 0 and torch.rand((), generator=generator).item() < self.config.flip
        return (down, right), flip

    def _clip(self, images: Tensor) -> None:
        """Clamp each channel to [-m/s, (1 - m)/s], the range of normalized pixels."""
        if not self.config.clip:
            return
        mean, std = (
            torch.tensor(values, dtype=images.dtype).to(images.device).view(1, -1, 1, 1)
            for values in (self.config.mean, self.config.std)
        )
        with torch.no_grad():
            images.copy_(torch.minimum(torch.maximum(images, -mean / std), (1 - mean) / std))
