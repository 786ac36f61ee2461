"""Modules of the functions in :mod:`kdkernels.functional`; their ``repr`` shows what they compute."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Module

from kdkernels import functional
from kdkernels._distillation_modules import DecoupledDistillationLoss, DistillationLoss, NormalizedDistillationLoss
from kdkernels._divergence_modules import (
    JSDivWithLogitsLoss,
    KLDivWithLogitsLoss,
    SkewKLDivWithLogitsLoss,
    SoftCrossEntropyLoss,
)
from kdkernels._gradient_reversal import GradientReversal, GradientReversalLinear, WarmStartGradientReversal
from kdkernels._pointwise_losses import BinaryKLDivWithLogitsLoss, KLDivLoss
from kdkernels._topk_divergence import TopKKLDivWithLogitsLoss
from kdkernels.ops import total_variation as _total_variation
from kdkernels.ops._types import ChannelReduction, Mode, Moment

__all__ = [
    "BatchNormStatLoss",
    "BinaryKLDivWithLogitsLoss",
    "DecoupledDistillationLoss",
    "DistillationLoss",
    "GradientReversal",
    "GradientReversalLinear",
    "ImagePriorLoss",
    "JSDivWithLogitsLoss",
    "KLDivLoss",
    "KLDivWithLogitsLoss",
    "NormalizedDistillationLoss",
    "SkewKLDivWithLogitsLoss",
    "SoftCrossEntropyLoss",
    "TopKKLDivWithLogitsLoss",
    "TotalVariationLoss",
    "WarmStartGradientReversal",
]


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
