"""What a call of the op asks for, in the order of its schema."""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kdkernels.ops._numerics import compute_dtype


@dataclass(frozen=True)
class Arguments:
    """The arguments of the op but for the gradients; the first six get one."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor | None
    target_linear_weight: Tensor | None
    target_linear_bias: Tensor | None
    labels: Tensor | None
    position_weight: Tensor | None
    class_weight: Tensor | None
    target_indices: Tensor | None
    temperature: Tensor
    divergence_weight: Tensor
    label_weight: Tensor
    beta: Tensor
    label_smoothing: Tensor
    logit_scale: float
    softcap: float
    target_logit_scale: float
    target_softcap: float
    divergence: str
    target_type: str
    tail: str
    reduction: str
    ignore_index: int
    ignored_by_divergence: bool
    is_plain: bool
    memory_budget: int

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The tensors that may get a gradient."""
        return (
            self.input, self.linear_weight, self.linear_bias, self.target, self.target_linear_weight,
            self.target_linear_bias,
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that is computed in."""
        soft = (self.labels,) if self.soft_labels else ()
        return compute_dtype(*(t for t in (*self.differentiable, *soft) if t is not None))

    @property
    def soft_labels(self) -> bool:
        """Whether labels are probabilities rather than class indices."""
        return self.labels is not None and self.labels.is_floating_point()

    @property
    def positions(self) -> torch.Size:
        """Shape of the positions."""
        return self.input.shape[:-1]

    @property
    def rows(self) -> int:
        """Number of positions."""
        return math.prod(self.positions)

    @property
    def classes(self) -> int:
        """Size of the vocabulary."""
        return self.linear_weight.shape[0]

    @property
    def logits_op(self) -> str:
        """Name of the op that computes the loss of logits."""
        return "softmax_divergence" if self.is_plain else "softmax_loss"

    def logits_options(self, reduction: str) -> tuple[object, ...]:
        """Return the options of that op, for logits [rows, classes]."""
        if self.is_plain:
            return 1, self.divergence, reduction, self.ignore_index
        return 1, self.divergence, self.target_type, reduction, self.ignore_index, self.ignored_by_divergence


COUNT = len(fields(Arguments))
TENSORS = 15
DIFFERENTIABLE = 6
SIGNATURE = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor? target, Tensor? target_linear_weight, "
    "Tensor? target_linear_bias, Tensor? labels, Tensor? position_weight, Tensor? class_weight, "
    "Tensor? target_indices, Tensor temperature, Tensor divergence_weight, Tensor label_weight, Tensor beta, "
    "Tensor label_smoothing, float logit_scale, float softcap, float target_logit_scale, float target_softcap, "
    "str divergence, str target_type, str tail, str reduction, int ignore_index, bool ignored_by_divergence, "
    "bool is_plain, int memory_budget"
)
