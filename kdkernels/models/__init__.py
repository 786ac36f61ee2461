"""Small reference networks, for the demo, the tests and first steps."""

from kdkernels.models.cnn import SmallCNN

__all__ = ["SmallCNN"]
