"""A small convolutional network with batch normalization."""

from torch import nn


class SmallCNN(nn.Sequential):
    """Three convolutions with batch normalization, global average pooling and a linear classifier.

    ``[conv 3x3 - BatchNorm - ReLU]`` with ``width``, ``2 * width`` (stride 2) and ``2 * width`` (stride 2) channels;
    any image size from 4x4 on. Called with images [B, in_channels, H, W] it returns logits [B, num_classes].

    Args:
        width: channels of the first convolution.
        num_classes: outputs.
        in_channels: channels of the images.

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
