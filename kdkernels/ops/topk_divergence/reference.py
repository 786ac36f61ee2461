"""The divergence from a teacher's top classes, written to be read.

The listed classes are those of ``indices`` whose value is not -inf; p and q are the probabilities of teacher and
student. The gradients are closed forms, in differentiable operations, so that they can be differentiated again. For
that, values that may be infinite or NaN are replaced before they enter an operation whose result is not used: autograd
multiplies its derivative by 0, which would give NaN.
"""

import math

import torch
from torch import Tensor

from kdkernels.ops import _positions, _registry
from kdkernels.ops._numerics import laid_out_as

# The most that probabilities may add up to: more is no rounding, but logits passed as log-probabilities.
MOST_MASS = 1.1

# The logarithm of a probability that is 0 in double, which the kernels compute in.
_GONE = math.log(5e-324)


def _log_sum(logits: Tensor, dim: int = -1) -> Tensor:
    """Return the log-sum-exp, and -inf with gradient 0 where there is nothing but -inf."""
    absent = logits == -math.inf
    empty = absent.all(dim, keepdim=True)
    largest = torch.where(empty, 0.0, logits.detach().amax(dim, keepdim=True))
    sums = torch.where(absent, 0.0, (torch.where(absent, largest, logits) - largest).exp()).sum(dim, keepdim=True)
    return torch.where(empty, -math.inf, largest + torch.where(empty, 1.0, sums).log()).squeeze(dim)


def _log_ratio(log_w: Tensor, log_v: Tensor) -> Tensor:
    """Return ln(w / v) where both are positive, else 0."""
    both = (log_w != -math.inf) & (log_v != -math.inf)
    return torch.where(both, torch.where(both, log_w, 0.0) - torch.where(both, log_v, 0.0), 0.0)


def _term(log_w: Tensor, log_v: Tensor) -> Tensor:
    """Return w ln(w / v) - w + v, which is at least 0, and +inf where v = 0 alone.

    Written as a share of the larger of w and v, it is accurate where they nearly agree.
    """
    ratio = _log_ratio(log_w, log_v)
    w_larger = ratio > 0
    below = torch.where(w_larger, -ratio, ratio)
    less = below.expm1()
    share = torch.where(w_larger, less - below, below * (less + 1) - less)
    value = torch.where(w_larger, log_w.exp(), log_v.exp()) * share
    value = torch.where(log_w == -math.inf, log_v.exp(), value)
    return torch.where((log_w > _GONE) & (log_v == -math.inf), math.inf, value)


