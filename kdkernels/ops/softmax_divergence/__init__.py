"""Temperature-softmax divergences from raw logits, with the cross-entropy of hard labels in the same pass.

Passes over memory (R a read, W a write of a tensor of logits), student gradient only: forward R R, backward R R W.
A forward that will be followed by a backward saves what spares it work. On the CPU, where a row stays in cache, that
may be the gradient, R R W, which the backward only scales, R W, or, where the incoming gradient is 1, hands on as it
is. On a GPU it is a few sums of each position, with which the backward is one pass without a reduction. Rows that do
not fit into a GPU's shared memory are read twice by the forward.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from kdkernels.ops import _checks, _registry
from kdkernels.ops.softmax_divergence import reference

Reduction = Literal["none", "mean", "sum", "batchmean"]
Divergence = Literal["forward_kl", "reverse_kl", "js"]
Save = Literal["nothing", "gradient", "statistics"]

_ARGUMENTS = (
    "Tensor input, Tensor target, Tensor? labels, Tensor temperature, Tensor divergence_weight, Tensor label_weight, "
    "Tensor beta, int dim, str divergence, str reduction, int ignore_index"
)
# Up to this size the allocator reuses warm memory, and a second tensor of it costs less than computing again.
SAVED_GRADIENT_BYTES = 32 << 20


def statistics_shape(positions: int) -> tuple[int, int]:
    """Return the shape of what a GPU's forward saves: nine numbers a position, and places for numbers of the call."""
    return 9, positions + 1


def _check_shapes(input: Tensor, target: Tensor, labels: Tensor | None, dim: int) -> None:
    torch._check(input.dim() == target.dim(), lambda: "input and target have different numbers of dimensions")
    for a, b in zip(input.shape, target.shape, strict=True):
        torch._check(a == b, lambda: "input and target have different shapes")
    if labels is not None:
        positions = input.shape[:dim] + input.shape[dim + 1 :]
        torch._check(labels.dim() == len(positions), lambda: "labels have the wrong number of dimensions")
        for a, b in zip(labels.shape, positions, strict=True):
            torch._check(a == b, lambda: "labels do not have the shape of the positions")


