"""The loss of blocks of logits, computed by the ops that also serve whole logits."""

from typing import Any

import torch
from torch import Tensor

from kdkernels.ops import _loader, _registry
from kdkernels.ops.linear_distillation import reference
from kdkernels.ops.linear_distillation.arguments import Arguments
from kdkernels.ops.linear_distillation.layers import Rows


class LossOfLogits:
    """The loss of blocks of logits, by the op that serves the options of the call."""

    def __init__(self, given: Arguments, backend: str) -> None:
        self.given, self.backend = given, backend
        self.forward = _registry.find(given.logits_op)
        self.backward = _registry.find(f"{given.logits_op}_backward")
        self.is_reduced = given.reduction != "none"
        self.options = given.logits_options("sum" if self.is_reduced else "none")
        self.labels = None
        if given.labels is not None:
            self.labels = Rows(given.labels if given.soft_labels else given.labels.unsqueeze(-1))
        self.weight = None if given.position_weight is None else given.position_weight.flatten()
        of_divergence, of_labels = reference.divisors(given)
        # In fp64, so that a weight given in fp32 loses nothing
        exact = torch.float32 if given.input.device.type == "mps" else torch.float64
        weights = (
            given.divergence_weight.to(exact) / of_divergence,
            given.label_weight.to(exact) / of_labels,
        )
        self.scalars = (given.temperature, *weights, given.beta)
        native = _loader.native_kernels(given.input.device.type)
        self.statistics = given.is_plain and (backend == "triton" or (backend == "native" and native == "cuda"))

    def _arguments(self, logits: Tensor, target: Tensor, begin: int, end: int) -> tuple[Any, ...]:
        labels = None if self.labels is None else self.labels(begin, end)
        if labels is not None and not self.given.soft_labels:
            labels = labels.flatten()
        if self.given.is_plain:
            return (logits, target, labels, *self.scalars, *self.options)
        weights = (None if self.weight is None else self.weight[begin:end], self.given.class_weight)
        return (logits, target, labels, *weights, *self.scalars, self.given.label_smoothing, *self.options)

    def _run(self, arguments: tuple[Any, ...], save: str) -> tuple[Tensor, Tensor]:
        more = (save,) if self.given.is_plain else (False, save)
        loss, saved, *_ = self.forward.compute(self.backend, *arguments, *more)
        return loss, saved

    def value(self, logits: Tensor, target: Tensor, begin: int, end: int) -> Tensor:
        """Return the loss of some rows."""
        return self._run(self._arguments(logits, target, begin, end), "nothing")[0]

    def gradients(
        self, logits: Tensor, target: Tensor, begin: int, end: int, grad_output: Tensor | None, of_target: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of some rows, and the gradients of both sides."""
        arguments = self._arguments(logits, target, begin, end)
        if grad_output is None and not of_target and not self.statistics:
            loss, gradient = self._run(arguments, "gradient")
            return loss, gradient, gradient
        loss, statistics = logits.new_zeros(()), None
        if grad_output is None:
            loss, statistics = self._run(arguments, "statistics" if self.statistics else "nothing")
            grad_output = torch.ones_like(loss)
        if self.given.is_plain:
            arguments = (statistics if self.statistics else None, *arguments)
        more = (True, of_target, *((False,) if self.given.is_plain else ()))
        backend = self.backend if self.given.target_type == "logits" or not of_target else "reference"
        of_input, of_teacher, *_ = self.backward.compute(backend, grad_output, *arguments, *more)
        return loss, of_input, of_teacher


class LossOfTopClasses:
    """The loss of blocks of logits from a teacher of whom only some classes are known, and from the labels."""

    def __init__(self, given: Arguments, backend: str) -> None:
        self.given = given
        self.forward, self.backward = (_registry.find(f"topk_divergence{end}") for end in ("", "_backward"))
        self.backend = backend if self.forward.available(backend, given.input.device) else "reference"
        self.reduction = "none" if given.reduction == "none" else "sum"
        assert given.target_indices is not None
        self.indices = Rows(given.target_indices)
        weight = reference.divergence_weight_of_rows(given)
        self.weight = None if weight is None else weight.flatten()
        factor = given.divergence_weight / reference.divisors(given)[0]
        self.factor = factor.to(given.dtype)
        self.of_labels = None
        if given.labels is not None:
            self.of_labels = LossOfLogits(reference.of_labels_alone(given), backend)

    def _arguments(self, logits: Tensor, target: Tensor, begin: int, end: int) -> tuple[Any, ...]:
        values, indices = target.to(self.given.dtype).contiguous(), self.indices(begin, end).contiguous()
        weight = None if self.weight is None else self.weight[begin:end]
        return (logits, values, indices, weight, self.given.temperature, self.given.tail,
                self.given.divergence == "reverse_kl", self.reduction)  # fmt: skip

    def value(self, logits: Tensor, target: Tensor, begin: int, end: int) -> Tensor:
        """Return the loss of some rows."""
        arguments = self._arguments(logits, target, begin, end)
        loss = reference.times(self.factor, self.forward.compute(self.backend, *arguments, False)[0])
        return loss if self.of_labels is None else loss + self.of_labels.value(logits, logits, begin, end)

    def gradients(
        self, logits: Tensor, target: Tensor, begin: int, end: int, grad_output: Tensor | None, of_target: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of some rows, and the gradients of both sides."""
        arguments = self._arguments(logits, target, begin, end)
        loss, _, _, rest = self.forward.compute(self.backend, *arguments, False)
        incoming = torch.ones_like(loss) if grad_output is None else grad_output
        sides = self.backward.compute(self.backend, incoming * self.factor, rest, *arguments, True, of_target)
        loss = reference.times(self.factor, loss)
        if self.of_labels is None:
            return loss, *sides
        by_label, of_label, _ = self.of_labels.gradients(logits, logits, begin, end, grad_output, False)
        return loss + by_label, sides[0].add_(of_label), sides[1]
