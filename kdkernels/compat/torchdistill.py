"""The distillation loss of torchdistill (yoshitomo-matsubara/torchdistill)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdkernels import functional
from kdkernels.ops._checks import check_scalar
from kdkernels.ops._types import Reduction

__all__ = ["KDLoss"]


class KDLoss(torch.nn.Module):
    r"""Divergence of the logits of two modules, with cross-entropy only if ``alpha`` and targets are given.

    With both it is :math:`\alpha\,\mathrm{CE} + \beta\,T^2\,\mathrm{KL}(p\,\|\,q)`; without targets, or with an
    ``alpha`` of 0, it is the divergence alone, without :math:`T^2` and without :math:`\beta`. The classes are
    dimension 1.

    Args:
        student_module_path: Path of the student's module in the dictionary of its outputs.
        student_module_io: ``"input"`` or ``"output"`` of that module.
        teacher_module_path: Path of the teacher's module.
        teacher_module_io: ``"input"`` or ``"output"`` of that module.
        temperature: Temperature.
        alpha: Weight of the cross-entropy.
        beta: Weight of the divergence; 1 - alpha if None.
        reduction: ``"batchmean"``, ``"mean"`` (over all elements, the classes included), ``"sum"`` or ``"none"`` of the
            divergence. The cross-entropy has the same, and ``"mean"`` where this is ``"batchmean"``.
        kwargs: Arguments of ``torch.nn.CrossEntropyLoss``.

    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float | Tensor,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: Reduction = "batchmean",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if alpha is None and beta is None:
            raise TypeError("alpha and beta are both None; torchdistill needs one of them, such as alpha=0.5")
        self.student_module_path, self.student_module_io = student_module_path, student_module_io
        self.teacher_module_path, self.teacher_module_io = teacher_module_path, teacher_module_io
        self.temperature = temperature
        self.alpha = alpha
        self.beta = 1 - alpha if beta is None and alpha is not None else beta
        self.reduction: Reduction = reduction
        of_labels = "mean" if reduction == "batchmean" else reduction
        self.cross_entropy_loss = torch.nn.CrossEntropyLoss(reduction=of_labels, **kwargs)

    def forward(
        self,
        student_io_dict: Mapping[str, Mapping[str, Tensor]],
        teacher_io_dict: Mapping[str, Mapping[str, Tensor]],
        targets: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the logits that the two dictionaries hold."""
        student = student_io_dict[self.student_module_path][self.student_module_io]
        teacher = teacher_io_dict[self.teacher_module_path][self.teacher_module_io]
        divergence = self._divergence(student, teacher)
        if not self.alpha or targets is None:
            return divergence
        if self.reduction == "none":
            raise ValueError(
                "reduction='none' gives the divergence of every class and the cross-entropy of every position, which "
                "do not add up; leave out targets, or choose another reduction"
            )
        cross_entropy: Tensor = self.cross_entropy_loss(student, targets)
        return self.alpha * cross_entropy + self.beta * self.temperature * self.temperature * divergence  # type: ignore[operator]

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.reduction == "none":
            temperature = check_scalar("temperature", self.temperature, student, minimum=0)
            log_q, log_p = ((side / temperature).log_softmax(1) for side in (student, teacher))
            return functional.kl_div(log_q, log_p, reduction="none", log_target=True)
        loss = functional.kl_div_with_logits(
            student, teacher, temperature=self.temperature, dim=1, reduction=self.reduction
        )
        return loss / student.shape[1] if self.reduction == "mean" else loss

    def extra_repr(self) -> str:
        """Show the options."""
        options = f"temperature={self.temperature}, alpha={self.alpha}, beta={self.beta}"
        return f"{options}, reduction={self.reduction!r}"
