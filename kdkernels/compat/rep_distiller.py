"""The distillation loss of RepDistiller (HobbitLong/RepDistiller)."""

import torch
from torch import Tensor

from kdkernels import functional

__all__ = ["DistillKL"]


class DistillKL(torch.nn.Module):
    """Divergence KL(teacher || student) at a temperature, times its square: T² Σ p (ln p - ln q) / batch size.

    The classes are dimension 1. It is ``distillation_loss(y_s, y_t, temperature=T, dim=1, reduction="batchmean")``.

    Args:
        T: Temperature, a positive number or a 0-dim tensor.

    """

    def __init__(self, T: float | Tensor) -> None:  # noqa: N803  (the name of the project)
        super().__init__()
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        """Return the loss of student logits ``y_s`` and teacher logits ``y_t``."""
        return functional.distillation_loss(y_s, y_t, temperature=self.T, dim=1, reduction="batchmean")

    def extra_repr(self) -> str:
        """Show the temperature."""
        return f"T={self.T}"
