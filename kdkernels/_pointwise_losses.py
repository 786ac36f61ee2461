"""Modules of the divergences of single elements."""

from typing import Literal

from torch import Tensor
from torch.nn import Module

from kdkernels import functional
from kdkernels._coefficients import Coefficients, shown
from kdkernels.ops._legacy import legacy_reduction
from kdkernels.ops._types import Reduction


class KLDivLoss(Module):
    """Module of :func:`kdkernels.functional.kl_div`, with the arguments of ``torch.nn.KLDivLoss``.

    Call it with log-probabilities and a target of probabilities, or of log-probabilities with ``log_target=True``.
    """

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
        log_target: bool = False,
    ) -> None:
        super().__init__()
        if size_average is not None or reduce is not None:
            reduction = legacy_reduction(size_average, reduce)
        self.reduction: Reduction = reduction
        self.log_target = log_target

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of log-probabilities ``input``."""
        return functional.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"reduction={self.reduction!r}, log_target={self.log_target}"


class BinaryKLDivWithLogitsLoss(Coefficients):
    """Module of :func:`kdkernels.functional.binary_kl_div_with_logits`; call it with student logits and a target.

    A temperature that is a tensor moves with the module; a ``torch.nn.Parameter`` is also trained with it.
    """

    temperature: float | Tensor

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        reverse: bool = False,
        target_type: Literal["logits", "probs"] = "logits",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.set_coefficient("temperature", temperature)
        self.reverse = reverse
        self.target_type: Literal["logits", "probs"] = target_type
        self.reduction: Reduction = reduction

    def forward(self, input: Tensor, target: Tensor, position_weight: Tensor | None = None) -> Tensor:
        """Return the divergence of student logits ``input`` and teacher logits or probabilities ``target``."""
        return functional.binary_kl_div_with_logits(
            input,
            target,
            temperature=self.temperature,
            reverse=self.reverse,
            target_type=self.target_type,
            position_weight=position_weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show which divergence it is."""
        direction = "KL(student || teacher)" if self.reverse else "KL(teacher || student)"
        target = "" if self.target_type == "logits" else f", target_type={self.target_type!r}"
        return f"{direction}, temperature={shown(self.temperature)}{target}, reduction={self.reduction!r}"
