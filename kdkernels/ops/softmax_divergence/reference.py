"""Divergences between softmax distributions, written to be read.

Student logits are ``input``, teacher logits ``target``; q and p are their softmax at the temperature, along ``dim``.
The gradients are closed forms, in differentiable operations, so that they can be differentiated again.
"""

import math

import torch
from torch import Tensor

from kdkernels.ops import _registry
from kdkernels.ops._numerics import compute_dtype, laid_out_as


def _kl_div(log_weight: Tensor, log_other: Tensor, dim: int) -> Tensor:
    """Return the sum of w (ln w - ln v); a term with w = 0 is 0.

    The sum of v - w is 0; added term by term, it removes the rounding error of the first-order terms.
    """
    weight = log_weight.exp()
    term = weight * (log_weight - log_other) + (log_other.exp() - weight)
    return torch.where(weight > 0, term, log_other.exp()).sum(dim)


def _sum_to_zero(gradient: Tensor, probability: Tensor, dim: int) -> Tensor:
    """Remove the sum that rounding leaves in a gradient through softmax; it matters if one class has p near 1."""
    return gradient - probability * gradient.sum(dim, keepdim=True)


def _softmax_gradient(log_probability: Tensor, slope: Tensor, dim: int) -> Tensor:
    """Return T * d/dz of a function of softmax(z / T) whose derivative with respect to the probabilities is slope.

    If the mean slope of a position is infinite, its gradient is 0.
    """
    probability = log_probability.exp()
    mean = torch.where(probability > 0, probability * slope, 0.0).sum(dim, keepdim=True)
    gradient = torch.where(probability > 0, probability * (slope - mean), probability)
    return torch.where(mean == math.inf, 0.0, _sum_to_zero(gradient, probability, dim))


def _log_mean(log_q: Tensor, log_p: Tensor, beta: Tensor) -> Tensor:
    """Return ln(beta p + (1 - beta) q)."""
    return torch.logaddexp(log_p + beta.log(), log_q + torch.log1p(-beta))


class _Clamped:
    """The parts of the published competition term: probabilities clamped after their mean is taken."""

    def __init__(self, log_q: Tensor, log_p: Tensor) -> None:
        q, p = log_q.exp(), log_p.exp()
        m = (p + q) / 2
        self.q, self.p, self.m = (x.clamp(0.01, 0.99) for x in (q, p, m))
        self.q_inside, self.p_inside, self.m_inside = ((x >= 0.01) & (x <= 0.99) for x in (q, p, m))

    def value(self, dim: int) -> Tensor:
        """Return KL(m || p) / 2 + KL(m || q) / 2 of the clamped probabilities, which are not renormalized."""
        return (self.m * (self.m.log() - (self.p.log() + self.q.log()) / 2)).sum(dim)

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Return the derivatives with respect to q and p; a clamp passes no gradient outside its range."""
        through_m = self.m_inside * (self.m.log() + 1 - (self.p.log() + self.q.log()) / 2) / 2
        return through_m - self.q_inside * self.m / self.q / 2, through_m - self.p_inside * self.m / self.p / 2


def divergence_of(kind: str, log_q: Tensor, log_p: Tensor, beta: Tensor, dim: int) -> Tensor:
    """Return the divergence of each position."""
    if kind == "forward_kl":
        return _kl_div(log_p, log_q, dim)
    if kind == "reverse_kl":
        return _kl_div(log_q, log_p, dim)
    if kind == "clamped_js":
        return _Clamped(log_q, log_p).value(dim)
    inner, log_m = _interior(log_q, log_p, beta)
    js = inner * _kl_div(log_p, log_m, dim) + (1 - inner) * _kl_div(log_q, log_m, dim)
    at_0 = divergence_of("forward_kl", log_q, log_p, beta, dim)
    at_1 = divergence_of("reverse_kl", log_q, log_p, beta, dim)
    return torch.where(beta == 0, at_0, torch.where(beta == 1, at_1, js))


def gradients_of(kind: str, log_q: Tensor, log_p: Tensor, beta: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return T times the gradients of each position's divergence for the student's and the teacher's logits."""
    q, p = log_q.exp(), log_p.exp()
    if kind == "forward_kl":
        return _sum_to_zero(q - p, q, dim), _softmax_gradient(log_p, log_p - log_q, dim)
    if kind == "reverse_kl":
        return _softmax_gradient(log_q, log_q - log_p, dim), _sum_to_zero(p - q, p, dim)
    if kind == "clamped_js":
        q_slope, p_slope = _Clamped(log_q, log_p).slopes()
        return _softmax_gradient(log_q, q_slope, dim), _softmax_gradient(log_p, p_slope, dim)
    inner, log_m = _interior(log_q, log_p, beta)
    js = (
        (1 - inner) * _softmax_gradient(log_q, log_q - log_m, dim),
        inner * _softmax_gradient(log_p, log_p - log_m, dim),
    )
    at_0 = gradients_of("forward_kl", log_q, log_p, beta, dim)
    at_1 = gradients_of("reverse_kl", log_q, log_p, beta, dim)
    q_side, p_side = (
        torch.where(beta == 0, a, torch.where(beta == 1, b, inside))
        for a, b, inside in zip(at_0, at_1, js, strict=True)
    )
    return q_side, p_side


