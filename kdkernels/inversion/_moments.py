"""Mean and variance of each image in every layer, and of classes of images, merged from them."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kdkernels.functional import batch_norm_stats, batch_norm_tap

Over = Literal["batch", "image", "class"]


class Reported(NamedTuple):
    """What a layer reports: the options of :func:`kdkernels.functional.batch_norm_act_stats` of these names."""

    statistics: Literal["batch", "image"]
    unbiased: bool

    @classmethod
    def for_comparison(cls, over: Over, unbiased: bool) -> "Reported":
        """Return what to report for a comparison over the batch, images or classes."""
        # The variance of a class is corrected after merging; a single value has no unbiased one of its own.
        return cls("batch" if over == "batch" else "image", unbiased and over != "class")


def check_values(activation: Tensor, reported: Reported, layer: str) -> None:
    """Raise unless each image has the values that its statistics need."""
    if reported.statistics == "batch":
        return
    values = activation[:1, :1].numel() if activation.shape[0] and activation.shape[1] else 0
    needed = 2 if reported.unbiased else 1
    if values < needed:
        raise ValueError(
            f"layer {layer} got an activation of shape {list(activation.shape)}, which has {values} values for each "
            f"image and channel; {'the unbiased' if reported.unbiased else 'a'} variance needs at least {needed}. "
            "Leave the layer out with layers=" + (", or use unbiased=False" if reported.unbiased else "")
        )


def tap(activation: Tensor, reported: Reported, layer: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return an activation for the network to continue with, and its statistics, [C] or [N, C].

    Args:
        activation: Shape [N, C, ...].
        reported: Which statistics.
        layer: Name of the layer, for errors.

    Raises:
        ValueError: If there are too few values.

    """
    if reported.statistics == "batch":
        return batch_norm_tap(activation, unbiased=reported.unbiased)
    check_values(activation, reported, layer)
    images, channels, *positions = activation.shape
    # The channels of all images are those of one.
    one = (1, images * channels, *positions)
    if activation.is_contiguous():
        output, mean, var = batch_norm_tap(activation.view(one), unbiased=reported.unbiased)
        output = output.view(activation.shape)
    else:
        output = activation
        mean, var = batch_norm_stats(activation.contiguous().view(one), unbiased=reported.unbiased)
    return output, mean.view(images, channels), var.view(images, channels)


class Classes:
    """Which images of a batch have the same label. The device decides; the host does not wait.

    Attributes:
        images: Number of images of each image's class, [N, 1], in fp64.
        first: Whether an image is the first of its class, [N].

    """

    def __init__(self, labels: Tensor) -> None:
        same = labels[:, None] == labels[None, :]
        self.first = same.int().argmax(1) == torch.arange(len(labels), device=labels.device)
        # In fp64, which autocast and TF32 leave alone
        self._same = same.to(torch.float64)
        self.images = self._same.sum(1, keepdim=True)

    def merged(self, mean: Tensor, var: Tensor, values: int, unbiased: bool) -> tuple[Tensor, Tensor]:
        """Return the statistics of each image's class; differentiable.

        Args:
            mean: Means of the images, [N, C].
            var: Biased variances of the images, [N, C].
            values: Number of values of each image and channel.
            unbiased: Whether to divide by n - 1, where n counts the values of a channel in a class.

        """
        means, variances = mean.double(), var.double()
        of_class = self._same @ means / self.images
        spread = self._same @ (variances + (means - of_class).square()) / self.images
        if unbiased:
            count = self.images * values
            spread = spread * (count / (count - 1))
        return of_class.to(mean.dtype), spread.to(var.dtype)

    def mean_of(self, losses: Tensor) -> Tensor:
        """Return the mean over the classes of losses [N, ...] that are equal for all images of a class."""
        first = self.first.view(-1, *[1] * (losses.dim() - 1))
        return torch.where(first, losses, 0.0).sum(0) / first.sum()
