"""Divergences of logits whose classes are split over ranks: statistics of a shard, their combination, and gradients.

With P and Q the masses of the shards and p^k and q^k the distributions within shard k, the divergence is a sum of terms
that cannot be negative: KL(p || q) = KL(P || Q) + sum_k P_k KL(p^k || q^k). So a shard needs no other rank's maximum.
"""

import math

import torch
from torch import Tensor

from kdkernels.ops import _checks, _positions, _registry

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


def _divergence(input: Tensor, target: Tensor, temperature: Tensor, divergence: str) -> Tensor:
    """Return the divergence of the distributions within a shard."""
    op = _registry.find("softmax_divergence")
    one = torch.ones_like(temperature)
    options = (input.dim() - 1, divergence, "none", -100, "nothing")
    arguments = (input, target, None, temperature, one, 0 * one, 0.5 * one, *options)
    return op.run_on(input.device, *arguments)[0]  # type: ignore[no-any-return]


def statistics(
    input: Tensor, target: Tensor, index: Tensor | None, temperature: Tensor, divergence: str, dtype: torch.dtype
) -> Tensor:
    """Return the statistics of a shard; ``index`` is the label's place in it, or outside."""
    of_input, of_target = (side.amax(-1).to(dtype) for side in (input, target))
    found, label_logit = torch.zeros_like(of_input), torch.full_like(of_input, -math.inf)
    hard = value = found
    if divergence != "js":
        value = _divergence(input, target, temperature, divergence)
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


def check_values(
    position_weight: Tensor | None, labels: Tensor | None, totals: Tensor, ignore_index: int, weight: Tensor
) -> None:
    """Raise if a weight, or a label that lies in no shard, may be read here."""
    if position_weight is not None and _checks.is_readable(weight):
        _positions.check_weight_values("position_weight", weight)
    if labels is None or not (_checks.is_readable(labels) or _registry.checks_values(labels.device)):
        return
    missing = (labels != ignore_index) & (totals[6] == 0) & (weight != 0)
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


def mixture(input: Tensor, target: Tensor, totals: Tensor, temperature: Tensor, beta: Tensor) -> Tensor:
    """Return what a shard adds to KL(p || m) and KL(q || m) of each row."""
    classes = input.shape[-1]
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


def _gradients(
    chunk: _Chunk, totals: Tensor, divergence: str, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Return T times the gradients of the divergence by both sides' logits."""
    log_q, log_p = chunk.log_q, chunk.log_p
    if divergence == "forward_kl":
        return log_q.exp() - log_p.exp(), _slope(log_p, log_q, totals[7])
    if divergence == "reverse_kl":
        return _slope(log_q, log_p, totals[7]), log_p.exp() - log_q.exp()
    log_m = chunk.log_mean(beta)
    return (1 - beta) * _slope(log_q, log_m, totals[9]), beta * _slope(log_p, log_m, totals[8])


def forward(
    _backend: str, input: Tensor, target: Tensor, index: Tensor | None, totals: Tensor, temperature: Tensor,
    divergence_weight: Tensor, label_weight: Tensor, beta: Tensor, divergence: str,
) -> Tensor:  # fmt: skip
    """Return the loss of each row, which is known from the totals."""
    value = totals[7] if divergence != "js" else beta.to(totals) * totals[8] + (1 - beta.to(totals)) * totals[9]
    loss = torch.where(divergence_weight.to(totals) == 0, 0.0, divergence_weight.to(totals) * value)
    if index is None:
        return loss
    found = totals[6] > 0
    hard = torch.where(found, totals[4] - (torch.where(found, totals[5], 0.0) - totals[0]), math.nan)
    return loss + torch.where(label_weight.to(totals) == 0, 0.0, label_weight.to(totals) * hard)


def backward(
    _backend: str, grad_output: Tensor, input: Tensor, target: Tensor, index: Tensor | None, totals: Tensor, temperature: Tensor,
    divergence_weight: Tensor, label_weight: Tensor, beta: Tensor, divergence: str, input_gradient: bool,
    target_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of the shard's logits, a chunk of rows at a time."""
    classes = input.shape[-1]
    s, t, whole = input.reshape(-1, classes), target.reshape(-1, classes), totals.reshape(len(totals), -1)
    scale = grad_output.reshape(-1, 1)
    numbers = (n.to(whole) for n in (temperature, divergence_weight, label_weight, beta))
    temperature, divergence_weight, label_weight, beta = numbers
    by_input = input.new_empty(input.shape if input_gradient else 0)
    by_target = target.new_empty(target.shape if target_gradient else 0)
    size = _rows(classes, whole.dtype)
    for begin in range(0, len(s), size):
        rows = slice(begin, begin + size)
        chunk = _Chunk(s[rows], t[rows], whole[:, rows], temperature)
        student, teacher = _gradients(chunk, whole[:, rows], divergence, beta)
        factor = scale[rows] * divergence_weight / temperature
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
            gradient = gradient + torch.where(label_weight != 0, scale[rows] * label_weight * hard, 0.0)
        by_input.view(-1, classes)[rows] = torch.where(counts, gradient, 0.0)
    return by_input, by_target
