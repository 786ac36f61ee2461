"""Drop-in functions: the losses of knowledge distillation and data-free image synthesis, fused."""

from kdkernels.ops.softmax_divergence import distillation_loss, js_div_with_logits, kl_div_with_logits

__all__ = ["distillation_loss", "js_div_with_logits", "kl_div_with_logits"]
