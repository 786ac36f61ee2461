"""Modules of the divergences between softmax distributions; :mod:`kdkernels.nn` has them."""

from collections.abc import Sequence

from torch import Tensor

from kdkernels import functional
from kdkernels._coefficients import Coefficients, shown
from kdkernels.ops._types import Reduction, TargetType

Dim = int | Sequence[int] | None


def differing(**options: tuple[object, object]) -> str:
    """Show the options that differ from their defaults, given as pairs of value and default."""
    return "".join(
        f", {name}={shown(value) if isinstance(value, Tensor) else repr(value)}"
        for name, (value, default) in options.items()
        if value is not default and (isinstance(value, Tensor) or value != default)
    )


def of_pair(target_type: str, standardize: bool) -> str:
    """Show what the sides are, if it is not plain logits."""
    return differing(target_type=(target_type, "logits"), standardize=(standardize, False))


def shown_dim(dim: Dim) -> str:
    """Show the class dimension, if it is given."""
    return "" if dim is None else f", dim={dim}"


class KLDivWithLogitsLoss(Coefficients):
    """Module of :func:`kdkernels.functional.kl_div_with_logits`; call it with student and teacher logits.

    A temperature that is a tensor moves with the module; a ``torch.nn.Parameter`` is also trained with it.
    """

    temperature: float | Tensor

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        dim: Dim = None,
        reverse: bool = False,
        target_type: TargetType = "logits",
        standardize: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.set_coefficient("temperature", temperature)
        self.dim = dim
        self.reverse = reverse
        self.target_type: TargetType = target_type
        self.standardize = standardize
        self.reduction: Reduction = reduction

    def forward(self, input: Tensor, target: Tensor, *, position_weight: Tensor | None = None) -> Tensor:
        """Return the divergence of student logits ``input`` and the teacher ``target``."""
        return functional.kl_div_with_logits(
            input,
            target,
            temperature=self.temperature,
            dim=self.dim,
            reverse=self.reverse,
            target_type=self.target_type,
            position_weight=position_weight,
            standardize=self.standardize,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show which divergence it is."""
        direction = "KL(student || teacher)" if self.reverse else "KL(teacher || student)"
        return (
            f"{direction}, temperature={shown(self.temperature)}{shown_dim(self.dim)}, reduction={self.reduction!r}"
            f"{of_pair(self.target_type, self.standardize)}"
        )


class JSDivWithLogitsLoss(Coefficients):
    """Module of :func:`kdkernels.functional.js_div_with_logits`; call it with student and teacher logits.

    Coefficients that are tensors move with the module.
    """

    beta: float | Tensor
    temperature: float | Tensor

    def __init__(
        self,
        *,
        beta: float | Tensor = 0.5,
        temperature: float | Tensor = 1.0,
        dim: Dim = None,
        legacy_clamp: bool = False,
        target_type: TargetType = "logits",
        standardize: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.set_coefficient("beta", beta)
        self.set_coefficient("temperature", temperature)
        self.dim = dim
        self.legacy_clamp = legacy_clamp
        self.target_type: TargetType = target_type
        self.standardize = standardize
        self.reduction: Reduction = reduction

    def forward(self, input: Tensor, target: Tensor, *, position_weight: Tensor | None = None) -> Tensor:
        """Return the divergence of student logits ``input`` and the teacher ``target``."""
        return functional.js_div_with_logits(
            input,
            target,
            beta=self.beta,
            temperature=self.temperature,
            dim=self.dim,
            legacy_clamp=self.legacy_clamp,
            target_type=self.target_type,
            position_weight=position_weight,
            standardize=self.standardize,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show which divergence it is."""
        form = "clamped, reversed J" if self.legacy_clamp else f"JS, beta={shown(self.beta)}"
        return (
            f"{form}, temperature={shown(self.temperature)}{shown_dim(self.dim)}, reduction={self.reduction!r}"
            f"{of_pair(self.target_type, self.standardize)}"
        )


class SkewKLDivWithLogitsLoss(Coefficients):
    """Module of :func:`kdkernels.functional.skew_kl_div_with_logits`; call it with student and teacher logits.

    Coefficients that are tensors move with the module.
    """

    alpha: float | Tensor
    temperature: float | Tensor

    def __init__(
        self,
        *,
        alpha: float | Tensor = 0.1,
        temperature: float | Tensor = 1.0,
        dim: Dim = None,
        reverse: bool = False,
        target_type: TargetType = "logits",
        standardize: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.set_coefficient("alpha", alpha)
        self.set_coefficient("temperature", temperature)
        self.dim = dim
        self.reverse = reverse
        self.target_type: TargetType = target_type
        self.standardize = standardize
        self.reduction: Reduction = reduction

    def forward(self, input: Tensor, target: Tensor, *, position_weight: Tensor | None = None) -> Tensor:
        """Return the divergence of student logits ``input`` and the teacher ``target``."""
        return functional.skew_kl_div_with_logits(
            input,
            target,
            alpha=self.alpha,
            temperature=self.temperature,
            dim=self.dim,
            reverse=self.reverse,
            target_type=self.target_type,
            position_weight=position_weight,
            standardize=self.standardize,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show which divergence it is."""
        first, second = ("student", "teacher") if self.reverse else ("teacher", "student")
        return (
            f"KL({first} || alpha * {first} + (1 - alpha) * {second}), alpha={shown(self.alpha)}, "
            f"temperature={shown(self.temperature)}{shown_dim(self.dim)}, reduction={self.reduction!r}"
            f"{of_pair(self.target_type, self.standardize)}"
        )


class SoftCrossEntropyLoss(Coefficients):
    """Module of :func:`kdkernels.functional.soft_cross_entropy`; call it with student and teacher logits.

    A temperature that is a tensor moves with the module; a ``torch.nn.Parameter`` is also trained with it.
    """

    temperature: float | Tensor

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        dim: Dim = None,
        target_type: TargetType = "logits",
        standardize: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.set_coefficient("temperature", temperature)
        self.dim = dim
        self.target_type: TargetType = target_type
        self.standardize = standardize
        self.reduction: Reduction = reduction

    def forward(self, input: Tensor, target: Tensor, *, position_weight: Tensor | None = None) -> Tensor:
        """Return the cross-entropy of student logits ``input`` with the teacher ``target``."""
        return functional.soft_cross_entropy(
            input,
            target,
            temperature=self.temperature,
            dim=self.dim,
            target_type=self.target_type,
            position_weight=position_weight,
            standardize=self.standardize,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show its options."""
        return (
            f"temperature={shown(self.temperature)}{shown_dim(self.dim)}, reduction={self.reduction!r}"
            f"{of_pair(self.target_type, self.standardize)}"
        )
