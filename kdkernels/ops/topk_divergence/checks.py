"""Checks of the arguments that need no values of tensors."""

import operator

import torch
from torch import Tensor

from kdkernels.ops._checks import check_choice, check_dense, check_floating, check_same_device
from kdkernels.ops._positions import REDUCTIONS


def check_arguments(
    input: Tensor,
    values: Tensor,
    indices: Tensor,
    values_type: str,
    target_logsumexp: Tensor | None,
    tail: str,
    reverse: bool,
    reduction: str,
) -> None:
    """Raise unless the tensors fit together and the options are known."""
    check_floating("input", input)
    check_floating("values", values)
    _check_indices(indices)
    check_choice("values_type", values_type, ("log_probs", "logits"))
    check_choice("tail", tail, ("bucket", "renormalize", "ignore"))
    check_choice("reduction", reduction, REDUCTIONS)
    _check_flag("reverse", reverse)
    check_same_device("input", input, "values", values)
    check_same_device("input", input, "indices", indices)
    _check_shapes(input, values, indices)
    if target_logsumexp is not None:
        _check_logsumexp(target_logsumexp, input, values_type)
    elif values_type == "logits" and tail != "renormalize":
        raise ValueError(
            f"target_logsumexp is missing, which values_type='logits' needs with tail={tail!r}: pass "
            "torch.logsumexp(logits / temperature, -1) of the teacher's full rows, or tail='renormalize'"
        )


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def _check_indices(indices: object) -> None:
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a tensor, got {type(indices).__name__}")
    check_dense("indices", indices)
    if indices.dtype not in (torch.int64, torch.int32):
        real = not indices.is_complex() and indices.dtype != torch.bool
        remedy = "; are values and indices exchanged?" if indices.is_floating_point() else "; pass indices.long()"
        raise TypeError(f"indices must be int64 or int32, got {indices.dtype}{remedy if real else ''}")


def _check_shapes(input: Tensor, values: Tensor, indices: Tensor) -> None:
    if input.dim() == 0:
        raise ValueError("input has no dimensions; expected at least one, for the classes")
    classes = input.shape[-1]
    if classes == 0:
        raise ValueError(f"input has 0 classes: shape {tuple(input.shape)}, of which the last dimension is the classes")
    if values.shape[:-1] != input.shape[:-1] or values.dim() != input.dim():
        raise ValueError(
            f"values have shape {tuple(values.shape)}; expected {(*input.shape[:-1], 'K')}, K classes per position "
            f"of input, whose shape is {tuple(input.shape)} with the classes last".replace("'K'", "K")
        )
    if indices.shape != values.shape:
        raise ValueError(
            f"indices have shape {tuple(indices.shape)} and values {tuple(values.shape)}; they must be the same"
        )
    if not 1 <= values.shape[-1] <= classes:
        raise ValueError(
            f"values list K = {values.shape[-1]} classes per position; expected 1 to {classes}, the classes of input"
        )


def _check_logsumexp(target_logsumexp: object, input: Tensor, values_type: str) -> None:
    check_floating("target_logsumexp", target_logsumexp)
    assert isinstance(target_logsumexp, Tensor)
    if values_type == "log_probs":
        raise ValueError(
            "target_logsumexp applies to values_type='logits'; log-probabilities have it in them: leave it out, or "
            "pass values_type='logits'"
        )
    if target_logsumexp.shape != input.shape[:-1]:
        kept = target_logsumexp.shape == (*input.shape[:-1], 1)
        remedy = "; pass target_logsumexp.squeeze(-1)" if kept else ""
        raise ValueError(
            f"target_logsumexp has shape {tuple(target_logsumexp.shape)}; expected one number per position, "
            f"{tuple(input.shape[:-1])}{remedy}"
        )
    check_same_device("input", input, "target_logsumexp", target_logsumexp)


def check_masses(return_masses: bool, values_type: str, target_logsumexp: Tensor | None) -> None:
    """Raise if the teacher's mass is asked for and cannot be known."""
    _check_flag("return_masses", return_masses)
    if return_masses and values_type == "logits" and target_logsumexp is None:
        raise ValueError(
            "return_masses=True needs target_logsumexp with values_type='logits': without it the teacher's mass is not "
            "known; pass torch.logsumexp(logits / temperature, -1) of the teacher's full rows"
        )


def check_teacher(logits: Tensor, k: object) -> int:
    """Return the number of classes to keep, or raise."""
    check_floating("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits have no dimensions; expected at least one, for the classes")
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(f"k must be an integer, got {k!r}")
    count = operator.index(k)
    if not 1 <= count <= logits.shape[-1]:
        raise ValueError(
            f"k is {count}; expected 1 to {logits.shape[-1]}, the last dimension of logits of shape "
            f"{tuple(logits.shape)}"
        )
    return count
