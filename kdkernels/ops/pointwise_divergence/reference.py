"""Divergences of single elements, written to be read.

Each formula comes as the value of an element and as its slopes, the derivatives by both sides and by the temperature.
The slopes are closed forms in differentiable operations. Values that may be infinite or NaN are replaced before they
enter an operation whose result is not used: autograd multiplies its derivative by 0, which would give NaN.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops import _checks, _registry
from kdkernels.ops._numerics import compute_dtype, laid_out_as
from kdkernels.ops._positions import check_weight_values, divisor

REVERSED = "reverse_"
DIVERGENCES = ("kl", "kl_log", "js_log", "binary_kl", "binary_kl_probs")


class Slopes(NamedTuple):
    """Derivatives of an element by the input, by the target, and by the temperature."""

    input: Tensor
    target: Tensor
    temperature: Tensor


def _present(probability: Tensor) -> Tensor:
    """Tell whether a probability counts: those below the smallest normal number are taken for 0. NaN counts."""
    return ~(probability.abs() < torch.finfo(probability.dtype).tiny)


class _Probabilities:
    """p ln p - p x with the input x = ln q: the elements of ``F.kl_div``; 0 where p = 0."""

    def __init__(self, input: Tensor, target: Tensor) -> None:
        self.present = _present(target)
        self.p = torch.where(self.present, target, 1.0)
        self.log_ratio = self.p.log() - torch.where(self.present, input, 0.0)

    def value(self) -> Tensor:
        return torch.where(self.present, self.p * self.log_ratio, 0.0)

    def slopes(self) -> Slopes:
        by_input = torch.where(self.present, -self.p, 0.0)
        return Slopes(by_input, torch.where(self.present, self.log_ratio + 1, 0.0), torch.zeros_like(self.p))


class _LogProbabilities:
    """w (ln w - ln v) from the two logarithms; 0 where w = 0."""

    def __init__(self, log_weight: Tensor, log_other: Tensor) -> None:
        self.present = _present(log_weight.exp())
        weight = torch.where(self.present, log_weight, 0.0)
        self.weight = weight.exp()
        self.log_ratio = weight - torch.where(self.present, log_other, 0.0)

    def value(self) -> Tensor:
        return torch.where(self.present, self.weight * self.log_ratio, 0.0)

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Return the derivatives by ln w and by ln v."""
        by_weight = torch.where(self.present, self.weight * (self.log_ratio + 1), 0.0)
        return by_weight, torch.where(self.present, -self.weight, 0.0)


class _JensenShannon:
    """beta p ln(p / m) + (1 - beta) q ln(q / m) with m = beta p + (1 - beta) q, 0 < beta < 1.

    Both logarithms come from the difference ln p - ln q by log1p and expm1, so that they are 0 where p = q. The
    derivatives by ln p and ln q are the two terms.
    """

    def __init__(self, log_q: Tensor, log_p: Tensor, beta: Tensor) -> None:
        self.has_q, self.has_p = _present(log_q.exp()), _present(log_p.exp())
        neither = ~(self.has_q | self.has_p)
        log_p, log_q = (torch.where(neither, 0.0, side) for side in (log_p, log_q))
        self.q, self.p = (torch.where(h, s, 0.0).exp() for h, s in ((self.has_q, log_q), (self.has_p, log_p)))
        difference = log_p - log_q
        teacher_larger = difference >= 0
        down = torch.where(teacher_larger, -difference, 0.0)
        up = torch.where(teacher_larger, 0.0, difference)
        larger_p, larger_q = -torch.log1p((1 - beta) * down.expm1()), -torch.log1p(beta * up.expm1())
        of_p, of_q = (
            torch.where(teacher_larger, larger_p, up + larger_q),
            torch.where(teacher_larger, down + larger_p, larger_q),
        )
        self.by_p = beta * torch.where(self.has_p, self.p * torch.where(self.has_p, of_p, 0.0), 0.0)
        self.by_q = (1 - beta) * torch.where(self.has_q, self.q * torch.where(self.has_q, of_q, 0.0), 0.0)

    def value(self) -> Tensor:
        total = self.by_p + self.by_q
        return torch.where(total < 0, 0.0, total)


