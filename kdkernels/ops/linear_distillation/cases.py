"""Cases of the loss of hidden states: vocabularies, hidden sizes, options, layouts, and budgets of a few rows."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops._cases import Benchmark, Call, Case, Workload, draw, layouts, one_of, register
from kdkernels.ops.linear_distillation import PASSES, linear_distillation_loss

FUNCTION = "linear_distillation_loss"
HIDDEN = 1024  # of the benchmark


def _divergence(kind: str, log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    if kind == "forward_kl":
        return F.kl_div(log_q, log_p.exp(), reduction="none").sum(-1)
    if kind == "reverse_kl":
        return F.kl_div(log_p, log_q.exp(), reduction="none").sum(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    parts = (F.kl_div(log_m, side, reduction="none", log_target=True).sum(-1) for side in (log_p, log_q))
    return beta * next(parts) + (1 - beta) * next(parts)


def eager(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    target_linear_weight: Tensor | None = None,
    labels: Tensor | None = None,
    linear_bias: Tensor | None = None,
    target_linear_bias: Tensor | None = None,
    *,
    temperature: float = 4.0,
    kd_weight: float = 0.9,
    ce_weight: float = 0.1,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    target_type: str = "logits",
    label_smoothing: float = 0.0,
    position_weight: Tensor | None = None,
    reduction: str = "mean",
    memory_budget: int | None = None,
) -> Tensor:
    """Return the loss as users write it, with whole logits; label -100 is ignored."""

    def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = logit_scale * F.linear(hidden, weight, bias)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    logits = logits_of(input, linear_weight, linear_bias)
    loss = logits.new_zeros(logits.shape[:-1])
    if target is not None:
        if target_linear_weight is not None:
            target = logits_of(target, target_linear_weight, target_linear_bias)
        log_p = F.log_softmax(target / temperature, -1) if target_type == "logits" else target
        log_q = F.log_softmax(logits / temperature, -1)
        loss = kd_weight * temperature**2 * _divergence(divergence, log_q, log_p, beta)
    weight = loss.new_ones(loss.shape) if position_weight is None else position_weight.to(loss.dtype)
    if labels is not None:
        rows, at = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        hard = F.cross_entropy(rows, at, reduction="none", label_smoothing=label_smoothing).view(labels.shape)
        weight = weight * (labels != -100)
        loss = loss + ce_weight * hard
    loss = weight * loss
    if reduction == "none":
        return loss
    if reduction == "mean":
        return loss.sum() / weight.sum()
    return loss.sum() / (input.shape[0] if reduction == "batchmean" else 1)


def ours(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    target_linear_weight: Tensor | None = None,
    labels: Tensor | None = None,
    linear_bias: Tensor | None = None,
    target_linear_bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Call the function with the biases in positions of tensors."""
    return linear_distillation_loss(
        input, linear_weight, target, target_linear_weight, labels, linear_bias=linear_bias,
        target_linear_bias=target_linear_bias, **options,
    )  # fmt: skip


def _case(name: str, samples: tuple[tuple[Any, ...], ...], differentiable: tuple[int, ...], **options: Any) -> Case:
    """Return a case; a sample may have None in the place of a tensor that is left out."""
    places = [i for i, tensor in enumerate(samples[0]) if tensor is not None]

    def placed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        arguments: list[Tensor | None] = [None] * 7
        for place, tensor in zip(places, tensors, strict=True):
            arguments[place] = tensor
        return function(*arguments, **options)

    return Case(
        name, partial(placed, ours), partial(placed, eager),
        tuple(tuple(tensor for tensor in sample if tensor is not None) for sample in samples),
        tuple(places.index(place) for place in differentiable),
    )  # fmt: skip


def cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yield the cases: every option at least once, most with a budget of a few rows."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(draw, dtype=dtype, device=device, generator=generator)

    def sides(shape: tuple[int, ...], classes: int, hidden: int = 24) -> list[Tensor]:
        student, teacher = normal(shape) / shape[-1] ** 0.5, normal((*shape[:-1], hidden)) / hidden**0.5
        return [student, 2 * normal((classes, shape[-1])), teacher, 2 * normal((classes, hidden))]

    def labels(shape: tuple[int, ...], classes: int) -> Tensor:
        drawn = torch.randint(0, classes, shape[:-1], generator=generator)
        return drawn.masked_fill(torch.rand(drawn.shape, generator=generator) < 0.3, -100).to(device)

    def budget(classes: int, rows: int) -> int:
        return 40 * classes * rows * (8 if dtype == torch.float64 else 4) + 40000

    both, student = (0, 1, 2, 3), (0, 1)
    for classes in (2, 10, 257, 5000):
        shape = (33, 16)
        samples = tuple((*sides(shape, classes), labels(shape, classes)) for _ in range(2))
        for kind in ("forward_kl", "reverse_kl", "js"):
            yield _case(f"{kind}, {classes} classes", samples, student, divergence=kind, kd_weight=0.5, ce_weight=0.5,
                        memory_budget=budget(classes, 3))  # fmt: skip
    maps = (2, 9, 20)
    every = [(*sides(maps, 60), labels(maps, 60), normal((60,)), normal((60,))) for _ in range(2)]
    for reduction in ("none", "sum", "batchmean"):
        yield _case(f"biases, {reduction}", tuple(every), (0, 1, 2, 3, 5, 6), reduction=reduction, kd_weight=0.9,
                    ce_weight=0.1, temperature=2.0, memory_budget=budget(60, 2))  # fmt: skip
    yield _case("softcap and scale", tuple(every), (0, 1, 2, 3, 5, 6), logit_scale=1.5, softcap=2.0, kd_weight=0.5,
                ce_weight=0.5, memory_budget=budget(60, 2))  # fmt: skip
    without = tuple((*sides((40, 12), 100),) for _ in range(2))
    yield _case("no labels", without, both, kd_weight=1.0, temperature=1.0)
    yield _case("no teacher", tuple((h, w, None, None, labels((40, 12), 100)) for h, w, _, _ in without), student,
                kd_weight=0.0, ce_weight=1.0)  # fmt: skip
    given = tuple((h, w, 2 * normal((40, 100)), None) for h, w, _, _ in without)
    yield _case("teacher's logits", given, (0, 1, 2), kd_weight=1.0, memory_budget=budget(100, 4))
    weight = (torch.rand((40,), generator=generator) + 0.1).to(device)
    yield _case("weights of positions", without, both, kd_weight=1.0, position_weight=weight)
    for layout in ("transposed", "sliced", "part", "offset"):
        h, w, t, v = sides((4, 6, 8), 30)
        sample = (layouts(h)[layout], layouts(w)["sliced"], layouts(t)[layout], layouts(v)["transposed"])
        yield _case(f"{layout} hidden states", (sample,), both, kd_weight=1.0, memory_budget=budget(30, 5))


