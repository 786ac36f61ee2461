"""Modules of the functions in :mod:`kdkernels.functional`; their ``repr`` shows what they compute."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Module

from kdkernels import functional
from kdkernels._coefficients import Coefficients, shown
from kdkernels._gradient_reversal import GradientReversal, GradientReversalLinear, WarmStartGradientReversal
from kdkernels._pointwise_losses import BinaryKLDivWithLogitsLoss, KLDivLoss
from kdkernels._topk_divergence import TopKKLDivWithLogitsLoss
from kdkernels.ops import total_variation as _total_variation
from kdkernels.ops._types import ChannelReduction, Mode, Moment, Reduction
from kdkernels.ops.softmax_divergence import Divergence

__all__ = [
    "BatchNormStatLoss",
    "BinaryKLDivWithLogitsLoss",
    "DistillationLoss",
    "GradientReversal",
    "GradientReversalLinear",
    "ImagePriorLoss",
    "JSDivWithLogitsLoss",
    "KLDivLoss",
    "KLDivWithLogitsLoss",
    "TopKKLDivWithLogitsLoss",
    "TotalVariationLoss",
    "WarmStartGradientReversal",
]


class KLDivWithLogitsLoss(Coefficients):
    """Module of :func:`kdkernels.functional.kl_div_with_logits`; call it with student and teacher logits.

    A temperature that is a tensor moves with the module; a ``torch.nn.Parameter`` is also trained with it.
    """

    temperature: float | Tensor

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        dim: int | None = None,
        reverse: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.set_coefficient("temperature", temperature)
        self.dim = dim
        self.reverse = reverse
        self.reduction: Reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the divergence of student logits ``input`` and teacher logits ``target``."""
        return functional.kl_div_with_logits(
            input, target, temperature=self.temperature, dim=self.dim, reverse=self.reverse, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """Show which divergence it is."""
        direction = "KL(student || teacher)" if self.reverse else "KL(teacher || student)"
        return f"{direction}, temperature={shown(self.temperature)}{_dim(self.dim)}, reduction={self.reduction!r}"


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
        dim: int | None = None,
        legacy_clamp: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.set_coefficient("beta", beta)
        self.set_coefficient("temperature", temperature)
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
        """Show which divergence it is."""
        form = "clamped, reversed J" if self.legacy_clamp else f"JS, beta={shown(self.beta)}"
        return f"{form}, temperature={shown(self.temperature)}{_dim(self.dim)}, reduction={self.reduction!r}"


class DistillationLoss(Coefficients):
    """Module of :func:`kdkernels.functional.distillation_loss`.

    Call it with student logits, teacher logits and, for the cross-entropy term, labels. The default weights are those
    of the function: 0.9 and 0.1 with labels, 1 and 0 without. Coefficients that are tensors move with the module.
    """

    temperature: float | Tensor
    kd_weight: float | Tensor | None
    ce_weight: float | Tensor | None
    beta: float | Tensor

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
        self.set_coefficient("temperature", temperature)
        self.set_coefficient("kd_weight", kd_weight)
        self.set_coefficient("ce_weight", ce_weight)
        self.divergence: Divergence = divergence
        self.set_coefficient("beta", beta)
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
        return (
            f"kd_weight * T^2 * {name} + ce_weight * CE, T={shown(self.temperature)}, {weights}{_dim(self.dim)}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        )


def _dim(dim: int | None) -> str:
    return "" if dim is None else f", dim={dim}"


class BatchNormStatLoss(Module):
    """Module of :func:`kdkernels.functional.batch_norm_stat_loss`.

    Call it with an activation, a running mean and a running variance.
    """

    def __init__(
        self,
        *,
        mode: Mode = "l2",
        moment: Moment = "var",
        reduction: ChannelReduction | None = None,
        mean_weight: float = 1.0,
        var_weight: float = 1.0,
        unbiased: bool = False,
    ) -> None:
        super().__init__()
        self.mode: Mode = mode
        self.moment: Moment = moment
        self.reduction: ChannelReduction | None = reduction
        self.mean_weight = mean_weight
        self.var_weight = var_weight
        self.unbiased = unbiased

    def forward(self, input: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
        """Return the distance of the activation's statistics from the running statistics."""
        return functional.batch_norm_stat_loss(
            input,
            running_mean,
            running_var,
            mode=self.mode,
            moment=self.moment,
            reduction=self.reduction,
            mean_weight=self.mean_weight,
            var_weight=self.var_weight,
            unbiased=self.unbiased,
        )

    def extra_repr(self) -> str:
        """Show which distance it is."""
        means, spreads = "mean - running_mean", f"{self.moment} - running_{self.moment}"
        a, b = (f"{weight} " if weight != 1 else "" for weight in (self.mean_weight, self.var_weight))
        over = f"{self.reduction or 'mean'} over channels of"
        formula = {
            "l2": f"{a}||{means}|| + {b}||{spreads}||",
            "l1": f"{over} {a}|{means}| + {b}|{spreads}|",
            "squared": f"{over} {a}({means})^2 + {b}({spreads})^2",
            "gaussian_kl": f"{over} the Gaussian KL",
        }.get(self.mode, self.mode)
        return f"{formula}, unbiased={self.unbiased}"


class TotalVariationLoss(Module):
    """Module of :func:`kdkernels.functional.total_variation`; call it with images or volumes, and a mask if any."""

    def __init__(
        self,
        reduction: _total_variation.Reduction = "sum",
        *,
        norm_type: _total_variation.NormType = "l1",
        directions: Literal[1, 2, 3, 4] | None = None,
        eps: float = 0.0,
        spatial_dims: Literal[1, 2, 3] = 2,
        axis_weight: float | Sequence[float] | None = None,
        axis_reduction: Literal["sum", "mean"] | None = None,
        spacing: float | Sequence[float] | None = None,
        delta: float | None = None,
    ) -> None:
        super().__init__()
        self.reduction: _total_variation.Reduction = reduction
        self.norm_type: _total_variation.NormType = norm_type
        self.directions: Literal[1, 2, 3, 4] | None = directions
        self.eps = eps
        self.spatial_dims: Literal[1, 2, 3] = spatial_dims
        self.axis_weight = axis_weight
        self.axis_reduction: Literal["sum", "mean"] | None = axis_reduction
        self.spacing = spacing
        self.delta = delta

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the total variation of the images, of the pairs inside the mask if there is one."""
        return functional.total_variation(
            input,
            self.reduction,
            norm_type=self.norm_type,
            directions=self.directions,
            eps=self.eps,
            spatial_dims=self.spatial_dims,
            axis_weight=self.axis_weight,
            axis_reduction=self.axis_reduction,
            spacing=self.spacing,
            mask=mask,
            delta=self.delta,
        )

    def extra_repr(self) -> str:
        """Show which total variation it is."""
        squares = "dx^2 + dy^2" if self.spatial_dims == 2 else "|d|^2"
        formula = {
            "l1": "sum |d|",
            "l2": "sqrt(sum d^2)",
            "l2_squared": "sum d^2",
            "isotropic": f"sum sqrt({squares} + {self.eps})",
            "huber": f"sum huber(d), delta={1.0 if self.delta is None else self.delta}",
        }.get(self.norm_type, self.norm_type)
        options = {
            "directions": self.directions,
            "spatial_dims": None if self.spatial_dims == 2 else self.spatial_dims,
            "axis_weight": self.axis_weight,
            "axis_reduction": self.axis_reduction,
            "spacing": self.spacing,
        }
        given = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
        return f"{formula}{given}, reduction={self.reduction!r}"


class ImagePriorLoss(Module):
    """The weighted sum of :func:`kdkernels.functional.image_prior_losses`; call it with images [B, C, H, W]."""

    def __init__(self, *, tv_l1: float = 0.0, tv_l2: float = 1e-4, l2: float = 0.0) -> None:
        super().__init__()
        self.tv_l1 = tv_l1
        self.tv_l2 = tv_l2
        self.l2 = l2

    def forward(self, input: Tensor) -> Tensor:
        """Return the weighted image priors; a term of weight 0 is left out."""
        tv_l1, tv_l2, l2 = functional.image_prior_losses(input)
        terms = ((self.tv_l1, tv_l1), (self.tv_l2, tv_l2), (self.l2, l2))
        weighted = [weight * term for weight, term in terms if weight != 0]
        return torch.stack(weighted).sum() if weighted else input.sum() * 0.0

    def extra_repr(self) -> str:
        """Show the weight of each term."""
        return f"{self.tv_l1} * TV_l1 + {self.tv_l2} * TV_l2 + {self.l2} * L2"


for _name in __all__:
    globals()[_name].__module__ = __name__  # where users find it


def __dir__() -> list[str]:
    return __all__
