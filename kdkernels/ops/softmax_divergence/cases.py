"""Cases of the softmax divergences: class counts, temperatures, layouts, masks, and the edges of the formulas."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops._cases import Benchmark, Call, Case, FarCall, Workload, draw, layouts, one_of, register
from kdkernels.ops.softmax_divergence import (
    distillation_loss,
    js_div_with_logits,
    kl_div_with_logits,
    loss_cases,
    other_cases,
)
from kdkernels.ops.softmax_divergence.saved import passes

CLASSES = (1, 2, 3, 10, 19, 1000, 1001, 32000, 50257, 128256, 151936, 2**17 + 1)
TEMPERATURES = (0.05, 0.5, 1.0, 4.0, 20.0)
REDUCTIONS = ("mean", "none", "sum", "batchmean")
DIVERGENCES = ("forward_kl", "reverse_kl", "js")


def eager_divergence(
    input: Tensor, target: Tensor, temperature: float, dim: int, divergence: str, beta: float = 0.5
) -> Tensor:
    """Return the divergence of each position as users write it, with log_softmax and kl_div."""
    log_q = F.log_softmax(input / temperature, dim)
    log_p = F.log_softmax(target / temperature, dim)
    if divergence == "js" and 0 < beta < 1:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
        student = F.kl_div(log_m, log_q, reduction="none", log_target=True)
        return (beta * teacher + (1 - beta) * student).sum(dim)
    if divergence == "reverse_kl" or (divergence == "js" and beta == 1):
        return F.kl_div(log_p, log_q.exp(), reduction="none").sum(dim)
    return F.kl_div(log_q, log_p.exp(), reduction="none").sum(dim)


def eager_clamped_js(input: Tensor, target: Tensor, temperature: float, dim: int) -> Tensor:
    """Return the published competition term of each position."""
    q, p = F.softmax(input / temperature, dim), F.softmax(target / temperature, dim)
    m = ((q + p) / 2).clamp(0.01, 0.99)
    q, p = q.clamp(0.01, 0.99), p.clamp(0.01, 0.99)
    return (0.5 * F.kl_div(q.log(), m, reduction="none") + 0.5 * F.kl_div(p.log(), m, reduction="none")).sum(dim)


def _reduce(loss: Tensor, reduction: str, count: Tensor | int, batch: int) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() / {"mean": count, "sum": 1, "batchmean": batch}[reduction]


def eager_loss(
    input: Tensor,
    target: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    dim: int = -1,
    reduction: str = "mean",
    weights: tuple[float, float] = (1.0, 0.0),
) -> Tensor:
    """Return weights[0] * divergence + weights[1] * cross-entropy, ignoring label -100."""
    if divergence == "clamped_js":
        loss = eager_clamped_js(input, target, temperature, dim)
    else:
        loss = eager_divergence(input, target, temperature, dim, divergence, beta)
    batch = input.shape[0]
    if labels is None:
        return _reduce(weights[0] * loss, reduction, loss.numel(), batch)
    kept = labels != -100
    logits = input.movedim(dim, 1) if input.dim() > 1 else input
    loss = weights[0] * loss + weights[1] * F.cross_entropy(logits, labels, reduction="none")
    return _reduce(torch.where(kept, loss, 0.0), reduction, kept.sum(), batch)


def _distillation(eager_options: dict[str, Any]) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return distillation_loss and its eager equivalent with the same options."""
    options = dict(eager_options)
    temperature, (kd, ce) = options["temperature"], options.pop("weights")
    ours = partial(distillation_loss, **options, kd_weight=kd, ce_weight=ce)
    return ours, partial(eager_loss, **options, weights=(kd * temperature**2, ce))


def cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yield the cases: every value of the grid at least once, in changing combinations."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(draw, dtype=dtype, device=device, generator=generator)

    def pairs(shape: tuple[int, ...], scale: float = 2.0, count: int = 3) -> list[tuple[Tensor, Tensor]]:
        return [(normal(shape) * scale, normal(shape) * scale) for _ in range(count)]

    def labelled(shape: tuple[int, ...], ignored: float, count: int = 3) -> list[tuple[Tensor, Tensor, Tensor]]:
        result = []
        for s, t in pairs(shape, count=count):
            labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
            mask = torch.rand(labels.shape, generator=generator) < ignored
            result.append((s, t, labels.masked_fill(mask, -100).to(device)))
        return result

    # Class counts, with alternating temperatures, divergences, reductions and labels
    for i, classes in enumerate(CLASSES):
        rows = max(2, min(64, 4096 // classes))
        options: dict[str, Any] = {
            "temperature": TEMPERATURES[i % len(TEMPERATURES)],
            "divergence": DIVERGENCES[i % 3],
            "reduction": REDUCTIONS[i % 4],
            "weights": (0.9, 0.1),
        }
        ours, eager = _distillation(options)
        # A gradient of one class is always 0, of which the functions warn.
        differentiable = (0, 1) if classes > 1 else ()
        yield Case(f"{classes} classes", ours, eager, tuple(labelled((rows, classes), 0.3)), differentiable)

    both = (0, 1)
    for i, temperature in enumerate(TEMPERATURES):
        for divergence, ours in (
            ("forward_kl", kl_div_with_logits),
            ("reverse_kl", partial(kl_div_with_logits, reverse=True)),
            ("js", js_div_with_logits),
            ("clamped_js", partial(js_div_with_logits, legacy_clamp=True)),
        ):
            options = {"temperature": temperature, "reduction": REDUCTIONS[i % 4]}
            eager = partial(eager_loss, divergence=divergence, **options)
            name = f"{divergence} at temperature {temperature}"
            yield Case(name, partial(ours, **options), eager, tuple(pairs((16, 33))), both)
    for beta in (0.0, 0.1, 0.9, 1.0):
        eager = partial(eager_loss, divergence="js", beta=beta)
        yield Case(f"beta {beta}", partial(js_div_with_logits, beta=beta), eager, tuple(pairs((16, 50))), both)

    # Layouts, with the classes first, in the middle and last
    of_layout = {"contiguous": 1, "channels_last": 1, "transposed": -1, "sliced": 1, "part": -1, "offset": 2}
    for layout, dim in of_layout.items():
        for shape in ((2, 19, 5, 7), (3, 130, 2, 3)):
            samples = tuple((layouts(s)[layout], layouts(t)[layout]) for s, t in pairs(shape, count=2))
            options = {"dim": dim, "reduction": "none"}
            yield Case(
                f"{layout}, dim {dim} of {shape}", partial(kl_div_with_logits, **options),
                partial(eager_loss, **options), samples, both,
            )  # fmt: skip
    samples = tuple((s, layouts(t)["channels_last"]) for s, t in pairs((2, 40, 3, 5), count=2))
    yield Case("two layouts", partial(js_div_with_logits, dim=1), partial(eager_loss, dim=1, divergence="js"), samples)
    samples = tuple((s, t[:1].expand(6, -1)) for s, t in pairs((6, 45)))
    yield Case("expanded teacher", kl_div_with_logits, eager_loss, samples)
    yield Case("one row without a batch", kl_div_with_logits, eager_loss, tuple(pairs((100,))), both)

    # Masks and edges
    ours, eager = _distillation({"temperature": 2.0, "weights": (0.5, 0.5), "dim": 1, "reduction": "sum"})
    yield Case("labels of maps", ours, eager, tuple(labelled((2, 19, 4, 9), 0.2)), both)
    ours, eager = _distillation({"temperature": 1.0, "weights": (0.0, 1.0), "reduction": "mean"})
    yield Case("labels alone", ours, eager, tuple(labelled((9, 77), 0.0)))
    yield Case("large logits", kl_div_with_logits, eager_loss, tuple(pairs((8, 40), scale=1e4)), both)
    samples = tuple((s, s.clone()) for s, _ in pairs((8, 300)))
    yield Case("teacher equal to student", kl_div_with_logits, eager_loss, samples, both)
    samples = tuple((s, s + 0.01 * t) for s, t in pairs((8, 300)))
    yield Case("teacher close to student", kl_div_with_logits, eager_loss, samples, both)
    eager = partial(eager_loss, divergence="js")
    yield Case("teacher close to student, js", js_div_with_logits, eager, samples, both)
    samples = tuple((s, t + 60 * F.one_hot(t.argmax(1), t.shape[1])) for s, t in pairs((8, 30)))
    yield Case("one-hot teacher", kl_div_with_logits, eager_loss, samples, both)
    if dtype == torch.bfloat16:
        for other in (torch.float32, torch.float64):
            samples = tuple((s.to(other), t) for s, t in pairs((8, 60)))
            yield Case(f"{other} student", kl_div_with_logits, eager_loss, samples, both)
            yield Case(f"{other} teacher", kl_div_with_logits, eager_loss, tuple((t, s) for s, t in samples), both)


def workload(function: str, shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Workload:
    """Return a row of the benchmark: a divergence with the gradient of the student's logits, at temperature 2.

    The classes are the last dimension, or the second with the variant ``"dim=1"``.
    """
    if function in other_cases.FUNCTIONS:
        return other_cases.workload(function, shape, dtype, variant)
    dim = {"": -1, "dim=1": 1}[one_of(variant, ("", "dim=1"))]
    if len(shape) < 2:
        raise ValueError(f"shape must have a dimension of positions and one of classes, got {list(shape)}")
    options: dict[str, Any] = {"temperature": 2.0, "dim": dim}
    ours: Callable[..., Any]
    if function == "distillation_loss":
        ours = partial(distillation_loss, **options, kd_weight=0.9, ce_weight=0.1)
        eager = partial(eager_loss, **options, weights=(0.9 * 2.0**2, 0.1))
    elif function == "js_div_with_logits":
        ours, eager = partial(js_div_with_logits, **options), partial(eager_loss, **options, divergence="js")
    else:
        ours, eager = partial(kl_div_with_logits, **options), partial(eager_loss, **options)

    def make(device: str) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)
        logits = [torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(3) for _ in range(2)]
        if function != "distillation_loss":
            return tuple(logits)
        positions = [size for i, size in enumerate(shape) if i != dim % len(shape)]
        return (*logits, torch.randint(0, shape[dim], positions, generator=generator, device=device))

    return Workload(
        "softmax_divergence", function, shape, dtype, variant, ours, eager, make,
        {device: passes(device, shape, dtype) for device in ("cpu", "cuda")},
        _scaled if dtype == torch.float16 else None,
    )  # fmt: skip


def _scaled(losses: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The usual scale of a loss in fp16, without which its gradient underflows."""
    return tuple(torch.full_like(loss, 1024.0) for loss in losses)


def calls() -> list[Call]:
    """Return small calls in float64."""
    s, t = (torch.randn(3, 7, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([6, -100, 0])
    maps = [torch.randn(2, 3, 2, 2, dtype=torch.float64).contiguous(memory_format=torch.channels_last) for _ in "st"]
    both = (0, 1)
    return [
        Call("kl_div", partial(kl_div_with_logits, temperature=2.0), (s, t)),
        Call("kl_div to both", partial(kl_div_with_logits, reduction="none"), (s, t), both),
        Call("reverse_kl of maps", partial(kl_div_with_logits, dim=1, reverse=True), tuple(maps), both),
        Call("js_div", partial(js_div_with_logits, beta=0.3, temperature=3.0), (s, t), both),
        Call("js_div, legacy clamp", partial(js_div_with_logits, legacy_clamp=True), (s, t), both),
        Call("distillation", distillation_loss, (s, t, labels)),
        Call("distillation to both", partial(distillation_loss, temperature=1.5), (s, t), both),
    ]


def _two_labels(input: Tensor, target: Tensor) -> Tensor:
    return distillation_loss(input, target, torch.tensor([1, 2], device=input.device))


FAR_CALLS = (
    FarCall(kl_div_with_logits, (3, 70), inputs=2),
    FarCall(kl_div_with_logits, (3, 5), inputs=2),
    FarCall(partial(kl_div_with_logits, dim=1), (2, 3, 2, 40), dim=1, inputs=2),
    FarCall(_two_labels, (2, 1500), inputs=2),
)
BF16, FP16 = torch.bfloat16, torch.float16
KL, JS, DISTILLATION = FUNCTIONS = ("kl_div_with_logits", "js_div_with_logits", "distillation_loss")
# Goals for forward and backward with two CPU threads, against the default mode of torch.compile.
GOALS = {"faster than eager": 4.0, "faster than compile": 2.5}
BENCHMARKS = (
    *(Benchmark(function, shape, quick=True, compared=True, goals=GOALS)
      for shape in ((256, 1000), (8192, 100), (64, 32000))
      for function in (DISTILLATION, JS)),
    Benchmark(KL, (8, 19, 128, 128), variant="dim=1", quick=True, compared=True,
              goals={"faster than eager": 4.0, "faster than compile": 4.0}),
    Benchmark(KL, (8, 19, 256, 256), variant="dim=1", quick=True, compared=True,
              goals={"faster than eager": 6.0, "faster than compile": 2.5}),
    Benchmark(DISTILLATION, (128, 100), quick=True),
    Benchmark(KL, (256, 1000), BF16, quick=True),
    # Overhead of a call
    Benchmark(KL, (128, 100)),
    Benchmark(JS, (128, 10)),
    # CIFAR and ImageNet classifiers
    Benchmark(KL, (256, 1000)),
    Benchmark(KL, (8192, 100)),
    *(Benchmark(function, (256, 1000), dtype) for function in (DISTILLATION, JS) for dtype in (BF16, FP16)),
    # Cityscapes: 19 classes for every pixel
    Benchmark(KL, (8, 19, 128, 128), BF16, "dim=1"),
    *(Benchmark(function, (1, 19, 512, 1024), variant="dim=1") for function in FUNCTIONS),
    # Language models
    *(Benchmark(function, (256, classes), dtype)
      for classes in (32000, 128256, 151936)
      for function in FUNCTIONS
      for dtype in (torch.float32, BF16)),
    *other_cases.BENCHMARKS,
)  # fmt: skip
GPU_BENCHMARKS = (
    Benchmark(KL, (8192, 32000)),
    Benchmark(KL, (8192, 32000), BF16),
    Benchmark(DISTILLATION, (128, 100)),
    Benchmark(JS, (8192, 32000), BF16),
    Benchmark(KL, (8, 19, 512, 1024), variant="dim=1"),
    Benchmark(KL, (4096, 128256), BF16),
    Benchmark(DISTILLATION, (8192, 32000), BF16),
    Benchmark(JS, (8192, 32000)),
    Benchmark(KL, (4096, 128256)),
    Benchmark(KL, (8192, 4096)),
    Benchmark(KL, (8192, 4096), BF16),
    Benchmark(KL, (8, 19, 512, 1024), BF16, "dim=1"),
    *(Benchmark(JS, shape, dtype) for dtype in (BF16, torch.float32) for shape in ((4096, 128256), (8192, 4096))),
    *(Benchmark(KL, (128, 100), dtype) for dtype in (BF16, torch.float32)),
    Benchmark(KL, (4096, 151936), BF16),
)


def _cases_with_options(dtype: torch.dtype, device: str) -> Iterator[Case]:
    yield from loss_cases.cases(dtype, device)
    yield from other_cases.cases(dtype, device)


register(
    __package__,
    accuracy=cases,
    calls=calls,
    cpu_accuracy=_cases_with_options,
    cpu_calls=lambda: [*loss_cases.calls(), *other_cases.calls()],
    far_calls=FAR_CALLS,
    functions=(*FUNCTIONS, *other_cases.FUNCTIONS),
    workload=workload,
    benchmarks=BENCHMARKS,
    gpu_benchmarks=GPU_BENCHMARKS,
)
