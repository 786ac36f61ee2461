"""Divergences between softmax distributions, written to be read.

Student logits are ``input``, teacher logits ``target``; q and p are their softmax at the temperature, along ``dim``.
The gradients are closed forms, in differentiable operations, so that they can be differentiated again. For that, values
that may be infinite or NaN are replaced before they enter an operation whose result is not used: autograd multiplies
its derivative by 0, which would give NaN.
"""

import math

import torch
from torch import Tensor

from kdkernels.ops import _registry
from kdkernels.ops._numerics import compute_dtype, laid_out_as


def kl_div(log_weight: Tensor, log_other: Tensor, dim: int) -> Tensor:
    """Return the sum of w (ln w - ln v); a term with w = 0 is 0.

    The sum of v - w is 0; added term by term, it removes the rounding error of the first-order terms.
    """
    weight, other = log_weight.exp(), log_other.exp()
    unbounded = (weight > 0) & (log_other == -math.inf)
    ratio = torch.where((weight > 0) & ~unbounded, log_weight - log_other, 0.0)
    value = torch.where(weight > 0, weight * ratio + (other - weight), weight + other).sum(dim)
    return torch.where(unbounded.any(dim), math.inf, value)


def sum_to_zero(gradient: Tensor, probability: Tensor, dim: int) -> Tensor:
    """Remove the sum that rounding leaves in a gradient through softmax; it matters if one class has p near 1."""
    return gradient - probability * gradient.sum(dim, keepdim=True)


def softmax_gradient(log_probability: Tensor, slope: Tensor, dim: int) -> Tensor:
    """Return T * d/dz of a function of softmax(z / T) whose derivative with respect to the probabilities is slope.

    If the mean slope of a position is infinite, its gradient is 0.
    """
    probability = log_probability.exp()
    bounded = ~((probability > 0) & (slope == math.inf)).any(dim, keepdim=True)
    slope = torch.where((probability > 0) & bounded, slope, 0.0)
    mean = (probability * slope).sum(dim, keepdim=True)
    gradient = torch.where(probability > 0, probability * (slope - mean), probability)
    return torch.where(bounded, sum_to_zero(gradient, probability, dim), 0.0)


def _log_mean(log_q: Tensor, log_p: Tensor, beta: Tensor) -> Tensor:
    """Return ln(beta p + (1 - beta) q)."""
    neither = (log_p == -math.inf) & (log_q == -math.inf)
    by_p, by_q = (torch.where(neither, 0.0, side) for side in (log_p + beta.log(), log_q + torch.log1p(-beta)))
    return torch.where(neither, -math.inf, torch.logaddexp(by_p, by_q))


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
        return kl_div(log_p, log_q, dim)
    if kind == "reverse_kl":
        return kl_div(log_q, log_p, dim)
    if kind == "clamped_js":
        return _Clamped(log_q, log_p).value(dim)
    inner, log_m = _interior(log_q, log_p, beta)
    js = inner * kl_div(log_p, log_m, dim) + (1 - inner) * kl_div(log_q, log_m, dim)
    at_0 = divergence_of("forward_kl", log_q, log_p, beta, dim)
    at_1 = divergence_of("reverse_kl", log_q, log_p, beta, dim)
    return torch.where(beta == 0, at_0, torch.where(beta == 1, at_1, js))


