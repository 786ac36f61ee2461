"""The gradient reversal layers of the Transfer Learning Library (thuml/Transfer-Learning-Library, tllib)."""

import math

import torch
from torch import Tensor

from kdkernels import functional

__all__ = ["GradientReverseLayer", "WarmStartGradientReverseLayer"]


class GradientReverseLayer(torch.nn.Module):
    """The identity, whose gradient is multiplied by -coeff.

    It is ``gradient_reversal(input, coeff)``. The output is a view of the input, where the project copies.
    """

    def forward(self, input: Tensor, coeff: float | Tensor = 1.0) -> Tensor:
        """Return the input; its gradient will be reversed."""
        return functional.gradient_reversal(input, coeff)


class WarmStartGradientReverseLayer(torch.nn.Module):
    """Gradient reversal whose coefficient grows with the steps: 2 (hi - lo) / (1 + e^(-alpha i / N)) - (hi - lo) + lo.

    With the default alpha of 1 the coefficient is 0.46 after N = ``max_iters`` steps and approaches ``hi`` only long
    after. The count is the Python integer ``iter_num``, which checkpoints do not keep;
    :class:`kdkernels.nn.WarmStartGradientReversal` has the schedule of the DANN paper, and a count that they keep.

    Args:
        alpha: Steepness of the schedule.
        lo: Coefficient at the start.
        hi: Limit of the coefficient.
        max_iters: Number of steps N that alpha refers to, positive.
        auto_step: Whether each call of the layer is a step, after its own coefficient has been read.

    """

    def __init__(
        self, alpha: float = 1.0, lo: float = 0.0, hi: float = 1.0, max_iters: int = 1000, auto_step: bool = False
    ) -> None:
        super().__init__()
        if not max_iters > 0:
            raise ValueError(f"max_iters is {max_iters!r}; expected a positive number of steps")
        self.alpha = alpha
        self.lo = lo
        self.hi = hi
        self.iter_num = 0
        self.max_iters = max_iters
        self.auto_step = auto_step

    def forward(self, input: Tensor) -> Tensor:
        """Return the input; its gradient will be reversed."""
        # 2 / (1 + e^-a) - 1 = tanh(a / 2), which does not overflow.
        growth = math.tanh(self.alpha * self.iter_num / self.max_iters / 2)
        coeff = self.lo + (self.hi - self.lo) * growth
        if self.auto_step:
            self.step()
        return functional.gradient_reversal(input, coeff)

    def step(self) -> None:
        """Advance by one training step."""
        self.iter_num += 1

    def extra_repr(self) -> str:
        """Show the schedule."""
        return f"alpha={self.alpha}, lo={self.lo}, hi={self.hi}, max_iters={self.max_iters}, auto_step={self.auto_step}"
