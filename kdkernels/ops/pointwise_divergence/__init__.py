"""Divergences of single elements: ``F.kl_div``, its Jensen-Shannon counterpart, and the KL of sigmoid heads.

``autograd.py`` defines the op, one for all formulas: it reads each side once and writes each gradient once.
"""

from typing import Literal

import torch
from torch import Tensor

from kdkernels.ops import _checks
from kdkernels.ops._legacy import legacy_reduction
from kdkernels.ops._numerics import compute_dtype
from kdkernels.ops._positions import REDUCTIONS
from kdkernels.ops._types import Reduction
from kdkernels.ops.pointwise_divergence.autograd import compute
from kdkernels.ops.pointwise_divergence.weights import checked_element_weight

# Passes over a side in memory, forward and backward: R R and R R W; the gradient of F.kl_div's input needs no input.
PASSES = {"kl_div": (2, 2), "js_div": (2, 3), "binary_kl_div_with_logits": (2, 3)}


def _check_sides(input: Tensor, target: Tensor, reduction: str) -> None:
    _checks.check_floating("input", input)
    _checks.check_floating("target", target)
    _checks.check_same_device("input", input, "target", target)
    _checks.check_choice("reduction", reduction, REDUCTIONS)


def _reduced(
    input: Tensor, target: Tensor, weight: Tensor | None, temperature: Tensor, beta: Tensor, divergence: str,
    reduction: str, batch: int,
) -> Tensor:  # fmt: skip
    if reduction != "batchmean":
        return compute(input, target, weight, temperature, beta, divergence, reduction)
    return compute(input, target, weight, temperature, beta, divergence, "sum") / max(batch, 1)


