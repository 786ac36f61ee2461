"""Distillation from the hidden states in front of the last linear layers, without whole logits.

This file has the public function. ``chunks.py`` has the loop over chunks of rows, ``plan.py`` their sizes,
``layers.py`` the matrix products, and ``autograd.py`` the op. The loss of a chunk of logits is that of the op that also
serves ``distillation_loss``, found in the registry.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from kdkernels.ops import _checks, _positions, _registry
from kdkernels.ops._labels import checked_class_weight, checked_term_weights
from kdkernels.ops._numerics import compute_dtype
from kdkernels.ops._types import Reduction
from kdkernels.ops.linear_distillation import checks, reference
from kdkernels.ops.linear_distillation.arguments import Arguments
from kdkernels.ops.linear_distillation.autograd import FORWARD, wanted_in_forward
from kdkernels.ops.linear_distillation.plan import check_budget

__all__ = ["PASSES", "linear_distillation_loss"]

# Passes over the logits in memory, of which a chunk exists at a time: the products write both sides, the loss reads
# them and writes the student's gradient, and two products read that.
PASSES = (3, 3)


def linear_distillation_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    target_linear_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    target_linear_bias: Tensor | None = None,
    target_indices: Tensor | None = None,
    temperature: float | Tensor = 4.0,
    kd_weight: float | Tensor | None = None,
    ce_weight: float | Tensor | None = None,
    divergence: Literal["forward_kl", "reverse_kl", "js"] = "forward_kl",
    beta: float | Tensor = 0.5,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    target_logit_scale: float | None = None,
    target_softcap: float | None = None,
    target_type: Literal["logits", "log_probs", "probs"] = "logits",
    tail: Literal["bucket", "renormalize", "ignore"] = "bucket",
    label_smoothing: float | Tensor = 0.0,
    class_weight: Tensor | None = None,
    position_weight: Tensor | None = None,
    ignore_index: int = -100,
    ignore_index_in: Literal["both", "cross_entropy"] = "both",
    memory_budget: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Knowledge-distillation loss of hidden states, whose logits never exist whole.

    .. math:: \text{logits} = \mathrm{cap}\bigl(\text{scale}\,(\text{input}\,W^\top + b)\bigr), \qquad
              \mathrm{cap}(x) = \text{softcap}\,\tanh(x / \text{softcap})

    for both sides, and then the loss of :func:`distillation_loss`, with the same defaults:

    .. math:: w_{ce}\,\mathrm{CE}(\text{logits}, \text{labels}) + w_{kd}\,T^2\,\mathrm{KL}(p \,\|\, q).

    The rows are processed in chunks. A reduced loss computes its gradients in the forward, while a chunk of logits
    exists: four matrix products in all, two of them where no gradient is asked for. The backward scales them.
    ``reduction="none"`` and a second backward compute the logits again. Source of the loss: Hinton, Vinyals and Dean,
    arXiv 1503.02531; the layer follows ``F.linear_cross_entropy``, which ``target=None, kd_weight=0, ce_weight=1``
    computes.

    Args:
        input: Student hidden states [..., H], any strides; fp16, bf16, fp32 or fp64.
        linear_weight: Weight of the student's last linear layer, [V, H].
        target: Teacher hidden states [..., H_t]. Without ``target_linear_weight``, the teacher's logits or
            probabilities [..., V]; see ``target_type``. None if ``kd_weight`` is 0.
        target_linear_weight: Weight of the teacher's last linear layer, [V, H_t].
        labels: Class indices [...], or probabilities [..., V], as in :func:`distillation_loss`.
        linear_bias: Bias of the student's layer, [V]. A bias of -inf removes a class, such as padding of the
            vocabulary; give it to both sides.
        target_linear_bias: Bias of the teacher's layer, [V].
        target_indices: Classes that ``target`` has the log-probabilities of, [..., K], as :func:`topk_teacher` returns
            them; with ``target_type="log_probs"``. The divergence is that of :func:`topk_kl_div_with_logits`.
        temperature: T > 0, a number or a 0-dim tensor without gradient.
        kd_weight: Weight of the divergence; default 0.9 with labels, 1 without.
        ce_weight: Weight of the cross-entropy; default 0.1 with labels. With labels, give both weights or neither.
        divergence: ``"forward_kl"``, ``"reverse_kl"``, or ``"js"`` with ``beta``.
        beta: Teacher's share of the mixture of ``"js"``.
        logit_scale: Factor of the logits, as in Cohere's models; for Granite 1 / ``logits_scaling``.
        softcap: Bound that the logits are squashed to after the scale, as ``final_logit_softcapping`` of Gemma 2; None
            for none.
        target_logit_scale: Factor of the teacher's logits; None for that of the student. Like ``target_softcap`` it
            belongs to ``target_linear_weight``, and is refused where ``target`` holds the logits themselves.
        target_softcap: Bound of the teacher's logits; None for that of the student, ``math.inf`` for none.
        target_type: What a ``target`` without a linear layer holds: ``"logits"``, ``"log_probs"`` or ``"probs"``, which
            the temperature does not divide.
        tail: What the other classes count as, with ``target_indices``: ``"bucket"``, ``"renormalize"`` or ``"ignore"``.
        label_smoothing: Share in [0, 1] of the uniform distribution in the labels.
        class_weight: Weight of each class in the cross-entropy, [V], as in :func:`distillation_loss`.
        position_weight: Weight of each position in both terms, boolean (a mask) or floating-point, [...]. A position of
            weight 0 counts for nothing, even if its hidden states are NaN.
        ignore_index: Label of the positions to leave out.
        ignore_index_in: Whether those count in neither term, ``"both"``, or only not in the ``"cross_entropy"``.
        memory_budget: Bytes that may be used beyond the inputs, the gradients and the result; by default 256 MiB on a
            CPU and 1 GiB on another device. Products of few rows are slow: 250 rows of V logits of both sides, in fp32,
            are a good size.
        reduction: ``"none"``, ``"mean"``, ``"sum"`` or ``"batchmean"`` (sum / ``input.size(0)``), as in
            :func:`distillation_loss`.

    Returns:
        The loss in fp32, or fp64 if a tensor is fp64; 0 if no position counts. Gradients flow to the hidden states,
        weights and biases of both sides. Logits and sums are in fp32 (fp64) in every dtype of the inputs. The gradient
        of a weight in 16 bits is summed in fp32 over all rows and rounded once; the sum takes twice its size beside it.
        Under autocast, hidden states, weights and biases are rounded as ``F.linear`` rounds them. Second derivatives
        are right, but hold the logits whole. For special values see :func:`kl_div_with_logits`.

    Raises:
        TypeError: An argument is not a tensor of an accepted dtype, or not a number.
        ValueError: A shape, a device, a weight or an option is not accepted, the temperature requires grad, or the
            budget does not hold the logits of one row; the message has the bytes that it takes.
        IndexError: A label is neither a class nor ``ignore_index``. On a GPU the loss is NaN instead, unless
            :func:`kdkernels.set_debug` is on.

    Example:
        >>> student, teacher = torch.randn(8, 16, requires_grad=True), torch.randn(8, 32)
        >>> heads = torch.randn(100, 16, requires_grad=True), torch.randn(100, 32)
        >>> loss = linear_distillation_loss(student, heads[0], teacher, heads[1], torch.randint(100, (8,)))
        >>> loss.backward()

    """
    checks.check_sides(
        input, linear_weight, linear_bias, target, target_linear_weight, target_linear_bias, target_indices,
        target_type, kd_weight,
    )  # fmt: skip
    _checks.check_choice("reduction", reduction, _positions.REDUCTIONS)
    _checks.check_choice("divergence", divergence, ("forward_kl", "reverse_kl", "js"))
    indices = checks.checked_indices(target_indices, target, target_type, divergence, tail)
    _checks.check_choice("ignore_index_in", ignore_index_in, ("both", "cross_entropy"))
    labels = checks.checked_labels(labels, input, linear_weight.shape[0])
    kd_weight, ce_weight = checked_term_weights(labels, kd_weight, ce_weight)
    temperature = _checks.check_scalar("temperature", temperature, input, minimum=0)
    numbers: list[float | Tensor] = [
        temperature,
        _checks.check_scalar("kd_weight", kd_weight, input) * temperature * temperature,
        _checks.check_scalar("ce_weight", ce_weight, input),
        _checks.check_scalar("beta", beta, input, minimum=0, maximum=1),
        _checks.check_scalar("label_smoothing", label_smoothing, input, minimum=0, maximum=1),
    ]
    if labels is None and (number := _checks.number_of(numbers[-1])) != 0:
        raise ValueError(f"label_smoothing is {number!r}, but there are no labels; pass labels or leave it out")
    checks.check_target_head(target_linear_weight, target_logit_scale=target_logit_scale, target_softcap=target_softcap)
    scale = checks.checked_scale("logit_scale", logit_scale)
    target_scale = (
        scale if target_logit_scale is None else checks.checked_scale("target_logit_scale", target_logit_scale)
    )
    cap = checks.checked_cap("softcap", softcap)
    target_cap = cap if target_softcap is None else checks.checked_cap("target_softcap", target_softcap)
    layers = [checks.autocast(tensor) for tensor in (input, linear_weight, linear_bias)]
    teacher = [target, target_linear_weight, target_linear_bias]
    if target_linear_weight is not None:
        teacher = [checks.autocast(tensor) for tensor in teacher]
    soft = [labels] if labels is not None and labels.is_floating_point() else []
    dtype = compute_dtype(*(tensor for tensor in (*layers, *teacher, *soft) if tensor is not None))
    class_weight = checked_class_weight(class_weight, input, labels, linear_weight.shape[0], dtype)
    weight = _positions.checked_position_weight(position_weight, input, input.shape[:-1], dtype)
    is_plain = (
        weight is None
        and class_weight is None
        and type(label_smoothing) is float
        and label_smoothing == 0
        and target_type == "logits"
        and ignore_index_in == "both"
        and not soft
    )
    scalars = (_checks.scalar_tensor(number, input) for number in numbers)
    options = (scale, cap, target_scale, target_cap, divergence, target_type, tail, reduction, ignore_index)
    more = (ignore_index_in == "both", is_plain, checks.checked_budget(memory_budget, input))
    arguments: list[Any] = [*layers, *teacher, labels, weight, class_weight, indices, *scalars, *options, *more]
    given = Arguments(*arguments)
    backend = _registry.find(given.logits_op).choose(input.device)
    if not torch.compiler.is_exporting():  # the number of rows may be dynamic; the op checks again
        check_budget(given, backend)
    if _registry.checks_values(input.device):
        reference.check_values(given)
    return FORWARD.run(backend, *arguments, wanted_in_forward(given))[0]  # type: ignore[no-any-return]
