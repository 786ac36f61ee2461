"""The loss of DeepInversion: its terms, their sum, and what the loop watches beside them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels._networks import frozen
from kdkernels.functional import image_prior_losses, js_div_with_logits
from kdkernels.inversion._augmentation import Positions, move
from kdkernels.inversion._network import Network
from kdkernels.inversion.batch_norm_statistics import BatchNormStatistics
from kdkernels.inversion.config import InversionConfig

COMPETE_TEMPERATURE = 3.0


class Evaluation(NamedTuple):
    """The loss of a batch.

    Attributes:
        terms: Weighted terms, in the order of :attr:`Objective.names`.
        loss: Their sum.
        of_images: Loss of each image, without gradient, if it was asked for: :attr:`loss`, where the means over the
            images are replaced by the values of this image. The mean over the images is :attr:`loss`.
        dead: Share of the images whose competition term has no gradient, if it was asked for.

    """

    terms: Tensor
    loss: Tensor
    of_images: Tensor | None
    dead: Tensor | None


class Objective:
    """The terms of the loss for a teacher and, in the adaptive form, a student.

    Args:
        config: Settings.
        teacher: Teacher.
        student: Student; None without competition.

    Attributes:
        names: Names of the terms that have a weight, in their order.
        statistics: Statistics of the teacher's BatchNorm layers, if their term has a weight.

    """

    def __init__(self, config: InversionConfig, teacher: Network, student: Network | None) -> None:
        self.config, self.teacher = config, teacher
        self.student = student if config.compete_weight != 0 else None
        self.statistics: BatchNormStatistics | None = None
        self._layer_weights: list[float] | None = None
        if config.feature_weight != 0:
            self.statistics = BatchNormStatistics(
                teacher.model, mode=config.mode, moment=config.moment, reduction=config.reduction,
                mean_weight=config.mean_weight, var_weight=config.var_weight, unbiased=config.unbiased,
                over=config.over,
            )  # fmt: skip
            if config.first_layer_weight != 1:
                self._layer_weights = [config.first_layer_weight] + [1.0] * (len(self.statistics.layers) - 1)
        weights = {
            "cross_entropy": config.ce_weight, "features": config.feature_weight, "tv_l1": config.tv_l1,
            "tv_l2": config.tv_l2, "l2": config.l2, "compete": config.compete_weight * (self.student is not None),
        }  # fmt: skip
        self._weights = {name: weight for name, weight in weights.items() if weight != 0}
        self.names = list(self._weights)
        self._weights_of: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Freeze the networks, tap the teacher's BatchNorm layers, and hold the weights in their memory format."""
        with ExitStack() as stack:
            stack.enter_context(frozen(self.teacher.model) if self.statistics is None else self.statistics)
            stack.enter_context(self.teacher.ready())
            if self.student is not None:
                stack.enter_context(frozen(self.student.model))
                stack.enter_context(self.student.ready())
            yield

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        pool: int,
        positions: Positions | None,
        *,
        of_images: bool = False,
        dead: bool = False,
    ) -> Evaluation:
        """Evaluate images [B, C, H, W], pooled and then moved, inside of :meth:`ready`.

        Args:
            images: Images, in fp32 or fp64.
            labels: Class of each image.
            pool: Factor of the average pooling.
            positions: Where the pixels of the pooled images are taken from; None if they stay.
            of_images: Whether to compute the loss of each image.
            dead: Whether to compute the share of images without a gradient of the competition.

        """
        config = self.config
        # A view, because autocast keeps its copy in 16 bits of a leaf, although each step changes the images.
        augmented = F.avg_pool2d(images, pool) if pool > 1 else images.view_as(images)
        if positions is not None:
            augmented = move(augmented, positions)
        of_prior = images if config.prior_of == "plain" else augmented
        # Before the networks, so that the backward makes their gradient last, when the activations are free again.
        values = self._priors(of_prior)
        logits = self.teacher(augmented)
        if config.ce_weight != 0:
            values["cross_entropy"] = F.cross_entropy(logits, labels)
        if self.statistics is not None:
            classes = labels if config.over == "class" else None
            values["features"] = self.statistics.loss(self._layer_weights, labels=classes)
        student_logits = share = None
        if self.student is not None:
            student_logits = self.student(augmented)
            values["compete"] = self._compete(student_logits, logits, "mean")
            share = _dead_share(values["compete"], student_logits, logits) if dead else None
        terms = torch.stack([values[name] for name in self.names]).to(images.dtype) * self._weights_on(images)
        loss = terms.sum()
        each = self._of_images(loss, logits, student_logits, labels, of_prior) if of_images else None
        return Evaluation(terms, loss, each, share)

    def _weights_on(self, images: Tensor) -> Tensor:
        """Return the weights of the terms as a tensor on the device; made once, because a copy waits for it."""
        key = images.device, images.dtype
        if key not in self._weights_of:
            self._weights_of[key] = torch.tensor(list(self._weights.values()), dtype=images.dtype, device=images.device)
        return self._weights_of[key]

    def _priors(self, images: Tensor) -> dict[str, Tensor]:
        config = self.config
        if config.tv_l1 == config.tv_l2 == config.l2 == 0:
            return {}
        values = image_prior_losses(images)._asdict()
        if config.l2 != 0 and config.l2_norm == "batch":
            values["l2"] = torch.linalg.vector_norm(images)
        return values

    def _compete(self, student: Tensor, teacher: Tensor, reduction: Literal["mean", "none"]) -> Tensor:
        config = self.config
        divergence = js_div_with_logits(
            student, teacher, temperature=COMPETE_TEMPERATURE, legacy_clamp=config.compete != "js", reduction=reduction
        )
        if config.compete == "datafree":
            return -divergence
        return 1 - (divergence.clamp(0, 1) if config.compete == "nvlabs" else divergence)

    @torch.no_grad()
    def _of_images(
        self, loss: Tensor, logits: Tensor, student_logits: Tensor | None, labels: Tensor, images: Tensor
    ) -> Tensor:
        """Return the loss of each image: the terms that are means over the images, for it alone, and the others."""
        config = self.config
        own = config.ce_weight * F.cross_entropy(logits, labels, reduction="none")
        if student_logits is not None:
            own += config.compete_weight * self._compete(student_logits, logits, "none")
        if config.l2 != 0 and config.l2_norm == "image":
            own += config.l2 * torch.linalg.vector_norm(images, dim=(1, 2, 3))
        return loss + (own - own.mean())


def _dead_share(term: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the share of rows of logits, of both networks, in which the gradient of a term is exactly 0."""
    gradients = torch.autograd.grad(term, (student, teacher), retain_graph=True)
    dead = [(gradient == 0).all(1) for gradient in gradients]
    return (dead[0] & dead[1]).to(term.dtype).mean()
