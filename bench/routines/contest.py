"""Shared by the benchmarks of the routines: networks for small images, and the check before the timing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels.testing.comparison import relative_error, why_not
from kdkernels.testing.timing import Timed

SIZES = {
    "ResNet-8": ((1, 1, 1), (16, 32, 64)),
    "ResNet-20": ((3, 3, 3), (16, 32, 64)),
    "ResNet-18": ((2, 2, 2, 2), (64, 128, 256, 512)),
}
# In every implementation, rounding in fp32 flips the sign of some inputs to ReLU, more of them in deeper networks.
TOLERANCES = {
    "SmallCNN": 1e-4, "ResNet-8": 1e-4, "ResNet-20": 1e-2, "ResNet-18": 1e-2, "ResNet-50": 1e-2,
    "EfficientNet-Lite0": 1e-2,
}  # fmt: skip
ONLY_IN_FULL = "only in the full set: compiling a network takes longer than everything else in the quick set"


class Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class CifarResNet(nn.Sequential):
    """A residual network for images of 32x32 pixels, one of SIZES. Source: He et al., arXiv 1512.03385."""

    def __init__(self, name: str, num_classes: int = 10) -> None:
        blocks, widths = SIZES[name]
        channels = widths[0]
        layers = [nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            for index in range(count):
                layers.append(Block(channels, width, 2 if stage > 0 and index == 0 else 1))
                channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


@torch.no_grad()
def with_statistics(model: nn.Module, images: Tensor) -> nn.Module:
    """Set the running statistics of a new network from images, and return it."""
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = 1.0
    model.train()(images)
    for layer in layers:
        layer.momentum = 0.1
    return model.eval()


@dataclass(frozen=True)
class Contender:
    """One implementation of a step of a routine."""

    call: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    results: Callable[[], list[Tensor]] | None = None  # compared with the truth; None if it is only part of the step
    compiled: bool = False  # whether the first results include a compilation


def check_and_race(
    race: Callable[..., Any],
    contenders: Mapping[str, Contender],
    truth: list[Tensor],
    tolerance: float,
    *,
    rounds: int = 15,
    **info: Any,
) -> None:
    """Time the contenders whose results agree with the truth in fp64; kdkernels must be among them.

    The tolerance is relative: the norm of the error divided by that of the result.
    """
    errors: dict[str, float] = {}
    compile_seconds: dict[str, float] = {}
    not_timed: dict[str, str] = dict(info.pop("not_timed", {}))
    for name, one in contenders.items():
        if one.results is None:
            continue
        start = perf_counter()
        try:
            results = one.results()
        except Exception as error:
            not_timed[name] = why_not(error)
            continue
        if one.compiled:
            compile_seconds[name] = perf_counter() - start
        errors[name] = relative_error(results, truth)
        if not errors[name] <= tolerance:
            not_timed[name] = f"wrong: relative error {errors[name]:.1e}, allowed {tolerance:.0e}"
    if "kdkernels" in not_timed:
        pytest.fail(f"{info['function']}: {not_timed['kdkernels']}")
    timed = {name: Timed(one.call, one.prepare) for name, one in contenders.items() if name not in not_timed}
    info |= {"not_timed": not_timed, "errors": errors, "compile_seconds": compile_seconds}
    race(timed, cold=False, rounds=rounds, kind="routine", dtype="float32", mode="step", **info)
