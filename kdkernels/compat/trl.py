"""The loss of TRL's trainer for generalized knowledge distillation (huggingface/trl)."""

from typing import Literal

from torch import Tensor

from kdkernels import functional
from kdkernels.compat._labels import kept
from kdkernels.ops._checks import check_floating, check_scalar

__all__ = ["generalized_jsd_loss"]


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float | Tensor = 0.5,
    temperature: float | Tensor = 1.0,
    reduction: Literal["batchmean", "sum", "mean", "none"] = "batchmean",
) -> Tensor:
    r"""Generalized Jensen-Shannon divergence of ``GKDTrainer.generalized_jsd_loss``, without a factor T².

    With the teacher's p, the student's q, both at the temperature, and :math:`m = \beta p + (1-\beta) q` it is
    :math:`\beta\,\mathrm{KL}(p\,\|\,m) + (1-\beta)\,\mathrm{KL}(q\,\|\,m)` for each token, KL(p || q) at ``beta=0`` and
    KL(q || p) at ``beta=1``; see :func:`kdkernels.functional.js_div_with_logits`.

    Args:
        student_logits: Student logits, classes last; [batch, tokens, classes].
        teacher_logits: Teacher logits of the same shape.
        labels: Token ids, [batch, tokens]; tokens labelled -100 count for nothing.
        beta: Teacher's share of the mixture in [0, 1].
        temperature: Temperature of both sides.
        reduction: ``"batchmean"`` divides by the tokens that count if there are labels, and else by the batch.
            ``"mean"`` is over all elements, tokens times classes. ``"none"`` gives every element, [tokens that count,
            classes] if there are labels, whose number is read from the device.

    Returns:
        The loss in fp32 (fp64 for fp64). Where no token counts it is 0; TRL has NaN.

    """
    if reduction not in ("batchmean", "sum", "mean", "none"):
        raise ValueError(f"reduction is {reduction!r}; accepted are 'batchmean', 'sum', 'mean', 'none'")
    for name, side in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        check_floating(name, side)
    if student_logits.dim() == 0:
        raise ValueError("student_logits has no dimensions; expected the classes in the last one")
    mask = kept("labels", labels, student_logits.shape[:-1], -100)
    if reduction == "none":
        number = check_scalar("temperature", temperature, student_logits, minimum=0)
        log_q, log_p = ((side / number).log_softmax(-1) for side in (student_logits, teacher_logits))
        elements = functional.js_div(log_q, log_p, beta=beta, reduction="none")
        return elements if mask is None else elements[mask]
    over_positions = "mean" if reduction == "batchmean" and mask is not None else reduction
    loss = functional.js_div_with_logits(
        student_logits, teacher_logits, beta=beta, temperature=temperature, dim=-1, position_weight=mask,
        reduction=over_positions,
    )  # fmt: skip
    return loss / student_logits.shape[-1] if reduction == "mean" else loss
