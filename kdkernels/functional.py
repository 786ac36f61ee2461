"""Drop-in functions: the losses of knowledge distillation and data-free image synthesis, fused."""

from kdkernels.ops.batch_norm_stats import batch_norm_stat_loss, batch_norm_stats, batch_norm_tap
from kdkernels.ops.gradient_reversal import gradient_reversal, gradient_reversal_linear
from kdkernels.ops.softmax_divergence import distillation_loss, js_div_with_logits, kl_div_with_logits
from kdkernels.ops.total_variation import image_prior_losses, total_variation

__all__ = [
    "batch_norm_stat_loss",
    "batch_norm_stats",
    "batch_norm_tap",
    "distillation_loss",
    "gradient_reversal",
    "gradient_reversal_linear",
    "image_prior_losses",
    "js_div_with_logits",
    "kl_div_with_logits",
    "total_variation",
]
