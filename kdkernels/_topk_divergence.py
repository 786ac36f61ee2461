"""Module of the divergence from a teacher's top classes."""

from torch import Tensor

from kdkernels import functional
from kdkernels._coefficients import Coefficients, shown
from kdkernels.ops._types import Reduction, Tail, ValuesType


class TopKKLDivWithLogitsLoss(Coefficients):
    """Module of :func:`kdkernels.functional.topk_kl_div_with_logits`.

    Call it with student logits and the values and indices of a teacher's likeliest classes. A temperature that is a
    tensor moves with the module; a ``torch.nn.Parameter`` is also trained with it.
    """

    temperature: float | Tensor

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        values_type: ValuesType = "log_probs",
        tail: Tail = "bucket",
        reverse: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.set_coefficient("temperature", temperature)
        self.values_type: ValuesType = values_type
        self.tail: Tail = tail
        self.reverse = reverse
        self.reduction: Reduction = reduction

    def forward(
        self,
        input: Tensor,
        values: Tensor,
        indices: Tensor,
        target_logsumexp: Tensor | None = None,
        position_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the divergence of student logits ``input`` and a teacher's ``values`` at ``indices``."""
        return functional.topk_kl_div_with_logits(  # type: ignore[return-value]
            input,
            values,
            indices,
            temperature=self.temperature,
            values_type=self.values_type,
            target_logsumexp=target_logsumexp,
            tail=self.tail,
            reverse=self.reverse,
            position_weight=position_weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show which divergence it is."""
        direction = "KL(student || teacher)" if self.reverse else "KL(teacher || student)"
        return (
            f"{direction} of listed classes, temperature={shown(self.temperature)}, values_type={self.values_type!r}, "
            f"tail={self.tail!r}, reduction={self.reduction!r}"
        )