class _Problem:
    """The prepared arguments of a call: log-probabilities of the listed classes and of the rest.

    The rest has no probability for ``"renormalize"`` and ``"ignore"``: p_R = 0, and q_R only serves the gradient.
    """

    def __init__(
        self, input: Tensor, values: Tensor, indices: Tensor, weight: Tensor | None, temperature: Tensor, tail: str
    ) -> None:
        dtype, classes = values.dtype, input.shape[-1]
        one = values.new_ones(())
        self.weight = one.expand(input.shape[:-1]) if weight is None else weight.to(dtype)
        self.weight = torch.where((self.weight >= 0) & (self.weight < math.inf), self.weight, math.nan)
        counts = (self.weight != 0).unsqueeze(-1)
        # In a product, a scalar on the CPU is passed to another device by value, without a copy that would wait.
        temperature = (one * temperature).to(dtype)
        self.temperature = torch.where((temperature > 0) & (temperature < math.inf), temperature, math.nan)
        # The logits of a position of weight 0 must not matter, even if they are NaN.
        logits = torch.where(counts, input.to(dtype), 0.0)
        absent = logits == -math.inf
        # Everything depends on differences of logits; those from the largest one are small where it matters.
        known = torch.where(logits.isfinite(), logits.detach(), -math.inf)
        largest = known.amax(-1, keepdim=True)
        largest = torch.where(largest == -math.inf, 0.0, largest)
        self.logits = torch.where(absent, 0.0, torch.where(absent, 0.0, logits) - largest)
        scaled = torch.where(absent, -math.inf, self.logits / self.temperature)
        self.given = counts & (values != -math.inf)
        in_range = (indices >= 0) & (indices < classes)
        # Padding goes to a column of its own behind the classes.
        self.columns = torch.where(self.given & in_range, indices, classes)
        ones = torch.where(self.given, one, 0.0)
        counted = torch.zeros_like(torch.cat((scaled, scaled[..., :1]), -1)).scatter_add(-1, self.columns, ones)
        self.listed = counted[..., :-1] > 0
        self.log_p = torch.where(self.given, values, -math.inf)
        raw_mass = self.log_p.exp().sum(-1)
        repeated = (counted[..., :-1] > 1).any(-1) | (self.given & ~in_range).any(-1)
        self.refused = repeated if tail == "renormalize" else repeated | (raw_mass > MOST_MASS)

        at = torch.where(self.given & in_range, indices, 0)
        listed_logits = torch.where(self.given, scaled.gather(-1, at), -math.inf)
        renormalized = tail == "renormalize"
        log_total = _log_sum(listed_logits if renormalized else scaled)
        no_classes = renormalized & ~self.given.any(-1)
        # A row without a finite logit gives NaN, as a softmax does.
        log_total = torch.where(log_total == -math.inf, torch.where(no_classes, 0.0, math.nan), log_total)
        self.log_q = torch.where(self.given, listed_logits - log_total.unsqueeze(-1), -math.inf)
        others = torch.where(self.listed, -math.inf, scaled)
        self.log_others = _log_sum(others)
        self.target_mass, self.input_mass = raw_mass, self._mass(listed_logits)
        self.log_rest = self.log_others - torch.where(no_classes | renormalized, 0.0, log_total)
        self.of_others = torch.where(
            others == -math.inf,
            0.0,
            (others - torch.where(self.log_others == -math.inf, 0.0, self.log_others).unsqueeze(-1)).exp(),
        )
        if renormalized:
            log_sum = _log_sum(self.log_p)
            self.log_p = torch.where(
                self.given, self.log_p - torch.where(no_classes, 0.0, log_sum).unsqueeze(-1), -math.inf
            )
            # Other logits do not matter, even if they are NaN.
            self.log_rest = torch.full_like(self.log_rest, -math.inf)
            self.of_others = torch.zeros_like(self.of_others)
            self.logits = torch.where(self.listed, self.logits, 0.0)
        self.p, self.q = self.log_p.exp(), self.log_q.exp()
        self.q_rest = self.log_rest.exp()
        p_sum = self.p.sum(-1)
        has_rest = (tail == "bucket") & (self.given.sum(-1) < classes) & (p_sum < 1)
        self.p_rest = torch.where(has_rest, 1 - p_sum, 0.0)
        self.log_p_rest = torch.where(has_rest, torch.where(has_rest, self.p_rest, 1.0).log(), -math.inf)
        self.p_sum = torch.where(has_rest, 1.0, torch.ones_like(p_sum) if renormalized else p_sum)

    def _mass(self, listed_logits: Tensor) -> Tensor:
        """Return the student's share of the listed classes."""
        listed = _log_sum(listed_logits)
        return (listed - torch.logaddexp(listed, self.log_others)).detach().exp()


def _value(problem: _Problem, tail: str, reverse: bool) -> Tensor:
    """Return the divergence of each position."""
    of_teacher, of_student = (problem.log_p, problem.log_p_rest), (problem.log_q, problem.log_rest)
    (log_w, log_w_rest), (log_v, log_v_rest) = (of_student, of_teacher) if reverse else (of_teacher, of_student)
    if tail == "ignore":
        unbounded = (log_w > _GONE) & (log_v == -math.inf)
        return torch.where(unbounded, math.inf, log_w.exp() * _log_ratio(log_w, log_v)).sum(-1)
    value = _term(log_w, log_v).sum(-1)
    if tail == "bucket":
        # The terms are w ln(w / v) - w + v; the sum of what they have more than w ln(w / v) is known.
        excess = problem.p_sum - 1.0
        value = value + _term(log_w_rest, log_v_rest) + (-excess if reverse else excess)
    return torch.where(value < 0, 0.0, value)


