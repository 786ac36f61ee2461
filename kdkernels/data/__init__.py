"""Real data without a download: the handwritten digits shipped with scikit-learn."""

from kdkernels.data.digits import Digits, load_digits

__all__ = ["Digits", "load_digits"]
