"""The loss of linear layers' outputs in differentiable PyTorch, with whole logits; and what tells which rows count.

Forward-mode and second derivatives come from here. Ordinary calls never hold the logits whole: see ``chunks.py``.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kdkernels.ops import _positions, _registry
from kdkernels.ops.linear_distillation.arguments import Arguments


def check_values(given: Arguments) -> None:
    """Raise if a label or a weight that may be read here is not accepted."""
    weight = given.position_weight
    _positions.check_weight_values("position_weight", weight)
    labels = given.labels
    if labels is None or given.soft_labels or not _registry.values_are_visible(labels):
        return
    bad = ((labels < 0) | (labels >= given.classes)) & (labels != given.ignore_index)
    if weight is not None:
        bad = bad & (weight != 0)
    if bad.any():
        first = int(bad.flatten().nonzero()[0])
        raise IndexError(
            f"labels[{first}] (in flattened order) is {labels.flatten()[first].item()}; expected a class from 0 to "
            f"{given.classes - 1} or ignore_index {given.ignore_index}"
        )


def counted_rows(given: Arguments) -> Tensor | None:
    """Return which rows count in a term of the loss, or None if all do."""
    counted = None if given.position_weight is None else given.position_weight.flatten() != 0
    if given.labels is None or given.soft_labels or not given.ignored_by_divergence:
        return counted
    kept = given.labels.flatten() != given.ignore_index
    return kept if counted is None else counted & kept


def divisors(given: Arguments) -> tuple[Tensor | float, Tensor | float]:
    """Return what the sums of the divergence and of the cross-entropy are divided by; infinity where a sum is empty."""
    rows = given.rows
    if given.reduction != "mean":
        divisor = float(max(given.input.shape[0], 1)) if given.reduction == "batchmean" and given.positions else 1.0
        return divisor, divisor
    weight = None if given.position_weight is None else given.position_weight.flatten()
    of_all: Tensor | float = float(max(rows, 1)) if weight is None else _positions.divisor("mean", weight, rows)
    if given.labels is None or given.soft_labels:
        return of_all, of_all
    labels = given.labels.flatten()
    kept = labels != given.ignore_index
    weight = kept.to(given.dtype) if weight is None else torch.where(kept, weight, 0.0)
    of_divergence = of_labels = _positions.divisor("mean", weight, rows)
    if given.class_weight is not None:
        in_range = torch.where((labels >= 0) & (labels < given.classes), labels, 0)
        of_labels = _positions.divisor("mean", weight * given.class_weight[in_range], rows)
    return of_divergence if given.ignored_by_divergence else of_all, of_labels


def divergence_weight_of_rows(given: Arguments) -> Tensor | None:
    """Return the weight of each position in the divergence, or None if all have 1."""
    if given.labels is None or given.soft_labels or not given.ignored_by_divergence:
        return given.position_weight
    kept = given.labels != given.ignore_index
    return kept.to(given.dtype) if given.position_weight is None else torch.where(kept, given.position_weight, 0.0)


def of_labels_alone(given: Arguments) -> Arguments:
    """Return the call without its teacher."""
    zero = torch.zeros_like(given.divergence_weight)
    return replace(
        given, target=None, target_indices=None, target_linear_weight=None, target_linear_bias=None,
        target_type="logits", divergence_weight=zero,
    )  # fmt: skip


def times(weight: Tensor, loss: Tensor) -> Tensor:
    """Return the product, 0 where the weight is 0."""
    return torch.where(weight == 0, 0.0, weight * loss)


def capped(logits: Tensor, cap: float) -> Tensor:
    """Return cap * tanh(logits / cap), or the logits if there is no cap."""
    return logits if cap == 0 else cap * torch.tanh(logits / cap)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float, counted: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    hidden = hidden.to(dtype)
    if counted is not None:
        hidden = torch.where(counted.view(*hidden.shape[:-1], 1), hidden, 0.0)
    logits = torch.nn.functional.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
    return capped(scale * logits, cap)


def loss_of(given: Arguments) -> Tensor:
    """Return the loss as a differentiable expression of whole logits."""
    dtype, counted = given.dtype, counted_rows(given)
    logits = _logits(
        given.input, given.linear_weight, given.linear_bias, given.logit_scale, given.softcap, counted, dtype
    )
    if given.target is not None and given.target_indices is not None:
        return _loss_of_top_classes(given, logits)
    return _loss_of_logits(given, logits)


def _loss_of_top_classes(given: Arguments, logits: Tensor) -> Tensor:
    assert given.target is not None
    weight = divergence_weight_of_rows(given)
    reduction = "none" if given.reduction == "none" else "sum"
    options = (given.temperature, given.tail, given.divergence == "reverse_kl", reduction, False)
    arguments = (logits, given.target.to(given.dtype), given.target_indices, weight, *options)
    value = _registry.find("topk_divergence").run("reference", *arguments)[0]
    loss = times((given.divergence_weight / divisors(given)[0]).to(given.dtype), value)
    if given.labels is None:
        return loss
    return loss + _loss_of_logits(of_labels_alone(given), logits)


def _loss_of_logits(given: Arguments, logits: Tensor) -> Tensor:
    dtype, counted = given.dtype, counted_rows(given)
    target = logits.detach() if given.target is None else given.target
    if given.target is not None and given.target_linear_weight is not None:
        target = _logits(
            given.target, given.target_linear_weight, given.target_linear_bias, given.target_logit_scale,
            given.target_softcap, counted, dtype,
        )  # fmt: skip
    scalars = (given.temperature, given.divergence_weight, given.label_weight, given.beta, given.label_smoothing)
    weights = (given.position_weight, given.class_weight)
    options = (given.divergence, given.target_type, given.reduction, given.ignore_index, given.ignored_by_divergence)
    arguments = (logits, target, given.labels, *weights, *scalars, logits.dim() - 1, *options, False, "nothing")
    return _registry.find("softmax_loss").run("reference", *arguments)[0]  # type: ignore[no-any-return]


def gradients(grad_output: Tensor, given: Arguments, wanted: list[int]) -> tuple[Tensor, ...]:
    """Return the gradients of the tensors at the given places, as differentiable expressions."""
    arguments = list(vars(given).values())

    def loss(*primals: Tensor) -> Tensor:
        every = arguments.copy()
        for place, primal in zip(wanted, primals, strict=True):
            every[place] = primal
        return (loss_of(Arguments(*every)) * grad_output).sum()

    places = tuple(range(len(wanted)))
    return torch.func.grad(loss, places)(*(arguments[place] for place in wanted))  # type: ignore[no-any-return]
