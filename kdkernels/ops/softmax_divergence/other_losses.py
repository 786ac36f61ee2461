"""Other functions of softmax distributions: soft cross-entropy, skewed divergences, total variation, entropy."""

from collections.abc import Sequence

from torch import Tensor

from kdkernels.ops import _checks
from kdkernels.ops._types import Reduction, TargetType
from kdkernels.ops.softmax_divergence.compute import divergence_loss


def soft_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    dim: int | Sequence[int] | None = None,
    target_type: TargetType = "logits",
    position_weight: Tensor | None = None,
    standardize: bool = False,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor:
    r"""Cross-entropy of the student's softmax distribution with the teacher's.

    With :math:`p = \mathrm{softmax}(\text{target}/T)` (teacher) and :math:`q = \mathrm{softmax}(\text{input}/T)`
    (student), each position gives

    .. math:: -\sum_c p_c \ln q_c = \mathrm{KL}(p \,\|\, q) + H(p),

    in nats. Its gradient by the student's logits is that of the divergence; that by the teacher's is not. There is no
    factor :math:`T^2`. Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network",
    arXiv 1503.02531.

    Args:
        input: Student logits, any shape with one dimension of classes; fp16, bf16, fp32 or fp64, any strides.
        target: Teacher logits of the same shape and device; their dtype may differ.
        temperature: T > 0, as in :func:`kl_div_with_logits`.
        dim: Class dimension, or a tuple of them, as in :func:`kl_div_with_logits`.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``, which the temperature does not
            divide. Probabilities count as they are: their sum need not be 1, and the derivative by the student's
            logits is :math:`((\sum_c p_c) q - p) / T`.
        position_weight: Weight of each position, boolean or floating-point, as in :func:`kl_div_with_logits`.
        standardize: Whether to standardize the logits of each position first, as in :func:`kl_div_with_logits`.
        reduction: ``"none"``, ``"mean"`` (weighted, over positions), ``"sum"`` or ``"batchmean"`` (sum /
            ``input.size(0)``).
        return_parts: Whether to return :class:`DivergenceParts` instead of the loss; ``divergence`` is the soft
            cross-entropy.

    Returns:
        The loss in fp32, or fp64 if a side is fp64; 0 if no position counts. Gradients flow to both sides.

    Special values: a class without probability p adds exactly 0. Where q is 0 and p is not, the loss is +inf, the
    gradient of the student finite, and that of the teacher 0. A row without a finite logit gives NaN. For one class,
    derivatives and inference tensors see :func:`kl_div_with_logits`.

    Raises:
        TypeError: A side is not a floating-point tensor, or the temperature is not a number.
        ValueError: A shape, a device, a weight or an option is not accepted, or there are no classes.

    Example:
        >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10).softmax(1)
        >>> loss = soft_cross_entropy(student, teacher, target_type="probs")
        >>> loss.backward()

    """
    return divergence_loss(  # type: ignore[no-any-return]
        input, target, "soft_cross_entropy", temperature=temperature, dim=dim, reduction=reduction,
        position_weight=position_weight, target_type=target_type, standardize=standardize, return_parts=return_parts,
    )  # fmt: skip


