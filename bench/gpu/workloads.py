"""What the benchmark on a GPU times: each workload with its rivals and its goals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.rivals import rivals_of
from kdkernels.ops._cases import Workload, workload
from kdkernels.testing.comparison import COMPILE

Function = Callable[..., Any]
FASTER = {"faster than eager": 4.0, "faster than compile": 1.2}
FASTER_THAN_LIGER = {"faster than liger": 3.0}
LARGE = 256_000_000  # bytes of a tensor from which on the share of the copy bandwidth is a goal
SHARE = {"share of copy bandwidth": 0.8}
SMALL = {"graph microseconds": 15.0, "launches forward": 2, "launches backward": 2}


@dataclass(frozen=True)
class GpuCase:
    """A row of the benchmark.

    Attributes:
        workload: what is computed.
        goals: by name, see gpu_report.judge.
        rivals: functions of other packages.
        missing: rivals that are not there, with the reason.

    """

    workload: Workload
    goals: dict[str, float]
    rivals: dict[str, Function] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.workload.name

    @property
    def compiled(self) -> dict[str, str | None]:
        """The modes of torch.compile: tuning takes long, and only large tensors have tiles to tune."""
        return COMPILE if self.workload.tensor_bytes >= LARGE else {"compile": None}

    @property
    def needs_graph(self) -> bool:
        """Whether launches count more than bytes, so that it is timed under a CUDA graph too."""
        return "graph microseconds" in self.goals


def case(function: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, variant: str = "") -> GpuCase:
    one = workload(function, shape, dtype, variant)
    rivals, missing = rivals_of(one, "cuda")
    goals = {**FASTER, **(SHARE if one.tensor_bytes >= LARGE else {})}
    if function in ("kl_div_with_logits", "js_div_with_logits") and not variant:
        goals |= FASTER_THAN_LIGER
    if shape == (128, 100):
        goals = {**FASTER, **SMALL}
    if function == "gradient_reversal":  # one multiplication, which a compiler writes as well
        goals = {}
    return GpuCase(one, goals, rivals, missing)


def cases(dry: bool) -> Iterator[GpuCase]:
    """Yield the largest claims first, every op early; in a dry run the same with tiny tensors."""
    fp32, bf16 = torch.float32, torch.bfloat16
    kl, js, distillation = "kl_div_with_logits", "js_div_with_logits", "distillation_loss"
    tap, prior, channels_last = "batch_norm_tap", "image_prior_losses", "channels_last"

    def sized(*shape: int) -> tuple[int, ...]:
        return tuple(min(size, limit) for size, limit in zip(shape, (8, 37, 9, 9), strict=False)) if dry else shape

    yield case(kl, sized(8192, 32000), fp32)
    yield case(kl, sized(8192, 32000), bf16)
    yield case(distillation, (128, 100), fp32)
    yield case(tap, sized(84, 256, 56, 56), fp32)
    yield case(prior, sized(84, 3, 224, 224))
    yield case(js, sized(8192, 32000), bf16)
    yield case(kl, sized(8, 19, 512, 1024), fp32, "dim=1")
    yield case(prior, sized(448, 3, 224, 224))
    yield case(tap, sized(84, 256, 56, 56), fp32, channels_last)
    yield case(kl, sized(4096, 128256), bf16)
    yield case(distillation, sized(8192, 32000), bf16)
    yield case(js, sized(8192, 32000), fp32)
    yield case(kl, sized(4096, 128256), fp32)
    yield case(kl, sized(8192, 4096), fp32)
    yield case(kl, sized(8192, 4096), bf16)
    yield case(tap, sized(84, 256, 56, 56), bf16)
    yield case(tap, sized(84, 256, 56, 56), bf16, channels_last)
    yield case("gradient_reversal", sized(4096, 4096))
    yield case("total_variation", sized(84, 3, 224, 224))
    yield case(prior, sized(256, 3, 32, 32))
    for dtype in (fp32, bf16):
        for layout in ("", channels_last):
            yield case(tap, sized(256, 64, 32, 32), dtype, layout)
    yield case(kl, sized(8, 19, 512, 1024), bf16, "dim=1")
    for dtype in (bf16, fp32):
        yield case(js, sized(4096, 128256), dtype)
        yield case(js, sized(8192, 4096), dtype)
        yield case(kl, (128, 100), dtype)
    yield case(kl, sized(4096, 151936), bf16)
