"""Modules of the functions in :mod:`kdkernels.functional`; ``repr`` shows what they compute."""

from torch import Tensor
from torch.nn import Module

from kdkernels import functional
from kdkernels.ops.softmax_divergence import Divergence, Reduction

__all__ = ["DistillationLoss", "JSDivWithLogitsLoss", "KDLoss", "KLDivWithLogitsLoss"]


class KLDivWithLogitsLoss(Module):
    """Module of :func:`kdkernels.functional.kl_div_with_logits`; call it with student and teacher logits."""

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        dim: int | None = None,
        reverse: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.dim = dim
        self.reverse = reverse
        self.reduction: Reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the divergence of student logits ``input`` and teacher logits ``target``."""
        return functional.kl_div_with_logits(
            input, target, temperature=self.temperature, dim=self.dim, reverse=self.reverse, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """Say which divergence it is."""
        direction = "KL(student || teacher)" if self.reverse else "KL(teacher || student)"
        return f"{direction}, temperature={self.temperature}{_dim(self.dim)}, reduction={self.reduction!r}"


class JSDivWithLogitsLoss(Module):
    """Module of :func:`kdkernels.functional.js_div_with_logits`; call it with student and teacher logits."""

    def __init__(
        self,
        *,
        beta: float | Tensor = 0.5,
        temperature: float | Tensor = 1.0,
        dim: int | None = None,
        legacy_clamp: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.beta = beta
        self.temperature = temperature
        self.dim = dim
        self.legacy_clamp = legacy_clamp
        self.reduction: Reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the divergence of student logits ``input`` and teacher logits ``target``."""
        return functional.js_div_with_logits(
            input,
            target,
            beta=self.beta,
            temperature=self.temperature,
            dim=self.dim,
            legacy_clamp=self.legacy_clamp,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Say which divergence it is."""
        form = "clamped, reversed J" if self.legacy_clamp else f"JS, beta={self.beta}"
        return f"{form}, temperature={self.temperature}{_dim(self.dim)}, reduction={self.reduction!r}"


class KDLoss(Module):
    """Module of :func:`kdkernels.functional.distillation_loss`.

    Call it with student logits, teacher logits and, for the cross-entropy term, labels. Weights left out are those of
    the function: 0.9 and 0.1 with labels, 1 and 0 without.
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 4.0,
        kd_weight: float | Tensor | None = None,
        ce_weight: float | Tensor | None = None,
        divergence: Divergence = "forward_kl",
        beta: float | Tensor = 0.5,
        dim: int | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.kd_weight = kd_weight
        self.ce_weight = ce_weight
        self.divergence: Divergence = divergence
        self.beta = beta
        self.dim = dim
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(self, input: Tensor, target: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss of student logits ``input``, teacher logits ``target`` and class indices ``labels``."""
        return functional.distillation_loss(
            input,
            target,
            labels,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            divergence=self.divergence,
            beta=self.beta,
            dim=self.dim,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Say which loss it is."""
        name = {
            "forward_kl": "KL(teacher || student)",
            "reverse_kl": "KL(student || teacher)",
            "js": f"JS(beta={self.beta})",
        }[self.divergence]
        kd, ce = self.kd_weight, self.ce_weight
        weights = "kd_weight=0.9, ce_weight=0.1 (1 and 0 without labels)"
        if kd is not None or ce is not None:
            weights = f"kd_weight={kd}, ce_weight={ce}"
        return (
            f"kd_weight * T^2 * {name} + ce_weight * CE, T={self.temperature}, {weights}{_dim(self.dim)}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        )


DistillationLoss = KDLoss


def _dim(dim: int | None) -> str:
    return "" if dim is None else f", dim={dim}"
