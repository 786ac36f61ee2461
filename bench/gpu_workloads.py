"""What the benchmark on a GPU times: each case with its rivals, its passes over memory and its goals."""

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.cases.batch_norm_stats import eager_stats
from kdkernels.cases.softmax_divergence import eager_loss
from kdkernels.cases.total_variation import eager_priors
from kdkernels.functional import (
    batch_norm_tap,
    distillation_loss,
    gradient_reversal,
    image_prior_losses,
    js_div_with_logits,
    kl_div_with_logits,
)

Function = Callable[..., Any]
FASTER = {"faster than eager": 4.0, "faster than compile": 1.2}
FASTER_THAN_LIGER = {"faster than liger": 3.0}
LARGE = 256_000_000  # bytes of a tensor from which on the share of the copy bandwidth is a goal
SHARE = {"share of copy bandwidth": 0.8}
SMALL = {"graph microseconds": 15.0, "launches forward": 2, "launches backward": 2}


@dataclass(frozen=True)
class GpuCase:
    """A row of the benchmark: forward, backward to the first tensor, and both.

    Attributes:
        name: of the function, the shape and what else is particular.
        ours: a function of kdkernels with its options bound.
        rivals: functions of the same tensors with the same results, by name; eager is compiled too.
        make: draws the tensors on a device.
        cotangents: draws the incoming gradients; none for a loss, whose gradient is 1.
        tensor_bytes: of one large tensor.
        passes: over it, of the forward and of the backward, as the documentation of the op states them.
        tolerance: of our results, as the norm of the error over that of the true result; rivals may have ten times it.
        goals: by name, see gpu_report.judge.
        missing: rivals that are not there, with the reason.

    """

    name: str
    ours: Function
    rivals: dict[str, Function]
    make: Callable[[str], tuple[Tensor, ...]]
    tensor_bytes: int
    passes: tuple[int, int]
    tolerance: float
    goals: dict[str, float]
    cotangents: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def needs_graph(self) -> bool:
        """Whether launches count more than bytes, so that it is timed under a CUDA graph too."""
        return "graph microseconds" in self.goals


def liger(module: str, name: str, **options: Any) -> tuple[Function | None, str]:
    """A loss of Liger-Kernel, or why there is none."""
    try:
        return getattr(importlib.import_module(f"liger_kernel.transformers.{module}"), name)(**options), ""
    except ModuleNotFoundError as error:
        if error.name == "liger_kernel":
            return None, "not installed"
        return None, f"does not import: {error}"
    except Exception as error:
        return None, f"does not import: {error}"


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def _goals(size: int, **more: float) -> dict[str, float]:
    return {**FASTER, **(SHARE if size >= LARGE else {}), **more}


def divergence(kind: str, shape: tuple[int, ...], dtype: torch.dtype, *, dim: int = 1) -> GpuCase:
    """A divergence at temperature 2, or the distillation loss with labels, by student and teacher logits."""
    temperature = 2.0

    def make(device: str) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)
        logits = [torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(3) for _ in range(2)]
        if kind != "distillation":
            return tuple(logits)
        return (*logits, torch.randint(0, shape[1], shape[:1], generator=generator, device=device))

    options: dict[str, Any] = {"temperature": temperature, "dim": dim}
    rivals: dict[str, Function] = {}
    missing = {}
    name, liger_loss = "", None
    if kind == "distillation":
        name, ours = "distillation_loss", partial(distillation_loss, **options, kd_weight=0.9, ce_weight=0.1)
        rivals["eager"] = partial(eager_loss, **options, weights=(0.9 * temperature**2, 0.1))
    elif kind == "js":
        name, ours = "js_div_with_logits", partial(js_div_with_logits, **options)
        rivals["eager"] = partial(eager_loss, **options, divergence="js")
        liger_loss, reason = liger("jsd", "LigerJSD", beta=0.5)
    else:
        name, ours = "kl_div_with_logits", partial(kl_div_with_logits, **options)
        rivals["eager"] = partial(eager_loss, **options)
        liger_loss, reason = liger("kl_div", "LigerKLDIVLoss", reduction="batchmean")
    size = math.prod(shape) * dtype.itemsize
    goals = _goals(size)
    if len(shape) == 2 and kind != "distillation":
        goals |= FASTER_THAN_LIGER
        if liger_loss is None:
            missing["liger"] = reason
        else:
            rivals["liger"] = partial(_by_liger, liger_loss, kind, temperature)
    if shape == (128, 100):
        goals = {**FASTER, **SMALL}
    return GpuCase(
        f"{name} {list(shape)} {_short(dtype)}{', dim=1' if len(shape) > 2 else ''}", ours, rivals, make, size, (2, 3),
        1e-4 if dtype == torch.float32 else 1e-2, goals, missing=missing,
    )  # fmt: skip


