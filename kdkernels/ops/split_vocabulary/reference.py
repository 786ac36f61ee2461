"""Divergences of logits whose classes are split over ranks: statistics of a shard, their combination, and gradients.

With P and Q the masses of the shards and p^k and q^k the distributions within shard k, the divergence is a sum of terms
that cannot be negative: KL(p || q) = KL(P || Q) + sum_k P_k KL(p^k || q^k). So a shard needs no other rank's maximum.
"""

import math

import torch
from torch import Tensor

from kdkernels.ops import _positions, _registry
from kdkernels.ops._numerics import compute_dtype

# Rows of the statistics of a shard. Sums are relative to the maximum: the log-sum-exp of large logits would be coarse.
ROWS = (
    "input_max", "target_max", "input_log_sum", "target_log_sum", "hard_log_sum", "label_logit", "label_found",
    "divergence",
)  # fmt: skip
_CHUNK_BYTES = 4 << 20  # logits whose gradient is computed at once


def _rows(classes: int, dtype: torch.dtype) -> int:
    """Return how many rows of logits are computed at once."""
    return max(1, _CHUNK_BYTES // (classes * dtype.itemsize))


def _log_sum(logits: Tensor, largest: Tensor, temperature: Tensor) -> Tensor:
    """Return ln of the sum of exp((logits - largest) / temperature) of each row; 0 where the largest is -inf."""
    classes = logits.shape[-1]
    rows, shift = logits.reshape(-1, classes), largest.reshape(-1, 1)
    shift = torch.where(shift == -math.inf, 0.0, shift)
    size = _rows(classes, shift.dtype)
    parts = [
        ((part.to(shift.dtype) - first) / temperature.to(shift)).exp().sum(-1)
        for part, first in zip(rows.split(size), shift.split(size), strict=True)
    ]
    return torch.where(largest == -math.inf, 0.0, torch.cat(parts).view(largest.shape).log())


def _divergence(backend: str, input: Tensor, target: Tensor, temperature: Tensor, divergence: str) -> Tensor:
    """Return the divergence of the distributions within a shard."""
    one = torch.ones_like(temperature)
    options = (input.dim() - 1, divergence, "none", -100, "nothing")
    arguments = (input, target, None, temperature, one, 0 * one, 0.5 * one, *options)
    return _registry.find("softmax_divergence").compute(backend, *arguments)[0]  # type: ignore[no-any-return]


def index_of(labels: Tensor | None, first_class: int, ignore_index: int) -> Tensor | None:
    """Return the place of each label in a shard; that of an ignored one is outside."""
    return None if labels is None else torch.where(labels == ignore_index, -1, labels - first_class)


def statistics(
    backend: str, input: Tensor, target: Tensor, labels: Tensor | None, temperature: Tensor, divergence: str,
    first_class: int, ignore_index: int,
) -> Tensor:  # fmt: skip
    """Return the statistics of a shard."""
    dtype, index = compute_dtype(input, target), index_of(labels, first_class, ignore_index)
    of_input, of_target = (side.amax(-1).to(dtype) for side in (input, target))
    found, label_logit = torch.zeros_like(of_input), torch.full_like(of_input, -math.inf)
    hard = value = found
    if divergence != "js":
        value = _divergence(backend, input, target, temperature, divergence)
        value = torch.where((of_input == -math.inf) | (of_target == -math.inf), 0.0, value)
    if index is not None:
        inside = (index >= 0) & (index < input.shape[-1])
        at = torch.where(inside, index, 0).unsqueeze(-1)
        label_logit = torch.where(inside, input.gather(-1, at).squeeze(-1).to(dtype), -math.inf)
        found = inside.to(dtype)
        hard = _log_sum(input, of_input, torch.ones_like(temperature))
    sums = _log_sum(input, of_input, temperature), _log_sum(target, of_target, temperature)
    return torch.stack((of_input, of_target, *sums, hard, label_logit, found, value))


def _kl_terms(log_weight: Tensor, log_other: Tensor) -> Tensor:
    """Return w (ln w - ln v) + v - w of each class, infinite where v = 0 < w; the sum of v - w is 0."""
    weight, other = log_weight.exp(), log_other.exp()
    unbounded = (weight > 0) & (log_other == -math.inf)
    ratio = torch.where((weight > 0) & ~unbounded, log_weight - log_other, 0.0)
    value = torch.where(weight > 0, weight * ratio + (other - weight), weight + other)
    return torch.where(unbounded, math.inf, value.clamp(min=0))


def combined(every: Tensor, temperature: Tensor, divergence: str) -> Tensor:
    """Return the statistics of whole rows from those of all shards, stacked in the first dimension."""
    of_input, of_target, input_sum, target_sum, hard_sum, label_logit, found, value = every.unbind(1)
    temperature = temperature.to(every)
    max_input, max_target = of_input.amax(0), of_target.amax(0)
    log_q = (of_input - max_input) / temperature + input_sum
    log_p = (of_target - max_target) / temperature + target_sum
    hard = (of_input - max_input + hard_sum).logsumexp(0)
    whole_q, whole_p = log_q.logsumexp(0), log_p.logsumexp(0)
    weight, other = (log_q - whole_q, log_p - whole_p)
    if divergence != "reverse_kl":
        weight, other = other, weight
    mass = weight.exp()
    within = torch.where(mass > 0, mass * torch.where(mass > 0, value, 0.0), mass).sum(0)
    total = _kl_terms(weight, other).sum(0) + within
    return torch.stack((max_input, max_target, whole_q, whole_p, hard, label_logit.amax(0), found.sum(0), total))


def _check_labels(labels: Tensor, totals: Tensor, ignore_index: int, weight: Tensor | None) -> None:
    """Raise if a label that may be read here lies in no shard."""
    if not _registry.values_are_visible(labels):
        return
    missing = (labels != ignore_index) & (totals[6] == 0)
    if weight is not None:
        missing = missing & (weight != 0)
    if missing.any():
        first = int(missing.flatten().nonzero()[0])
        raise IndexError(
            f"labels[{first}] (in flattened order) is {labels.flatten()[first].item()}, which no rank has; expected a "
            f"class of the shards, as their first_class says, or ignore_index {ignore_index}"
        )


class _Chunk:
    """Some rows of a shard: the student's logits relative to the largest of the whole row, and log-probabilities."""

    def __init__(self, input: Tensor, target: Tensor, totals: Tensor, temperature: Tensor) -> None:
        of_input, of_target, input_sum, target_sum, *_ = (row.unsqueeze(-1) for row in totals.unbind())
        self.logits = input.to(totals.dtype) - of_input
        self.log_q = self.logits / temperature - input_sum
        self.log_p = (target.to(totals.dtype) - of_target) / temperature - target_sum

    def log_mean(self, beta: Tensor) -> Tensor:
        """Return ln(beta p + (1 - beta) q), exactly ln p where both are equal."""
        neither = (self.log_p == -math.inf) & (self.log_q == -math.inf)
        difference = torch.where(neither, 0.0, self.log_q - self.log_p)
        from_p = self.log_p + torch.log1p((1 - beta) * torch.expm1(difference.clamp(max=0)))
        from_q = self.log_q + torch.log1p(beta * torch.expm1(-difference.clamp(min=0)))
        return torch.where(difference > 0, from_q, from_p)


def _check_shard(input: Tensor, target: Tensor, every: Tensor, temperature: Tensor) -> None:
    """Raise if no rank has the statistics of this shard's first position, as with another temperature."""
    if input.numel() == 0 or not _registry.values_are_visible(input):
        return
    first = (0,) * (input.dim() - 1)
    sides = [side[first].to(every.dtype) for side in (input, target)]
    largest = [side.amax() for side in sides]
    sums = [_log_sum(side, most, temperature) for side, most in zip(sides, largest, strict=True)]
    own, given = torch.stack((*largest, *sums)), every[:, :4].reshape(len(every), 4, -1)[..., 0]
    if own.isfinite().all() and not ((given - own).abs() <= 1e-2 * (1 + own.abs())).all(-1).any():
        raise ValueError(
            "statistics are not those of input and target: no rank has the maxima and sums of exponentials of their "
            f"first position at temperature {temperature.item():g}; pass the same logits and the same temperature to "
            "split_vocabulary_statistics"
        )


def mixture(
    _backend: str, input: Tensor, target: Tensor, statistics: Tensor, temperature: Tensor, beta: Tensor
) -> Tensor:
    """Return what a shard adds to KL(p || m) and KL(q || m) of each row."""
    _check_shard(input, target, statistics, temperature)
    classes, totals = input.shape[-1], combined(statistics, temperature, "js")
    s, t, whole = input.reshape(-1, classes), target.reshape(-1, classes), totals.reshape(len(totals), -1)
    temperature, beta, size = temperature.to(whole), beta.to(whole), _rows(classes, whole.dtype)
    parts = []
    for shards in zip(s.split(size), t.split(size), whole.split(size, 1), strict=True):
        chunk = _Chunk(*shards, temperature)
        log_m = chunk.log_mean(beta)
        parts.append(torch.stack([_kl_terms(side, log_m).sum(-1) for side in (chunk.log_p, chunk.log_q)]))
    return torch.cat(parts, 1).view(2, *totals.shape[1:])


def _slope(log_probability: Tensor, log_other: Tensor, mean: Tensor) -> Tensor:
    """Return w (ln w - ln v - mean) of each class, the gradient of KL(w || v); 0 where the mean is infinite."""
    probability = log_probability.exp()
    bounded = (probability > 0) & (log_other > -math.inf) & (mean < math.inf).unsqueeze(-1)
    ratio = torch.where(bounded, log_probability - log_other, 0.0)
    return torch.where(bounded, probability * (ratio - torch.where(bounded, mean.unsqueeze(-1), 0.0)), 0.0)


def _gradients(chunk: _Chunk, totals: Tensor, divergence: str, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return T times the gradients of the divergence by both sides' logits."""
    log_q, log_p = chunk.log_q, chunk.log_p
    if divergence == "forward_kl":
        return log_q.exp() - log_p.exp(), _slope(log_p, log_q, totals[7])
    if divergence == "reverse_kl":
        return _slope(log_q, log_p, totals[7]), log_p.exp() - log_q.exp()
    log_m = chunk.log_mean(beta)
    return (1 - beta) * _slope(log_q, log_m, totals[9]), beta * _slope(log_p, log_m, totals[8])


class _Problem:
    """The prepared arguments of a call of the loss: totals, and what each row counts."""

    def __init__(
        self, labels: Tensor | None, position_weight: Tensor | None, statistics: Tensor, mixture: Tensor | None,
        temperature: Tensor, divergence_weight: Tensor, label_weight: Tensor, beta: Tensor, divergence: str,
        ignore_index: int, reduction: str, batch: int,
    ) -> None:  # fmt: skip
        self.totals = combined(statistics, temperature, divergence)
        if mixture is not None:
            self.totals = torch.cat((self.totals, mixture.to(self.totals)))
        numbers = (temperature, divergence_weight, label_weight, beta)
        self.temperature, self.divergence_weight, self.label_weight, self.beta = (n.to(statistics) for n in numbers)
        self.weight = self.totals.new_ones(self.totals.shape[1:]) if position_weight is None else position_weight
        if labels is not None:
            self.weight = torch.where(labels == ignore_index, 0.0, self.weight)
        self.divisor = _positions.divisor(reduction, self.weight, batch)


def _batch(input: Tensor) -> int:
    return input.shape[0] if input.dim() > 1 else 1


def forward(
    _backend: str, input: Tensor, target: Tensor, labels: Tensor | None, position_weight: Tensor | None,
    statistics: Tensor, mixture: Tensor | None, temperature: Tensor, divergence_weight: Tensor, label_weight: Tensor,
    beta: Tensor, divergence: str, first_class: int, ignore_index: int, reduction: str,
) -> Tensor:  # fmt: skip
    """Return the loss, which is known from the statistics."""
    problem = _Problem(
        labels, position_weight, statistics, mixture, temperature, divergence_weight, label_weight, beta, divergence,
        ignore_index, reduction, _batch(input),
    )  # fmt: skip
    _check_shard(input, target, statistics, temperature)
    totals, share = problem.totals, problem.beta
    _positions.check_weight_values("position_weight", position_weight)
    value = totals[7] if divergence != "js" else share * totals[8] + (1 - share) * totals[9]
    loss = torch.where(problem.divergence_weight == 0, 0.0, problem.divergence_weight * value)
    if labels is not None:
        _check_labels(labels, totals, ignore_index, position_weight)
        found = totals[6] > 0
        hard = torch.where(found, totals[4] - (torch.where(found, totals[5], 0.0) - totals[0]), math.nan)
        loss = loss + torch.where(problem.label_weight == 0, 0.0, problem.label_weight * hard)
    return _positions.reduced(loss, problem.weight, reduction, _batch(input))


def backward(
    _backend: str, grad_output: Tensor, input: Tensor, target: Tensor, labels: Tensor | None,
    position_weight: Tensor | None, statistics: Tensor, mixture: Tensor | None, temperature: Tensor,
    divergence_weight: Tensor, label_weight: Tensor, beta: Tensor, divergence: str, first_class: int,
    ignore_index: int, reduction: str, input_gradient: bool, target_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of the shard's logits, a chunk of rows at a time."""
    problem = _Problem(
        labels, position_weight, statistics, mixture, temperature, divergence_weight, label_weight, beta, divergence,
        ignore_index, reduction, _batch(input),
    )  # fmt: skip
    classes = input.shape[-1]
    s, t, whole = (
        input.reshape(-1, classes),
        target.reshape(-1, classes),
        problem.totals.reshape(len(problem.totals), -1),
    )
    scale = grad_output * problem.weight if reduction == "none" else grad_output * problem.weight / problem.divisor
    scale = scale.reshape(-1, 1)
    index = index_of(labels, first_class, ignore_index)
    by_input = input.new_empty(input.shape if input_gradient else 0)
    by_target = target.new_empty(target.shape if target_gradient else 0)
    size = _rows(classes, whole.dtype)
    for begin in range(0, len(s), size):
        rows = slice(begin, begin + size)
        chunk = _Chunk(s[rows], t[rows], whole[:, rows], problem.temperature)
        student, teacher = _gradients(chunk, whole[:, rows], divergence, problem.beta)
        factor = scale[rows] * problem.divergence_weight / problem.temperature
        counts = scale[rows] != 0  # what a row of weight 0 holds must not matter, even if it is NaN
        if target_gradient:
            by_target.view(-1, classes)[rows] = torch.where(counts & (factor != 0), factor * teacher, 0.0)
        if not input_gradient:
            continue
        gradient = torch.where(factor != 0, factor * student, 0.0)
        if index is not None:
            at = index.reshape(-1, 1)[rows]
            hard = (chunk.logits - whole[4, rows].unsqueeze(-1)).exp()
            inside = (at >= 0) & (at < classes)
            hard.scatter_add_(1, torch.where(inside, at, 0), torch.where(inside, -1.0, 0.0).to(hard.dtype))
            of_labels = scale[rows] * problem.label_weight * hard
            gradient = gradient + torch.where(problem.label_weight != 0, of_labels, 0.0)
        by_input.view(-1, classes)[rows] = torch.where(counts, gradient, 0.0)
    return by_input, by_target
