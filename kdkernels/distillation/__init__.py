"""Knowledge distillation: of a teacher into a student, with data or without."""

from kdkernels.distillation.data_free import DataFreeConfig, data_free_distill
from kdkernels.distillation.distill import accuracy, distill
from kdkernels.distillation.pool import ImagePool

__all__ = ["DataFreeConfig", "ImagePool", "accuracy", "data_free_distill", "distill"]
