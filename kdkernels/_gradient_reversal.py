"""Modules of gradient reversal."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear

from kdkernels import functional
from kdkernels._coefficients import Coefficients, coefficient_dtype, shown
from kdkernels.ops import _tracing


class GradientReversal(Coefficients):
    """Module of :func:`kdkernels.functional.gradient_reversal`.

    The coefficient is a 0-dim buffer, kept in checkpoints. ``.half()`` and the like do not round it. To change it
    during training, assign a number, ``module.lambd = 0.5``, or write into it, ``module.lambd.fill_(0.5)``.
    """

    lambd: Tensor

    def __init__(self, lambd: float = 1.0) -> None:
        super().__init__()
        self.initial_lambd = float(lambd)
        self.register_buffer("lambd", torch.empty((), dtype=coefficient_dtype(torch.get_default_device())))
        self.reset_parameters()

    def initial_value(self, name: str) -> float:
        """Return the coefficient of the constructor."""
        return self.initial_lambd

    def reset_parameters(self) -> None:
        """Set the coefficient to that of the constructor."""
        self.lambd.fill_(self.initial_lambd)

    def forward(self, input: Tensor) -> Tensor:
        """Return the input; its gradient will be reversed."""
        return functional.gradient_reversal(input, self.lambd)

    def extra_repr(self) -> str:
        """Show what the gradient is multiplied by."""
        return f"backward: -{shown(self.lambd)} * grad"


def _warm_start_lambd(iteration: Tensor, gamma: float, lo: float, hi: float, max_iters: int) -> Tensor:
    progress = (iteration.to(coefficient_dtype(iteration.device)) / max_iters).clamp(max=1.0)
    return lo + (hi - lo) * torch.tanh(gamma / 2 * progress)


@_tracing.as_one_node
def _warm_start_gradient_reversal(
    input: Tensor, iteration: Tensor, gamma: float, lo: float, hi: float, max_iters: int
) -> Tensor:
    return functional.gradient_reversal(input, _warm_start_lambd(iteration, gamma, lo, hi, max_iters))


class WarmStartGradientReversal(Coefficients):
    r"""Gradient reversal whose coefficient grows with training.

    .. math:: \lambda_i = lo + (hi - lo)\left(\frac{2}{1 + e^{-\gamma p}} - 1\right), \qquad p = \min(i / N, 1)

    after i calls of :meth:`step` out of N = ``max_iters``. The counter is an integer buffer, kept in checkpoints and
    exact in a module of any dtype. Source: Ganin et al., arXiv 1505.07818, which has gamma = 10.

    ``WarmStartGradientReverseLayer`` of tllib has the same formula with two differences: its gamma (``alpha``) is 1 by
    default, and its coefficient goes on growing after ``max_iters``.
    """

    iteration: Tensor

    def __init__(self, *, gamma: float = 10.0, lo: float = 0.0, hi: float = 1.0, max_iters: int = 1000) -> None:
        super().__init__()
        if max_iters < 1:
            raise ValueError(f"max_iters is {max_iters}; expected a positive number of steps")
        self.gamma = gamma
        self.lo = lo
        self.hi = hi
        self.max_iters = max_iters
        self.register_buffer("iteration", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    def initial_value(self, name: str) -> float:
        """Return the count before the first step."""
        return 0

    def reset_parameters(self) -> None:
        """Set the counter to 0."""
        self.iteration.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = f"{prefix}iteration"
        if name in state_dict:
            state_dict[name] = state_dict[name].to(torch.int64)  # version 0.1 saved a float
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def lambd(self) -> Tensor:
        """The coefficient at this point of training, a 0-dim tensor."""
        return _warm_start_lambd(self.iteration, self.gamma, self.lo, self.hi, self.max_iters)

    def forward(self, input: Tensor) -> Tensor:
        """Return the input; its gradient will be reversed."""
        return _warm_start_gradient_reversal(input, self.iteration, self.gamma, self.lo, self.hi, self.max_iters)

    def step(self) -> None:
        """Advance by one training step."""
        self.iteration += 1

    def extra_repr(self) -> str:
        """Show how the coefficient grows."""
        return f"lambda from {self.lo} to {self.hi}, gamma={self.gamma}, max_iters={self.max_iters}"


class GradientReversalLinear(Coefficients, Linear):
    """A linear layer with a reversed gradient, the reversal folded into the backward's matrix product.

    Takes the arguments of :class:`torch.nn.Linear`, and the coefficient; see :class:`GradientReversal` and
    :func:`kdkernels.functional.gradient_reversal_linear`.
    """

    lambd: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        lambd: float = 1.0,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.initial_lambd = float(lambd)
        device = self.weight.device
        self.register_buffer("lambd", torch.empty((), device=device, dtype=coefficient_dtype(device)))
        self.lambd.fill_(self.initial_lambd)

    def initial_value(self, name: str) -> float:
        """Return the coefficient of the constructor."""
        return self.initial_lambd

    def reset_parameters(self) -> None:
        """Draw the weights again, as ``torch.nn.Linear`` does, and set the coefficient to that of the constructor."""
        super().reset_parameters()
        if "lambd" in self._buffers:  # Linear calls this before there is a coefficient
            self.lambd.fill_(self.initial_lambd)

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output; the gradient of the input will be reversed."""
        return functional.gradient_reversal_linear(input, self.weight, self.bias, self.lambd)

    def extra_repr(self) -> str:
        """Show what the gradient is multiplied by."""
        return f"{super().extra_repr()}, backward: -{shown(self.lambd)} * grad"
