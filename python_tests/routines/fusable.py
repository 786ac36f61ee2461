"""Small networks of the usual architectures, and what fusion makes of them."""

import torch
import torch.nn.functional as F
from networks import trained_like
from torch import nn

from kdkernels.inversion import BatchNormStatistics

F64 = torch.float64


def conv(channels_in, channels_out, stride=1, groups=1, size=3):
    return nn.Conv2d(channels_in, channels_out, size, stride, size // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    """The block of a ResNet, as torchvision writes it."""

    def __init__(self, channels_in, channels, stride=1):
        super().__init__()
        self.conv1, self.bn1 = conv(channels_in, channels, stride), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(channels, channels), nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(conv(channels_in, channels, stride, size=1), nn.BatchNorm2d(channels))

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, classes=5, width=4):
        super().__init__()
        self.conv1, self.bn1 = conv(3, width), nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(2 * width, classes)

    def forward_features(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer2(self.layer1(x))

    def forward(self, x):
        return self.fc(torch.flatten(self.avgpool(self.forward_features(x)), 1))


class VGG(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(conv(4, 8), nn.BatchNorm2d(8), nn.LeakyReLU(0.2)),
        )
        self.classifier = nn.Sequential(
            nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.ReLU(True), nn.Dropout(), nn.Linear(6, 5)
        )

    def forward(self, x):
        x = self.features(x)
        return self.classifier(x.mean((2, 3)).view(x.size(0), -1))


class InvertedResidual(nn.Module):
    """The block of a MobileNetV2, with a linear end."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Sequential(conv(channels, 8, size=1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)),
            nn.Sequential(conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.Hardtanh(0, 6)),
            conv(8, channels, size=1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        return x + self.conv(x)


class MobileNet(nn.Sequential):
    def __init__(self):
        super().__init__(
            *(conv(3, 4, 2), nn.BatchNorm2d(4), nn.Hardswish()),
            *(InvertedResidual(4), InvertedResidual(4)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
        )


class DenseLayer(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), conv(channels, 3)

    def forward(self, features):
        return self.conv(F.relu(self.norm(torch.cat(features, 1)), inplace=True))


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 4)
        self.layers = nn.ModuleList(DenseLayer(4 + 3 * i) for i in range(3))
        self.norm, self.fc = nn.BatchNorm2d(13), nn.Linear(13, 5)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        x = F.relu(self.norm(torch.cat(features, 1)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class DropPath(nn.Module):
    def __init__(self, rate=0.2):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0 or not self.training:
            return x
        return x * (torch.rand(len(x), 1, 1, 1, device=x.device) > self.rate) / (1 - self.rate)


class Swish(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x.mul_(x.sigmoid()) if self.inplace else x * torch.sigmoid(x)


class Squeeze(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))


class MBConv(nn.Module):
    """The block of an EfficientNet."""

    def __init__(self, channels, activation):
        super().__init__()
        self.expand, self.bn0 = conv(channels, 8, size=1), nn.BatchNorm2d(8)
        self.depthwise, self.bn1 = conv(8, 8, groups=8), nn.BatchNorm2d(8)
        self.project, self.bn2 = conv(8, channels, size=1), nn.BatchNorm2d(channels)
        self.squeeze, self.act, self.drop_path = Squeeze(8), activation, DropPath()

    def forward(self, inputs):
        x = self.act(self.bn0(self.expand(inputs)))
        x = self.squeeze(self.act(self.bn1(self.depthwise(x))))
        return self.drop_path(self.bn2(self.project(x))) + inputs


class EfficientNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 4, 2), nn.BatchNorm2d(4), nn.SiLU(inplace=True))
        self.blocks = nn.ModuleList([MBConv(4, nn.SiLU(inplace=True)), MBConv(4, Swish()), MBConv(4, Swish(True))])
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.fc(x.mean((2, 3))), "features": (x, [x.amax((2, 3))])}


class RepVGGBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.dense = nn.Sequential(conv(channels, channels), nn.BatchNorm2d(channels))
        self.point = nn.Sequential(conv(channels, channels, size=1), nn.BatchNorm2d(channels))
        self.identity, self.act = nn.BatchNorm2d(channels), nn.ReLU()

    def forward(self, x):
        return self.act(self.dense(x) + self.point(x) + self.identity(x))


class RepVGG(nn.Sequential):
    def __init__(self):
        super().__init__(conv(3, 4), RepVGGBlock(4), RepVGGBlock(4), nn.Flatten(), nn.LazyLinear(5))
        self(torch.zeros(2, 3, 8, 8))


class PreActivation(nn.Module):
    """A wide ResNet's block: normalization and activation come first."""

    def __init__(self, channels):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, channels)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), conv(channels, channels)

    def forward(self, x):
        out = self.conv1(self.bn1(x).relu())
        return torch.add(self.conv2(torch.relu_(self.bn2(out))), x)


class WideResNet(nn.Sequential):
    def __init__(self):
        super().__init__(conv(3, 4), PreActivation(4), PreActivation(4), nn.BatchNorm2d(4), nn.ReLU())


NETWORKS = [ResNet, VGG, MobileNet, DenseNet, EfficientNet, RepVGG, WideResNet]


def made(network, *args):
    """Return a network in float64 with statistics and scales unlike those of a new one."""
    torch.manual_seed(0)
    return trained_like(network(*args)).double()


def batch(seed=0, count=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, dtype=F64, generator=generator).requires_grad_()


class Wrapped(nn.Module):
    """A convolution, and a function of layers and its output."""

    def __init__(self, function, **modules):
        super().__init__()
        self.conv = conv(3, 4)
        self.bn, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, x):
        return self.function(self, self.conv(x))


def leaves(output):
    return torch.utils._pytree.tree_leaves(output)


def result_of(model, x, fuse, call=None, **options):
    """Return output, losses and gradient by the names of the layers' uses, and the statistics."""
    x = x.detach().clone().requires_grad_()
    with BatchNormStatistics(model, fuse=fuse, **options) as statistics:
        outputs = [value.clone() for value in leaves((call or model)(x * 1))]
        losses = statistics.losses()
        total = sum(value.square().sum() for value in outputs) + 0.7 * statistics.loss()
        total.backward()
        return outputs, list(losses), torch.stack(list(losses.values())).detach(), x.grad, statistics.describe()


def same(model, x=None, call=None, **options):
    """Assert that a network gives the same with and without fusion, and return what is fused."""
    x = batch() if x is None else x
    outputs, names, losses, grad, _ = result_of(model, x, False, call, **options)
    found, found_names, found_losses, found_grad, text = result_of(model, x, "auto", call, **options)
    assert found_names == names
    for a, b in [*zip(found, outputs, strict=True), (found_losses, losses), (found_grad, grad)]:
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12 * b.abs().max().item())
        assert (a - b).norm() <= 1e-12 * b.norm()
    return text


def parts_of(text):
    """Return what each layer is fused with, by its name."""
    return dict(line.split(": ", 1) for line in text.split("\n") if ": " in line)
