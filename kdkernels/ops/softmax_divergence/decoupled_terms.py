"""Losses that treat the class of the label apart from the others: part of the reference.

Decoupled distillation (Zhao et al., arXiv 2203.08679) and normalized distillation (Yang et al., arXiv 2303.13005).
Everything about the label comes from the log-odds a = ln((1 - q_y) / q_y) = lse of the other classes - z_y, so that no
logarithm of a rounded 1 - q_y is taken, however sure of the label a side is.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kdkernels.ops.softmax_divergence import other_terms, reference
from kdkernels.ops.softmax_divergence.terms import Pair, divided, relative

KINDS = ("decoupled", "normalized")


class _Side:
    """The log-odds against the label of one side, and the distribution over the other classes.

    Attributes:
        odds: ln((1 - q_y) / q_y) of each position.
        log_others: Log-probabilities of the other classes among themselves, -inf at the label.
        empty: Whether no other class has a finite logit.

    """

    def __init__(self, logits: Tensor, is_label: Tensor, at: Tensor, dim: int) -> None:
        others = torch.where(is_label, -math.inf, logits)
        empty = (others == -math.inf).all(dim, keepdim=True)
        others = torch.where(empty, 0.0, others)
        label = logits.gather(dim, at).squeeze(dim)
        self.empty = empty.squeeze(dim)
        self.log_others = torch.where(empty | is_label, -math.inf, torch.log_softmax(others, dim))
        absent = label == -math.inf
        odds = torch.logsumexp(others, dim) - torch.where(absent, 0.0, label)
        odds = torch.where(self.empty, -math.inf, torch.where(absent, math.inf, odds))
        self.odds = torch.where(self.empty & absent, math.nan, odds)


def pair(kind: str, logits: Tensor, target: Tensor, temperature: Tensor, dim: int, index: Tensor) -> Pair:
    """Return the divergence over the other classes, the term of the label, and the derivatives of both."""
    at = index.unsqueeze(dim)
    is_label = torch.zeros_like(logits, dtype=torch.bool).scatter(dim, at, True)
    student, teacher = (_Side(divided(z, temperature), is_label, at, dim) for z in (logits, target))
    log_q, log_p = student.log_others, teacher.log_others
    if kind == "decoupled":
        value = reference.divergence_of("forward_kl", log_q, log_p, temperature, dim)
        by_student, by_teacher = reference.gradients_of("forward_kl", log_q, log_p, temperature, dim)
    else:
        value, by_student, by_teacher = other_terms.terms_of("soft_cross_entropy", log_q, log_p, temperature, dim)
    # Without a teacher's distribution over the others nothing is compared there.
    value = torch.where(teacher.empty, 0.0, value)
    by_student = torch.where(teacher.empty.unsqueeze(dim), 0.0, by_student)
    others = [torch.where(is_label, -math.inf, z) for z in (logits, target)]
    by_temperature = _by_temperature(others, (by_student, by_teacher), value, temperature, dim)
    if kind == "decoupled":
        term, *of_term = _target_class_divergence(student, teacher, is_label, dim)
        label_by_temperature = _by_temperature((logits, target), of_term, term, temperature, dim)
        label_student, label_teacher = (derivative / temperature for derivative in of_term)
    else:
        student, teacher = (_Side(z, is_label, at, dim) for z in (logits, target))
        term, label_student, label_teacher = _weighted_cross_entropy(student, teacher, is_label, dim)
        label_by_temperature = torch.zeros_like(term)
    log_p = torch.log_softmax(divided(target, temperature), dim)
    return Pair(
        value, by_student, by_teacher, temperature, by_temperature, log_p, term, label_student, label_teacher,
        label_by_temperature,
    )  # fmt: skip


def _by_temperature(
    logits: Sequence[Tensor], derivatives: Sequence[Tensor], value: Tensor, temperature: Tensor, dim: int
) -> Tensor:
    """Return the derivative by T of what depends on z / T alone, given T times its derivatives by z."""
    student, teacher = (relative(z, dim) * by_z for z, by_z in zip(logits, derivatives, strict=True))
    return torch.where(value == math.inf, 0.0, -(student + teacher).sum(dim) / temperature**2)


def _term(teacher: Tensor, student: Tensor, difference: Tensor) -> Tensor:
    """Return p ln(p / q) + (q - p) of one of two classes, given the log-odds for it and q - p."""
    p = torch.sigmoid(teacher)
    infinite = (p > 0) & (student == -math.inf)
    both = (p > 0) & (student != -math.inf)
    ratio = logsigmoid(torch.where(both, teacher, 0.0)) - logsigmoid(torch.where(both, student, 0.0))
    return torch.where(infinite, math.inf, p * ratio + difference)


def _target_class_divergence(
    student: _Side, teacher: _Side, is_label: Tensor, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL of (p_y, 1 - p_y) and (q_y, 1 - q_y), and T times its derivatives by the logits."""
    a, b = student.odds, teacher.odds
    known = (a.abs() != math.inf) & (b.abs() != math.inf)
    gap = torch.where(known, torch.where(known, b, 0.0) - torch.where(known, a, 0.0), 0.0)
    # (1 - q_y) - (1 - p_y), as a product so that it is accurate however close the two are
    decreases = torch.sigmoid(-a) * torch.sigmoid(b) * torch.expm1(torch.where(gap > 0, -gap, 0.0))
    increases = torch.sigmoid(a) * torch.sigmoid(-b) * -torch.expm1(torch.where(gap > 0, 0.0, gap))
    by_a = torch.where(gap > 0, decreases, increases)
    by_a = torch.where(known, by_a, torch.sigmoid(a) - torch.sigmoid(b))
    value = _term(-b, -a, -by_a) + _term(b, a, by_a)
    by_b = torch.sigmoid(b) * torch.sigmoid(-b) * gap
    return value, _through_odds(student, by_a, is_label, dim), _through_odds(teacher, by_b, is_label, dim)


def _weighted_cross_entropy(
    student: _Side, teacher: _Side, is_label: Tensor, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return -p_y ln(q_y), and its derivatives by the logits."""
    p, rest = torch.sigmoid(-teacher.odds), torch.sigmoid(teacher.odds)
    absent = student.odds == math.inf
    cross_entropy = -logsigmoid(-torch.where(absent, 0.0, student.odds))
    value = torch.where(p > 0, torch.where(absent, math.inf, p * cross_entropy), p)
    by_a = p * torch.sigmoid(student.odds)
    by_b = torch.where(absent, 0.0, -p * rest * cross_entropy)
    return value, _through_odds(student, by_a, is_label, dim), _through_odds(teacher, by_b, is_label, dim)


def _through_odds(side: _Side, by_odds: Tensor, is_label: Tensor, dim: int) -> Tensor:
    """Return the derivative by the logits of what depends on the log-odds alone."""
    by_odds = by_odds.unsqueeze(dim)
    return torch.where(is_label, -by_odds, side.log_others.exp() * by_odds)
