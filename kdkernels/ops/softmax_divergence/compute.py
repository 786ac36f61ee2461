"""From checked arguments to the ops: what every function of the family shares."""

import copy
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.ops import _checks, _positions, _registry
from kdkernels.ops._labels import checked_class_weight
from kdkernels.ops._numerics import compute_dtype, root
from kdkernels.ops.softmax_divergence import checks, loss_reference, reference
from kdkernels.ops.softmax_divergence.autograd import FORWARD
from kdkernels.ops.softmax_divergence.loss import LOSS
from kdkernels.ops.softmax_divergence.loss_reference import Arguments
from kdkernels.ops.softmax_divergence.saved import what_to_save


@_registry.returns
class DivergenceParts(NamedTuple):
    """The loss of a function called with ``return_parts=True``, and what the same pass over the logits found.

    Only the loss has a gradient. A position that does not count has 0 in every part.

    Attributes:
        loss: The loss, as without parts.
        cross_entropy: Term of the labels without ``ce_weight``, reduced as in the loss; 0 without labels.
        divergence: Divergence without ``kd_weight`` and T^2, reduced as in the loss.
        input_logsumexp: ln of the sum of exp(input / T) of each position.
        target_logsumexp: The same for the teacher; for a target of probabilities, the logarithm of their sum.
        target_entropy: Entropy of the teacher's distribution in nats, of each position; of a target of probabilities
            as they are, whatever their sum.
        agreement: Whether student and teacher have the largest value at the same class; the first of equal ones counts.

    """

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    input_logsumexp: Tensor
    target_logsumexp: Tensor
    target_entropy: Tensor
    agreement: Tensor


def standardized(logits: Tensor, dim: int, dtype: torch.dtype, counts: Tensor | None) -> Tensor:
    """Return the logits of each position with mean 0 and unbiased standard deviation 1.

    Positions that do not count become 0 and get a gradient of 0, whatever they hold.
    """
    values = logits.to(dtype)
    if counts is not None:
        values = torch.where(counts.unsqueeze(dim), values, 0.0)
    values = values - values.mean(dim, keepdim=True)
    spread = root(values.square().sum(dim, keepdim=True) / (logits.shape[dim] - 1))
    return values / (spread + 1e-7)


