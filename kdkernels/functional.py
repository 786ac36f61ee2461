"""Drop-in functions: the losses of knowledge distillation and data-free image synthesis, fused."""

import inspect

from kdkernels.ops import _tracing
from kdkernels.ops.batch_norm_act_stats import BatchNormActStats, batch_norm_act_stats
from kdkernels.ops.batch_norm_stats import (
    BatchNormStats,
    BatchNormTap,
    batch_norm_stat_distances,
    batch_norm_stat_loss,
    batch_norm_stats,
    batch_norm_tap,
)
from kdkernels.ops.gradient_reversal import gradient_reversal, gradient_reversal_linear
from kdkernels.ops.linear_distillation import linear_distillation_loss
from kdkernels.ops.pointwise_divergence import binary_kl_div_with_logits, js_div, kl_div
from kdkernels.ops.softmax_divergence import (
    DivergenceParts,
    decoupled_distillation_loss,
    distillation_loss,
    entropy_with_logits,
    js_div_with_logits,
    kl_div_with_logits,
    normalized_distillation_loss,
    skew_kl_div_with_logits,
    soft_cross_entropy,
    total_variation_distance_with_logits,
)
from kdkernels.ops.split_vocabulary import (
    split_vocabulary_loss,
    split_vocabulary_mixture,
    split_vocabulary_statistics,
)
from kdkernels.ops.topk_divergence import TopKLoss, TopKTeacher, topk_kl_div_with_logits, topk_teacher
from kdkernels.ops.total_variation import ImagePriorLosses, image_prior_losses, total_variation

__all__ = [
    "BatchNormActStats",
    "BatchNormStats",
    "BatchNormTap",
    "DivergenceParts",
    "ImagePriorLosses",
    "TopKLoss",
    "TopKTeacher",
    "batch_norm_act_stats",
    "batch_norm_stat_distances",
    "batch_norm_stat_loss",
    "batch_norm_stats",
    "batch_norm_tap",
    "binary_kl_div_with_logits",
    "decoupled_distillation_loss",
    "distillation_loss",
    "entropy_with_logits",
    "gradient_reversal",
    "gradient_reversal_linear",
    "image_prior_losses",
    "js_div",
    "js_div_with_logits",
    "kl_div",
    "kl_div_with_logits",
    "linear_distillation_loss",
    "normalized_distillation_loss",
    "skew_kl_div_with_logits",
    "soft_cross_entropy",
    "split_vocabulary_loss",
    "split_vocabulary_mixture",
    "split_vocabulary_statistics",
    "topk_kl_div_with_logits",
    "topk_teacher",
    "total_variation",
    "total_variation_distance_with_logits",
]

for _name in __all__:
    if inspect.isfunction(globals()[_name]):
        globals()[_name] = _tracing.as_one_node(globals()[_name])
    globals()[_name].__module__ = __name__  # where users find it, whichever folder it lies in


def __dir__() -> list[str]:
    return __all__