def _one(like: Tensor) -> Tensor:
    return _checks.scalar_tensor(1.0, like)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    log_target: bool = False,
) -> Tensor:
    r"""``torch.nn.functional.kl_div``, with a gradient for both sides in one pass and in any memory layout.

    With the student's log-probabilities x = ``input`` and the teacher's probabilities p = ``target``, an element gives

    .. math:: p\,(\ln p - x), \qquad \text{or} \quad e^{t}\,(t - x)

    for a target t of log-probabilities, ``log_target=True``. Nothing is normalized, and an element may be negative: the
    sum over the classes is a divergence if both sides are distributions. For logits, :func:`kl_div_with_logits` is
    faster and never negative. Source: Kullback and Leibler, "On Information and Sufficiency", 1951.

    Args:
        input: Log-probabilities, any shape; fp16, bf16, fp32 or fp64, any strides.
        target: Probabilities, or log-probabilities. The two shapes are broadcast as by ``F.kl_div``; dtypes may differ.
        size_average: Deprecated, as in PyTorch: False means ``reduction="sum"``. It overrides ``reduction`` and warns.
        reduce: Deprecated, as in PyTorch: False means ``reduction="none"``.
        reduction: ``"none"`` (every class has its own value), ``"mean"`` (over all elements, the classes included: not
            a divergence), ``"sum"``, or ``"batchmean"`` (the sum divided by ``input.size(0)``).
        log_target: Whether the target holds log-probabilities.

    Returns:
        The loss in fp32, or fp64 if a side is fp64. PyTorch's own is in 16 bits for 16-bit inputs outside autocast.

    Special values: an element with target probability 0 is 0, and so are its gradients, also where ``F.kl_div`` has
    NaN: at an input of -inf, or with ``log_target`` a target of -inf. Probabilities below the smallest normal number
    count as 0. Where only the input is -inf, the loss is +inf and the gradient of the input -p. A negative probability
    gives NaN. Without elements every reduction gives 0.

    Raises:
        TypeError: A side is not a floating-point tensor.
        ValueError: The shapes cannot be broadcast, devices differ, or the reduction is not accepted.

    Example:
        >>> log_q = torch.randn(8, 10, requires_grad=True).log_softmax(1)
        >>> loss = kl_div(log_q, torch.randn(8, 10).softmax(1), reduction="batchmean")
        >>> loss.backward()

    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    _check_sides(input, target, reduction)
    batch = input.shape[0] if input.dim() else 1
    if input.shape != target.shape:
        try:
            input, target = torch.broadcast_tensors(input, target)
        except RuntimeError:
            raise ValueError(
                f"input has shape {tuple(input.shape)} and target {tuple(target.shape)}, which cannot be broadcast"
            ) from None
    one = _one(input)
    return _reduced(input, target, None, one, one, "kl_log" if log_target else "kl", reduction, batch)


def js_div(
    input: Tensor,
    target: Tensor,
    *,
    beta: float | Tensor = 0.5,
    position_weight: Tensor | None = None,
    reduction: Reduction = "batchmean",
) -> Tensor:
    r"""Generalized Jensen-Shannon divergence of two tensors of log-probabilities, element by element.

    With the teacher's p = exp(target), the student's q = exp(input) and :math:`m = \beta p + (1-\beta) q`, each element
    gives

    .. math:: \beta\, p \ln\frac pm + (1-\beta)\, q \ln\frac qm \;\ge\; 0,

    computed from the difference of the logarithms: 0 where they are equal, and right where both underflow. ``beta=0``
    gives the elements of KL(p || q), :math:`p \ln(p/q)`, and ``beta=1`` those of KL(q || p), as in
    :func:`js_div_with_logits`, which takes logits and is faster. Sources: Lin, "Divergence measures based on the
    Shannon entropy", 1991; Agarwal et al., arXiv 2306.13649.

    Args:
        input: Student log-probabilities, any shape; fp16, bf16, fp32 or fp64, any strides.
        target: Teacher log-probabilities of the same shape and device; their dtype may differ.
        beta: Teacher's share of the mixture in [0, 1], a number or a 0-dim tensor without gradient.
        position_weight: Weight of each element, a mask or floating-point numbers in the shape of the input; for a
            weight per row, ``weight[..., None].expand_as(input)``, which takes no memory. An element of weight 0 counts
            for nothing, NaN included.
        reduction: ``"none"``, ``"mean"`` (over all elements, or Σ w·loss / Σ w), ``"sum"``, or ``"batchmean"`` (sum /
            ``input.size(0)``).

    Returns:
        The loss in fp32, or fp64 if a side is fp64; 0 without elements. Gradients flow to both sides. An element at
        -inf on both sides is 0 with gradients 0; one at -inf on one side is finite if 0 < beta < 1, and +inf for the
        KL whose weighting side is the other one. Probabilities below the smallest normal number count as 0.

    Raises:
        TypeError: A side or the weight is not a tensor of an accepted dtype, or beta is not a number.
        ValueError: A shape, a device or an option is not accepted, or a weight is negative or not finite (on a GPU the
            loss is then NaN, unless :func:`kdkernels.set_debug` is on).

    Example:
        >>> student, teacher = (torch.randn(8, 10, requires_grad=True).log_softmax(1) for _ in range(2))
        >>> loss = js_div(student, teacher, beta=0.3)
        >>> loss.backward()

    """
    _check_sides(input, target, reduction)
    _checks.check_same_shape("input", input, "target", target)
    beta = _checks.check_scalar("beta", beta, input, minimum=0, maximum=1)
    weight = checked_element_weight(position_weight, input, compute_dtype(input, target))
    batch = input.shape[0] if input.dim() else 1
    return _reduced(input, target, weight, _one(input), _checks.scalar_tensor(beta, input), "js_log", reduction, batch)


def binary_kl_div_with_logits(
    input: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    reverse: bool = False,
    target_type: Literal["logits", "probs"] = "logits",
    position_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Kullback-Leibler divergence of independent yes-or-no outcomes, for sigmoid heads: many labels, detection.

    With :math:`p = \sigma(\text{target}/T)` (teacher) and :math:`q = \sigma(\text{input}/T)` (student), each element is
    a position and gives

    .. math:: p \ln\frac pq + (1-p) \ln\frac{1-p}{1-q},

    or the same with p and q exchanged with ``reverse=True``. It is never negative, 0 for equal logits, and right for
    logits of any size. The gradient is :math:`(q - p)/T` for the student and :math:`p(1-p)(t-s)/T` for the teacher,
    with s and t the logits divided by T. There is no factor :math:`T^2`. Source: Kullback and Leibler, "On Information
    and Sufficiency", 1951.

    Args:
        input: Student logits, any shape; fp16, bf16, fp32 or fp64, any strides.
        target: Teacher logits, or probabilities, of the same shape and device; their dtype may differ.
        temperature: T > 0, a number or a 0-dim tensor, which gets its gradient if it requires one.
        reverse: Whether to compute KL(student || teacher) instead of KL(teacher || student).
        target_type: ``"logits"``, or ``"probs"`` for probabilities in [0, 1], which the temperature does not change:
            it divides the student's logits alone.
        position_weight: Weight of each element, a mask or floating-point numbers in the shape of the input. An element
            of weight 0 counts for nothing, NaN included.
        reduction: ``"none"``, ``"mean"`` (over the elements, or Σ w·loss / Σ w), ``"sum"``, or ``"batchmean"`` (sum /
            ``input.size(0)``).

    Returns:
        The loss in fp32, or fp64 if a side is fp64; 0 if there are no elements or no weight. Gradients flow to both
        sides.

    Special values: an outcome of probability 0 in the weighting distribution adds exactly 0. Where only the other
    distribution excludes an outcome, with a logit of ±inf or a probability of 0 or 1, the loss is +inf; the gradients
    of the weighting side and of a learned temperature are 0 there. Probabilities below the smallest normal number count
    as 0. The gradient of a target probability of 0 or 1 is 0.

    Raises:
        TypeError: A side or the weight is not a tensor of an accepted dtype, or the temperature is not a number.
        ValueError: A shape, a device or an option is not accepted, a weight is negative or not finite, or a target
            probability is outside [0, 1] (on a GPU the loss is then NaN, unless :func:`kdkernels.set_debug` is on).

    Example:
        >>> student, teacher = torch.randn(8, 20, requires_grad=True), torch.randn(8, 20)
        >>> loss = binary_kl_div_with_logits(student, teacher, temperature=2.0)
        >>> loss.backward()

    """
    _check_sides(input, target, reduction)
    _checks.check_same_shape("input", input, "target", target)
    _checks.check_choice("target_type", target_type, ("logits", "probs"))
    temperature = _checks.check_scalar("temperature", temperature, input, minimum=0, grad=True)
    weight = checked_element_weight(position_weight, input, compute_dtype(input, target))
    divergence = ("reverse_" if reverse else "") + ("binary_kl" if target_type == "logits" else "binary_kl_probs")
    batch = input.shape[0] if input.dim() else 1
    scalars = _checks.scalar_tensor(temperature, input), _one(input)
    return _reduced(input, target, weight, *scalars, divergence, reduction, batch)
