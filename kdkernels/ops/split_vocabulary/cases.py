"""Cases of split vocabularies: all ranks in one process, against whole logits."""

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops._cases import Call, Case, draw, layouts, register
from kdkernels.ops.split_vocabulary import (
    split_vocabulary_loss,
    split_vocabulary_mixture,
    split_vocabulary_statistics,
)


def losses_of_ranks(
    input: Tensor,
    target: Tensor,
    labels: Tensor | None = None,
    *,
    ranks: int = 2,
    divergence: str = "forward_kl",
    temperature: float = 4.0,
    beta: float = 0.5,
    ignore_index: int = -100,
    **options: Any,
) -> list[Tensor]:
    """Return the loss of each rank; all are equal, and each has the gradient of the rank's shard."""
    ends = [k * input.shape[-1] // ranks for k in range(ranks + 1)]
    shards = [(a, input.narrow(-1, a, b - a), target.narrow(-1, a, b - a)) for a, b in pairwise(ends)]
    shared: dict[str, Any] = {"temperature": temperature, "divergence": divergence, "ignore_index": ignore_index}
    every = torch.stack(
        [split_vocabulary_statistics(s, t, labels, first_class=first, **shared) for first, s, t in shards]
    )
    mixture = None
    if divergence == "js":
        terms = [split_vocabulary_mixture(s, t, every, temperature=temperature, beta=beta) for _, s, t in shards]
        mixture = torch.stack(terms).sum(0)
    return [
        split_vocabulary_loss(s, t, every, labels, first_class=a, mixture=mixture, beta=beta, **shared, **options)
        for a, s, t in shards
    ]


def of_all_ranks(*tensors: Tensor, **options: Any) -> Tensor:
    """Return the loss that every rank has, which must be finite, with the gradients of all shards."""
    first, *others = losses_of_ranks(*tensors, **options)
    return first + sum(loss - loss.detach() for loss in others)


def eager(
    input: Tensor,
    target: Tensor,
    labels: Tensor | None = None,
    *,
    ranks: int = 1,
    divergence: str = "forward_kl",
    temperature: float = 4.0,
    beta: float = 0.5,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Return the loss of whole logits as users write it; label -100 is ignored."""
    log_q, log_p = F.log_softmax(input / temperature, -1), F.log_softmax(target / temperature, -1)
    if divergence == "forward_kl":
        value = F.kl_div(log_q, log_p.exp(), reduction="none").sum(-1)
    elif divergence == "reverse_kl":
        value = F.kl_div(log_p, log_q.exp(), reduction="none").sum(-1)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        of_p, of_q = (F.kl_div(log_m, side, reduction="none", log_target=True).sum(-1) for side in (log_p, log_q))
        value = beta * of_p + (1 - beta) * of_q
    loss = kd_weight * temperature**2 * value
    count: Tensor | int = loss.numel()
    if labels is not None:
        hard = F.cross_entropy(input.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
        loss = torch.where(labels == -100, 0.0, loss + ce_weight * hard)
        count = (labels != -100).sum()
    return loss if reduction == "none" else loss.sum() / {"mean": count, "sum": 1}[reduction]


def cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yield the cases: every divergence with one, two and five ranks, labels, layouts, and close sides."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(draw, dtype=dtype, device=device, generator=generator)
    both = (0, 1)

    def pairs(shape: tuple[int, ...], scale: float = 2.0) -> tuple[tuple[Tensor, ...], ...]:
        return tuple((normal(shape) * scale, normal(shape) * scale) for _ in range(3))

    for divergence in ("forward_kl", "reverse_kl", "js"):
        for ranks, temperature in ((1, 1.0), (2, 4.0), (5, 0.5)):
            options: dict[str, Any] = {"ranks": ranks, "divergence": divergence, "temperature": temperature}
            yield Case(f"{divergence}, {ranks} ranks", partial(of_all_ranks, **options), partial(eager, **options),
                       pairs((7, 203)), both)  # fmt: skip
    labels = torch.randint(0, 60, (3, 4), generator=generator)
    labels[0, 1] = -100
    samples = tuple((*pair, labels.to(device)) for pair in pairs((3, 4, 60)))
    for reduction in ("mean", "sum", "none"):
        options = {"ranks": 3, "reduction": reduction, "kd_weight": 0.5, "ce_weight": 0.5}
        yield Case(f"labels, {reduction}", partial(of_all_ranks, **options), partial(eager, **options), samples, both)
    close = tuple((s, s + 0.01 * t) for s, t in pairs((6, 300)))
    yield Case("sides that are close", of_all_ranks, eager, close, both)
    large = pairs((6, 40), 1e3)
    # Eager's gradient of a teacher whose probabilities underflow is NaN.
    yield Case("large logits", of_all_ranks, eager, large)
    for layout in ("transposed", "sliced", "part"):
        strided = tuple((layouts(s)[layout], layouts(t)[layout]) for s, t in pairs((4, 5, 30)))
        yield Case(layout, of_all_ranks, eager, strided, both)


def calls() -> list[Call]:
    """Return small calls in float64."""
    s, t = (torch.randn(4, 9, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([8, -100, 0, 4])
    return [
        Call("forward_kl", of_all_ranks, (s, t), (0, 1)),
        Call("js of rows", partial(of_all_ranks, divergence="js", beta=0.3, reduction="none"), (s, t), (0, 1)),
        Call("labels", partial(of_all_ranks, divergence="reverse_kl", ranks=3), (s, t, labels), (0, 1)),
    ]


register(__package__, accuracy=cases, calls=calls)
