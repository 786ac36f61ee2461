"""Divergences of a student from teachers of every kind, with their closed-form derivatives: part of the reference."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdkernels.ops.softmax_divergence import other_terms, reference


@dataclass(frozen=True)
class Pair:
    """The divergence of each position, and its derivatives.

    Attributes:
        value: Divergence of each position.
        student: T times the derivative by the student's logits.
        teacher: ``target_temperature`` times the derivative by the target.
        target_temperature: T if the target is logits, else 1.
        by_temperature: Derivative by T.
        log_p: The teacher's log-probabilities.
        label_term: A term of the labels that takes the place of the cross-entropy, if there is one.
        label_student: Its derivative by the student's logits.
        label_teacher: Its derivative by the target.
        label_by_temperature: Its derivative by T.

    """

    value: Tensor
    student: Tensor
    teacher: Tensor
    target_temperature: Tensor
    by_temperature: Tensor
    log_p: Tensor
    label_term: Tensor | None = None
    label_student: Tensor | None = None
    label_teacher: Tensor | None = None
    label_by_temperature: Tensor | None = None


def needs_unit_mass(divergence: str) -> bool:
    """Tell whether a divergence is defined for probabilities that sum to 1 only."""
    return divergence not in ("forward_kl", "soft_cross_entropy", "entropy")


def kernel_differentiates_target(divergence: str) -> bool:
    """Tell whether the kernels compute the gradient of a teacher's logits."""
    skewed = ("skew_kl", "reverse_skew_kl", "total_variation_distance")
    return divergence in ("forward_kl", "reverse_kl", "js", "clamped_js", *skewed)


def _log(probability: Tensor) -> Tensor:
    """Return the logarithm, -inf at 0 without a derivative there, and NaN below."""
    positive = probability != 0
    return torch.where(positive, torch.where(positive, probability, 1.0).log(), -math.inf)


def _zero_if_masked(logits: Tensor) -> Tensor:
    return torch.where(logits == -math.inf, 0.0, logits)


def relative(logits: Tensor, dim: int) -> Tensor:
    """Return logits relative to the maximum of their row, and 0 where they are -inf."""
    largest = logits.detach().amax(dim, keepdim=True)
    return torch.where(logits == -math.inf, 0.0, torch.where(logits == -math.inf, largest, logits) - largest)


def divided(logits: Tensor, temperature: Tensor) -> Tensor:
    """Return the logits divided by the temperature; where they are -inf, they do not depend on it."""
    return torch.where(logits == -math.inf, -math.inf, _zero_if_masked(logits) / temperature)


def _forward_kl(log_q: Tensor, log_p: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL(p || q) of probabilities p with any sum, T times the student's gradient, and the derivative by ln p."""
    p, q = log_p.exp(), log_q.exp()
    unbounded = (p > 0) & (log_q == -math.inf)
    ratio = torch.where((p > 0) & ~unbounded, log_p - log_q, 0.0)
    value = torch.where(unbounded.any(dim), math.inf, (p * ratio).sum(dim))
    return value, p.sum(dim, keepdim=True) * q - p, torch.where(p > 0, p * (ratio + 1), 0.0)


def _one_pair(
    kind: str, logits: Tensor, target: Tensor, target_type: str, temperature: Tensor, beta: Tensor, dim: int,
    *, unit_mass: bool,
) -> Pair:  # fmt: skip
    """Return a divergence and its derivatives; the share of a skewed one lies strictly between 0 and 1.

    With ``unit_mass``, probabilities are normalized.
    """
    log_q = torch.log_softmax(divided(logits, temperature), dim)
    by_target = torch.zeros_like(log_q)
    if target_type == "logits":
        log_p = divided(target, temperature)
    else:
        log_p = target if target_type == "log_probs" else _log(target)
    if target_type == "logits" or unit_mass:
        normalized = torch.log_softmax(log_p, dim)
        if kind in other_terms.KINDS:
            value, student, teacher = other_terms.terms_of(kind, log_q, normalized, beta, dim)
        else:
            value = reference.divergence_of(kind, log_q, normalized, beta, dim)
            student, teacher = reference.gradients_of(kind, log_q, normalized, beta, dim)
    elif kind == "soft_cross_entropy":
        value, student, teacher = other_terms.soft_cross_entropy(log_q, log_p, dim)
    else:
        value, student, teacher = _forward_kl(log_q, log_p, dim)
    if target_type == "logits":
        log_p = normalized
        by_target = relative(target, dim) * teacher
    elif target_type == "probs":
        zero, slope = target == 0, torch.zeros_like(log_q)
        if kind == "soft_cross_entropy":  # which is linear in p
            slope = torch.where(log_q == -math.inf, 0.0, -log_q)
        teacher = torch.where(zero, slope, teacher / torch.where(zero, 1.0, target))
    by_temperature = -(relative(logits, dim) * student + by_target).sum(dim) / temperature**2
    by_temperature = torch.where(value == math.inf, 0.0, by_temperature)
    own = temperature if target_type == "logits" else torch.ones_like(temperature)
    return Pair(value, student, teacher, own, by_temperature, log_p)


def pair(
    kind: str, logits: Tensor, target: Tensor, target_type: str, temperature: Tensor, beta: Tensor, dim: int
) -> Pair:
    """Return the divergence of a kind, and its derivatives."""
    sides = (logits, target, target_type, temperature)
    if kind not in ("skew_kl", "reverse_skew_kl"):
        return _one_pair(kind, *sides, beta, dim, unit_mass=needs_unit_mass(kind))
    at_end = (beta == 0) | (beta == 1)
    inner = torch.where(at_end, 0.5, beta)
    skewed = _one_pair(kind, *sides, inner, dim, unit_mass=True)
    plain = _one_pair("forward_kl" if kind == "skew_kl" else "reverse_kl", *sides, inner, dim, unit_mass=True)

    def at(place: str) -> Tensor:
        end = torch.where(beta == 0, getattr(plain, place), 0.0)
        return torch.where(at_end, end, getattr(skewed, place))

    return replace(skewed, **{place: at(place) for place in ("value", "student", "teacher", "by_temperature")})
