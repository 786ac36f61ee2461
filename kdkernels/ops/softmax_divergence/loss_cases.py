"""Cases of the losses with options: targets of each kind, weights, smoothed and soft labels, joint dimensions."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops._cases import Call, Case, draw
from kdkernels.ops.softmax_divergence import distillation_loss, js_div_with_logits, kl_div_with_logits


def eager_general_loss(
    input: Tensor,
    target: Tensor,
    labels: Tensor | None = None,
    *,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    target_type: str = "logits",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    position_weight: Tensor | None = None,
    ignore_index_in: str = "both",
    dim: int = -1,
    reduction: str = "mean",
) -> Tensor:
    """Return kd_weight * divergence + ce_weight * cross-entropy as users write it; label -100 is ignored."""
    log_q = F.log_softmax(input / temperature, dim)
    if target_type == "logits":
        log_p = F.log_softmax(target / temperature, dim)
    else:
        log_p = target if target_type == "log_probs" else target.log()
    if divergence == "js":
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        kd = beta * F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(dim)
        kd = kd + (1 - beta) * F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(dim)
    elif divergence == "reverse_kl":
        kd = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim)
    elif target_type == "probs":
        kd = F.kl_div(log_q, target, reduction="none").sum(dim)
    else:
        kd = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim)
    weight = torch.ones_like(kd) if position_weight is None else position_weight.to(kd)
    kept = torch.ones_like(weight) if labels is None or labels.is_floating_point() else (labels != -100).to(weight)
    kd_counts = weight * kept if ignore_index_in == "both" else weight
    ce, ce_counts, by_label = torch.zeros_like(kd), weight * kept, weight * kept
    if labels is not None:
        moved = input.movedim(dim, 1)
        targets = labels.movedim(dim, 1) if labels.is_floating_point() else labels
        class_weight = None if class_weight is None else class_weight.to(input)
        ce = F.cross_entropy(moved, targets, class_weight, reduction="none", label_smoothing=label_smoothing)
        if class_weight is not None and not labels.is_floating_point():
            by_label = ce_counts * class_weight[labels.clamp(min=0)]
    terms = (kd_weight * kd_counts * kd, ce_weight * ce_counts * ce)
    if reduction == "none":
        return terms[0] + terms[1]
    of_kd, of_ce = {
        "mean": (kd_counts.sum(), by_label.sum()),
        "sum": (torch.ones(()), torch.ones(())),
        "batchmean": (torch.tensor(input.shape[0]),) * 2,
    }[reduction]
    return terms[0].sum() / of_kd + (terms[1].sum() / of_ce if labels is not None else 0.0)


OPTIONS: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
    ("mask", (9, 33), {"mask": True}),
    ("weights", (9, 100), {"weights": True, "reduction": "sum"}),
    ("weights of maps", (2, 19, 4, 5), {"weights": True, "dim": 1, "reduction": "batchmean"}),
    ("log-probabilities", (9, 70), {"target_type": "log_probs"}),
    ("log-probabilities at temperature 3, reverse", (9, 40), {"target_type": "log_probs", "divergence": "reverse_kl"}),
    ("probabilities, js", (9, 21), {"target_type": "probs", "divergence": "js", "beta": 0.3}),
    ("probabilities of maps", (2, 19, 3, 5), {"target_type": "probs", "dim": 1, "reduction": "none"}),
    ("probabilities of any sum", (9, 50), {"target_type": "probs", "times": 1.7}),
    ("smoothed labels", (9, 100), {"labels": True, "label_smoothing": 0.1}),
    ("smoothed labels of maps", (2, 19, 4, 3), {"labels": True, "label_smoothing": 0.1, "dim": 1}),
    ("class weights", (9, 30), {"labels": True, "class_weights": True}),
    ("everything", (9, 45), {"labels": True, "class_weights": True, "label_smoothing": 0.2, "weights": True,
                             "target_type": "log_probs", "ignore_index_in": "cross_entropy"}),
    ("labels ignored by the cross-entropy", (9, 12), {"labels": True, "ignore_index_in": "cross_entropy"}),
    ("soft labels", (9, 35), {"soft": True, "reduction": "none"}),
    ("smoothed soft labels, weights", (9, 60), {"soft": True, "label_smoothing": 0.3, "class_weights": True,
                                                "weights": True}),
    ("soft labels of maps", (2, 7, 3, 3), {"soft": True, "dim": 1}),
)  # fmt: skip


def cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yield the cases of the options."""
    generator = torch.Generator().manual_seed(1)
    normal = partial(draw, dtype=dtype, device=device, generator=generator)

    def uniform(shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float32).to(device)

    for name, shape, given in OPTIONS:
        options = {"temperature": 3.0 if "3" in name else 1.5, "dim": -1, **given}
        dim = options["dim"]
        positions = tuple(size for i, size in enumerate(shape) if i != dim % len(shape))
        if options.pop("mask", False):
            options["position_weight"] = uniform(positions) > 0.3
        if options.pop("weights", False):
            options["position_weight"] = uniform(positions)
        if options.pop("class_weights", False):
            options["class_weight"] = uniform((shape[dim],))
        soft, hard, times = options.pop("soft", False), options.pop("labels", False), options.pop("times", 1.0)
        samples = []
        for _ in range(3):
            student, teacher = normal(shape) * 2, normal(shape) * 2
            if options.get("target_type") == "probs":
                teacher = (teacher.softmax(dim) * times).to(dtype)
            elif options.get("target_type") == "log_probs":
                teacher = teacher.log_softmax(dim)
            sample = [student, teacher]
            if soft:
                sample.append(normal(shape).softmax(dim))
            elif hard:
                labels = torch.randint(0, shape[dim], positions, generator=generator)
                sample.append(labels.masked_fill(torch.rand(positions, generator=generator) < 0.3, -100).to(device))
            samples.append(tuple(sample))
        kd, ce = (0.7, 0.4) if soft or hard else (1.0, 0.0)
        eager = partial(eager_general_loss, **options, kd_weight=kd * options["temperature"] ** 2, ce_weight=ce)
        weights: dict[str, Any] = {"kd_weight": kd, "ce_weight": ce} if soft or hard else {"kd_weight": kd}
        # What 16 bits round off a sum of probabilities is no longer 1 where the truth is computed in 64 bits.
        normalized = options.get("divergence", "forward_kl") != "forward_kl" and dtype.itemsize == 2
        if normalized and options.get("target_type", "logits") != "logits":
            continue
        both = (0, 1, 2) if soft else (0, 1)
        ours = partial(distillation_loss, **options, **weights)
        yield Case(name, ours, eager, tuple(samples), both)


