"""Losses of log-probabilities from Liger-Kernel (linkedin/Liger-Kernel)."""

import torch
from torch import Tensor

from kdkernels import functional, nn
from kdkernels.compat._labels import kept
from kdkernels.ops._checks import check_floating
from kdkernels.ops._types import Reduction

__all__ = ["LigerJSD", "LigerKLDIVLoss"]


def _check_rows(name: str, tensor: Tensor) -> None:
    check_floating(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected [tokens, classes]: pass {name}.flatten(0, -2)"
        )


class LigerJSD(torch.nn.Module):
    r"""Generalized Jensen-Shannon divergence of log-probabilities, divided by the number of tokens that count.

    With the teacher's p = exp(log_p), the student's q = exp(log_q) and :math:`m = \beta p + (1-\beta) q` it is
    :math:`\beta\,\mathrm{KL}(p\,\|\,m) + (1-\beta)\,\mathrm{KL}(q\,\|\,m)`, KL(p || q) at ``beta=0`` and KL(q || p) at
    ``beta=1``; see :func:`kdkernels.functional.js_div`. The result is in fp32 (fp64 for fp64), and the target gets no
    gradient.

    Args:
        beta: Teacher's share of the mixture in [0, 1].
        ignore_index: Label of the tokens that do not count.

    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """Return the loss of the student's ``log_q`` and the teacher's ``log_p``, [tokens, classes], fp32."""
        _check_rows("log_q", log_q)
        check_floating("log_p", log_p)
        mask = kept("shift_labels", shift_labels, log_q.shape[:-1], self.ignore_index)
        if mask is None:
            return functional.js_div(log_q, log_p.detach(), beta=self.beta, reduction="batchmean")
        weight = mask.unsqueeze(-1).expand_as(log_q)
        total = functional.js_div(log_q, log_p.detach(), beta=self.beta, position_weight=weight, reduction="sum")
        return total / mask.sum().clamp(min=1)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"beta={self.beta}, ignore_index={self.ignore_index}"


class LigerKLDIVLoss(nn.KLDivLoss):
    r"""``torch.nn.KLDivLoss`` whose logarithm of the target is bounded: :math:`y\,(\ln \max(y, \epsilon) - x)`.

    With ``log_target=True`` it is ``torch.nn.KLDivLoss``. The result is in fp32 (fp64 for fp64), and the target gets no
    gradient.

    Args:
        eps: Smallest argument of the logarithm. It comes first, before the arguments of ``torch.nn.KLDivLoss``.
        size_average: Deprecated, as in PyTorch.
        reduce: Deprecated, as in PyTorch.
        reduction: ``"none"``, ``"mean"`` (over all elements), ``"sum"`` or ``"batchmean"``.
        log_target: Whether the target holds log-probabilities.

    """

    def __init__(
        self,
        eps: float = 1e-10,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
        log_target: bool = False,
    ) -> None:
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps > 0:
            raise TypeError(
                f"eps is {eps!r}; expected a positive number: it is the first argument, before those of "
                "torch.nn.KLDivLoss, so pass reduction=... by name"
            )
        super().__init__(size_average, reduce, reduction, log_target)
        self.eps = float(eps)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """Return the loss of log-probabilities ``y_pred`` and the target ``y_true``, both [tokens, classes]."""
        _check_rows("y_pred", y_pred)
        check_floating("y_true", y_true)
        if y_pred.shape != y_true.shape:
            raise ValueError(
                f"y_pred has shape {tuple(y_pred.shape)} and y_true {tuple(y_true.shape)}; expected the same"
            )
        y_true = y_true.detach()
        loss = super().forward(y_pred, y_true)
        if self.log_target:
            return loss
        y = y_true.to(loss.dtype)
        bounded = torch.where(y < self.eps, y * torch.tensor(self.eps, dtype=y.dtype).log() - torch.xlogy(y, y), 0.0)
        if self.reduction == "none":
            return loss + bounded
        divisor = {"sum": 1, "mean": max(y.numel(), 1), "batchmean": max(y.shape[0], 1)}[self.reduction]
        return loss + bounded.sum() / divisor

    def extra_repr(self) -> str:
        """Show the options."""
        return f"eps={self.eps:g}, {super().extra_repr()}"
