"""Checks of the arguments that need no values of tensors."""

import math
from typing import Any

import torch
from torch import Tensor

from kdkernels.ops._checks import (
    check_choice,
    check_floating,
    check_integer,
    check_number,
    check_same_device,
    number_of,
)
from kdkernels.ops._labels import check_label_type


def autocast(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor as ``F.linear`` takes it under autocast."""
    if tensor is None or not isinstance(tensor, Tensor):
        return tensor
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not tensor.is_floating_point() or not torch.amp.is_autocast_available(device):
        return tensor
    if not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _check_layer(hidden_name: str, hidden: Tensor, prefix: str, weight: Tensor, bias: Tensor | None) -> None:
    name = f"{prefix}linear_weight"
    check_floating(name, weight)
    check_same_device("input", hidden, name, weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        transposed = weight.dim() == 2 and weight.shape[0] == hidden.shape[-1]
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}; expected (classes, {hidden.shape[-1]}), for {hidden_name} of "
            f"shape {tuple(hidden.shape)}{f'; pass {name}.t()' if transposed else ''}"
        )
    if bias is None:
        return
    check_floating(f"{prefix}linear_bias", bias)
    check_same_device("input", hidden, f"{prefix}linear_bias", bias)
    if bias.shape != (weight.shape[0],):
        raise ValueError(
            f"{prefix}linear_bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},), one number per class"
        )


def check_sides(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor | None,
    target_linear_weight: Tensor | None, target_linear_bias: Tensor | None, target_indices: Tensor | None,
    target_type: str, kd_weight: Any,
) -> None:  # fmt: skip
    """Check hidden states and linear layers of both sides."""
    check_floating("input", input)
    if input.dim() == 0:
        raise ValueError("input has no dimensions; expected hidden states [..., H]")
    _check_layer("input", input, "", linear_weight, linear_bias)
    classes = linear_weight.shape[0]
    if classes == 0:
        raise ValueError("linear_weight has 0 classes")
    check_choice("target_type", target_type, ("logits", "log_probs", "probs"))
    if target is None:
        if target_linear_weight is not None or target_linear_bias is not None:
            raise ValueError("target_linear_weight was given without target; pass the teacher's hidden states")
        if (number := number_of(kd_weight)) != 0:
            raise ValueError(
                f"target is None, but kd_weight is {'its default' if number is None else repr(number)}; pass a "
                "teacher, or kd_weight=0 for the cross-entropy alone"
            )
        return
    check_floating("target", target)
    check_same_device("input", input, "target", target)
    if target.dim() == 0 or target.shape[:-1] != input.shape[:-1]:
        raise ValueError(
            f"target has shape {tuple(target.shape)} and input {tuple(input.shape)}; they must be the same but for the "
            "last dimension"
        )
    if target_linear_weight is None:
        if target_linear_bias is not None:
            raise ValueError("target_linear_bias was given without target_linear_weight")
        if target_indices is not None:
            return
        if target.shape[-1] != classes:
            raise ValueError(
                f"target has {target.shape[-1]} classes and linear_weight {classes}: without target_linear_weight, "
                "target holds logits or probabilities of the same classes; pass target_linear_weight if it holds "
                f"hidden states{_slices(target.shape[-1], classes, 'target[..., ', 'linear_weight[')}"
            )
        return
    if isinstance(target_linear_weight, Tensor) and target_linear_weight.dtype == torch.int64:
        raise TypeError(
            "target_linear_weight must be floating-point, got torch.int64; pass class indices by name, as labels=... "
            "or target_indices=..."
        )
    if target_indices is not None:
        raise ValueError("target_indices makes target the values of these classes; leave target_linear_weight out")
    if target_type != "logits":
        raise ValueError(
            f"target_type is {target_type!r}, but target_linear_weight makes logits of target; leave one of them out"
        )
    _check_layer("target", target, "target_", target_linear_weight, target_linear_bias)
    if target_linear_weight.shape[0] != classes:
        raise ValueError(
            f"linear_weight has {classes} classes and target_linear_weight {target_linear_weight.shape[0]}; they must "
            f"be the same{_slices(target_linear_weight.shape[0], classes, 'target_linear_weight[', 'linear_weight[')}"
        )


def checked_indices(
    indices: Tensor | None, target: Tensor | None, target_type: str, divergence: str, tail: str
) -> Tensor | None:
    """Return the classes of a teacher of whom only some are known, or raise."""
    check_choice("tail", tail, ("bucket", "renormalize", "ignore"))
    if indices is None:
        if tail != "bucket":
            raise ValueError(f"tail is {tail!r}, but there are no target_indices; pass them or leave it out")
        return None
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"target_indices must be a tensor of class indices, torch.int64 or torch.int32, got {got}")
    if target is None or indices.shape != target.shape:
        shape = None if target is None else tuple(target.shape)
        raise ValueError(f"target_indices has shape {tuple(indices.shape)}; expected that of target, {shape}")
    check_same_device("target", target, "target_indices", indices)
    if target_type != "log_probs":
        raise ValueError(
            f"target_type is {target_type!r}; with target_indices, target holds log-probabilities at the temperature, "
            "as topk_teacher returns them: pass target_type='log_probs'"
        )
    if divergence == "js":
        raise ValueError("divergence is 'js'; with target_indices, accepted are 'forward_kl', 'reverse_kl'")
    return indices.long()


def _slices(of_target: int, of_input: int, target: str, input: str) -> str:
    """Return the remedy for vocabularies of different lengths."""
    longer, classes = (target, of_input) if of_target > of_input else (input, of_target)
    return f"; if the first {classes} classes are the same, pass {longer}:{classes}]"


def checked_labels(labels: Tensor | None, input: Tensor, classes: int) -> Tensor | None:
    """Return class indices, one for each position, or the probability of each class, or raise."""
    if labels is None:
        return None
    check_label_type(labels)
    soft = labels.is_floating_point()
    check_same_device("input", input, "labels", labels)
    expected = (*input.shape[:-1], classes) if soft else tuple(input.shape[:-1])
    if labels.shape != expected:
        raise ValueError(
            f"labels of dtype {labels.dtype} have shape {tuple(labels.shape)}; expected {expected}, "
            + ("the probabilities of the classes at each position" if soft else "input's shape without the last one")
        )
    if soft and labels.requires_grad and torch.is_grad_enabled():
        raise ValueError("labels require grad, but no gradient is computed for them; detach them")
    return labels


def check_target_head(target_linear_weight: Tensor | None, **options: float | None) -> None:
    """Raise if an option of the teacher's linear layer was given, but the layer was not."""
    for name, value in options.items():
        if value is not None and target_linear_weight is None:
            raise ValueError(
                f"{name} is {value!r}, but without target_linear_weight a teacher's logits are taken as they are; "
                "leave it out"
            )


def checked_cap(name: str, value: object) -> float:
    """Return the bound of the logits as a number, 0 for none: None or infinity."""
    if value is None or (isinstance(value, float) and value == math.inf):
        return 0.0
    return checked_scale(name, value)


def checked_scale(name: str, value: object) -> float:
    """Return a positive constant of a model as a number, or raise."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} is a tensor; expected a number, such as float({name})")
    check_number(name, value)
    number = float(value)  # type: ignore[arg-type]
    if not 0 < number < math.inf:
        raise ValueError(f"{name} is {number!r}; expected a positive, finite number")
    return number


def checked_budget(budget: int | None, input: Tensor) -> int:
    """Return the budget in bytes, by default 256 MiB on a CPU and 1 GiB on another device."""
    if budget is None:
        return (256 if input.device.type == "cpu" else 1024) << 20
    check_integer("memory_budget", budget, minimum=1)
    return int(budget)
