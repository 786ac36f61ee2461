"""One iteration of DeepInversion as in its published code, written from the formulas.

Source: Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020, arXiv 1912.08795.
As a rival in the benchmark it does the same work as the published code: a forward hook on every BatchNorm2d with a copy
of the activation for its variance, total variation in both norms even if a weight is 0, unused gradients of the
teacher's parameters, and a wait for the loss in every iteration.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels.inversion import InversionConfig
from kdkernels.inversion._loop import learning_rate_at

Terms = dict[str, Tensor]


def total_variation(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the total variation in the l1 and l2 norms, from four differences of shifted images."""
    differences = (
        images[:, :, :, :-1] - images[:, :, :, 1:],
        images[:, :, :-1, :] - images[:, :, 1:, :],
        images[:, :, 1:, :-1] - images[:, :, :-1, 1:],
        images[:, :, :-1, :-1] - images[:, :, 1:, 1:],
    )
    l2 = sum(torch.norm(d) for d in differences)
    l1 = sum((d.abs() / 255.0).mean() for d in differences) * 255.0
    return l1, l2


def draw_augmentation(config: InversionConfig, generator: torch.Generator | None) -> tuple[tuple[int, int], bool]:
    """Draw the roll and the flip of the whole batch, in the order in which ``DeepInversion.synthesize`` draws them."""
    down, right = torch.randint(-config.jitter, config.jitter + 1, (2,), generator=generator).tolist()
    flip = config.flip > 0 and torch.rand((), generator=generator).item() < config.flip
    return (down, right), flip


class PublishedInversion:
    """The published iteration, with hooks on a copy of the teacher.

    ``freeze`` switches off the unused gradients of the teacher's parameters, as a careful user does with one more line;
    ``compile_mode`` compiles everything between the augmented images and the loss.
    """

    def __init__(
        self, teacher: nn.Module, config: InversionConfig, *, freeze: bool = False, compile_mode: str | None = None
    ) -> None:
        if len(config.stages) != 1 or config.stages[0].pool != 1:
            raise ValueError(f"config.stages is {config.stages!r}; expected one, without pooling")
        if (config.mode, config.moment, config.prior_of) != ("l2", "var", "augmented"):
            raise ValueError("config.mode, moment and prior_of must be 'l2', 'var' and 'augmented', as published")
        self.teacher = copy.deepcopy(teacher).eval()
        self.config = config
        self.iterations = config.stages[0].iterations
        if freeze:
            self.teacher.requires_grad_(False)
        layers = [module for module in self.teacher.modules() if isinstance(module, nn.BatchNorm2d)]
        self.layer_weights = [config.first_layer_weight] + [1.0] * (len(layers) - 1)
        self._distances: list[Any] = [None] * len(layers)
        for index, layer in enumerate(layers):
            layer.register_forward_hook(self._hook_of(index))
        # The augmentation is not compiled: each roll would be a new graph for the compiler.
        self._terms_of = (
            self._terms if compile_mode is None else torch.compile(self._terms, mode=compile_mode, dynamic=False)
        )

    def _hook_of(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            activation = inputs[0]
            mean = activation.mean((0, 2, 3))
            by_channel = activation.permute(1, 0, 2, 3).contiguous().view(activation.shape[1], -1)
            var = by_channel.var(1, unbiased=False)
            self._distances[index] = torch.norm(layer.running_var - var) + torch.norm(layer.running_mean - mean)

        return hook

    def loss_terms(
        self, images: Tensor, labels: Tensor, offsets: tuple[int, int] = (0, 0), flip: bool = False
    ) -> Terms:
        """Return the weighted terms of the loss for rolled and flipped images, and their sum, "loss"."""
        augmented = torch.roll(images, offsets, (2, 3))
        if flip:
            augmented = torch.flip(augmented, (3,))
        return self._terms_of(augmented, labels)

    def _terms(self, images: Tensor, labels: Tensor) -> Terms:
        config = self.config
        logits = self.teacher(images)
        tv_l1, tv_l2 = total_variation(images)
        l2 = (
            torch.norm(images)
            if config.l2_norm == "batch"
            else torch.norm(images.reshape(len(images), -1), dim=1).mean()
        )
        features = sum(weight * distance for weight, distance in zip(self.layer_weights, self._distances, strict=True))
        terms = {
            "cross_entropy": config.ce_weight * F.cross_entropy(logits, labels),
            "features": config.feature_weight * features,
            "tv_l1": config.tv_l1 * tv_l1,
            "tv_l2": config.tv_l2 * tv_l2,
            "l2": config.l2 * l2,
        }
        return terms | {"loss": sum(terms.values())}

    def begin(self, images: Tensor, labels: Tensor) -> None:
        """Start a synthesis from a copy of images, with a new optimizer."""
        self.images = images.detach().clone().requires_grad_()
        self.labels = labels
        self.optimizer = torch.optim.Adam([self.images], lr=self.config.learning_rate, betas=self.config.betas)
        self.done = 0
        self.best_loss, self.best_images = float("inf"), self.images.detach()

    def iteration(self, offsets: tuple[int, int] = (0, 0), flip: bool = False) -> float:
        """Take a step and return the loss before it."""
        self.optimizer.param_groups[0]["lr"] = learning_rate_at(self.config, self.done, self.iterations)
        self.optimizer.zero_grad()
        self.teacher.zero_grad()
        loss = self.loss_terms(self.images, self.labels, offsets, flip)["loss"]
        loss.backward()
        self.optimizer.step()
        if self.config.clip:
            self._clip()
        value = loss.item()
        if value < self.best_loss:
            # As published: a copy of the images after the step, or just a reference if the last ones are kept.
            images = self.images.detach()
            self.best_loss, self.best_images = value, images.clone() if self.config.keep == "best" else images
        self.done += 1
        return value

    @torch.no_grad()
    def _clip(self) -> None:
        for channel, (mean, std) in enumerate(zip(self.config.mean, self.config.std, strict=True)):
            self.images[:, channel] = torch.clamp(self.images[:, channel], -mean / std, (1 - mean) / std)

    def synthesize(self, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Run all iterations from given images, and return the images to keep."""
        self.begin(images, labels)
        for _ in range(self.iterations):
            self.iteration(*draw_augmentation(self.config, generator))
        return self.best_images if self.config.keep == "best" else self.images.detach()
