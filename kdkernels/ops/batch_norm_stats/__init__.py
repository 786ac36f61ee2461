"""Batch-norm statistics in one read, with a fused backward, and as a loss against the running statistics.

The backward keeps nothing but the activation, which BatchNorm saves anyway.
"""

from kdkernels.ops.batch_norm_stats.distances import batch_norm_stat_distances, batch_norm_stat_loss
from kdkernels.ops.batch_norm_stats.statistics import BatchNormStats, BatchNormTap, batch_norm_stats, batch_norm_tap

__all__ = [
    "PASSES",
    "BatchNormStats",
    "BatchNormTap",
    "batch_norm_stat_distances",
    "batch_norm_stat_loss",
    "batch_norm_stats",
    "batch_norm_tap",
]

# Passes over the activation in memory, forward and backward: statistics R and R W. The backward of the tap also reads
# the gradient of the network: R R W.
PASSES = {"batch_norm_stats": (1, 2), "batch_norm_stat_loss": (1, 2), "batch_norm_tap": (1, 3)}