def calls() -> list[Call]:
    """Return small calls in float64."""
    s, t = (torch.randn(3, 7, dtype=torch.float64) for _ in range(2))
    labels, mask = torch.tensor([6, -100, 0]), torch.tensor([True, True, False])
    weight = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    maps = [torch.randn(2, 3, 2, 2, dtype=torch.float64) for _ in "st"]
    both = (0, 1)
    return [
        Call("kl_div, weighted", _weighted_kl_div, (s, t, weight), both),
        Call("kl_div of log-probabilities", partial(kl_div_with_logits, target_type="log_probs", temperature=2.0),
             (s, t.log_softmax(1)), both),
        Call("js_div of probabilities", _masked_js_div_of_softmax, (s, t, mask), both),
        Call("kl_div over a map", partial(kl_div_with_logits, dim=(2, 3), reduction="none"), tuple(maps), both),
        Call("kl_div, standardized", partial(kl_div_with_logits, standardize=True), (s, t), both),
        Call("distillation, smoothed", _smoothed_distillation, (s, t, labels, t[0].exp())),
        Call("distillation of soft labels", partial(distillation_loss, label_smoothing=0.1, reduction="none"),
             (s, t, t.softmax(1)), (0, 1, 2)),
    ]  # fmt: skip


def _weighted_kl_div(input: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return kl_div_with_logits(input, target, temperature=2.0, position_weight=weight)


def _masked_js_div_of_softmax(input: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Take probabilities that still sum to 1 when a numerical derivative changes the logits."""
    return js_div_with_logits(input, target.softmax(1), target_type="probs", position_weight=mask)


def _smoothed_distillation(input: Tensor, target: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return distillation_loss(
        input, target, labels, label_smoothing=0.1, class_weight=weight, ignore_index_in="cross_entropy"
    )