def _fake(
    input: Tensor, target: Tensor, labels: Tensor | None, temperature: Tensor, divergence_weight: Tensor,
    label_weight: Tensor, beta: Tensor, dim: int, divergence: str, reduction: str, ignore_index: int,
    save: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_shapes(input, target, labels, dim)
    positions = input.shape[:dim] + input.shape[dim + 1 :]
    loss = input.new_empty(positions if reduction == "none" else (), dtype=reference.compute_dtype(input, target))
    if save == "gradient":
        return loss, torch.empty_like(input)
    return loss, loss.new_empty(statistics_shape(math.prod(positions)) if save == "statistics" else 0)


def _backward_fake(
    grad_output: Tensor, statistics: Tensor | None, input: Tensor, target: Tensor, labels: Tensor | None,
    temperature: Tensor, divergence_weight: Tensor, label_weight: Tensor, beta: Tensor, dim: int, divergence: str,
    reduction: str, ignore_index: int, input_gradient: bool, target_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_shapes(input, target, labels, dim)
    return (
        torch.empty_like(input) if input_gradient else input.new_empty(0),
        torch.empty_like(target) if target_gradient else target.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dim, ctx.divergence, ctx.reduction, ctx.ignore_index, ctx.save = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1] if ctx.save == "statistics" else None, *tensors)
    ctx.gradient = [output[1]] if ctx.save == "gradient" else []


def _backward(ctx: Any, grad_loss: Tensor | None, _grad_saved: None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    if grad_loss is None or not any(wanted):
        return (None,) * 12
    arguments = (*ctx.saved_tensors, ctx.dim, ctx.divergence, ctx.reduction, ctx.ignore_index)
    # The saved gradient is a constant to autograd; a backward that is differentiated itself computes anew.
    if ctx.save == "gradient" and not wanted[1] and not torch.is_grad_enabled():
        return _scaled(_take_gradient(ctx, grad_loss, arguments), grad_loss, ctx), *(None,) * 11
    grads = _BACKWARD.run(ctx.backend, grad_loss, *arguments, *wanted)
    return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * 10)


def _take_gradient(ctx: Any, grad_loss: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """Give away the gradient that the forward left; another backward of the same graph computes the same bits anew."""
    try:
        return ctx.gradient.pop()  # type: ignore[no-any-return]
    except IndexError:
        return _BACKWARD.run(ctx.backend, torch.ones_like(grad_loss), *arguments, True, False)[0]  # type: ignore[no-any-return]


def _scaled(gradient: Tensor, grad_loss: Tensor, ctx: Any) -> Tensor:
    """Multiply with the incoming gradient, unless it is 1, as in ``loss.backward()``."""
    if ctx.reduction == "none":
        return gradient * grad_loss.unsqueeze(ctx.dim)
    try:
        is_one = not torch.compiler.is_compiling() and float(grad_loss) == 1.0
    except RuntimeError:  # a batch of incoming gradients, or a fake one, has no value to read
        is_one = False
    return gradient if is_one else gradient * grad_loss


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, dim, divergence, reduction, ignore_index, input_gradient, target_gradient = inputs
    ctx.wanted = (input_gradient, target_gradient)
    ctx.options = (dim, divergence, reduction, ignore_index)
    ctx.mark_non_differentiable(*(grad for grad, want in zip(output, ctx.wanted, strict=True) if not want))
    ctx.save_for_backward(*tensors)


def _backward_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate the gradients: any order, through the reference's closed forms."""
    grad_output, _statistics, input, target, labels, *scalars = ctx.saved_tensors
    given = [v if want else None for v, want in zip(cotangents, ctx.wanted, strict=True)]
    if all(v is None for v in given):
        return (None,) * 15

    def gradients(grad_output: Tensor, input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        both = reference.gradients(grad_output, input, target, labels, tuple(scalars), *ctx.options)
        return tuple(g for g, v in zip(both, given, strict=True) if v is not None)

    pull_back = torch.func.vjp(gradients, grad_output, input, target)[1]
    by_grad_output, by_input, by_target = pull_back(tuple(v for v in given if v is not None))
    return by_grad_output, None, by_input, by_target, *(None,) * 11


_FORWARD = _registry.define(
    "softmax_divergence",
    f"({_ARGUMENTS}, str save) -> (Tensor loss, Tensor saved)",
    reference=reference.forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_BACKWARD = _registry.define(
    "softmax_divergence_backward",
    f"(Tensor grad_output, Tensor? statistics, {_ARGUMENTS}, bool input_gradient, bool target_gradient) "
    "-> (Tensor, Tensor)",
    reference=reference.backward,
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
)


def _what_to_save(backend: str, input: Tensor, target: Tensor) -> Save:
    """Choose what the forward saves for the backward.

    No gradient in 16 bits: rounded before the gradient of a loss scaler multiplies it, it would underflow. None while
    exporting: the size would become a condition on dynamic shapes. None under a transform of ``torch.func``.
    """
    if not torch.is_grad_enabled() or not (input.requires_grad or target.requires_grad):
        return "nothing"
    if backend == "triton" or (backend == "native" and input.device.type == "cuda"):
        return "statistics"
    keeps_gradient = (
        not torch.compiler.is_exporting()
        and not _registry.is_transformed()
        and not target.requires_grad
        and input.device.type == "cpu"
        and input.dtype == reference.compute_dtype(input, target)
        and input.numel() * input.element_size() <= SAVED_GRADIENT_BYTES
    )
    return "gradient" if keeps_gradient else "nothing"


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
    backend = _FORWARD.choose(input.device)
    numbers = (temperature, divergence_weight, label_weight, beta)
    scalars = tuple(_checks.scalar_tensor(number, input) for number in numbers)
    if _registry.checks_values(input.device):
        reference.check_values(labels, scalars[0], scalars[3], input.shape[dim], ignore_index)
    options = (dim, divergence, reduction, ignore_index, _what_to_save(backend, input, target))
    loss, _ = _FORWARD.run(backend, input, target, labels, *scalars, *options)
    return loss  # type: ignore[no-any-return]


def _learned(temperature: float | Tensor) -> bool:
    return isinstance(temperature, Tensor) and temperature.requires_grad and torch.is_grad_enabled()


def _divide(input: Tensor, target: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Divide the logits by a temperature that needs a gradient: autograd then gives it, for one more pass each."""
    dtype = reference.compute_dtype(input, target)
    return input.to(dtype) / temperature, target.to(dtype) / temperature


def _divergence(
    input: Tensor, target: Tensor, temperature: float | Tensor, dim: int | None, divergence: str, reduction: str,
    beta: float | Tensor = 0.5,
) -> Tensor:  # fmt: skip
    dim = _checks.check_logits(input, target, None, dim, reduction)
    _checks.check_scalar("temperature", temperature, input, minimum=0, grad=True)
    _checks.check_scalar("beta", beta, input, minimum=0, maximum=1)
    if _learned(temperature):
        (input, target), temperature = _divide(input, target, temperature), 1.0
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

    or :math:`\mathrm{KL}(q\,\|\,p)` with ``reverse=True``. There is no factor :math:`T^2`; :func:`distillation_loss`
    has it. Natural logarithm. Source: Kullback and Leibler, "On Information and Sufficiency", 1951.

    Args:
        input: student logits, any shape with one dimension of classes; fp16, bf16, fp32 or fp64, any strides.
        target: teacher logits, same shape and device; its dtype may differ.
        temperature: T > 0, a number or a 0-dim tensor. A tensor that requires grad gets its gradient (the logits
            are then divided by it first, one more pass over each).
        dim: the class dimension; ``None`` means the last of 1-D and 2-D logits and raises for more dimensions.
        reverse: KL(student || teacher) instead of KL(teacher || student).
        reduction: ``"none"`` (a value per position), ``"mean"`` (over positions, unlike ``F.kl_div``), ``"sum"``, or
            ``"batchmean"`` (the sum divided by ``input.size(0)``).

    Returns:
        The loss in fp32, fp64 where a side is fp64. 0 for no positions. Gradients flow to both sides.

    Special values: a class with zero probability in the weighting distribution (a logit of -inf) adds exactly 0;
    where the other distribution alone is zero, the loss is +inf, the gradient by the logits of the other distribution
    is finite, and the one by the logits of the weighting distribution is set to 0. Probabilities below the smallest
    normal number count as zero. A row without a finite logit gives NaN.

    Raises:
        TypeError: a side is no floating tensor, or the temperature no number.
        ValueError: shapes, devices, ``dim``, ``reduction`` or ``temperature`` are not as above, or there are 0 classes.

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

    With p the teacher's and q the student's distribution at the temperature and
    :math:`m = \beta p + (1-\beta) q`, each position gives

    .. math:: \mathrm{JS}_\beta = \beta\,\mathrm{KL}(p\,\|\,m) + (1-\beta)\,\mathrm{KL}(q\,\|\,m),

    computed in log space: it does not saturate, is never negative beyond rounding, and at ``beta=0.5`` is symmetric
    and at most ln 2. ``beta=0`` gives KL(p || q) and ``beta=1`` KL(q || p), the convention of generalized knowledge
    distillation; the limit of the formula at both ends is 0. No factor :math:`T^2`. Sources: Lin, "Divergence
    measures based on the Shannon entropy", 1991; Agarwal et al., arXiv 2306.13649.

    ``legacy_clamp=True`` gives instead the competition term that was published with DeepInversion (Yin et al.,
    arXiv 1912.08795), :math:`J = \tfrac12\mathrm{KL}(m\,\|\,p) + \tfrac12\mathrm{KL}(m\,\|\,q)` with p, q and m clamped
    to [0.01, 0.99] after m is taken and not renormalized. Its direction is reversed, it ranges from slightly negative
    to 1.61, and its gradient is zero wherever the clamp binds.

    Args:
        input: student logits, any shape with one dimension of classes; fp16, bf16, fp32 or fp64, any strides.
        target: teacher logits, same shape and device; its dtype may differ.
        beta: the teacher's share of the mixture in [0, 1], a number or a 0-dim tensor without gradient.
        temperature: T > 0, a number or a 0-dim tensor, with gradient where it requires one.
        dim: the class dimension; ``None`` means the last of 1-D and 2-D logits and raises for more dimensions.
        legacy_clamp: the published clamped form; only with ``beta=0.5``.
        reduction: ``"none"``, ``"mean"`` (over positions), ``"sum"`` or ``"batchmean"`` (sum / ``input.size(0)``).

    Returns:
        The loss in fp32, fp64 where a side is fp64. 0 for no positions. Gradients flow to both sides.

    Raises:
        TypeError: a side is no floating tensor, or a scalar no number.
        ValueError: an argument is not as above, or there are 0 classes.

    """
    if legacy_clamp and (isinstance(beta, Tensor) or beta != 0.5):
        raise ValueError(f"legacy_clamp=True is defined for beta=0.5 only, got beta={beta!r}")
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
        input: student logits, any shape with one dimension of classes; fp16, bf16, fp32 or fp64, any strides.
        target: teacher logits, same shape and device; its dtype may differ.
        labels: class indices, int64, of ``input``'s shape without the class dimension; positions that hold
            ``ignore_index`` count neither in the loss, nor in its gradient, nor in the mean.
        temperature: T > 0, a number or a 0-dim tensor, with gradient where it requires one.
        kd_weight: weight of the divergence; default 0.9 with labels, 1 without.
        ce_weight: weight of the cross-entropy; default 0.1 with labels. With labels give both weights or neither;
            without labels there is no cross-entropy, and any weight of it but 0 raises. Numbers or 0-dim tensors
            without gradient.
        divergence: ``"forward_kl"`` as above, ``"reverse_kl"``, or ``"js"`` with ``beta`` as in
            :func:`js_div_with_logits`.
        beta: the teacher's share of the mixture of ``"js"``.
        dim: the class dimension; ``None`` means the last of 1-D and 2-D logits and raises for more dimensions.
        ignore_index: the label of positions to leave out.
        reduction: ``"none"``, ``"mean"`` (over positions that count), ``"sum"`` or ``"batchmean"`` (sum /
            ``input.size(0)``).

    Returns:
        The loss, as of :func:`kl_div_with_logits`. 0, with zero gradients, where no position counts.

    Raises:
        TypeError, ValueError: an argument is not as above, or there are 0 classes.
        IndexError: a label is neither a class nor ``ignore_index`` (on a GPU the loss is NaN instead, unless
            :func:`kdkernels.set_debug` is on).

    """
    dim = _checks.check_logits(input, target, labels, dim, reduction)
    _checks.check_choice("divergence", divergence, ("forward_kl", "reverse_kl", "js"))
    kd_weight, ce_weight = _weights(labels, kd_weight, ce_weight)
    _checks.check_scalar("temperature", temperature, input, minimum=0, grad=True)
    _checks.check_scalar("beta", beta, input, minimum=0, maximum=1)
    _checks.check_scalar("kd_weight", kd_weight, input)
    _checks.check_scalar("ce_weight", ce_weight, input)
    common: dict[str, Any] = {
        "beta": beta, "dim": dim, "divergence": divergence, "reduction": reduction, "ignore_index": ignore_index,
    }  # fmt: skip
    if not _learned(temperature):
        return _compute(
            input, target, labels, temperature=temperature, divergence_weight=kd_weight * temperature * temperature,
            label_weight=ce_weight, **common,
        )  # fmt: skip
    student, teacher = _divide(input, target, temperature)
    soft = _compute(student, teacher, labels, temperature=1.0, divergence_weight=kd_weight, **common)
    hard = _compute(input, target, labels, temperature=1.0, divergence_weight=0.0, label_weight=ce_weight, **common)
    return soft * temperature * temperature + hard


def _weights(
    labels: Tensor | None, kd_weight: float | Tensor | None, ce_weight: float | Tensor | None
) -> tuple[float | Tensor, float | Tensor]:
    if labels is None:
        if ce_weight is not None and (isinstance(ce_weight, Tensor) or ce_weight != 0):
            raise ValueError(f"ce_weight is {ce_weight!r}, but there are no labels; pass labels or leave it out")
        return 1.0 if kd_weight is None else kd_weight, 0.0
    if kd_weight is None and ce_weight is None:
        return 0.9, 0.1
    if kd_weight is None or ce_weight is None:
        given = "ce_weight" if kd_weight is None else "kd_weight"
        raise ValueError(f"{given} alone was given; with labels give both kd_weight and ce_weight, or neither")
    return kd_weight, ce_weight