class Call:
    """A call of one of the functions: its tensors with the classes in one dimension, and its checked options."""

    def __init__(
        self,
        input: Tensor,
        target: Tensor,
        labels: Tensor | None = None,
        *,
        dim: int | Sequence[int] | None,
        reduction: str,
        position_weight: Tensor | None = None,
        class_weight: Tensor | None = None,
        label_smoothing: float | Tensor = 0.0,
        target_type: str = "logits",
        ignore_index: int = -100,
        ignore_index_in: str = "both",
        return_parts: bool = False,
    ) -> None:
        _checks.check_choice("target_type", target_type, ("logits", "log_probs", "probs"))
        _checks.check_choice("ignore_index_in", ignore_index_in, ("both", "cross_entropy"))
        if type(ignore_index) is not int:
            _checks.check_integer("ignore_index", ignore_index)
            ignore_index = operator.index(ignore_index)
        input, target, labels, dim = checks.joined(input, target, labels, dim, reduction)
        self.dim = checks.check_logits(input, target, labels, dim, reduction)
        positions = input.shape[: self.dim] + input.shape[self.dim + 1 :]
        dtype = compute_dtype(input, target)
        self.input, self.target, self.labels = input, target, labels
        self.position_weight = _positions.checked_position_weight(position_weight, input, positions, dtype)
        self.class_weight = checked_class_weight(class_weight, input, labels, input.shape[self.dim], dtype)
        self.label_smoothing = checks.checked_smoothing(label_smoothing, input, labels)
        self.target_type, self.reduction, self.return_parts = target_type, reduction, return_parts
        self.ignore_index, self.ignored_by_divergence = ignore_index, ignore_index_in == "both"

    @property
    def is_plain(self) -> bool:
        """Whether the op without options computes it."""
        return (
            self.position_weight is None
            and self.class_weight is None
            and type(self.label_smoothing) is float
            and self.label_smoothing == 0
            and self.target_type == "logits"
            and not self.return_parts
            and self.ignored_by_divergence
            and not (self.labels is not None and self.labels.is_floating_point())
        )

    def standardize(self) -> None:
        """Standardize the logits of both sides; see :func:`standardized`."""
        if self.target_type != "logits":
            raise ValueError(
                f"standardize=True needs the teacher's logits, but target_type is {self.target_type!r}; leave one out"
            )
        if self.input.shape[self.dim] < 2:
            raise ValueError("standardize=True needs two classes or more, but input has 1")
        counts = None if self.position_weight is None else self.position_weight != 0
        if self.ignored_by_divergence and self.labels is not None and not self.labels.is_floating_point():
            labelled = self.labels != self.ignore_index
            counts = labelled if counts is None else counts & labelled
        dtype = compute_dtype(self.input, self.target)
        self.input, self.target = (standardized(side, self.dim, dtype, counts) for side in (self.input, self.target))

    def run_standardized(
        self, divergence: str, divergence_weight: float | Tensor, label_weight: float | Tensor, **options: Any
    ) -> Any:
        """Return the loss whose divergence has standardized logits, and whose cross-entropy has the logits as given."""
        of_labels = copy.copy(self)
        self.standardize()
        loss = self.run(divergence, divergence_weight=divergence_weight, **options)
        if self.labels is None:
            return loss
        cross_entropy = of_labels.run(divergence, divergence_weight=0.0, label_weight=label_weight, **options)
        if not self.return_parts:
            return loss + cross_entropy
        return loss._replace(loss=loss.loss + cross_entropy.loss, cross_entropy=cross_entropy.cross_entropy)

    def run(
        self,
        divergence: str,
        *,
        temperature: float | Tensor,
        divergence_weight: float | Tensor = 1.0,
        label_weight: float | Tensor = 0.0,
        beta: float | Tensor = 0.5,
    ) -> Any:
        """Return the loss, or the loss with its parts."""
        input, target = self.input, self.target
        numbers = (temperature, divergence_weight, label_weight, beta)
        scalars = tuple(_checks.scalar_tensor(number, input) for number in numbers)
        if self.is_plain and divergence in ("forward_kl", "reverse_kl", "js", "clamped_js"):
            backend = FORWARD.choose(input.device)
            if _registry.checks_values(input.device):
                reference.check_values(self.labels, scalars[0], scalars[3], input.shape[self.dim], self.ignore_index)
            plain = (self.dim, divergence, self.reduction, self.ignore_index)
            save = what_to_save(backend, input, target, scalars[0])
            return FORWARD.run(backend, input, target, self.labels, *scalars, *plain, save)[0]
        backend = LOSS.choose(input.device)
        smoothing = _checks.scalar_tensor(self.label_smoothing, input)
        weights = (self.position_weight, self.class_weight)
        options = (self.dim, divergence, self.target_type, self.reduction, self.ignore_index)
        arguments: tuple[Any, ...] = (input, target, self.labels, *weights, *scalars, smoothing, *options)
        arguments = (*arguments, self.ignored_by_divergence)
        if _registry.checks_values(input.device):
            loss_reference.check_values(Arguments(*arguments))
        learned = self.labels is not None and self.labels.requires_grad
        save = "nothing" if learned or input.device.type != "cpu" else what_to_save(backend, input, target, scalars[0])
        loss, _, parts = LOSS.run(backend, *arguments, self.return_parts, save)
        return self._with_parts(loss, parts) if self.return_parts else loss

    def _with_parts(self, loss: Tensor, parts: Tensor) -> DivergenceParts:
        cross_entropy, divergence, input_logsumexp, target_logsumexp, entropy, agreement = parts.unbind()
        weight = parts.new_ones(parts.shape[1:]) if self.position_weight is None else self.position_weight
        of_labels = of_divergence = by_label = weight
        if self.labels is not None and not self.labels.is_floating_point():
            of_labels = by_label = torch.where(self.labels != self.ignore_index, weight, 0.0)
            of_divergence = of_labels if self.ignored_by_divergence else weight
            if self.class_weight is not None:
                by_label = of_labels * self.class_weight[self.labels.clamp(0, self.input.shape[self.dim] - 1)]
        batch = self.input.shape[0]
        if self.reduction == "none":
            cross_entropy, divergence = of_labels * cross_entropy, of_divergence * divergence
        else:
            cross_entropy = (of_labels * cross_entropy).sum() / _positions.divisor(self.reduction, by_label, batch)
            divergence = _positions.reduced(divergence, of_divergence, self.reduction, batch)
        return DivergenceParts(
            loss, cross_entropy, divergence, input_logsumexp, target_logsumexp, entropy, agreement != 0
        )


def divergence_loss(
    input: Tensor, target: Tensor, divergence: str, *, temperature: float | Tensor, dim: int | Sequence[int] | None,
    reduction: str, beta: float | Tensor = 0.5, beta_name: str = "beta", position_weight: Tensor | None,
    target_type: str, standardize: bool, return_parts: bool,
) -> Any:  # fmt: skip
    """Return a divergence without labels, from the arguments of a public function."""
    call = Call(
        input, target, dim=dim, reduction=reduction, position_weight=position_weight, target_type=target_type,
        return_parts=return_parts,
    )  # fmt: skip
    if standardize:
        call.standardize()
    temperature = checks.check_temperature(temperature, input)
    beta = _checks.check_scalar(beta_name, beta, input, minimum=0, maximum=1)
    return call.run(divergence, temperature=temperature, beta=beta)
