"""What the benchmarks of the routines share: networks for small images, and the check that comes before the timing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels.testing.comparison import peak_bytes, relative_error, why_not
from kdkernels.testing.timing import Timed

SIZES = {
    "ResNet-8": ((1, 1, 1), (16, 32, 64)),
    "ResNet-20": ((3, 3, 3), (16, 32, 64)),
    "ResNet-18": ((2, 2, 2, 2), (64, 128, 256, 512)),
}
# Rounding in fp32 flips the sign of some inputs of ReLU, the more the deeper a network, whatever computes its loss.
TOLERANCES = {"SmallCNN": 1e-4, "ResNet-8": 1e-4, "ResNet-20": 1e-2, "ResNet-18": 1e-2, "ResNet-50": 1e-2}
ONLY_IN_FULL = "only in the full set: compiling a network takes longer than everything else here"


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
    """A residual network for images of 32x32 pixels. Source: He et al., arXiv 1512.03385.

    Args:
        name: one of :data:`SIZES`.
        num_classes: outputs.

    """

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
    """Give a new network the running statistics of images, so that they are of their order; return it."""
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
    model.train()(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    return model.eval()


@dataclass(frozen=True)
class Contender:
    """Somebody who runs a step of a routine.

    Attributes:
        call: what is timed.
        prepare: what comes before it, untimed.
        results: returns what is compared with the truth; None for a part of the step that has no such results.
        compiled: whether the first results are compiled for.

    """

    call: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    results: Callable[[], list[Tensor]] | None = None
    compiled: bool = False


def check_and_race(
    race: Callable[..., Any],
    benchmark: Any,
    contenders: Mapping[str, Contender],
    truth: list[Tensor],
    tolerance: float,
    *,
    rounds: int = 15,
    seconds: float = 5.0,
    **info: Any,
) -> None:
    """Compare everybody's results with the truth, then time those that are right; the first must be.

    Args:
        race: the fixture.
        benchmark: the fixture.
        contenders: by name, ours first.
        truth: the results in fp64.
        tolerance: the largest relative error, as norm of the error over norm of the result.
        rounds: at most.
        seconds: for the timing.
        info: for the report.

    """
    errors: dict[str, float] = {}
    compile_seconds: dict[str, float] = {}
    not_timed: dict[str, str] = dict(info.pop("not_timed", {}))
    first = next(iter(contenders))
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
    info |= {
        "kind": "routine", "dtype": "float32", "mode": "step", "not_timed": not_timed, "errors": errors,
        "compile_seconds": compile_seconds, "bytes": None, "passes": None,
    }  # fmt: skip
    if first in not_timed:
        benchmark.extra_info.update(info, failed=not_timed[first])
        pytest.fail(f"{info['function']}: {not_timed[first]}")
    timed = {name: Timed(one.call, one.prepare) for name, one in contenders.items() if name not in not_timed}
    info["peak_bytes"] = {}
    for name, one in timed.items():
        one.prepare()
        info["peak_bytes"][name] = peak_bytes(one.call)
    race(timed, cold=False, rounds=rounds, seconds=seconds, **info)
