"""DeepInversion: images synthesized from a trained network alone.

Source: Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020, arXiv 1912.08795.
"""

from kdkernels._networks import NonFiniteLossError
from kdkernels.inversion._loop import Synthesis
from kdkernels.inversion._network import Execution
from kdkernels.inversion._targets import demixed_targets
from kdkernels.inversion.batch_norm_statistics import BatchNormStatistics
from kdkernels.inversion.config import PRESETS, InversionConfig, Stage
from kdkernels.inversion.deep_inversion import DeepInversion

__all__ = [
    "PRESETS",
    "BatchNormStatistics",
    "DeepInversion",
    "Execution",
    "InversionConfig",
    "NonFiniteLossError",
    "Stage",
    "Synthesis",
    "demixed_targets",
]
