"""Losses that treat the class of the label apart from the others: decoupled and normalized distillation."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kdkernels.ops import _checks
from kdkernels.ops._types import Reduction
from kdkernels.ops.softmax_divergence.checks import check_temperature
from kdkernels.ops.softmax_divergence.compute import Call


def _loss(
    divergence: str, input: Tensor, target: Tensor, labels: Tensor, temperature: float | Tensor,
    label_weight: float | Tensor, divergence_weight: float | Tensor, standardize: bool, **options: Any,
) -> Tensor:  # fmt: skip
    """Return weight * term of the label + weight * T^2 * divergence of the others; T^2 is in both if decoupled."""
    decoupled = divergence == "decoupled"
    if labels is None:
        raise TypeError("labels must be a tensor of class indices, torch.int64, got None")
    call = Call(input, target, labels, **options)
    if call.labels.is_floating_point():  # type: ignore[union-attr]
        raise TypeError(
            f"labels are probabilities, {labels.dtype}; this loss needs one class per position: pass class indices, "
            f"such as labels.argmax({call.dim})"
        )
    if call.input.shape[call.dim] < 2:
        raise ValueError(
            f"input has one class: shape {tuple(input.shape)}; this loss compares the class of the label with the "
            "others and needs two or more"
        )
    temperature = check_temperature(temperature, input)
    square: float | Tensor = temperature * temperature
    # The weight of the label's term has no gradient in the op: a learned temperature multiplies the result.
    outside = decoupled and isinstance(square, Tensor) and square.requires_grad
    inside = 1.0 if outside else square
    label_weight = label_weight * inside if decoupled else label_weight
    weights = {"divergence_weight": divergence_weight * inside, "label_weight": label_weight}
    if standardize and decoupled:
        call.standardize()
    run = call.run_standardized if standardize and not decoupled else call.run
    loss = run(divergence, temperature=temperature, **weights)
    if not outside:
        return loss  # type: ignore[no-any-return]
    if call.return_parts:
        return loss._replace(loss=loss.loss * square)  # type: ignore[no-any-return]
    return loss * square  # type: ignore[no-any-return]


def decoupled_distillation_loss(
    input: Tensor,
    target: Tensor,
    labels: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 8.0,
    temperature: float | Tensor = 4.0,
    dim: int | Sequence[int] | None = None,
    ignore_index: int = -100,
    position_weight: Tensor | None = None,
    standardize: bool = False,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor:
    r"""Decoupled knowledge distillation (DKD): the class of the label and the other classes, weighted separately.

    With the teacher's distribution p and the student's q, both at the temperature, y the label, and
    :math:`\hat p, \hat q` the softmax over the classes other than y, each position gives

    .. math:: T^2 \left( \alpha\,\mathrm{KL}\big((p_y, 1 - p_y) \,\|\, (q_y, 1 - q_y)\big)
              + \beta\,\mathrm{KL}(\hat p \,\|\, \hat q) \right).

    The first divergence is that of the target class (TCKD), the second that of the others (NCKD);
    :math:`\mathrm{KL}(p \,\|\, q) = \mathrm{TCKD} + (1 - p_y)\,\mathrm{NCKD}`. Source: Zhao et al., "Decoupled
    Knowledge Distillation", arXiv 2203.08679, which adds the cross-entropy of the labels.

    Args:
        input: Student logits, any shape with one dimension of two classes or more; fp16, bf16, fp32 or fp64, any
            strides.
        target: Teacher logits of the same shape and device; their dtype may differ.
        labels: Class indices, int64, in the shape of ``input`` without the class dimension.
        alpha: Weight of the target class, a number or a 0-dim tensor without gradient.
        beta: Weight of the divergence among the other classes; see ``alpha``.
        temperature: T > 0, as in :func:`kl_div_with_logits`; its gradient includes that of the factor T^2.
        dim: Class dimension, or a tuple of them, as in :func:`kl_div_with_logits`; labels then count in the flattened
            classes.
        ignore_index: Label of the positions to leave out.
        position_weight: Weight of each position, boolean or floating-point, as in :func:`kl_div_with_logits`.
        standardize: Whether to standardize the logits of each position first, as in :func:`kl_div_with_logits`.
        reduction: ``"none"``, ``"mean"`` (weighted, over the positions that count), ``"sum"`` or ``"batchmean"`` (sum /
            ``input.size(0)``).
        return_parts: Whether to return :class:`DivergenceParts` instead of the loss; its ``cross_entropy`` is TCKD and
            its ``divergence`` NCKD.

    Returns:
        The loss in fp32, or fp64 if a side is fp64; 0 if no position counts. Gradients flow to both sides.

    Special values: it is finite and exact however sure a side is of the label, as no logarithm of a rounded
    :math:`1 - q_y` is taken, and 0 for equal rows. With two classes NCKD is 0. If all other classes of the teacher are
    at -inf, so is it; if only those of the student are, it is +inf. Otherwise -inf counts as in
    :func:`kl_div_with_logits`, where derivatives and inference tensors are described too.

    Raises:
        TypeError: A side is not a floating-point tensor, labels are not class indices, or a scalar is not a number.
        ValueError: A shape, a device, a weight or an option is not accepted, or there are less than two classes.
        IndexError: A label is neither a class nor ``ignore_index``. On a GPU the loss is NaN instead, unless
            :func:`kdkernels.set_debug` is on.

    Example:
        >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        >>> labels = torch.randint(10, (8,))
        >>> loss = torch.nn.functional.cross_entropy(student, labels)
        >>> loss = loss + decoupled_distillation_loss(student, teacher, labels, alpha=1.0, beta=8.0)
        >>> loss.backward()

    """
    alpha = _checks.check_scalar("alpha", alpha, input)
    beta = _checks.check_scalar("beta", beta, input)
    return _loss(
        "decoupled", input, target, labels, temperature, alpha, beta, standardize, dim=dim, ignore_index=ignore_index,
        position_weight=position_weight, reduction=reduction, return_parts=return_parts,
    )  # fmt: skip


def normalized_distillation_loss(
    input: Tensor,
    target: Tensor,
    labels: Tensor,
    *,
    gamma: float | Tensor = 1.5,
    temperature: float | Tensor = 1.0,
    dim: int | Sequence[int] | None = None,
    ignore_index: int = -100,
    position_weight: Tensor | None = None,
    standardize: bool = False,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor:
    r"""Normalized knowledge distillation (NKD): soft cross-entropies of the label's class and of the other classes.

    With y the label, p and q the softmax of teacher and student at temperature 1, and :math:`\hat p, \hat q` their
    softmax at T over the classes other than y, each position gives

    .. math:: -p_y \ln q_y - \gamma\,T^2 \sum_{c \ne y} \hat p_c \ln \hat q_c.

    Source: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
    Normalized Loss and Customized Soft Labels", arXiv 2303.13005, which adds the cross-entropy of the labels.

    Args:
        input: Student logits, any shape with one dimension of two classes or more; fp16, bf16, fp32 or fp64, any
            strides.
        target: Teacher logits of the same shape and device; their dtype may differ.
        labels: Class indices, int64, in the shape of ``input`` without the class dimension.
        gamma: Weight of the other classes, a number or a 0-dim tensor without gradient.
        temperature: T > 0 of the other classes, as in :func:`kl_div_with_logits`; its gradient includes that of the
            factor T^2.
        dim: Class dimension, or a tuple of them, as in :func:`kl_div_with_logits`; labels then count in the flattened
            classes.
        ignore_index: Label of the positions to leave out.
        position_weight: Weight of each position, boolean or floating-point, as in :func:`kl_div_with_logits`.
        standardize: Whether the term of the other classes, not that of the label, standardizes the logits of each
            position, as in :func:`kl_div_with_logits`.
        reduction: ``"none"``, ``"mean"`` (weighted, over the positions that count), ``"sum"`` or ``"batchmean"`` (sum /
            ``input.size(0)``).
        return_parts: Whether to return :class:`DivergenceParts` instead of the loss; its ``cross_entropy`` is the term
            of the label and its ``divergence`` the cross-entropy of the others.

    Returns:
        The loss in fp32, or fp64 if a side is fp64; 0 if no position counts. Gradients flow to both sides.

    Special values: with two classes the term of the others is 0, and it is 0 if all others of the teacher are at
    -inf. A class without the teacher's probability adds exactly 0; where only the student's is 0, the loss is +inf. For
    derivatives and inference tensors see :func:`kl_div_with_logits`.

    Raises:
        TypeError: A side is not a floating-point tensor, labels are not class indices, or a scalar is not a number.
        ValueError: A shape, a device, a weight or an option is not accepted, or there are less than two classes.
        IndexError: A label is neither a class nor ``ignore_index``. On a GPU the loss is NaN instead, unless
            :func:`kdkernels.set_debug` is on.

    Example:
        >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        >>> labels = torch.randint(10, (8,))
        >>> loss = torch.nn.functional.cross_entropy(student, labels)
        >>> loss = loss + normalized_distillation_loss(student, teacher, labels, gamma=1.5)
        >>> loss.backward()

    """
    gamma = _checks.check_scalar("gamma", gamma, input)
    return _loss(
        "normalized", input, target, labels, temperature, 1.0, gamma, standardize, dim=dim, ignore_index=ignore_index,
        position_weight=position_weight, reduction=reduction, return_parts=return_parts,
    )  # fmt: skip