class _Bernoulli:
    """KL(w || v) of two yes-or-no outcomes from their logits.

    It is softplus(v) - softplus(w) - sigmoid(w) (v - w). Both signs are flipped where w > 0, which exchanges the
    outcomes, so that the sigmoid is at most 1/2 and nothing cancels between large numbers.
    """

    def __init__(self, weight: Tensor, other: Tensor, difference: Tensor) -> None:
        flipped = weight > 0
        self.sign = torch.where(flipped, -1.0, torch.ones_like(weight))
        weight = torch.where(flipped, -weight, weight)
        self.other = torch.where(flipped, -other, other)
        difference = torch.where(flipped, -difference, difference)
        self.sigmoid = weight.sigmoid()
        self.present = _present(self.sigmoid)
        self.unbounded = self.other.abs() == math.inf
        known = self.present & ~self.unbounded
        self.difference = torch.where(known, difference, 0.0)
        self.softplus_of_weight = -F.logsigmoid(-weight)

    def value(self) -> Tensor:
        infinite = self.unbounded & ((self.other > 0) | self.present) & ~self.sigmoid.isnan()
        softplus = -F.logsigmoid(-torch.where(self.unbounded, -1e4, self.other))
        value = softplus - self.softplus_of_weight - self.sigmoid * self.difference
        return torch.where(infinite, math.inf, torch.where(value < 0, 0.0, value))

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Return the derivatives by the logits w and v."""
        by_weight = -self.sigmoid * (1 - self.sigmoid) * self.difference
        return self.sign * by_weight, self.sign * (self.other.sigmoid() - self.sigmoid)


class _BinaryKL:
    """The Bernoulli divergence of student logits and teacher logits or probabilities."""

    def __init__(self, input: Tensor, target: Tensor, temperature: Tensor, reverse: bool, probs: bool) -> None:
        self.input, self.target, self.temperature, self.reverse, self.probs = input, target, temperature, reverse, probs
        self.student = input / temperature
        if probs:
            self.inside = _present(target) & _present(1 - target)
            p = torch.where(self.inside, target, 0.5)
            self.share = p * (1 - p)
            ends = torch.where(target > 0.5, math.inf, -math.inf)
            self.teacher = torch.where(self.inside, p.log() - torch.log1p(-p), ends)
            difference = self.student - self.teacher
        else:
            self.teacher = target / temperature
            difference = (input - target) / temperature
        pair = (self.teacher, self.student, difference)
        self.pair = _Bernoulli(self.student, self.teacher, -difference) if reverse else _Bernoulli(*pair)

    def value(self) -> Tensor:
        return self.pair.value()

    def slopes(self) -> Slopes:
        by_student, by_teacher = self.pair.slopes() if self.reverse else self.pair.slopes()[::-1]
        by_input = by_student / self.temperature
        by_temperature = -torch.where(self.input.abs() == math.inf, 0.0, self.input) * by_input / self.temperature
        if self.probs:
            return Slopes(by_input, torch.where(self.inside, by_teacher / self.share, 0.0), by_temperature)
        by_target = by_teacher / self.temperature
        target = torch.where(self.target.abs() == math.inf, 0.0, self.target)
        return Slopes(by_input, by_target, by_temperature - target * by_target / self.temperature)


def _elements(
    input: Tensor, target: Tensor, temperature: Tensor, beta: Tensor, divergence: str, slopes: bool
) -> Tensor | Slopes:
    """Return the value of each element, or its slopes."""
    reverse, name = divergence.startswith(REVERSED), divergence.removeprefix(REVERSED)
    if name == "kl":
        of = _Probabilities(input, target)
        return of.slopes() if slopes else of.value()
    if name.startswith("binary_kl"):
        pair = _BinaryKL(input, target, temperature, reverse, name == "binary_kl_probs")
        return pair.slopes() if slopes else pair.value()
    if name == "js_log":
        return _jensen_shannon(input, target, beta, slopes)
    return _kl_of_logs(input, target, reverse, slopes)


def _kl_of_logs(input: Tensor, target: Tensor, reverse: bool, slopes: bool) -> Tensor | Slopes:
    terms = _LogProbabilities(input, target) if reverse else _LogProbabilities(target, input)
    if not slopes:
        return terms.value()
    by_weight, by_other = terms.slopes()
    by_input, by_target = (by_weight, by_other) if reverse else (by_other, by_weight)
    return Slopes(by_input, by_target, torch.zeros_like(by_weight))


def _jensen_shannon(input: Tensor, target: Tensor, beta: Tensor, slopes: bool) -> Tensor | Slopes:
    """Return the generalized divergence; beta = 0 and 1 are the two KL, not the limits of the formula."""
    known = _checks.number_of(beta)
    if known in (0.0, 1.0):
        return _kl_of_logs(input, target, known == 1.0, slopes)
    if isinstance(known, float):
        return _between_the_ends(input, target, beta, slopes)
    ends = (beta == 0) | (beta == 1)
    at_ends: Any = [_kl_of_logs(input, target, reverse, slopes) for reverse in (False, True)]
    inside = _between_the_ends(input, target, beta.masked_fill(ends, 0.5), slopes)
    if isinstance(inside, Tensor):
        return torch.where(ends, torch.where(beta == 0, at_ends[0], at_ends[1]), inside)
    pairs = zip(at_ends[0], at_ends[1], inside, strict=True)
    return Slopes(*(torch.where(ends, torch.where(beta == 0, a, b), between) for a, b, between in pairs))


def _between_the_ends(input: Tensor, target: Tensor, beta: Tensor, slopes: bool) -> Tensor | Slopes:
    of = _JensenShannon(input, target, beta)
    return Slopes(of.by_q, of.by_p, torch.zeros_like(of.q)) if slopes else of.value()


class _Problem:
    """The arguments in the dtype that is computed in, and what the sum of the elements is multiplied by."""

    def __init__(
        self, input: Tensor, target: Tensor, weight: Tensor | None, temperature: Tensor, beta: Tensor, divergence: str,
        reduction: str,
    ) -> None:  # fmt: skip
        dtype, device = compute_dtype(input, target), input.device
        sides = input.to(dtype), target.to(dtype)
        temperature, beta = (scalar.to(device=device, dtype=dtype) for scalar in (temperature, beta))
        self.elements = (*sides, temperature.where(temperature > 0, math.nan), beta, divergence)
        self.weight = None
        if weight is None:
            self.normalizer = torch.ones_like(temperature) / (max(input.numel(), 1) if reduction == "mean" else 1)
        else:  # a number that is no weight gives NaN where nothing has read it before
            self.weight = torch.where((weight >= 0) & (weight < math.inf), weight, math.nan)
            self.normalizer = 1 / divisor("mean" if reduction == "mean" else "sum", self.weight, 1)

    def value(self) -> Tensor:
        return self.weighted(_elements(*self.elements, False))  # type: ignore[arg-type]

    def slopes(self) -> Slopes:
        return _elements(*self.elements, True)  # type: ignore[return-value]

    def weighted(self, values: Tensor) -> Tensor:
        if self.weight is None:
            return values
        return torch.where(self.weight == 0, 0.0, self.weight * torch.where(self.weight == 0, 0.0, values))


def loss_of(
    input: Tensor, target: Tensor, weight: Tensor | None, temperature: Tensor, beta: Tensor, divergence: str,
    reduction: str,
) -> Tensor:  # fmt: skip
    """Return the loss as a differentiable expression."""
    problem = _Problem(input, target, weight, temperature, beta, divergence, reduction)
    value = problem.value()
    return value if reduction == "none" else value.sum() * problem.normalizer


def gradients(
    grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, temperature: Tensor, beta: Tensor,
    divergence: str, reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of ``input``, ``target`` and the temperature as differentiable expressions."""
    problem = _Problem(input, target, weight, temperature, beta, divergence, reduction)
    scale = grad_output * problem.normalizer
    by_input, by_target, by_temperature = (scale * problem.weighted(slope) for slope in problem.slopes())
    return by_input.to(input.dtype), by_target.to(target.dtype), by_temperature.sum()


