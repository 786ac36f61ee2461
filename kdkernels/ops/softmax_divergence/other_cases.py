"""Cases of soft cross-entropy, skewed divergences, total variation, entropy, decoupled and normalized distillation."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops._cases import Benchmark, Call, Case, Workload, draw, layouts, one_of
from kdkernels.ops.softmax_divergence import (
    decoupled_distillation_loss,
    entropy_with_logits,
    normalized_distillation_loss,
    skew_kl_div_with_logits,
    soft_cross_entropy,
    total_variation_distance_with_logits,
)
from kdkernels.ops.softmax_divergence.saved import passes


def _reduced(loss: Tensor, weight: Tensor | None, reduction: str, batch: int) -> Tensor:
    weight = torch.ones_like(loss) if weight is None else weight.to(loss)
    loss = loss * weight
    if reduction == "none":
        return loss
    divisors: dict[str, Tensor | int] = {"mean": weight.sum(), "sum": 1, "batchmean": batch}
    return loss.sum() / divisors[reduction]


def eager_pair(
    input: Tensor,
    target: Tensor,
    *,
    loss: str,
    temperature: float = 1.0,
    alpha: float = 0.1,
    dim: int = -1,
    target_type: str = "logits",
    position_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return a loss of both sides as users write it."""
    log_q = F.log_softmax(input / temperature, dim)
    if target_type == "logits":
        log_p = F.log_softmax(target / temperature, dim)
        p = F.softmax(target / temperature, dim)
    else:
        p = target.exp() if target_type == "log_probs" else target
        log_p = target if target_type == "log_probs" else target.log()
    q = F.softmax(input / temperature, dim)
    if loss == "soft_cross_entropy":
        value = -(p * log_q).sum(dim)
    elif loss == "skew_kl":
        value = (p * (log_p - (alpha * p + (1 - alpha) * q).log())).sum(dim)
    elif loss == "reverse_skew_kl":
        value = (q * (log_q - (alpha * q + (1 - alpha) * p).log())).sum(dim)
    elif loss == "entropy":
        value = -(q * log_q).sum(dim)
    else:
        value = (p - q).abs().sum(dim) / 2
    return _reduced(value, position_weight, reduction, input.shape[0])


def eager_entropy(input: Tensor, **options: Any) -> Tensor:
    """Return the entropy as users write it."""
    return eager_pair(input, input, loss="entropy", **options)


