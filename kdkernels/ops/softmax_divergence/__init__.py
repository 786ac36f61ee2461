"""Temperature-softmax divergences from raw logits, with the cross-entropy of hard labels in the same pass.

This file has the public functions. ``autograd.py`` defines the op; ``saved.py`` says what the forward of each backend
saves for its backward, and states the passes over memory.
"""

from typing import Literal

from torch import Tensor

from kdkernels.ops import _checks, _registry
from kdkernels.ops._types import Reduction
from kdkernels.ops.softmax_divergence import reference
from kdkernels.ops.softmax_divergence.autograd import FORWARD
from kdkernels.ops.softmax_divergence.checks import check_logits, check_temperature, check_weights
from kdkernels.ops.softmax_divergence.saved import what_to_save

Divergence = Literal["forward_kl", "reverse_kl", "js"]


def _compute(
    input: Tensor,
    target: Tensor,
    labels: Tensor | None,
    *,
    temperature: float | Tensor,
    divergence_weight: float | Tensor = 1.0,
    label_weight: float | Tensor = 0.0,
    beta: float | Tensor = 0.5,
    dim: int,
    divergence: str,
    reduction: str,
    ignore_index: int = -100,
) -> Tensor:
    backend = FORWARD.choose(input.device)
    numbers = (temperature, divergence_weight, label_weight, beta)
    scalars = tuple(_checks.scalar_tensor(number, input) for number in numbers)
    if _registry.checks_values(input.device):
        reference.check_values(labels, scalars[0], scalars[3], input.shape[dim], ignore_index)
    options = (dim, divergence, reduction, ignore_index)
    save = what_to_save(backend, input, target, scalars[0])
    loss, _ = FORWARD.run(backend, input, target, labels, *scalars, *options, save)
    return loss  # type: ignore[no-any-return]


def _divergence(
    input: Tensor, target: Tensor, temperature: float | Tensor, dim: int | None, divergence: str, reduction: str,
    beta: float | Tensor = 0.5,
) -> Tensor:  # fmt: skip
    dim = check_logits(input, target, None, dim, reduction)
    temperature = check_temperature(temperature, input)
    beta = _checks.check_scalar("beta", beta, input, minimum=0, maximum=1)
    return _compute(
        input, target, None, temperature=temperature, beta=beta, dim=dim, divergence=divergence, reduction=reduction
    )


def kl_div_with_logits(
    input: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    dim: int | None = None,
    reverse: bool = False,
    reduction: Reduction = "mean",
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
        dim: Class dimension. ``None`` means the last one for 1-D and 2-D logits, and raises for more dimensions.
        reverse: Whether to compute KL(student || teacher) instead of KL(teacher || student).
        reduction: ``"none"`` (a value per position), ``"mean"`` (over positions, unlike ``F.kl_div``), ``"sum"``, or
            ``"batchmean"`` (the sum divided by ``input.size(0)``).

    Returns:
        The loss in fp32, or fp64 if a side is fp64; 0 if there are no positions. Gradients flow to both sides.

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
        ValueError: A shape, a device or an option is not accepted, or there are no classes.

    Example:
        >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        >>> loss = kl_div_with_logits(student, teacher, temperature=4.0)
        >>> loss.backward()

    """
    return _divergence(input, target, temperature, dim, "reverse_kl" if reverse else "forward_kl", reduction)


def js_div_with_logits(
    input: Tensor,
    target: Tensor,
    *,
    beta: float | Tensor = 0.5,
    temperature: float | Tensor = 1.0,
    dim: int | None = None,
    legacy_clamp: bool = False,
    reduction: Reduction = "mean",
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
        dim: Class dimension. ``None`` means the last one for 1-D and 2-D logits, and raises for more dimensions.
        legacy_clamp: Whether to compute the published clamped form; it is defined for ``beta=0.5`` only.
        reduction: ``"none"``, ``"mean"`` (over positions), ``"sum"`` or ``"batchmean"`` (sum / ``input.size(0)``).

    Returns:
        The loss in fp32, or fp64 if a side is fp64; 0 if there are no positions. Gradients flow to both sides. A class
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
    return _divergence(input, target, temperature, dim, "clamped_js" if legacy_clamp else "js", reduction, beta)


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
    dim: int | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
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
            ``ignore_index`` count neither in the loss, nor in its gradient, nor in the mean.
        temperature: T > 0, as in :func:`kl_div_with_logits`; its gradient includes that of the factor T^2, which is
            computed in 32 bits or more. For a temperature per sample, ``T**2 * kl_div_with_logits(input / T[:, None],
            target / T[:, None], reduction="none")`` has the same terms.
        kd_weight: Weight of the divergence; default 0.9 with labels, 1 without.
        ce_weight: Weight of the cross-entropy; default 0.1 with labels. With labels, give both weights or neither;
            without labels, any ``ce_weight`` but 0 raises. Numbers or 0-dim tensors without gradient.
        divergence: ``"forward_kl"`` as above, ``"reverse_kl"``, or ``"js"`` with ``beta`` as in
            :func:`js_div_with_logits`.
        beta: Teacher's share of the mixture of ``"js"``.
        dim: Class dimension. ``None`` means the last one for 1-D and 2-D logits, and raises for more dimensions.
        ignore_index: Label of the positions to leave out.
        reduction: ``"none"``, ``"mean"`` (over positions that count), ``"sum"`` or ``"batchmean"`` (sum /
            ``input.size(0)``).

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
    dim = check_logits(input, target, labels, dim, reduction)
    _checks.check_choice("divergence", divergence, ("forward_kl", "reverse_kl", "js"))
    kd_weight, ce_weight = check_weights(labels, kd_weight, ce_weight)
    temperature = check_temperature(temperature, input)
    beta = _checks.check_scalar("beta", beta, input, minimum=0, maximum=1)
    kd_weight = _checks.check_scalar("kd_weight", kd_weight, input)
    ce_weight = _checks.check_scalar("ce_weight", ce_weight, input)
    return _compute(
        input, target, labels, temperature=temperature, divergence_weight=kd_weight * temperature * temperature,
        label_weight=ce_weight, beta=beta, dim=dim, divergence=divergence, reduction=reduction,
        ignore_index=ignore_index,
    )  # fmt: skip
