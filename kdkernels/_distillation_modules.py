"""Modules of the losses of distillation with labels; :mod:`kdkernels.nn` has them."""

from typing import Literal

from torch import Tensor

from kdkernels import functional
from kdkernels._coefficients import Coefficients, shown
from kdkernels._divergence_modules import Dim, differing, of_pair, shown_dim
from kdkernels.ops._types import Divergence, Reduction, TargetType


class DistillationLoss(Coefficients):
    """Module of :func:`kdkernels.functional.distillation_loss`.

    Call it with student logits, teacher logits and, for the cross-entropy term, labels. The default weights are those
    of the function: 0.9 and 0.1 with labels, 1 and 0 without. Coefficients that are tensors move with the module, and
    so does ``class_weight``.
    """

    temperature: float | Tensor
    kd_weight: float | Tensor | None
    ce_weight: float | Tensor | None
    beta: float | Tensor
    label_smoothing: float | Tensor
    class_weight: Tensor | None

    def __init__(
        self,
        *,
        temperature: float | Tensor = 4.0,
        kd_weight: float | Tensor | None = None,
        ce_weight: float | Tensor | None = None,
        divergence: Divergence = "forward_kl",
        beta: float | Tensor = 0.5,
        target_type: TargetType = "logits",
        label_smoothing: float | Tensor = 0.0,
        class_weight: Tensor | None = None,
        standardize: bool = False,
        dim: Dim = None,
        ignore_index: int = -100,
        ignore_index_in: Literal["both", "cross_entropy"] = "both",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.set_coefficient("temperature", temperature)
        self.set_coefficient("kd_weight", kd_weight)
        self.set_coefficient("ce_weight", ce_weight)
        self.divergence: Divergence = divergence
        self.set_coefficient("beta", beta)
        self.target_type: TargetType = target_type
        self.set_coefficient("label_smoothing", label_smoothing)
        self.set_coefficient("class_weight", class_weight)
        self.standardize = standardize
        self.dim = dim
        self.ignore_index = ignore_index
        self.ignore_index_in: Literal["both", "cross_entropy"] = ignore_index_in
        self.reduction: Reduction = reduction

    def forward(
        self, input: Tensor, target: Tensor, labels: Tensor | None = None, *, position_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of student logits ``input``, the teacher ``target`` and ``labels``."""
        return functional.distillation_loss(
            input,
            target,
            labels,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            divergence=self.divergence,
            beta=self.beta,
            target_type=self.target_type,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            position_weight=position_weight,
            standardize=self.standardize,
            dim=self.dim,
            ignore_index=self.ignore_index,
            ignore_index_in=self.ignore_index_in,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show which loss it is."""
        name = {
            "forward_kl": "KL(teacher || student)",
            "reverse_kl": "KL(student || teacher)",
            "js": f"JS(beta={shown(self.beta)})",
        }.get(self.divergence, self.divergence)
        kd, ce = shown(self.kd_weight), shown(self.ce_weight)
        weights = "kd_weight=0.9, ce_weight=0.1 (1 and 0 without labels)"
        if kd is not None or ce is not None:
            weights = f"kd_weight={kd}, ce_weight={ce}"
        others = differing(
            label_smoothing=(self.label_smoothing, 0.0),
            class_weight=(self.class_weight, None),
            ignore_index_in=(self.ignore_index_in, "both"),
        )
        return (
            f"kd_weight * T^2 * {name} + ce_weight * CE, T={shown(self.temperature)}, {weights}{shown_dim(self.dim)}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
            f"{of_pair(self.target_type, self.standardize)}{others}"
        )


class DecoupledDistillationLoss(Coefficients):
    """Module of :func:`kdkernels.functional.decoupled_distillation_loss`.

    Call it with student logits, teacher logits and labels; the cross-entropy of the labels is not part of it.
    Coefficients that are tensors move with the module.
    """

    alpha: float | Tensor
    beta: float | Tensor
    temperature: float | Tensor

    def __init__(
        self,
        *,
        alpha: float | Tensor = 1.0,
        beta: float | Tensor = 8.0,
        temperature: float | Tensor = 4.0,
        standardize: bool = False,
        dim: Dim = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.set_coefficient("alpha", alpha)
        self.set_coefficient("beta", beta)
        self.set_coefficient("temperature", temperature)
        self.standardize = standardize
        self.dim = dim
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(
        self, input: Tensor, target: Tensor, labels: Tensor, *, position_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of student logits ``input``, teacher logits ``target`` and class indices ``labels``."""
        return functional.decoupled_distillation_loss(
            input,
            target,
            labels,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            position_weight=position_weight,
            standardize=self.standardize,
            dim=self.dim,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show which loss it is."""
        return (
            f"T^2 * (alpha * TCKD + beta * NCKD), alpha={shown(self.alpha)}, beta={shown(self.beta)}, "
            f"T={shown(self.temperature)}{shown_dim(self.dim)}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}{of_pair('logits', self.standardize)}"
        )


class NormalizedDistillationLoss(Coefficients):
    """Module of :func:`kdkernels.functional.normalized_distillation_loss`.

    Call it with student logits, teacher logits and labels; the cross-entropy of the labels is not part of it.
    Coefficients that are tensors move with the module.
    """

    gamma: float | Tensor
    temperature: float | Tensor

    def __init__(
        self,
        *,
        gamma: float | Tensor = 1.5,
        temperature: float | Tensor = 1.0,
        standardize: bool = False,
        dim: Dim = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.set_coefficient("gamma", gamma)
        self.set_coefficient("temperature", temperature)
        self.standardize = standardize
        self.dim = dim
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(
        self, input: Tensor, target: Tensor, labels: Tensor, *, position_weight: Tensor | None = None
    ) -> Tensor:
        """Return the loss of student logits ``input``, teacher logits ``target`` and class indices ``labels``."""
        return functional.normalized_distillation_loss(
            input,
            target,
            labels,
            gamma=self.gamma,
            temperature=self.temperature,
            position_weight=position_weight,
            standardize=self.standardize,
            dim=self.dim,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show which loss it is."""
        return (
            f"-p_y * ln(q_y) + gamma * T^2 * CE of the others, gamma={shown(self.gamma)}, "
            f"T={shown(self.temperature)}{shown_dim(self.dim)}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}{of_pair('logits', self.standardize)}"
        )
