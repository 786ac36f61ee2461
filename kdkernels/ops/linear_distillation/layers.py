"""The linear layer that gives the logits of one side, and its gradients, a chunk of rows at a time."""

import math

import torch
from torch import Tensor

from kdkernels.ops.linear_distillation.plan import Plan, parts


class Rows:
    """Rows of a tensor [..., n]: a view where the strides allow one, else copied when they are asked for."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.count = math.prod(tensor.shape[:-1])
        try:
            self.view: Tensor | None = tensor.view(self.count, tensor.shape[-1])
        except RuntimeError:
            self.view = None

    def __call__(self, begin: int, end: int) -> Tensor:
        """Return rows [begin, end) of all positions."""
        if self.view is not None:
            return self.view[begin:end]
        index = torch.arange(begin, end, device=self.tensor.device)
        return self.tensor[torch.unravel_index(index, self.tensor.shape[:-1])]


class Layer:
    """logits = cap * tanh(scale * (hidden @ weight.T + bias) / cap), and the sums of its gradients.

    The gradients of what is wanted are those for the sum of the loss over all rows that were added.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float, dtype: torch.dtype,
        counted: Tensor | None, sizes: Plan, wanted: tuple[bool, bool, bool],
    ) -> None:  # fmt: skip
        self.hidden, self.weight, self.scale, self.cap = Rows(hidden), weight, scale, cap
        self.dtype, self.counted = dtype, counted
        self.bias = None if bias is None else bias.to(dtype) if scale == 1 else bias.to(dtype) * scale
        self.buffer = weight.new_empty(sizes.chunk, weight.shape[0], dtype=dtype)
        whole = weight.dtype == dtype
        self.classes = parts(weight.shape[0], weight.shape[0] if whole else sizes.classes)
        of_hidden, of_weight, of_bias = wanted
        self.grad_hidden = hidden.new_empty(hidden.shape, dtype=dtype) if of_hidden else None
        create = torch.empty if self.hidden.count else torch.zeros  # the first chunk fills it, unless there is none
        self.grad_weight = create(weight.shape, dtype=dtype, device=weight.device) if of_weight else None
        self.grad_bias = torch.zeros(weight.shape[0], dtype=dtype, device=weight.device) if of_bias else None

    def _inputs(self, begin: int, end: int) -> Tensor:
        """Return rows of the hidden states times the scale; those that do not count are 0, even if they are NaN."""
        rows = self.hidden(begin, end).to(self.dtype)
        if self.counted is not None:
            rows = torch.where(self.counted[begin:end, None], rows, 0.0)
        return rows if self.scale == 1 else rows * self.scale

    def _weight(self, begin: int, end: int) -> Tensor:
        return self.weight[begin:end].to(self.dtype)

    def logits(self, begin: int, end: int) -> Tensor:
        """Return the logits of some rows before they are capped; the next call overwrites them."""
        inputs, out = self._inputs(begin, end), self.buffer[: end - begin]
        for first, last in self.classes:
            weight = self._weight(first, last).t()
            if self.bias is None:
                torch.mm(inputs, weight, out=out[:, first:last])
            else:
                torch.addmm(self.bias[first:last], inputs, weight, out=out[:, first:last])
        return out

    def cap_logits(self, logits: Tensor) -> None:
        """Cap logits in place."""
        if self.cap:
            logits.div_(self.cap).tanh_().mul_(self.cap)

    def pull_back_cap(self, logits: Tensor, gradient: Tensor) -> None:
        """Overwrite capped logits with the gradient before the cap."""
        if self.cap:
            torch.addcmul(gradient, gradient, logits.div_(self.cap).square_(), value=-1, out=logits)
        else:
            logits.copy_(gradient)

    def add_gradients(self, begin: int, end: int, gradient: Tensor) -> None:
        """Add what the gradient of the logits of some rows gives."""
        if self.grad_hidden is not None:
            out = self.grad_hidden.view(self.hidden.count, self.weight.shape[1])[begin:end]
            for first, last in self.classes:
                weight = self._weight(first, last)
                if first == 0:
                    torch.mm(gradient[:, :last], weight, out=out)
                else:
                    out.addmm_(gradient[:, first:last], weight)
            if self.scale != 1:
                out.mul_(self.scale)
        if self.grad_weight is not None:
            inputs = self._inputs(begin, end)
            if begin == 0:
                torch.mm(gradient.t(), inputs, out=self.grad_weight)
            else:
                self.grad_weight.addmm_(gradient.t(), inputs)
        if self.grad_bias is not None:
            self.grad_bias += gradient.sum(0) if self.scale == 1 else gradient.sum(0) * self.scale

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden states, weight and bias; None where they are not wanted."""
        return self.grad_hidden, self.grad_weight, self.grad_bias