def check_values(target: Tensor, weight: Tensor | None, divergence: str) -> None:
    """Raise if a weight or a probability of a binary divergence that may be read here is out of range."""
    check_weight_values("position_weight", weight)
    if not divergence.endswith("binary_kl_probs") or not _registry.values_are_visible(target):
        return
    bad = (target < 0) | (target > 1)
    if weight is not None:
        bad = bad & (weight != 0)
    if bad.any():
        first = int(bad.flatten().nonzero()[0])
        value = float(target.flatten()[first])
        raise ValueError(
            f"target[{first}] (in flattened order) is {value:f}; expected a probability in [0, 1], or pass "
            "target_type='logits'"
        )


def forward(
    input: Tensor, target: Tensor, weight: Tensor | None, temperature: Tensor, beta: Tensor, divergence: str,
    reduction: str,
) -> Tensor:  # fmt: skip
    """Return the loss."""
    check_values(target, weight, divergence)
    loss = loss_of(input, target, weight, temperature, beta, divergence, reduction)
    if reduction != "none":
        return loss
    return torch.empty_like(input, dtype=loss.dtype).copy_(loss)


def backward(
    grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, temperature: Tensor, beta: Tensor,
    divergence: str, reduction: str, input_gradient: bool, target_gradient: bool, temperature_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients, empty tensors for those that are not wanted."""
    by_input, by_target, by_temperature = gradients(
        grad_output, input, target, weight, temperature, beta, divergence, reduction
    )
    return (
        laid_out_as(input, by_input) if input_gradient else input.new_empty(0),
        laid_out_as(target, by_target) if target_gradient else target.new_empty(0),
        by_temperature if temperature_gradient else by_temperature.new_empty(0),
    )
