"""Divergences from a teacher of whom only the likeliest classes are stored.

This file has the public functions; ``autograd.py`` defines the op.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.ops import _autograd, _checks, _registry
from kdkernels.ops._numerics import compute_dtype
from kdkernels.ops._positions import checked_position_weight
from kdkernels.ops._types import Reduction, Tail, ValuesType
from kdkernels.ops.topk_divergence import reference
from kdkernels.ops.topk_divergence.autograd import FORWARD, PASSES
from kdkernels.ops.topk_divergence.checks import check_arguments, check_masses, check_teacher

__all__ = ["PASSES", "TopKLoss", "TopKTeacher", "topk_kl_div_with_logits", "topk_teacher"]

_ROWS_AT_ONCE = 1 << 22  # logits that topk_teacher converts at once


@_registry.returns
class TopKLoss(NamedTuple):
    """The results of :func:`topk_kl_div_with_logits`: the loss, and both masses of the listed classes by position."""

    loss: Tensor
    target_mass: Tensor
    input_mass: Tensor


@_registry.returns
class TopKTeacher(NamedTuple):
    """The results of :func:`topk_teacher`: log-probabilities of a teacher's likeliest classes, and the classes."""

    values: Tensor
    indices: Tensor


def topk_kl_div_with_logits(
    input: Tensor,
    values: Tensor,
    indices: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    values_type: ValuesType = "log_probs",
    target_logsumexp: Tensor | None = None,
    tail: Tail = "bucket",
    reverse: bool = False,
    position_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    return_masses: bool = False,
) -> Tensor | TopKLoss:
    r"""Kullback-Leibler divergence from a teacher of whom only the K likeliest classes are known, by student logits.

    With :math:`q = \mathrm{softmax}(\text{input}/T)` over all V classes, the teacher's probabilities
    :math:`p_1, \dots, p_K` of the listed classes, and what remains of both,

    .. math:: p_R = \max\Bigl(0,\; 1 - \sum_k p_k\Bigr), \qquad q_R = \sum_{j \text{ not listed}} q_j,

    each position gives, with ``tail="bucket"``, the exact divergence of K + 1 outcomes,

    .. math:: \sum_k p_k (\ln p_k - \ln q_k) + p_R (\ln p_R - \ln q_R),

    which is never negative, is a lower bound of the divergence from the full teacher, and whose gradient is
    :math:`(q_j - p_j)/T` for a listed class and :math:`(q_j - p_R\,q_j/q_R)/T` for any other. The other tails are

    - ``"renormalize"``: both sides divided by their sums over the listed classes,
      :math:`\sum_k p'_k (\ln p'_k - \ln q'_k)` with :math:`p' = p / \sum p`, :math:`q' = q / \sum_k q_k`. Logits that
      are not listed do not matter, and their gradient is 0.
    - ``"ignore"``: :math:`\sum_k p_k (\ln p_k - \ln q_k)` alone, the common form. It may be negative, and does not know
      what the student gives to other classes. Its gradient is :math:`(q_j \sum_k p_k - p_j)/T`, with
      :math:`p_j = 0` for a class that is not listed.

    ``reverse=True`` exchanges the sides: :math:`\sum_k q_k (\ln q_k - \ln p_k)` with the rest
    :math:`q_R (\ln q_R - \ln p_R)`, or over :math:`q', p'`, or without a rest. Its gradient is
    :math:`q_j (u_j - \sum_i q_i u_i)/T` with :math:`u = \ln q - \ln p` of the class's outcome; for ``"ignore"``,
    :math:`u = \ln q - \ln p + 1` for a listed class and 0 for any other. All values are in nats, and there is no factor
    :math:`T^2`. Source: Kullback and Leibler, "On Information and Sufficiency", 1951, for finitely many outcomes.

    Args:
        input: Student logits [..., V], the classes last; fp16, bf16, fp32 or fp64, any strides.
        values: The teacher's log-probabilities, or logits, of K classes at each position, [..., K]; the same dtypes.
            -inf marks padding, whose index is not looked at.
        indices: The classes, int64 or int32, in the shape of ``values``; different classes at each position.
        temperature: T > 0, a number or a 0-dim tensor, which gets its gradient if it requires one.
        values_type: ``"log_probs"`` if the values are log-probabilities at the temperature already, which then divides
            the student's logits alone. ``"logits"`` if it divides the values too:
            :math:`p_k = \exp(\text{values}_k / T - \text{target\_logsumexp})`.
        target_logsumexp: Log-sum-exp of the teacher's full rows at the temperature,
            ``torch.logsumexp(logits / T, -1)``, one per position. Needed with ``values_type="logits"``, except by
            ``tail="renormalize"`` without masses.
        tail: What becomes of the classes that are not listed, as above.
        reverse: Whether to compute KL(student || teacher) instead of KL(teacher || student).
        position_weight: Weight of each position, boolean or floating-point, in the shape of ``input`` without its
            classes. A position of weight 0 counts for nothing, whatever its logits, values and indices are.
        reduction: ``"none"`` (w · loss by position), ``"mean"`` (Σ w · loss / Σ w), ``"sum"``, or ``"batchmean"``
            (Σ w · loss / ``input.size(0)``).
        return_masses: Whether to return the masses of the listed classes too.

    Returns:
        The loss in fp32, or fp64 if a tensor is fp64; 0 if no position counts. Gradients flow to ``input``, ``values``
        and ``target_logsumexp``. With ``return_masses``, the named tuple (loss, target_mass, input_mass): the masses
        are :math:`\sum_k p_k` and :math:`\sum_k q_k` by position, without gradient, and 0 at a position of weight 0.

    Special values: where the teacher has probability and the student has none (a logit of -inf), the loss is +inf; the
    gradient of the student is finite, and that of the teacher is 0. In reverse, it is +inf where :math:`p_R = 0` and
    :math:`q_R > 0`, as rounding may leave it where K classes have nearly all probability; there the student's gradient
    is 0, and ``tail="renormalize"`` is the remedy. Where :math:`\sum p` exceeds 1 by rounding, :math:`p_R` is 0 and the
    formula is taken as it is, but not below 0. With K = V there is no rest. A position of padding alone has the loss 0;
    for ``"bucket"``, the rest is then all there is. A row without a finite logit gives NaN.

    Forward, the student's row is read once, or only at the listed classes (``"renormalize"``); backward, once more, and
    its gradient is written once. What is allocated beyond the gradient is a few numbers per listed class; a learned
    temperature, a second derivative and forward mode are computed in PyTorch and take several tensors of logits.

    Raises:
        TypeError: A tensor has another dtype, or an option another type.
        ValueError: A shape, a device or an option is not accepted; a class is listed twice at a position; probabilities
            add up to more than 1.1, as logits that are passed as log-probabilities do; a weight is negative.
        IndexError: An index is not a class. On a GPU such values give a loss of NaN instead, unless
            :func:`kdkernels.set_debug` is on.

    Example:
        >>> student, teacher = torch.randn(8, 1000, requires_grad=True), torch.randn(8, 1000)
        >>> values, indices = topk_teacher(teacher, 16, temperature=2.0)
        >>> loss = topk_kl_div_with_logits(student, values, indices, temperature=2.0)
        >>> loss.backward()

    """
    check_arguments(input, values, indices, values_type, target_logsumexp, tail, reverse, reduction)
    check_masses(return_masses, values_type, target_logsumexp)
    temperature = _checks.check_scalar("temperature", temperature, input, minimum=0, grad=True)
    dtype = compute_dtype(input, values, *(() if target_logsumexp is None else (target_logsumexp,)))
    weight = checked_position_weight(position_weight, input, input.shape[:-1], dtype)
    scalar = _checks.scalar_tensor(temperature, input)
    teacher = values.to(dtype)
    if values_type == "logits":
        teacher = _log_probabilities(teacher, scalar, target_logsumexp, weight)
    indices = indices.long()
    if _registry.checks_values(input.device):
        reference.check_values(teacher.detach(), indices, weight, scalar, tail, input.shape[-1])
    saved = (None if tensor is None else _autograd.savable(tensor) for tensor in (input, teacher, indices, weight))
    loss, *masses, _ = FORWARD.run_on(input.device, *saved, scalar, tail, reverse, reduction, return_masses)
    return TopKLoss(loss, *masses) if return_masses else loss