def gradients_of(kind: str, log_q: Tensor, log_p: Tensor, beta: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return T times the gradients of each position's divergence for the student's and the teacher's logits."""
    q, p = log_q.exp(), log_p.exp()
    if kind == "forward_kl":
        return sum_to_zero(q - p, q, dim), softmax_gradient(log_p, log_p - log_q, dim)
    if kind == "reverse_kl":
        return softmax_gradient(log_q, log_q - log_p, dim), sum_to_zero(p - q, p, dim)
    if kind == "clamped_js":
        q_slope, p_slope = _Clamped(log_q, log_p).slopes()
        return softmax_gradient(log_q, q_slope, dim), softmax_gradient(log_p, p_slope, dim)
    inner, log_m = _interior(log_q, log_p, beta)
    js = (
        (1 - inner) * softmax_gradient(log_q, log_q - log_m, dim),
        inner * softmax_gradient(log_p, log_p - log_m, dim),
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
        self.temperature = torch.where((temperature > 0) & (temperature < math.inf), temperature, math.nan)
        self.beta = torch.where((beta >= 0) & (beta <= 1), beta, math.nan)
        self.dim = dim
        self.labels = labels
        self.logits = input.to(dtype)
        teacher = target.to(dtype)
        positions = math.prod(input.shape[:dim] + input.shape[dim + 1 :])
        self.normalizer = one
        if reduction == "mean":
            self.normalizer = one / max(positions, 1)
        elif reduction == "batchmean":
            self.normalizer = one / max(input.shape[0], 1)
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
        self.log_q, self.log_p = (torch.log_softmax(self._divided(side), dim) for side in (self.logits, teacher))
        self.teacher = teacher

    def _divided(self, logits: Tensor) -> Tensor:
        """Return the logits divided by the temperature; where they are -inf, they do not depend on it."""
        masked = logits == -math.inf
        return torch.where(masked, -math.inf, torch.where(masked, 0.0, logits) / self.temperature)

    def relative(self, logits: Tensor) -> Tensor:
        """Return the logits of a side relative to the maximum of their row, and 0 where they are -inf."""
        largest = logits.detach().amax(self.dim, keepdim=True)
        return torch.where(logits == -math.inf, 0.0, torch.where(logits == -math.inf, largest, logits) - largest)


def check_values(
    labels: Tensor | None, temperature: Tensor, beta: Tensor, classes: int, ignore_index: int, share: str = "beta"
) -> None:
    """Raise if a value that may be read here is not accepted; ``share`` is the name of beta."""
    if _registry.values_are_visible(temperature) and not 0 < temperature.item() < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature.item()}")
    if _registry.values_are_visible(beta) and not 0 <= beta.item() <= 1:
        raise ValueError(f"{share} must be in [0, 1], got {beta.item()}")
    if labels is not None and _registry.values_are_visible(labels):
        check_labels(labels, classes, ignore_index)


def check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    """Raise if a label is neither a class nor ignored."""
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
    options = (dim, divergence, reduction, ignore_index)
    loss = loss_of(input, target, labels, scalars, *options)
    if save == "nothing":
        return loss, loss.new_empty(0)
    gradient, *_ = gradients(torch.ones_like(loss), input, target, labels, scalars, *options, False)
    return loss, laid_out_as(input, gradient)


def loss_of(
    input: Tensor,
    target: Tensor,
    labels: Tensor | None,
    scalars: tuple[Tensor, ...],
    dim: int,
    divergence: str,
    reduction: str,
    ignore_index: int,
) -> Tensor:
    """Return the loss as a differentiable expression."""
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
    return loss


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
    of_scalars: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``input``, of ``target``, and of two scalars, as differentiable expressions.

    The scalars are the temperature and the weight of the divergence; unless ``of_scalars``, the third is empty.
    """
    problem = _Problem(input, target, labels, scalars, dim, reduction, ignore_index)
    scale = grad_output * problem.normalizer
    student, teacher = gradients_of(divergence, problem.log_q, problem.log_p, problem.beta, dim)
    by_scalars = student.new_empty(0)
    if of_scalars:
        value = divergence_of(divergence, problem.log_q, problem.log_p, problem.beta, dim)
        by_scalars = _scalar_gradients(problem, scale, value, student, teacher)
    scale = scale.unsqueeze(dim) if reduction == "none" else scale
    weight = problem.divergence_weight / problem.temperature
    student, teacher = (torch.where(weight == 0, 0.0, weight * side) for side in (student, teacher))
    if labels is not None:
        one_hot = torch.zeros_like(student).scatter(dim, problem.index, 1.0)
        student = student + problem.label_weight * (torch.softmax(problem.logits, dim) - one_hot)
        kept = problem.kept.unsqueeze(dim)
        student, teacher = (torch.where(kept, side, 0.0) for side in (student, teacher))
    return (student * scale).to(input.dtype), (teacher * scale).to(target.dtype), by_scalars


def _scalar_gradients(problem: _Problem, scale: Tensor, value: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the gradients of the temperature and of the weight of the divergence.

    The divergence depends on z / T alone: T dK/dT is minus the sum of z dK/dz over both sides. The derivatives of a row
    sum to 0, so that z may be relative to the maximum of its row.
    """
    sides = ((problem.logits, student), (problem.teacher, teacher))
    of_student, of_teacher = (problem.relative(logits) * derivative for logits, derivative in sides)
    by_temperature = -(of_student + of_teacher).sum(problem.dim) / problem.temperature**2
    by_temperature = torch.where(value == math.inf, 0.0, by_temperature)
    both = (problem.divergence_weight * by_temperature, value)
    counts = problem.divergence_weight != 0
    if problem.labels is not None:
        counts = counts & problem.kept
    return torch.stack([torch.where(counts, scale * by_scalar, 0.0).sum() for by_scalar in both])


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
    scalar_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``input``, ``target`` and the scalars, empty tensors if not requested."""
    numbers = (temperature, divergence_weight, label_weight, beta)
    options = (dim, divergence, reduction, ignore_index)
    student, teacher, scalars = gradients(grad_output, input, target, labels, numbers, *options, scalar_gradients)
    return (
        laid_out_as(input, student) if input_gradient else input.new_empty(0),
        laid_out_as(target, teacher) if target_gradient else target.new_empty(0),
        scalars,
    )