def _interior(log_q: Tensor, log_p: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return beta, replaced by 1/2 at the endpoints, which have separate formulas, and the log of the mean."""
    inner = torch.where((beta == 0) | (beta == 1), 0.5, beta)
    return inner, _log_mean(log_q, log_p, inner)


class _Problem:
    """The prepared arguments of a call: log-probabilities, the mask of ignored positions, the normalizer."""

    def __init__(
        self,
        input: Tensor,
        target: Tensor,
        labels: Tensor | None,
        scalars: tuple[Tensor, ...],
        dim: int,
        reduction: str,
        ignore_index: int,
    ) -> None:
        dtype = compute_dtype(input, target)
        # In a product, a scalar on the CPU is passed to another device by value, without a copy that would wait.
        one = input.new_ones((), dtype=dtype)
        temperature, self.divergence_weight, self.label_weight, beta = ((one * scalar).to(dtype) for scalar in scalars)
        self.temperature = torch.where(temperature > 0, temperature, math.nan)
        self.beta = torch.where((beta >= 0) & (beta <= 1), beta, math.nan)
        self.dim = dim
        self.labels = labels
        self.logits = input.to(dtype)
        teacher = target.to(dtype)
        positions = math.prod(input.shape[:dim] + input.shape[dim + 1 :])
        self.normalizer: Tensor | float = 1.0
        if reduction == "mean":
            self.normalizer = 1 / max(positions, 1)
        elif reduction == "batchmean" and input.dim() > 1:
            self.normalizer = 1 / max(input.shape[0], 1)
        if labels is not None:
            self.kept = labels != ignore_index
            in_range = (labels >= 0) & (labels < input.shape[dim])
            self.misplaced = self.kept & ~in_range
            self.index = torch.where(in_range, labels, 0).unsqueeze(dim)
            # The values of an ignored position must not matter, even if they are NaN.
            self.logits = torch.where(self.kept.unsqueeze(dim), self.logits, 0.0)
            teacher = torch.where(self.kept.unsqueeze(dim), teacher, 0.0)
            if reduction == "mean":
                self.normalizer = 1 / self.kept.sum().clamp(min=1).to(dtype)
        self.log_q = torch.log_softmax(self.logits / self.temperature, dim)
        self.log_p = torch.log_softmax(teacher / self.temperature, dim)


def check_values(labels: Tensor | None, temperature: Tensor, beta: Tensor, classes: int, ignore_index: int) -> None:
    """Raise if a value that may be read here is not accepted."""
    if _registry.values_are_visible(temperature) and not temperature.item() > 0:
        raise ValueError(f"temperature must be positive, got {temperature.item()}")
    if _registry.values_are_visible(beta) and not 0 <= beta.item() <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta.item()}")
    if labels is not None and _registry.values_are_visible(labels):
        bad = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
        if bad.any():
            first = int(bad.flatten().nonzero()[0])
            raise IndexError(
                f"labels[{first}] (in flattened order) is {labels.flatten()[first].item()}; expected a class from 0 "
                f"to {classes - 1} or ignore_index {ignore_index}"
            )


def forward(
    input: Tensor,
    target: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    divergence_weight: Tensor,
    label_weight: Tensor,
    beta: Tensor,
    dim: int,
    divergence: str,
    reduction: str,
    ignore_index: int,
    save: str,
) -> tuple[Tensor, Tensor]:
    """Return the loss and, if requested, the gradient of ``input`` for an incoming gradient of 1."""
    if save == "statistics":
        raise ValueError("save is 'statistics'; the reference accepts 'nothing' and 'gradient'")
    check_values(labels, temperature, beta, input.shape[dim], ignore_index)
    scalars = (temperature, divergence_weight, label_weight, beta)
    problem = _Problem(input, target, labels, scalars, dim, reduction, ignore_index)
    value = divergence_of(divergence, problem.log_q, problem.log_p, problem.beta, dim)
    loss = torch.where(problem.divergence_weight == 0, 0.0, problem.divergence_weight * value)
    if labels is not None:
        log_softmax = torch.log_softmax(problem.logits, dim)
        cross_entropy = -log_softmax.gather(dim, problem.index).squeeze(dim)
        loss = loss + torch.where(problem.label_weight == 0, 0.0, problem.label_weight * cross_entropy)
        loss = torch.where(problem.kept, loss, 0.0)
        loss = torch.where(problem.misplaced, math.nan, loss)
    if reduction != "none":
        loss = loss.sum() * problem.normalizer
    if save == "nothing":
        return loss, loss.new_empty(0)
    ones = torch.ones_like(loss)
    gradient, _ = gradients(ones, input, target, labels, scalars, dim, divergence, reduction, ignore_index)
    return loss, laid_out_as(input, gradient)


def gradients(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    labels: Tensor | None,
    scalars: tuple[Tensor, ...],
    dim: int,
    divergence: str,
    reduction: str,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``input`` and ``target`` as differentiable expressions."""
    problem = _Problem(input, target, labels, scalars, dim, reduction, ignore_index)
    scale = grad_output * problem.normalizer
    scale = scale.unsqueeze(dim) if reduction == "none" else scale
    student, teacher = gradients_of(divergence, problem.log_q, problem.log_p, problem.beta, dim)
    weight = problem.divergence_weight / problem.temperature
    student, teacher = (torch.where(weight == 0, 0.0, weight * side) for side in (student, teacher))
    if labels is not None:
        one_hot = torch.zeros_like(student).scatter(dim, problem.index, 1.0)
        student = student + problem.label_weight * (torch.softmax(problem.logits, dim) - one_hot)
        kept = problem.kept.unsqueeze(dim)
        student, teacher = (torch.where(kept, side, 0.0) for side in (student, teacher))
    return (student * scale).to(input.dtype), (teacher * scale).to(target.dtype)


def backward(
    grad_output: Tensor,
    statistics: Tensor | None,
    input: Tensor,
    target: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    divergence_weight: Tensor,
    label_weight: Tensor,
    beta: Tensor,
    dim: int,
    divergence: str,
    reduction: str,
    ignore_index: int,
    input_gradient: bool,
    target_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``input`` and ``target``, empty tensors if not requested."""
    scalars = (temperature, divergence_weight, label_weight, beta)
    student, teacher = gradients(grad_output, input, target, labels, scalars, dim, divergence, reduction, ignore_index)
    return (
        laid_out_as(input, student) if input_gradient else input.new_empty(0),
        laid_out_as(target, teacher) if target_gradient else target.new_empty(0),
    )
