"""A small convolutional network with batch normalization."""

from torch import nn


class SmallCNN(nn.Sequential):
    """Three convolutions with batch normalization, global average pooling and a linear classifier.

    Three blocks ``[conv 3x3 - BatchNorm - ReLU]`` with ``width``, ``2 * width`` (stride 2) and ``2 * width`` (stride 2)
    channels. Images [B, in_channels, H, W] of at least 4x4 pixels give logits [B, num_classes].

    Args:
        width: Channels of the first convolution.
        num_classes: Number of classes.
        in_channels: Channels of the images.

    """

    def __init__(self, width: int = 16, num_classes: int = 10, in_channels: int = 1) -> None:
        layers: list[nn.Module] = []
        channels = in_channels
        for out_channels, stride in ((width, 1), (2 * width, 2), (2 * width, 2)):
            layers += [
                nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
            ]
            channels = out_channels
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