def _log_probabilities(
    logits: Tensor, temperature: Tensor, target_logsumexp: Tensor | None, weight: Tensor | None
) -> Tensor:
    """Return the teacher's log-probabilities, up to a constant if it is not given; padding has no derivative."""
    absent = logits == -torch.inf
    if weight is not None:
        absent = absent | (weight == 0).unsqueeze(-1)
    scaled = torch.where(absent, 0.0, logits) / temperature
    if target_logsumexp is not None:
        scaled = scaled - target_logsumexp.to(logits.dtype).unsqueeze(-1)
    return torch.where(absent, -torch.inf, scaled)


def topk_teacher(logits: Tensor, k: int, *, temperature: float | Tensor = 1.0) -> TopKTeacher:
    r"""Log-probabilities of a teacher's k likeliest classes, to be stored for :func:`topk_kl_div_with_logits`.

    .. math:: \text{values} = z_{(k)} / T - \ln \sum_j e^{z_j / T}

    for the k largest logits z of each position in descending order: exact log-probabilities of the full row, not of the
    k classes alone. A position takes 6 bytes per class if they are stored as ``values.bfloat16()`` and
    ``indices.int()``, and both can be passed back as they are. In bfloat16 a log-probability is rounded to 3 digits; in
    float16 it has 4.

    Args:
        logits: Teacher logits [..., V], the classes last; fp16, bf16, fp32 or fp64.
        k: Number of classes to keep, from 1 to V.
        temperature: T > 0, a number or a 0-dim tensor. Pass the same one to the loss.

    Returns:
        The named tuple (values, indices), both [..., k]; the values in fp32, or fp64 for fp64, the indices in int64.
        They have no gradient. Classes with a logit of -inf get the value -inf, which is padding there.

    Raises:
        TypeError: The logits are not a floating-point tensor, or k is not an integer.
        ValueError: k is not in 1 to V, there are no classes, or the temperature is not positive.

    Example:
        >>> values, indices = topk_teacher(torch.randn(4, 1000), 8, temperature=2.0)
        >>> stored = values.bfloat16(), indices.int()

    """
    k = check_teacher(logits, k)
    temperature = _checks.check_scalar("temperature", temperature, logits, minimum=0, grad=True)
    with torch.no_grad():
        dtype = compute_dtype(logits)
        scalar = _checks.scalar_tensor(temperature, logits)
        values, indices = logits.topk(k, dim=-1)
        rows = logits.reshape(-1, logits.shape[-1])
        # In blocks of rows, so that no second tensor of logits is needed.
        blocks = rows.split(max(1, _ROWS_AT_ONCE // logits.shape[-1]))
        sums = torch.cat([torch.logsumexp(block.to(dtype) / scalar, -1) for block in blocks])
        return TopKTeacher(values.to(dtype) / scalar - sums.view(logits.shape[:-1]).unsqueeze(-1), indices)