def _workload_options(variant: str) -> dict[str, Any]:
    weights = (
        {"kd_weight": 0.0, "ce_weight": 1.0} if variant == "cross-entropy" else {"kd_weight": 0.9, "ce_weight": 0.1}
    )
    return {"temperature": 2.0, **weights}


def workload(function: str, shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Workload:
    """Return a row of the benchmark: the gradients of hidden states and weight, for logits of a shape (rows, classes).

    Hidden states have 1024 channels, the budget is 64 MB. The variant ``"cross-entropy"`` has no teacher.
    """
    one_of(variant, ("", "cross-entropy"))
    if len(shape) != 2:
        raise ValueError(f"shape must be that of the logits, (rows, classes), got {list(shape)}")
    rows, classes = shape
    options = _workload_options(variant)

    def split(loss: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        *sides, labels = tensors
        if variant:
            return loss(sides[0], sides[1], None, None, labels, **options)
        return loss(*sides, labels, **options)

    def make(device: str) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)

        def layer() -> tuple[Tensor, Tensor]:
            hidden = torch.randn((rows, HIDDEN), generator=generator, device=device, dtype=dtype)
            weight = torch.randn((classes, HIDDEN), generator=generator, device=device, dtype=dtype)
            return hidden, weight.mul_(3 / HIDDEN**0.5)

        student, weight = layer()
        labels = torch.randint(0, classes, (rows,), generator=generator, device=device)
        teacher = () if variant else layer()
        return student, weight.requires_grad_(), *teacher, labels

    return Workload(
        "linear_distillation", function, shape, dtype, variant,
        partial(split, partial(linear_distillation_loss, memory_budget=64_000_000)), partial(split, eager), make,
        {"cpu": PASSES, "cuda": PASSES},
    )  # fmt: skip


def calls() -> list[Call]:
    """Return small calls in float64."""
    f64 = torch.float64
    h, w, t, v = (torch.randn(*shape, dtype=f64) for shape in ((5, 3), (6, 3), (5, 4), (6, 4)))
    labels = torch.tensor([5, -100, 0, 2, 2])
    biases = torch.randn(6, dtype=f64), torch.randn(6, dtype=f64)
    maps = torch.randn(2, 3, 3, dtype=f64), torch.randn(2, 3, 4, dtype=f64)
    few = 6 * 8 * 60 + 1000  # bytes for about two rows
    capped: dict[str, Any] = {"softcap": 2.0, "logit_scale": 1.5, "memory_budget": few}
    no_teacher: dict[str, Any] = {"kd_weight": 0.0, "ce_weight": 1.0, "label_smoothing": 0.1}
    return [
        Call("labels", partial(ours, memory_budget=few), (h, w, t, v, labels), (0, 1)),
        Call("every gradient", partial(ours, **capped), (h, w, t, v, labels, *biases), (0, 1, 2, 3, 5, 6)),
        Call("rows", partial(ours, reduction="none", divergence="js"), (maps[0], w, maps[1], v), (0, 1, 2, 3)),
        Call("logits of the teacher", partial(ours, divergence="reverse_kl"), (h, w, torch.randn(5, 6, dtype=f64)),
             (0, 1, 2)),
        Call("no teacher", partial(_no_teacher, **no_teacher), (h, w, labels), (0, 1)),
    ]  # fmt: skip


def _no_teacher(input: Tensor, linear_weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return linear_distillation_loss(input, linear_weight, None, None, labels, **options)


# Both give whole logits to PyTorch's losses; their products take most of the time, which sets the bound.
GOALS = {"faster than eager": 1.0, "faster than compile": 1.0}
register(
    __package__,
    accuracy=cases,
    calls=calls,
    functions=(FUNCTION,),
    workload=workload,
    benchmarks=(
        Benchmark(FUNCTION, (1024, 32000), quick=True, goals=GOALS),
        Benchmark(FUNCTION, (1024, 32000), variant="cross-entropy", goals={"faster than eager": 1.0}),
        Benchmark(FUNCTION, (4096, 32000), goals=GOALS),
        Benchmark(FUNCTION, (512, 128256), goals=GOALS),
    ),
)