def _by_liger(loss: Function, kind: str, temperature: float, student: Tensor, teacher: Tensor) -> Tensor:
    """From logits: it takes logarithms of probabilities, and of the teacher for KL probabilities."""
    log_q = F.log_softmax(student / temperature, -1)
    if kind == "js":
        return loss(log_q, F.log_softmax(teacher / temperature, -1))
    return loss(log_q, F.softmax(teacher / temperature, -1))


def _hook(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics as a hook takes them; the network goes on with the activation as it is."""
    return (input.view_as(input), *eager_stats(input))


def tap(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> GpuCase:
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def draw(device: str, seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        values = torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(1.5).add_(0.3)
        return values.contiguous(memory_format=memory_format)

    def cotangents(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        activation, mean, var = outputs
        ones = torch.linspace(-1, 1, mean.numel(), device=mean.device)
        # The gradient of a channel's mean is spread over all its values; this makes it as large as the network's.
        count = activation.numel() // mean.numel()
        return draw(activation.device.type, 1), ones.to(mean.dtype) * count, ones.flip(0).to(var.dtype) * count

    size = math.prod(shape) * dtype.itemsize
    return GpuCase(
        f"batch_norm_tap {list(shape)} {_short(dtype)}, {layout}", batch_norm_tap, {"eager": _hook},
        lambda device: (draw(device, 0),), size, (1, 3), 1e-4 if dtype == torch.float32 else 1e-2, _goals(size),
        cotangents,
    )  # fmt: skip


def prior(shape: tuple[int, ...]) -> GpuCase:
    def make(device: str) -> tuple[Tensor, ...]:
        return (torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device),)

    def total(function: Function, images: Tensor) -> Tensor:
        tv_l1, tv_l2, l2 = function(images)
        return tv_l1 + 1e-2 * tv_l2 + 1e-2 * l2

    size = math.prod(shape) * 4
    return GpuCase(
        f"image_prior_losses {list(shape)} fp32", partial(total, image_prior_losses),
        {"eager": partial(total, eager_priors)}, make, size, (1, 2), 1e-4, _goals(size),
    )  # fmt: skip


class _Reversal(torch.autograd.Function):
    """Gradient reversal as it is usually written."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, coefficient: float) -> Tensor:
        ctx.coefficient = coefficient
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.neg() * ctx.coefficient, None


def reversal(shape: tuple[int, ...]) -> GpuCase:
    """One multiplication, which a compiler writes as well: no goal but what the op's documentation states."""

    def make(device: str) -> tuple[Tensor, ...]:
        return (torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device),)

    return GpuCase(
        f"gradient_reversal {list(shape)} fp32", partial(gradient_reversal, lambd=0.3),
        {"eager": lambda features: _Reversal.apply(features, 0.3)}, make, math.prod(shape) * 4, (0, 2), 1e-4, {},
        lambda outputs: tuple(torch.cos(torch.arange(o.numel(), device=o.device)).view_as(o) for o in outputs),
    )  # fmt: skip


def cases(dry: bool) -> Iterator[GpuCase]:
    """Yield the largest claims first, every op early; in a dry run the same with tiny tensors."""
    fp32, bf16 = torch.float32, torch.bfloat16

    def sized(*shape: int) -> tuple[int, ...]:
        return tuple(min(size, limit) for size, limit in zip(shape, (8, 37, 9, 9), strict=False)) if dry else shape

    nchw, channels_last = "NCHW", "channels_last"
    yield divergence("kl", sized(8192, 32000), fp32)
    yield divergence("kl", sized(8192, 32000), bf16)
    yield divergence("distillation", (128, 100), fp32)
    yield tap(sized(84, 256, 56, 56), fp32, nchw)
    yield prior(sized(84, 3, 224, 224))
    yield divergence("js", sized(8192, 32000), bf16)
    yield divergence("kl", sized(8, 19, 512, 1024), fp32)
    yield prior(sized(448, 3, 224, 224))
    yield tap(sized(84, 256, 56, 56), fp32, channels_last)
    yield divergence("kl", sized(4096, 128256), bf16)
    yield divergence("distillation", sized(8192, 32000), bf16)
    yield divergence("js", sized(8192, 32000), fp32)
    yield divergence("kl", sized(4096, 128256), fp32)
    yield divergence("kl", sized(8192, 4096), fp32)
    yield divergence("kl", sized(8192, 4096), bf16)
    yield tap(sized(84, 256, 56, 56), bf16, nchw)
    yield tap(sized(84, 256, 56, 56), bf16, channels_last)
    yield reversal(sized(4096, 4096))
    yield prior(sized(256, 3, 32, 32))
    for dtype in (fp32, bf16):
        for layout in (nchw, channels_last):
            yield tap(sized(256, 64, 32, 32), dtype, layout)
    yield divergence("kl", sized(8, 19, 512, 1024), bf16)
    for dtype in (bf16, fp32):
        yield divergence("js", sized(4096, 128256), dtype)
        yield divergence("js", sized(8192, 4096), dtype)
        yield divergence("kl", (128, 100), dtype)
