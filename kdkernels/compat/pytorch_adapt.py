"""The gradient reversal of PyTorch Adapt (KevinMusgrave/pytorch-adapt)."""

import torch
from torch import Tensor

from kdkernels import functional

__all__ = ["GradientReversal"]


class GradientReversal(torch.nn.Module):
    """The identity, whose gradient is multiplied by -weight.

    It is ``gradient_reversal(x, weight)``. The weight is a buffer of shape [1], as in the project, so that checkpoints
    fit. It is read in the forward, and gradients keep their dtype.

    Args:
        weight: Coefficient, a finite number.

    """

    weight: Tensor

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor([float(weight)]))

    def update_weight(self, new_weight: float) -> None:
        """Set the coefficient."""
        self.weight[0] = new_weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the input; its gradient will be reversed."""
        return functional.gradient_reversal(x, self.weight[0])

    def extra_repr(self) -> str:
        """Show the coefficient."""
        return f"weight={self.weight}"
