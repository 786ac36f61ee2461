"""Knowledge distillation from a teacher to a student, with or without data."""

from kdkernels._networks import NonFiniteLossError
from kdkernels.distillation.data_free import DataFreeConfig, data_free_distill
from kdkernels.distillation.distill import accuracy, distill
from kdkernels.distillation.pool import ImagePool

__all__ = ["DataFreeConfig", "ImagePool", "NonFiniteLossError", "accuracy", "data_free_distill", "distill"]
