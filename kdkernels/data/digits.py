"""The 1797 handwritten digits of 8x8 pixels shipped with scikit-learn."""

from dataclasses import dataclass

import torch
from torch import Tensor

TRAIN, VALIDATION, TEST = 1047, 250, 500


@dataclass(frozen=True)
class Digits:
    """Digits in three parts, standardized by the mean and standard deviation of the training part.

    Attributes:
        train: Images [N, 1, 8, 8] and labels [N] for training.
        validation: Images and labels for choosing settings.
        test: Images and labels for the final figures only.
        mean: Mean of the training pixels before standardization, in [0, 1].
        std: Standard deviation of the training pixels before standardization.

    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    mean: float
    std: float


def load_digits() -> Digits:
    """Load the digits, always split into the same three parts.

    Raises:
        ImportError: If scikit-learn is not installed.

    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed; run `pip install scikit-learn`"
        ) from error
    bunch = datasets.load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(bunch.images, dtype=torch.float32).div(16).unsqueeze(1)[order]
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)[order]
    mean, std = images[:TRAIN].mean().item(), images[:TRAIN].std().item()
    parts = zip(
        images.sub(mean).div(std).split((TRAIN, VALIDATION, TEST)), labels.split((TRAIN, VALIDATION, TEST)), strict=True
    )
    train, validation, test = parts
    return Digits(train, validation, test, mean, std)