def skew_kl_div_with_logits(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float | Tensor = 0.1,
    temperature: float | Tensor = 1.0,
    dim: int | Sequence[int] | None = None,
    reverse: bool = False,
    target_type: TargetType = "logits",
    position_weight: Tensor | None = None,
    standardize: bool = False,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor:
    r"""Skewed Kullback-Leibler divergence between the softmax distributions of teacher and student logits.

    With the teacher's distribution p and the student's q, both at the temperature, each position gives

    .. math:: \mathrm{KL}(p \,\|\, \alpha p + (1 - \alpha) q),

    or :math:`\mathrm{KL}(q \,\|\, \alpha q + (1 - \alpha) p)` with ``reverse=True``, in nats. It is at most
    :math:`-\ln\alpha` and never negative. ``alpha=0`` gives the divergence without a skew, ``alpha=1`` gives 0. There
    is no factor :math:`T^2`. Sources: Lee, "On the effectiveness of the skew divergence for statistical language
    analysis", 2001; Ko et al., "DistiLLM", arXiv 2402.03898.

    Args:
        input: Student logits, any shape with one dimension of classes; fp16, bf16, fp32 or fp64, any strides.
        target: Teacher logits of the same shape and device; their dtype may differ.
        alpha: Share in [0, 1] of the weighting distribution in the mixture, a number or a 0-dim tensor without
            gradient.
        temperature: T > 0, as in :func:`kl_div_with_logits`.
        dim: Class dimension, or a tuple of them, as in :func:`kl_div_with_logits`.
        reverse: Whether the student's distribution takes the place of the teacher's, and the other way round.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``, which the temperature does not
            divide. Probabilities must sum to 1, up to 1e-3 (2e-2 in 16 bits), and are normalized.
        position_weight: Weight of each position, boolean or floating-point, as in :func:`kl_div_with_logits`.
        standardize: Whether to standardize the logits of each position first, as in :func:`kl_div_with_logits`.
        reduction: ``"none"``, ``"mean"`` (weighted, over positions), ``"sum"`` or ``"batchmean"`` (sum /
            ``input.size(0)``).
        return_parts: Whether to return :class:`DivergenceParts` instead of the loss.

    Returns:
        The loss in fp32, or fp64 if a side is fp64; 0 if no position counts. Gradients flow to both sides. A class
        without probability adds exactly 0; a row without a finite logit gives NaN. With ``alpha=0`` the special values
        are those of :func:`kl_div_with_logits`, where one class, derivatives and inference tensors are described too.

    Raises:
        TypeError: A side is not a floating-point tensor, or a scalar is not a number.
        ValueError: A shape, a device, a weight or an option is not accepted, or there are no classes.

    Example:
        >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        >>> loss = skew_kl_div_with_logits(student, teacher, alpha=0.1)
        >>> loss.backward()

    """
    return divergence_loss(  # type: ignore[no-any-return]
        input, target, "reverse_skew_kl" if reverse else "skew_kl", temperature=temperature, beta=alpha,
        beta_name="alpha", dim=dim, reduction=reduction, position_weight=position_weight, target_type=target_type,
        standardize=standardize, return_parts=return_parts,
    )  # fmt: skip


def total_variation_distance_with_logits(
    input: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    dim: int | Sequence[int] | None = None,
    target_type: TargetType = "logits",
    position_weight: Tensor | None = None,
    standardize: bool = False,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor:
    r"""Total variation distance between the softmax distributions of teacher and student logits.

    With the teacher's distribution p and the student's q, both at the temperature, each position gives

    .. math:: \tfrac12 \sum_c |p_c - q_c|,

    which is symmetric and lies between 0 and 1. The derivative of a class with p = q counts as 0. There is no factor
    :math:`T^2`. Source: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation",
    arXiv 2307.15190.

    Args:
        input: Student logits, any shape with one dimension of classes; fp16, bf16, fp32 or fp64, any strides.
        target: Teacher logits of the same shape and device; their dtype may differ.
        temperature: T > 0, as in :func:`kl_div_with_logits`.
        dim: Class dimension, or a tuple of them, as in :func:`kl_div_with_logits`.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``, which the temperature does not
            divide. Probabilities must sum to 1, up to 1e-3 (2e-2 in 16 bits), and are normalized.
        position_weight: Weight of each position, boolean or floating-point, as in :func:`kl_div_with_logits`.
        standardize: Whether to standardize the logits of each position first, as in :func:`kl_div_with_logits`.
        reduction: ``"none"``, ``"mean"`` (weighted, over positions), ``"sum"`` or ``"batchmean"`` (sum /
            ``input.size(0)``).
        return_parts: Whether to return :class:`DivergenceParts` instead of the loss.

    Returns:
        The loss in fp32, or fp64 if a side is fp64; 0 if no position counts. Gradients flow to both sides. A row
        without a finite logit gives NaN. For one class, derivatives and inference tensors see
        :func:`kl_div_with_logits`.

    Raises:
        TypeError: A side is not a floating-point tensor, or the temperature is not a number.
        ValueError: A shape, a device, a weight or an option is not accepted, or there are no classes.

    Example:
        >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        >>> loss = total_variation_distance_with_logits(student, teacher)
        >>> loss.backward()

    """
    return divergence_loss(  # type: ignore[no-any-return]
        input, target, "total_variation_distance", temperature=temperature, dim=dim, reduction=reduction,
        position_weight=position_weight, target_type=target_type, standardize=standardize, return_parts=return_parts,
    )  # fmt: skip


def entropy_with_logits(
    input: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    dim: int | Sequence[int] | None = None,
    position_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Entropy of the softmax distribution of logits.

    With :math:`q = \mathrm{softmax}(\text{input}/T)`, each position gives

    .. math:: H(q) = -\sum_c q_c \ln q_c,

    in nats, between 0 and the logarithm of the number of classes. Its derivative by the logits is
    :math:`-q (\ln q + H) / T`. Source: Shannon, "A Mathematical Theory of Communication", 1948.

    Args:
        input: Logits, any shape with one dimension of classes; fp16, bf16, fp32 or fp64, any strides.
        temperature: T > 0, as in :func:`kl_div_with_logits`.
        dim: Class dimension, or a tuple of them, as in :func:`kl_div_with_logits`.
        position_weight: Weight of each position, boolean or floating-point, as in :func:`kl_div_with_logits`.
        reduction: ``"none"``, ``"mean"`` (weighted, over positions), ``"sum"`` or ``"batchmean"`` (sum /
            ``input.size(0)``).

    Returns:
        The entropy in fp32, or fp64 if the logits are fp64; 0 if no position counts. A class without probability adds
        exactly 0, with gradient 0; a row without a finite logit gives NaN. For one class, derivatives and inference
        tensors see :func:`kl_div_with_logits`.

    Raises:
        TypeError: The logits are not a floating-point tensor, or the temperature is not a number.
        ValueError: A shape, a device, a weight or an option is not accepted, or there are no classes.

    Example:
        >>> logits = torch.randn(8, 10, requires_grad=True)
        >>> entropy = entropy_with_logits(logits, temperature=2.0)
        >>> entropy.backward()

    """
    _checks.check_floating("input", input)
    # The op takes two sides; it looks at one of them here, and another tensor would only have to be read.
    return divergence_loss(  # type: ignore[no-any-return]
        input, input.detach(), "entropy", temperature=temperature, dim=dim, reduction=reduction,
        position_weight=position_weight, target_type="logits", standardize=False, return_parts=False,
    )  # fmt: skip
