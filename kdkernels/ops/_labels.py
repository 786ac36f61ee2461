"""What losses with a cross-entropy share: checks of labels, of the weights of classes, and of the two terms."""

import torch
from torch import Tensor

from kdkernels.ops._autograd import savable
from kdkernels.ops._checks import check_dense, check_floating, check_same_device, number_of


def check_label_type(labels: object) -> None:
    """Raise unless labels are class indices, or floating-point numbers, the probabilities of the classes."""
    if isinstance(labels, Tensor) and (labels.dtype == torch.int64 or labels.is_floating_point()):
        check_dense("labels", labels)
        return
    got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
    integers = isinstance(labels, Tensor) and not labels.is_complex()
    raise TypeError(
        f"labels must be a tensor of class indices, torch.int64, or of the probabilities of the classes, got {got}"
        f"{'; pass labels.long()' if integers else ''}"
    )


def checked_class_weight(
    weight: Tensor | None, input: Tensor, labels: Tensor | None, classes: int, dtype: torch.dtype
) -> Tensor | None:
    """Return the weight of each class as contiguous numbers of a dtype, or raise."""
    if weight is None:
        return None
    check_floating("class_weight", weight)
    if labels is None:
        raise ValueError("class_weight applies to the cross-entropy, but there are no labels; pass labels")
    if weight.shape != (classes,):
        raise ValueError(f"class_weight has shape {tuple(weight.shape)}; expected one weight per class, ({classes},)")
    check_same_device("input", input, "class_weight", weight)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("class_weight requires grad, but no gradient is computed for it; detach it")
    return savable(weight.detach().to(dtype).contiguous())


def checked_term_weights(
    labels: Tensor | None, kd_weight: float | Tensor | None, ce_weight: float | Tensor | None
) -> tuple[float | Tensor, float | Tensor]:
    """Return the weights of the divergence and of the cross-entropy, with their defaults."""
    if labels is None:
        if ce_weight is not None and (number := number_of(ce_weight)) != 0:
            raise ValueError(f"ce_weight is {number!r}, but there are no labels; pass labels or leave it out")
        return 1.0 if kd_weight is None else kd_weight, 0.0
    if kd_weight is None and ce_weight is None:
        return 0.9, 0.1
    if kd_weight is None or ce_weight is None:
        given = "ce_weight" if kd_weight is None else "kd_weight"
        raise ValueError(f"{given} alone was given; with labels give both kd_weight and ce_weight, or neither")
    return kd_weight, ce_weight
