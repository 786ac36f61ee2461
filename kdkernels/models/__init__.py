"""Small reference networks for the demo, the tests and first experiments."""

from kdkernels.models.cnn import SmallCNN

__all__ = ["SmallCNN"]
