"""Temperature-softmax divergences from raw logits, with the cross-entropy of hard labels in the same pass.

This file has the main public functions, ``other_losses.py`` and ``decoupled_losses.py`` have the others.
``autograd.py`` defines the op of plain calls and ``loss.py`` that with every option; ``saved.py`` says what the forward
of each backend saves for its backward, and states the passes over memory.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from kdkernels.ops import _checks
from kdkernels.ops._labels import checked_term_weights
from kdkernels.ops._types import Divergence, Reduction, TargetType
from kdkernels.ops.softmax_divergence.checks import check_temperature
from kdkernels.ops.softmax_divergence.compute import Call, divergence_loss
from kdkernels.ops.softmax_divergence.compute import DivergenceParts as DivergenceParts
from kdkernels.ops.softmax_divergence.decoupled_losses import (
    decoupled_distillation_loss as decoupled_distillation_loss,
)
from kdkernels.ops.softmax_divergence.decoupled_losses import (
    normalized_distillation_loss as normalized_distillation_loss,
)
from kdkernels.ops.softmax_divergence.other_losses import entropy_with_logits as entropy_with_logits
from kdkernels.ops.softmax_divergence.other_losses import skew_kl_div_with_logits as skew_kl_div_with_logits
from kdkernels.ops.softmax_divergence.other_losses import soft_cross_entropy as soft_cross_entropy
from kdkernels.ops.softmax_divergence.other_losses import (
    total_variation_distance_with_logits as total_variation_distance_with_logits,
)


def kl_div_with_logits(
    input: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    dim: int | Sequence[int] | None = None,
    reverse: bool = False,
    target_type: TargetType = "logits",
    position_weight: Tensor | None = None,
    standardize: bool = False,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor:
    r"""Kullback-Leibler divergence between the softmax distributions of teacher and student logits.

    With :math:`p = \mathrm{softmax}(\text{target}/T)` (teacher) and :math:`q = \mathrm{softmax}(\text{input}/T)`
    (student), each position gives

    .. math:: \mathrm{KL}(p \,\|\, q) = \sum_c p_c (\ln p_c - \ln q_c),

    or :math:`\mathrm{KL}(q\,\|\,p)` with ``reverse=True``, in nats. There is no factor :math:`T^2`;
    :func:`distillation_loss` has it. Source: Kullback and Leibler, "On Information and Sufficiency", 1951.

    Args:
        input: Student logits, any shape with one dimension of classes; fp16, bf16, fp32 or fp64, any strides.
        target: Teacher logits of the same shape and device; their dtype may differ.
        temperature: T > 0, a number or a 0-dim tensor, which gets its gradient if it requires one. For a temperature
            per sample divide both logits by it, as in ``input / T[:, None]``, and leave this at 1.
        dim: Class dimension, or a tuple of dimensions that hold the classes together, such as ``(2, 3)`` for a softmax
            over the pixels of a map; dimensions that are not neighbours in memory are copied. ``None`` means the last
            one for 1-D and 2-D logits, and raises for more.
        reverse: Whether to compute KL(student || teacher) instead of KL(teacher || student).
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``. The temperature divides logits
            only: of a teacher given by probabilities it divides the student alone. Probabilities whose sum is not 1
            give exactly the formula above, with the derivative :math:`((\sum_c p_c) q - p) / T`; with ``reverse=True``
            they are normalized, and raise if the sum is off by more than 1e-3 (2e-2 in 16 bits).
        position_weight: Weight w of each position, boolean (a mask) or floating-point, in the shape of ``input``
            without the classes. A position of weight 0 counts for nothing, even if its logits are NaN.
        standardize: Whether to give the logits of each position mean 0 and unbiased standard deviation 1 first
            (Sun et al., "Logit Standardization in Knowledge Distillation", arXiv 2403.01427). PyTorch computes it
            before the pass: a call takes three to ten times as long, and six or more fp32 tensors of the size of the
            logits. Logits at -inf give NaN.
        reduction: ``"none"`` (w times the loss of each position), ``"mean"`` (the sum of w times the loss, divided by
            the sum of w; unlike ``F.kl_div``, over positions), ``"sum"``, or ``"batchmean"`` (the sum divided by
            ``input.size(0)``).
        return_parts: Whether to return :class:`DivergenceParts` instead of the loss: also the log-sum-exp of both
            sides, the teacher's entropy and the agreement of the largest logits, from the same pass.

    Returns:
        The loss in fp32, or fp64 if a side is fp64; 0 if no position counts. Gradients flow to both sides.

    Special values: a class with zero probability in the weighting distribution (a logit of -inf) adds exactly 0. Where
    only the other distribution is zero, the loss is +inf; the gradient of the other side is finite, and that of the
    weighting side is 0, as is that of a learned temperature. Probabilities below the smallest normal number count as
    zero. A row without a finite logit, such as the logarithm of probabilities that are all 0, gives NaN. With a single
    class the loss is always 0 and nothing is learned, which is warned of if a gradient is asked for: give a binary head
    with one logit z two logits, ``torch.cat([torch.zeros_like(z), z], 1)``.

    Derivatives of any order are those of the formula, with classes at -inf on both sides left out; in forward mode
    (``torch.func.jvp``, ``torch.func.hessian``) everything is computed in PyTorch. A teacher from
    ``torch.inference_mode()`` is accepted; a compiled graph that has to keep it for the backward, as with 16-bit logits
    or on a GPU, takes its clone or a teacher from ``torch.no_grad()``.

    Raises:
        TypeError: A side is not a floating-point tensor, or the temperature is not a number.
        ValueError: A shape, a device, a weight or an option is not accepted, or there are no classes.

    Example:
        >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        >>> loss = kl_div_with_logits(student, teacher, temperature=4.0)
        >>> loss.backward()

    Tokens that a mask leaves out, and a teacher stored as log-probabilities:
        >>> teacher, mask = teacher.log_softmax(1), torch.rand(8) > 0.3
        >>> loss = kl_div_with_logits(student, teacher, target_type="log_probs", position_weight=mask)

    """
    return divergence_loss(  # type: ignore[no-any-return]
        input, target, "reverse_kl" if reverse else "forward_kl", temperature=temperature, dim=dim,
        reduction=reduction, position_weight=position_weight, target_type=target_type, standardize=standardize,
        return_parts=return_parts,
    )  # fmt: skip


def js_div_with_logits(
    input: Tensor,
    target: Tensor,
    *,
    beta: float | Tensor = 0.5,
    temperature: float | Tensor = 1.0,
    dim: int | Sequence[int] | None = None,
    legacy_clamp: bool = False,
    target_type: TargetType = "logits",
    position_weight: Tensor | None = None,
    standardize: bool = False,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor:
    r"""Jensen-Shannon divergence between the softmax distributions of teacher and student logits.

    With the teacher's distribution p, the student's q, both at the temperature, and their mixture
    :math:`m = \beta p + (1-\beta) q`, each position gives

    .. math:: \mathrm{JS}_\beta = \beta\,\mathrm{KL}(p\,\|\,m) + (1-\beta)\,\mathrm{KL}(q\,\|\,m),

    computed in log space: it does not saturate, is never negative, and at ``beta=0.5`` is at most ln 2 and symmetric to
    the last bit: exchanging ``input`` and ``target`` exchanges their gradients and changes nothing else.
    ``beta=0`` gives KL(p || q) and ``beta=1`` KL(q || p), the convention of generalized knowledge distillation, while
    the limit of the formula at both ends is 0. There is no factor :math:`T^2`. Sources: Lin, "Divergence measures based
    on the Shannon entropy", 1991; Agarwal et al., arXiv 2306.13649.

    ``legacy_clamp=True`` gives the competition term published with DeepInversion instead (Yin et al.,
    arXiv 1912.08795): :math:`J = \tfrac12\mathrm{KL}(m\,\|\,p) + \tfrac12\mathrm{KL}(m\,\|\,q)`, with p, q and m
    clamped to [0.01, 0.99] after m is taken and not renormalized. Its direction is reversed, it ranges from slightly
    negative to 1.61, and its gradient is zero wherever the clamp binds.

    Args:
        input: Student logits, any shape with one dimension of classes; fp16, bf16, fp32 or fp64, any strides.
        target: Teacher logits of the same shape and device; their dtype may differ.
        beta: Teacher's share of the mixture in [0, 1], a number or a 0-dim tensor without gradient.
        temperature: T > 0, as in :func:`kl_div_with_logits`.
        dim: Class dimension, or a tuple of them, as in :func:`kl_div_with_logits`.
        legacy_clamp: Whether to compute the published clamped form; it is defined for ``beta=0.5`` only.
        target_type: What ``target`` holds: ``"logits"``, ``"log_probs"`` or ``"probs"``, which the temperature does not
            divide. Probabilities must sum to 1, up to 1e-3 (2e-2 in 16 bits), and are normalized.
        position_weight: Weight of each position, boolean or floating-point, as in :func:`kl_div_with_logits`.
        standardize: Whether to standardize the logits of each position first, as in :func:`kl_div_with_logits`.
        reduction: ``"none"``, ``"mean"`` (weighted, over positions), ``"sum"`` or ``"batchmean"`` (sum /
            ``input.size(0)``).
        return_parts: Whether to return :class:`DivergenceParts` instead of the loss.

    Returns:
        The loss in fp32, or fp64 if a side is fp64; 0 if no position counts. Gradients flow to both sides. A class
        without probability adds exactly 0; a row without a finite logit gives NaN. For one class, derivatives and
        teachers, see :func:`kl_div_with_logits`.

    Raises:
        TypeError: A side is not a floating-point tensor, or a scalar is not a number.
        ValueError: A shape, a device or an option is not accepted, or there are no classes.

    Example:
        >>> student, teacher = (torch.randn(2, 19, 8, 8, requires_grad=True) for _ in range(2))
        >>> loss = js_div_with_logits(student, teacher, dim=1)
        >>> loss.backward()

    """
    if legacy_clamp and (number := _checks.number_of(beta)) != 0.5:
        raise ValueError(f"legacy_clamp=True is defined for beta=0.5 only, got beta={number!r}; leave beta out")
    return divergence_loss(  # type: ignore[no-any-return]
        input, target, "clamped_js" if legacy_clamp else "js", temperature=temperature, beta=beta, dim=dim,
        reduction=reduction, position_weight=position_weight, target_type=target_type, standardize=standardize,
        return_parts=return_parts,
    )  # fmt: skip


def distillation_loss(
    input: Tensor,
    target: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 4.0,
    kd_weight: float | Tensor | None = None,
    ce_weight: float | Tensor | None = None,
    divergence: Divergence = "forward_kl",
    beta: float | Tensor = 0.5,
    target_type: TargetType = "logits",
    label_smoothing: float | Tensor = 0.0,
    class_weight: Tensor | None = None,
    position_weight: Tensor | None = None,
    standardize: bool = False,
    dim: int | Sequence[int] | None = None,
    ignore_index: int = -100,
    ignore_index_in: Literal["both", "cross_entropy"] = "both",
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor:
    r"""Knowledge-distillation loss: soft targets of a teacher and hard labels, in one pass over the logits.

    .. math:: w_{ce}\,\mathrm{CE}(\text{input}, \text{labels})
              + w_{kd}\,T^2\,\mathrm{KL}(p \,\|\, q)

    for each position, with p the softmax of target / T and q that of input / T; the cross-entropy is at temperature 1.
    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

    Args:
        input: Student logits, any shape with one dimension of classes; fp16, bf16, fp32 or fp64, any strides.
        target: Teacher logits of the same shape and device; their dtype may differ.
        labels: Class indices, int64, in the shape of ``input`` without the class dimension. Positions that hold
            ``ignore_index`` count neither in the loss, nor in its gradient, nor in the mean. Or the probability of each
            class, floating-point, in the shape of ``input``, as in ``F.cross_entropy``; they get their gradient if they
            require one.
        temperature: T > 0, as in :func:`kl_div_with_logits`; its gradient includes that of the factor T^2, which is
            computed in 32 bits or more. For a temperature per sample, ``T**2 * kl_div_with_logits(input / T[:, None],
            target / T[:, None], reduction="none")`` has the same terms.
        kd_weight: Weight of the divergence; default 0.9 with labels, 1 without.
        ce_weight: Weight of the cross-entropy; default 0.1 with labels. With labels, give both weights or neither;
            without labels, any ``ce_weight`` but 0 raises. Numbers or 0-dim tensors without gradient.
        divergence: ``"forward_kl"`` as above, ``"reverse_kl"``, or ``"js"`` with ``beta`` as in
            :func:`js_div_with_logits`.
        beta: Teacher's share of the mixture of ``"js"``.
        target_type: What ``target`` holds, as in :func:`kl_div_with_logits`.
        label_smoothing: Share in [0, 1] of the uniform distribution in the labels, as in ``F.cross_entropy``.
        class_weight: Weight of each class in the cross-entropy, shape [C], as ``weight`` in ``F.cross_entropy``: it
            enters every class of a smoothed label, and the mean divides by the sum of the weights of the labels; with
            probabilities as labels, by the number of positions.
        position_weight: Weight of each position in both terms, boolean or floating-point, as in
            :func:`kl_div_with_logits`.
        standardize: Whether the divergence, not the cross-entropy, standardizes the logits, as in
            :func:`kl_div_with_logits`.
        dim: Class dimension, or a tuple of them, as in :func:`kl_div_with_logits`; labels then count in the flattened
            classes.
        ignore_index: Label of the positions to leave out; probabilities as labels have none.
        ignore_index_in: Whether those positions count in neither term, ``"both"``, or only not in the
            ``"cross_entropy"``.
        reduction: ``"none"``, ``"mean"``, ``"sum"`` or ``"batchmean"`` (sum / ``input.size(0)``). The mean of each term
            is over the positions, and weights, that count in that term.
        return_parts: Whether to return :class:`DivergenceParts` instead of the loss.

    Returns:
        The loss; for its dtype, special values and derivatives see :func:`kl_div_with_logits`. If no position counts,
        it is 0 and so are the gradients.

    Raises:
        TypeError, ValueError: An argument is not accepted, or there are no classes.
        IndexError: A label is neither a class nor ``ignore_index``. On a GPU the loss is NaN instead, unless
            :func:`kdkernels.set_debug` is on.

    Example:
        >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        >>> loss = distillation_loss(student, teacher, torch.randint(10, (8,)), temperature=4.0)
        >>> loss.backward()

    """
    _checks.check_choice("divergence", divergence, ("forward_kl", "reverse_kl", "js"))
    call = Call(
        input, target, labels, dim=dim, reduction=reduction, position_weight=position_weight,
        class_weight=class_weight, label_smoothing=label_smoothing, target_type=target_type, ignore_index=ignore_index,
        ignore_index_in=ignore_index_in, return_parts=return_parts,
    )  # fmt: skip
    kd_weight, ce_weight = checked_term_weights(labels, kd_weight, ce_weight)
    temperature = check_temperature(temperature, input)
    beta = _checks.check_scalar("beta", beta, input, minimum=0, maximum=1)
    kd_weight = _checks.check_scalar("kd_weight", kd_weight, input)
    ce_weight = _checks.check_scalar("ce_weight", ce_weight, input)
    options: dict[str, float | Tensor] = {"temperature": temperature, "beta": beta}
    if standardize:
        return call.run_standardized(divergence, kd_weight * temperature * temperature, ce_weight, **options)  # type: ignore[no-any-return]
    return call.run(  # type: ignore[no-any-return]
        divergence, divergence_weight=kd_weight * temperature * temperature, label_weight=ce_weight, **options
    )
