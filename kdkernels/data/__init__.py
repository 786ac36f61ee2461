"""Real data that needs no download: the handwritten digits that scikit-learn carries."""

from kdkernels.data.digits import Digits, load_digits

__all__ = ["Digits", "load_digits"]
