"""The hook and the image priors of the published DeepInversion (NVlabs/DeepInversion)."""

from typing import Any

import torch
from torch import Tensor

from kdkernels import functional

__all__ = ["DeepInversionFeatureHook", "get_image_prior_losses"]


class DeepInversionFeatureHook:
    """Forward hook on a BatchNorm layer that measures how far its input is from the running statistics.

    ``r_feature`` is ||running_var - var|| + ||running_mean - mean|| of the latest forward, two norms over the channels,
    neither squared nor divided, with the biased variance of the batch: ``batch_norm_stat_loss(input, running_mean,
    running_var)``. :class:`kdkernels.inversion.BatchNormStatistics` computes the sum over all layers in the network's
    own passes, which is faster.

    Args:
        module: BatchNorm layer that keeps running statistics. Inputs have 2 to 5 dimensions.

    Raises:
        ValueError: The layer has no running statistics.

    """

    r_feature: Tensor

    def __init__(self, module: torch.nn.Module) -> None:
        if getattr(module, "running_mean", None) is None or getattr(module, "running_var", None) is None:
            raise ValueError(
                f"module is a {type(module).__name__} without running statistics; expected a BatchNorm layer with "
                "track_running_stats=True"
            )
        self.hook = module.register_forward_hook(self.hook_fn)

    def hook_fn(self, module: torch.nn.Module, input: tuple[Any, ...], output: object) -> None:
        """Measure the input of the layer."""
        # Copies: a later forward in training mode updates the running statistics before the backward has run.
        mean, var = (getattr(module, name).detach().clone() for name in ("running_mean", "running_var"))
        self.r_feature = functional.batch_norm_stat_loss(input[0], mean, var)

    def close(self) -> None:
        """Remove the hook from the layer."""
        self.hook.remove()


def get_image_prior_losses(inputs_jit: Tensor) -> tuple[Tensor, Tensor]:
    """Return the total variation of images in two norms: the sum of four means, and of four norms over the batch.

    They are the first two of ``image_prior_losses(inputs_jit)``. The norm grows with the root of the batch size.

    Args:
        inputs_jit: Images [B, C, H, W].

    """
    tv_l1, tv_l2, _ = functional.image_prior_losses(inputs_jit)
    return tv_l1, tv_l2