def loss_of(
    input: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor | None,
    temperature: Tensor,
    tail: str,
    reverse: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss as a differentiable expression, and both masses of the listed classes."""
    problem = _Problem(input, values, indices, weight, temperature, tail)
    value = torch.where(problem.refused, math.nan, _value(problem, tail, reverse))
    loss = _positions.reduced(value, problem.weight, reduction, input.shape[0])
    counts = problem.weight != 0
    target_mass, input_mass = (
        torch.where(counts, mass.detach(), 0.0) for mass in (problem.target_mass, problem.input_mass)
    )
    return loss, target_mass, input_mass


def check_values(
    values: Tensor, indices: Tensor, weight: Tensor | None, temperature: Tensor, tail: str, classes: int
) -> None:
    """Raise if a value that may be read here is not accepted."""
    if _registry.values_are_visible(temperature) and not 0 < temperature.item() < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature.item()}")
    _positions.check_weight_values("position_weight", weight)
    if not _registry.values_are_visible(values):
        return
    given = values != -math.inf
    if weight is not None:
        given = given & (weight != 0).unsqueeze(-1)
    _check_indices(indices, given, classes)
    masses = torch.where(given, values, -math.inf).exp().sum(-1)
    if tail != "renormalize" and (masses > MOST_MASS).any():
        first = int((masses > MOST_MASS).flatten().nonzero()[0])
        raise ValueError(
            f"the probabilities that values stand for add up to {masses.flatten()[first].item():.6f} at position "
            f'{first} (in flattened order); expected at most 1: pass values_type="logits" with target_logsumexp if '
            "they are logits, else check target_logsumexp and temperature"
        )


def _check_indices(indices: Tensor, given: Tensor, classes: int) -> None:
    remedy = "or a value of -inf there, which marks padding"
    flat = indices.flatten()
    outside = (given & ((indices < 0) | (indices >= classes))).flatten()
    if outside.any():
        first = int(outside.nonzero()[0])
        raise IndexError(
            f"indices[{first}] (in flattened order) is {flat[first].item()}; expected a class from 0 to {classes - 1}, "
            + remedy
        )
    # Padding gets numbers that are different from each other and from all classes.
    count = indices.shape[-1]
    different = torch.where(given, indices, classes + torch.arange(count, device=indices.device))
    ordered, order = different.sort(dim=-1, stable=True)
    again = torch.zeros_like(given)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    repeated = torch.zeros_like(given).scatter(-1, order, again).flatten()
    if repeated.any():
        first = int(repeated.nonzero()[0])
        raise ValueError(
            f"indices[{first}] (in flattened order) is {flat[first].item()}, which the same position lists already; "
            f"expected different classes, {remedy}"
        )


def forward(
    input: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor | None,
    temperature: Tensor,
    tail: str,
    reverse: bool,
    reduction: str,
    masses: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, both masses if requested, and nothing of use for the backward."""
    check_values(values, indices, weight, temperature, tail, input.shape[-1])
    options = (tail, reverse, reduction)
    loss, target_mass, input_mass = loss_of(input, values, indices, weight, temperature, *options)
    positions = math.prod(input.shape[:-1])
    return (
        loss,
        target_mass if masses else values.new_empty(0),
        input_mass if masses else values.new_empty(0),
        values.new_zeros(2, positions),
    )


def gradients(
    grad_output: Tensor,
    input: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor | None,
    temperature: Tensor,
    tail: str,
    reverse: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``input``, ``values`` and the temperature, as differentiable expressions."""
    problem = _Problem(input, values, indices, weight, temperature, tail)
    unbounded = _value(problem, tail, reverse).detach() == math.inf
    if reverse:
        by_listed, by_rest, by_values = _of_reverse(problem, tail, unbounded)
    else:
        by_listed, by_rest, by_values = _of_forward(problem, tail, unbounded)
    column = torch.zeros_like(torch.cat((input, input[..., :1]), -1), dtype=values.dtype)
    by_logit = column.scatter_add(-1, problem.columns, torch.where(problem.given, by_listed, 0.0))[..., :-1]
    by_logit = by_logit + problem.of_others * by_rest.unsqueeze(-1)
    by_values = torch.where(problem.given, by_values, 0.0)

    batch = input.shape[0]
    scale = grad_output * torch.where(problem.refused, math.nan, problem.weight)
    scale = scale if reduction == "none" else scale / _positions.divisor(reduction, problem.weight, batch)
    scale = scale.unsqueeze(-1)
    counts = (problem.weight != 0).unsqueeze(-1)
    by_logit = torch.where(counts, by_logit * scale / problem.temperature, 0.0)
    # The loss depends on z / T alone. The derivatives of a row sum to 0, so that z may be relative to its largest.
    bounded = torch.where(unbounded.unsqueeze(-1), 0.0, by_logit)
    by_temperature = -(problem.logits * bounded).sum() / problem.temperature
    return by_logit.to(input.dtype), torch.where(counts, by_values * scale, 0.0), by_temperature


def _of_forward(problem: _Problem, tail: str, unbounded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return T times the gradients of the listed logits and of the rest, and the gradient of the values."""
    p, q, p_sum = problem.p, problem.q, problem.p_sum
    ratio = _log_ratio(problem.log_p, problem.log_q)
    constant = torch.ones_like(p_sum)
    if tail == "bucket":
        constant = torch.where(problem.p_rest > 0, -_log_ratio(problem.log_p_rest, problem.log_rest), 1.0)
    elif tail == "renormalize":
        constant = -(p * ratio).sum(-1)
    by_values = torch.where(unbounded.unsqueeze(-1), 0.0, p * (ratio + constant.unsqueeze(-1)))
    return q * p_sum.unsqueeze(-1) - p, p_sum * problem.q_rest - problem.p_rest, by_values


def _of_reverse(problem: _Problem, tail: str, unbounded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same for the divergence of the student from the teacher."""
    p, q, q_rest = problem.p, problem.q, problem.q_rest
    slope = _log_ratio(problem.log_q, problem.log_p) + (1.0 if tail == "ignore" else 0.0)
    rest_slope, by_p = torch.zeros_like(q_rest), torch.zeros_like(q_rest)
    if tail == "bucket":
        rest_slope = _log_ratio(problem.log_rest, problem.log_p_rest)
        by_p = torch.where(problem.p_rest > 0, q_rest / torch.where(problem.p_rest > 0, problem.p_rest, 1.0), 0.0)
    elif tail == "renormalize":
        by_p = torch.ones_like(q_rest)
    mean = (q * slope).sum(-1) + q_rest * rest_slope
    by_listed = torch.where(unbounded.unsqueeze(-1), 0.0, q * (slope - mean.unsqueeze(-1)))
    by_rest = torch.where(unbounded, 0.0, q_rest * (rest_slope - mean))
    return by_listed, by_rest, p * by_p.unsqueeze(-1) - q


def backward(
    grad_output: Tensor,
    rest: Tensor,
    input: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor | None,
    temperature: Tensor,
    tail: str,
    reverse: bool,
    reduction: str,
    input_gradient: bool,
    values_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``input`` and ``values``, empty tensors if not requested."""
    options = (tail, reverse, reduction)
    by_input, by_values, _ = gradients(grad_output, input, values, indices, weight, temperature, *options)
    return (
        laid_out_as(input, by_input) if input_gradient else input.new_empty(0),
        by_values if values_gradient else values.new_empty(0),
    )
