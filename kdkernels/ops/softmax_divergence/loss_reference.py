"""Reference of the losses with every option: targets of each kind, weights, smoothed and soft labels, and their parts.

The loss of a position has two terms, each with a divisor of its own: a divergence at the temperature, and the
cross-entropy of the labels at temperature 1. As in the plain reference, gradients are closed forms in differentiable
operations, and values that may be infinite or NaN are replaced before they enter an operation whose result is not used.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kdkernels.ops import _positions, _registry
from kdkernels.ops._numerics import compute_dtype, laid_out_as
from kdkernels.ops.softmax_divergence import decoupled_terms, reference, terms

# Rows of the parts of a loss, with a column for each position
PARTS = ("cross_entropy", "divergence", "input_logsumexp", "target_logsumexp", "target_entropy", "agreement")


@dataclass(frozen=True)
class Arguments:
    """The arguments of the op but for the gradients; those of its schema, in its order."""

    input: Tensor
    target: Tensor
    labels: Tensor | None
    position_weight: Tensor | None
    class_weight: Tensor | None
    temperature: Tensor
    divergence_weight: Tensor
    label_weight: Tensor
    beta: Tensor
    label_smoothing: Tensor
    dim: int
    divergence: str
    target_type: str
    reduction: str
    ignore_index: int
    ignored_by_divergence: bool

    @property
    def soft_labels(self) -> bool:
        """Whether labels are probabilities rather than class indices."""
        return self.labels is not None and self.labels.is_floating_point()

    @property
    def positions(self) -> torch.Size:
        """Shape of the positions."""
        return self.input.shape[: self.dim] + self.input.shape[self.dim + 1 :]


COUNT = len(fields(Arguments))


class _Problem:
    """The prepared arguments of a call."""

    def __init__(self, given: Arguments) -> None:
        self.given = given
        dtype = compute_dtype(given.input, given.target)
        one = given.input.new_ones((), dtype=dtype)
        numbers = (given.temperature, given.divergence_weight, given.label_weight, given.beta, given.label_smoothing)
        # In a product, a scalar on the CPU is passed to another device by value, without a copy that would wait.
        temperature, self.divergence_weight, self.label_weight, beta, smoothing = ((one * n).to(dtype) for n in numbers)
        self.temperature = torch.where((temperature > 0) & (temperature < math.inf), temperature, math.nan)
        self.beta, self.smoothing = (torch.where((n >= 0) & (n <= 1), n, math.nan) for n in (beta, smoothing))
        self._weigh_positions(dtype)
        counted = ((self.divergence_counts != 0) | (self.label_counts != 0)).unsqueeze(given.dim)
        # The values of a position that does not count must not matter, even if they are NaN.
        self.logits = torch.where(counted, given.input.to(dtype), 0.0)
        self.target = torch.where(counted, given.target.to(dtype), 0.0 if given.target_type == "logits" else 1.0)
        if given.target_type == "log_probs":
            self.target = torch.where(counted, self.target, 0.0)
        sides, kind = (self.logits, self.target), given.divergence
        if kind in decoupled_terms.KINDS:
            self.pair = decoupled_terms.pair(kind, *sides, self.temperature, given.dim, self.index)
        else:
            self.pair = terms.pair(kind, *sides, given.target_type, self.temperature, self.beta, given.dim)

    def _weigh_positions(self, dtype: torch.dtype) -> None:
        """Find the weight of each position in either term, and what the sums of the terms are divided by."""
        given = self.given
        weight = given.position_weight
        ones = given.input.new_ones(given.positions, dtype=dtype)
        weight = ones if weight is None else weight.to(dtype)
        weight = torch.where((weight >= 0) & (weight < math.inf), weight, math.nan)
        self.divergence_counts = self.label_counts = weight
        self.class_weight = None if given.class_weight is None else given.class_weight.to(dtype)
        by_label = weight
        self.misplaced: Tensor | None = None
        if given.labels is not None and not given.soft_labels:
            kept = given.labels != given.ignore_index
            in_range = (given.labels >= 0) & (given.labels < given.input.shape[given.dim])
            self.index = torch.where(in_range, given.labels, 0)
            self.label_counts = by_label = torch.where(kept, weight, 0.0)
            if given.ignored_by_divergence:
                self.divergence_counts = self.label_counts
            self.misplaced = kept & ~in_range & (weight != 0)
            if self.class_weight is not None:
                by_label = by_label * self.class_weight[self.index]
        batch = given.input.shape[0]
        self.divergence_divisor = _positions.divisor(given.reduction, self.divergence_counts, batch)
        self.label_divisor = _positions.divisor(given.reduction, by_label, batch)

    def smoothed_labels(self) -> Tensor:
        """Return the target of each class in the cross-entropy: smoothed labels times class weights."""
        given, dim = self.given, self.given.dim
        if given.soft_labels:
            labels = given.labels.to(self.logits.dtype)  # type: ignore[union-attr]
        else:
            labels = torch.zeros_like(self.logits).scatter(dim, self.index.unsqueeze(dim), 1.0)
        labels = (1 - self.smoothing) * labels + self.smoothing / self.logits.shape[dim]
        weight = self.weight_of_classes()
        labels = labels if weight is None else labels * weight
        return torch.where(self.label_counts.unsqueeze(dim) == 0, 0.0, labels)

    def weight_of_classes(self) -> Tensor | None:
        """Return the class weights in a shape that broadcasts over the logits."""
        if self.class_weight is None:
            return None
        return self.class_weight.view(-1, *[1] * (self.logits.dim() - 1 - self.given.dim))

    def label_term(self) -> Tensor | None:
        """Return the term of the labels at each position."""
        if self.given.labels is None:
            return None
        if self.pair.label_term is not None:
            return self.pair.label_term
        labels = self.smoothed_labels()
        log_softmax = torch.log_softmax(self.logits, self.given.dim)
        return -torch.where(labels == 0, 0.0, labels * torch.where(labels == 0, 0.0, log_softmax)).sum(self.given.dim)

    def label_gradient(self) -> Tensor:
        """Return the derivative of the cross-entropy by the logits."""
        labels = self.smoothed_labels()
        total = labels.sum(self.given.dim, keepdim=True)
        return total * torch.softmax(self.logits, self.given.dim) - labels


def _weighted(counts: Tensor, divisor: Tensor, factor: Tensor) -> Tensor:
    return torch.where(counts == 0, 0.0, counts / divisor * factor)


def _times(weight: Tensor, value: Tensor) -> Tensor:
    """Return the product, and 0 where the weight is 0."""
    return torch.where(weight == 0, 0.0, weight * torch.where(weight == 0, 0.0, value))


def _mass_tolerance(dtype: torch.dtype) -> float:
    """Return how far from 1 probabilities of a dtype may sum to: what rounding them makes likely."""
    return 1e-3 if dtype.itemsize >= 4 else 2e-2


def _check_mass(target: Tensor, target_type: str, dim: int, counted: Tensor | None) -> None:
    """Raise if probabilities that may be read here do not sum to 1."""
    if not _registry.values_are_visible(target):
        return
    probabilities = target.detach().double()
    mass = (probabilities.exp() if target_type == "log_probs" else probabilities).sum(dim)
    bad = (mass - 1).abs() > _mass_tolerance(target.dtype)
    if counted is not None:
        bad = bad & counted
    if bad.any():
        first = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"the probabilities of target at position {first} (in flattened order) sum to "
            f"{mass.flatten()[first].item():g}; this divergence needs a sum of 1: normalize them, or use the forward "
            "KL divergence"
        )


def check_values(given: Arguments) -> None:
    """Raise if a value that may be read here is not accepted."""
    labels = None if given.soft_labels else given.labels
    smoothing = given.label_smoothing
    if labels is not None and given.position_weight is not None:
        labels = torch.where(given.position_weight == 0, 0, labels)
    share = "alpha" if given.divergence in ("skew_kl", "reverse_skew_kl") else "beta"
    classes = given.input.shape[given.dim]
    reference.check_values(labels, given.temperature, given.beta, classes, given.ignore_index, share)
    if _registry.values_are_visible(smoothing) and not 0 <= smoothing.item() <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {smoothing.item()}")
    _positions.check_weight_values("position_weight", given.position_weight)
    _positions.check_weight_values("class_weight", given.class_weight)
    if given.target_type != "logits" and terms.needs_unit_mass(given.divergence):
        counted = None if given.position_weight is None else given.position_weight != 0
        if labels is not None and given.ignored_by_divergence:
            kept = labels != given.ignore_index
            counted = kept if counted is None else kept & counted
        _check_mass(given.target, given.target_type, given.dim, counted)


def loss_of(given: Arguments) -> tuple[Tensor, Tensor]:
    """Return the loss as a differentiable expression, and its parts."""
    problem = _Problem(given)
    value, label_term = problem.pair.value, problem.label_term()
    divergence_weight = _weighted(problem.divergence_counts, problem.divergence_divisor, problem.divergence_weight)
    loss = _times(divergence_weight, value)
    if label_term is not None:
        label_weight = _weighted(problem.label_counts, problem.label_divisor, problem.label_weight)
        loss = loss + _times(label_weight, label_term)
    if problem.misplaced is not None:
        loss = torch.where(problem.misplaced, math.nan, loss)
    if given.reduction != "none":
        loss = loss.sum()
    return loss, _parts(problem, value, label_term)


def _parts(problem: _Problem, value: Tensor, label_term: Tensor | None) -> Tensor:
    """Return the parts of each position, 0 where it counts in neither term."""
    dim = problem.given.dim
    student, teacher = (side.detach() for side in (problem.logits, problem.target))
    mass = problem.pair.log_p.exp().detach()
    log_p = problem.pair.log_p.detach()
    entropy = -torch.where(mass > 0, mass * torch.where(mass > 0, log_p, 0.0), 0.0).sum(dim)
    scaled = teacher / problem.temperature if problem.given.target_type == "logits" else log_p
    agreement = (student.argmax(dim) == teacher.argmax(dim)).to(value.dtype)
    label_term = torch.zeros_like(value) if label_term is None else label_term
    rows = (
        _times(problem.label_counts != 0, label_term),
        _times(problem.divergence_counts != 0, value),
        torch.logsumexp(student / problem.temperature, dim),
        torch.logsumexp(scaled, dim),
        entropy,
        agreement,
    )
    counted = (problem.divergence_counts != 0) | (problem.label_counts != 0)
    return torch.where(counted, torch.stack(rows), 0.0).detach()


def gradients(grad_output: Tensor, given: Arguments) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return the gradients of ``input``, ``target``, soft labels, and of two scalars, as differentiable expressions.

    The scalars are the temperature and the weight of the divergence.
    """
    problem, dim = _Problem(given), given.dim
    pair = problem.pair
    counts = _weighted(problem.divergence_counts, problem.divergence_divisor, grad_output)
    by_divergence = (counts * problem.divergence_weight).unsqueeze(dim)
    student = _times(by_divergence / problem.temperature, pair.student)
    teacher = _times(by_divergence, pair.teacher / pair.target_temperature)
    by_labels: Tensor | None = None
    if given.labels is not None:
        label_scale = _weighted(problem.label_counts, problem.label_divisor, grad_output * problem.label_weight)
        label_scale = label_scale.unsqueeze(dim)
        if pair.label_student is not None and pair.label_teacher is not None:
            student = student + _times(label_scale, pair.label_student)
            teacher = teacher + _times(label_scale, pair.label_teacher)
        else:
            student = student + _times(label_scale, problem.label_gradient())
        if given.soft_labels:
            weight = problem.weight_of_classes()
            log_softmax = torch.log_softmax(problem.logits, dim)
            by_labels = _times(label_scale, -(1 - problem.smoothing) * (1 if weight is None else weight) * log_softmax)
            by_labels = by_labels.to(given.labels.dtype)
    by_temperature = _times(counts * problem.divergence_weight, pair.by_temperature)
    if pair.label_by_temperature is not None:
        by_temperature = by_temperature + _times(label_scale.squeeze(dim), pair.label_by_temperature)
    scalars = torch.stack([by_temperature.sum(), _times(counts, pair.value).sum()])
    return student.to(given.input.dtype), teacher.to(given.target.dtype), by_labels, scalars


def forward(*arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the gradient of ``input`` for an incoming gradient of 1 if requested, and the parts."""
    *shared, parts, save = arguments
    given = Arguments(*shared)  # type: ignore[arg-type]
    check_values(given)
    loss, every_part = loss_of(given)
    saved = loss.new_empty(0)
    if save == "gradient":
        saved = laid_out_as(given.input, gradients(torch.ones_like(loss), given)[0])
    return loss, saved, every_part if parts else loss.new_empty(0)


def backward(grad_output: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``input`` and ``target``, empty tensors if not requested."""
    *shared, input_gradient, target_gradient = arguments
    given = Arguments(*shared)  # type: ignore[arg-type]
    student, teacher, *_ = gradients(grad_output, given)
    return (
        laid_out_as(given.input, student) if input_gradient else given.input.new_empty(0),
        laid_out_as(given.target, teacher) if target_gradient else given.target.new_empty(0),
    )
