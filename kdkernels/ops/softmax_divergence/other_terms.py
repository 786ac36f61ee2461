"""Skewed divergences, total variation distance, soft cross-entropy and entropy: part of the reference.

As in the plain reference, these are closed forms in differentiable operations, and a value that may be infinite is
replaced before it enters an operation whose result is not used.
"""

import math

import torch
from torch import Tensor

from kdkernels.ops.softmax_divergence import reference

KINDS = ("skew_kl", "reverse_skew_kl", "total_variation_distance", "soft_cross_entropy", "entropy")


def terms_of(kind: str, log_q: Tensor, log_p: Tensor, alpha: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the value of each position, and T times its derivatives by the logits of student and teacher.

    Args:
        kind: One of :data:`KINDS`.
        log_q: The student's log-probabilities.
        log_p: The teacher's.
        alpha: Share of the first distribution in the mixture of the skewed divergences, strictly between 0 and 1.
        dim: Dimension of the classes.

    """
    q, p = log_q.exp(), log_p.exp()
    if kind == "entropy":
        # The largest probability is only a constant in the slope; with it, the gradient of equal logits is exactly 0.
        slope = torch.where(q > 0, log_q.detach().amax(dim, keepdim=True) - log_q, 0.0)
        value = -torch.where(q > 0, q * torch.where(q > 0, log_q, 0.0), q).sum(dim)
        return value, reference.softmax_gradient(log_q, slope, dim), torch.zeros_like(q)
    if kind == "soft_cross_entropy":
        value, student, _ = soft_cross_entropy(log_q, log_p, dim)
        return value, reference.sum_to_zero(student, q, dim), reference.softmax_gradient(log_p, -log_q, dim)
    if kind == "total_variation_distance":
        half = torch.sign(p - q) / 2
        value = (p - q).abs().sum(dim) / 2
        return value, reference.softmax_gradient(log_q, -half, dim), reference.softmax_gradient(log_p, half, dim)
    if kind == "skew_kl":
        value, of_p, of_q = _skew_kl(log_p, log_q, alpha, dim)
    else:
        value, of_q, of_p = _skew_kl(log_q, log_p, alpha, dim)
    return value, reference.softmax_gradient(log_q, of_q, dim), reference.softmax_gradient(log_p, of_p, dim)


def soft_cross_entropy(log_q: Tensor, log_p: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return -sum p ln q of p with any sum, T times the student's gradient, and the derivative by ln p."""
    p = log_p.exp()
    unbounded = (p > 0) & (log_q == -math.inf)
    terms = -torch.where(p > 0, p * torch.where((p > 0) & ~unbounded, log_q, 0.0), p)
    value = torch.where(unbounded.any(dim), math.inf, terms.sum(dim))
    return value, p.sum(dim, keepdim=True) * log_q.exp() - p, terms


def _log_share(log_w: Tensor, log_v: Tensor, alpha: Tensor) -> Tensor:
    """Return ln(w / (alpha w + (1 - alpha) v)), and 0 where w = 0; it is exactly 0 where w = v."""
    absent, alone = log_w == -math.inf, log_v == -math.inf
    ratio = torch.where(absent | alone, 0.0, torch.where(absent, 0.0, log_w) - torch.where(alone, 0.0, log_v))
    larger = ratio > 0
    share = torch.where(larger, 1 - alpha, alpha)
    result = torch.where(larger, 0.0, ratio) - torch.log1p(share * torch.expm1(torch.where(larger, -ratio, ratio)))
    return torch.where(absent, 0.0, torch.where(alone, -alpha.log(), result))


def _skew_kl(log_w: Tensor, log_v: Tensor, alpha: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL(w || m) with m = alpha w + (1 - alpha) v, and its derivatives by w and by v up to a constant."""
    w, v = log_w.exp(), log_v.exp()
    log_share = _log_share(log_w, log_v, alpha)
    # The sum of v - w is 0; added term by term, it removes the rounding error of the first-order terms.
    value = (torch.where(w > 0, w * log_share, w) + (1 - alpha) * (v - w)).sum(dim)
    excess = torch.where(w > 0, torch.expm1(log_share), -1.0)  # w / m - 1
    return value, torch.where(w > 0, log_share - alpha * excess, 0.0), (alpha - 1) * excess