def _rows(input: Tensor, labels: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the logits with the classes last, and 1 at the class of the label."""
    logits = input.movedim(dim, -1)
    return logits, torch.zeros_like(logits).scatter(-1, labels.clamp(min=0).unsqueeze(-1), 1.0)


def eager_decoupled(
    input: Tensor,
    target: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    dim: int = -1,
    position_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return decoupled distillation as it was published: logits of the label are lowered by 1000."""
    student, is_label = _rows(input / temperature, labels, dim)
    teacher, _ = _rows(target / temperature, labels, dim)
    q, p = ((F.softmax(z, -1) * is_label).sum(-1) for z in (student, teacher))
    of_label = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    log_q = F.log_softmax(student - 1000.0 * is_label, -1)
    others = F.kl_div(log_q, F.softmax(teacher - 1000.0 * is_label, -1), reduction="none").sum(-1)
    weight = (labels != -100).to(input) * (1.0 if position_weight is None else position_weight)
    return _reduced(temperature**2 * (alpha * of_label + beta * others), weight, reduction, input.shape[0])


def eager_normalized(
    input: Tensor,
    target: Tensor,
    labels: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    dim: int = -1,
    position_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return normalized distillation as users write it for torch.compile: logits of the label are lowered by 1000."""
    student, is_label = _rows(input, labels, dim)
    teacher, _ = _rows(target, labels, dim)
    log_q = (F.log_softmax(student, -1) * is_label).sum(-1)
    of_label = -(F.softmax(teacher, -1) * is_label).sum(-1) * log_q
    q, p = (z / temperature - 1000.0 * is_label for z in (student, teacher))
    others = -(F.softmax(p, -1) * F.log_softmax(q, -1)).sum(-1)
    weight = (labels != -100).to(input) * (1.0 if position_weight is None else position_weight)
    return _reduced(of_label + gamma * temperature**2 * others, weight, reduction, input.shape[0])


# Function, name of the eager loss, options of both
PAIRS: tuple[tuple[Callable[..., Tensor], str, dict[str, Any]], ...] = (
    (soft_cross_entropy, "soft_cross_entropy", {}),
    (skew_kl_div_with_logits, "skew_kl", {"alpha": 0.1}),
    (skew_kl_div_with_logits, "skew_kl", {"alpha": 0.8}),
    (skew_kl_div_with_logits, "reverse_skew_kl", {"alpha": 0.1}),
    (skew_kl_div_with_logits, "reverse_skew_kl", {"alpha": 0.5}),
    (total_variation_distance_with_logits, "total_variation_distance", {}),
)
DECOUPLED: tuple[tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]], ...] = (
    (decoupled_distillation_loss, eager_decoupled, {"alpha": 1.0, "beta": 8.0}),
    (decoupled_distillation_loss, eager_decoupled, {"alpha": 1.0, "beta": 0.0}),
    (normalized_distillation_loss, eager_normalized, {"gamma": 1.5}),
)
SHAPES: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((16, 33), {"temperature": 0.5}),
    ((9, 1001), {"reduction": "sum"}),
    ((8, 12), {"temperature": 4.0, "reduction": "none"}),
    ((2, 19, 5, 7), {"dim": 1, "temperature": 2.0, "reduction": "batchmean"}),
)
both = (0, 1)


def _bound(function: Callable[..., Tensor], loss: str, options: dict[str, Any]) -> Callable[..., Tensor]:
    reverse = {"reverse": True} if loss == "reverse_skew_kl" else {}
    return partial(function, **options, **reverse)


def cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yield the cases."""
    generator = torch.Generator().manual_seed(2)
    normal = partial(draw, dtype=dtype, device=device, generator=generator)

    def pairs(shape: tuple[int, ...], scale: float = 2.0, count: int = 3) -> list[tuple[Tensor, Tensor]]:
        return [(normal(shape) * scale, normal(shape) * scale) for _ in range(count)]

    def labels_of(logits: Tensor, dim: int = -1) -> Tensor:
        positions = [size for i, size in enumerate(logits.shape) if i != dim % logits.dim()]
        labels = torch.randint(0, logits.shape[dim], positions, generator=generator)
        return labels.masked_fill(torch.rand(positions, generator=generator) < 0.2, -100).to(device)

    for shape, options in SHAPES:
        for function, loss, own in PAIRS:
            ours, eager = _bound(function, loss, {**options, **own}), partial(eager_pair, loss=loss, **options, **own)
            yield Case(f"{loss} {own} of {shape}", ours, eager, tuple(pairs(shape)), both)
        students = tuple((s,) for s, _ in pairs(shape))
        entropy, eager = partial(entropy_with_logits, **options), partial(eager_entropy, **options)
        yield Case(f"entropy of {shape}", entropy, eager, students)
        dim = options.get("dim", -1)
        for function, formula, own in DECOUPLED:
            labelled = tuple((s, t, labels_of(s, dim)) for s, t in pairs(shape))
            name = f"{formula.__name__} {own} of {shape}"
            ours, eager = partial(function, **options, **own), partial(formula, **options, **own)
            yield Case(name, ours, eager, labelled, both)

    weight = torch.rand(9, generator=generator).to(device)
    for i, (function, loss, own) in enumerate(PAIRS):
        kind = ("log_probs", "probs")[i % 2]
        # What 16 bits round off a sum of probabilities is no longer 1 where the truth is computed in 64 bits.
        if dtype.itemsize == 2 and loss != "soft_cross_entropy":
            continue
        options = {**own, "target_type": kind, "position_weight": weight, "temperature": 1.5}
        samples = tuple((s, (t.log_softmax(1) if kind == "log_probs" else t.softmax(1))) for s, t in pairs((9, 40)))
        eager = partial(eager_pair, loss=loss, **options)
        yield Case(f"{loss} {own} of {kind}", _bound(function, loss, options), eager, samples, both)
    for function, loss, own in PAIRS:
        ours, eager = _bound(function, loss, own), partial(eager_pair, loss=loss, **own)
        samples = tuple((s, s + 0.01 * t) for s, t in pairs((8, 300)))
        yield Case(f"{loss} {own}, teacher close to student", ours, eager, samples, both)
        samples = tuple((s, t + 60 * F.one_hot(t.argmax(1), t.shape[1])) for s, t in pairs((8, 30)))
        yield Case(f"{loss} {own}, one-hot teacher", ours, eager, samples, both)
        samples = tuple((layouts(s)["transposed"], layouts(t)["sliced"]) for s, t in pairs((40, 50)))
        yield Case(f"{loss} {own}, strides", ours, eager, samples, both)
    for function, formula, own in DECOUPLED:
        options = {**own, "position_weight": weight, "temperature": 3.0}
        ours, eager = partial(function, **options), partial(formula, **options)
        labelled = tuple((s, t, labels_of(s)) for s, t in pairs((9, 100)))
        yield Case(f"{formula.__name__} {own}, weights", ours, eager, labelled, both)
        ours, eager = partial(function, **own), partial(formula, **own)
        labelled = tuple((s, s + 0.01 * t, labels_of(s)) for s, t in pairs((8, 300)))
        yield Case(f"{formula.__name__} {own}, teacher close to student", ours, eager, labelled, both)
        labelled = tuple((s, t + 5 * F.one_hot(t.argmax(1), 50), s.argmax(1)) for s, t in pairs((8, 50)))
        yield Case(f"{formula.__name__} {own}, likeliest class", ours, eager, labelled, both)
        labelled = tuple((layouts(s)["transposed"], layouts(t)["part"], labels_of(s)) for s, t in pairs((40, 50)))
        yield Case(f"{formula.__name__} {own}, strides", ours, eager, labelled, both)


def calls() -> list[Call]:
    """Return small calls in float64."""
    s, t = (torch.randn(3, 7, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([6, -100, 0])
    maps = tuple(torch.randn(2, 3, 2, 2, dtype=torch.float64) for _ in "st")
    weight = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    return [
        Call("soft cross-entropy", partial(soft_cross_entropy, temperature=2.0), (s, t), both),
        Call("skew_kl", _weighted_skew_kl, (s, t, weight), both),
        Call("reverse skew_kl of maps", partial(skew_kl_div_with_logits, reverse=True, dim=1), maps, both),
        Call("total variation distance", partial(total_variation_distance_with_logits, reduction="none"), (s, t), both),
        Call("entropy", partial(entropy_with_logits, temperature=2.0), (s,)),
        Call("decoupled", decoupled_distillation_loss, (s, t, labels), both),
        Call("normalized", partial(normalized_distillation_loss, temperature=2.0), (s, t, labels), both),
    ]


def _weighted_skew_kl(input: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return skew_kl_div_with_logits(input, target, alpha=0.3, position_weight=weight)


DKD, NKD = "decoupled_distillation_loss", "normalized_distillation_loss"
SKEW, TVD, SOFT = "skew_kl_div_with_logits", "total_variation_distance_with_logits", "soft_cross_entropy"
ENTROPY = "entropy_with_logits"
FUNCTIONS = (DKD, ENTROPY, NKD, SKEW, SOFT, TVD)
# Goals for forward and backward with two CPU threads, against the default mode of torch.compile.
BENCHMARKS = (
    *(Benchmark(function, (256, 1000), quick=True, compared=True, goals={"faster than compile": 2.5})
      for function in (DKD, NKD)),
    *(Benchmark(function, (8192, 100)) for function in (DKD, NKD)),
    *(Benchmark(function, (256, 32000)) for function in FUNCTIONS),
    Benchmark(SKEW, (256, 32000), torch.bfloat16),
)  # fmt: skip


def workload(function: str, shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Workload:
    """Return a row of the benchmark: a loss with the gradient of the student's logits, at temperature 2.

    The classes are the last dimension, or the second with the variant ``"dim=1"``.
    """
    dim = {"": -1, "dim=1": 1}[one_of(variant, ("", "dim=1"))]
    if len(shape) < 2:
        raise ValueError(f"shape must have a dimension of positions and one of classes, got {list(shape)}")
    options: dict[str, Any] = {"temperature": 2.0, "dim": dim}
    of_pair = {SKEW: "skew_kl", TVD: "total_variation_distance", SOFT: "soft_cross_entropy"}
    functions: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        DKD: (decoupled_distillation_loss, eager_decoupled),
        NKD: (normalized_distillation_loss, eager_normalized),
        ENTROPY: (entropy_with_logits, eager_entropy),
        SKEW: (skew_kl_div_with_logits, eager_pair),
        TVD: (total_variation_distance_with_logits, eager_pair),
        SOFT: (soft_cross_entropy, eager_pair),
    }
    ours, eager = functions[function]
    named = {"loss": of_pair[function]} if function in of_pair else {}

    def make(device: str) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)
        sides = 1 if function == ENTROPY else 2
        logits = [torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(3) for _ in range(sides)]
        if function not in (DKD, NKD):
            return tuple(logits)
        positions = [size for i, size in enumerate(shape) if i != dim % len(shape)]
        return (*logits, torch.randint(0, shape[dim], positions, generator=generator, device=device))

    read = {device: passes(device, shape, dtype) for device in ("cpu", "cuda")}
    if function == ENTROPY:  # which reads one side
        read = {device: (forward - 1, max(backward - 1, 0)) for device, (forward, backward) in read.items()}
    return Workload(
        "softmax_divergence", function, shape, dtype, variant, partial(ours, **options),
        partial(eager, **options, **named), make, read, _scaled if dtype == torch.float16 else None,
    )  # fmt: skip


def _scaled(losses: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The usual scale of a loss in fp16, without which its gradient underflows."""
    return tuple(torch.full_like(loss, 1024.0) for loss in losses)
