"""Distillation losses of mdistiller (megvii-research/mdistiller) and of its fork with logit standardization."""

import torch
from torch import Tensor

from kdkernels import functional

__all__ = ["dkd_loss", "kd_loss"]

_NO_LABEL = torch.iinfo(torch.int64).min  # the project ignores no class


def kd_loss(
    logits_student_in: Tensor, logits_teacher_in: Tensor, temperature: float | Tensor, logit_stand: bool = False
) -> Tensor:
    """Divergence KL(teacher || student) at a temperature, times its square, mean over the positions.

    The names and ``logit_stand`` are those of the fork (sunshangquan/logit-standardization-KD); the original has the
    same arguments in the same order, without the last. The classes are dimension 1.

    Args:
        logits_student_in: Student logits, [batch, classes] or [batch, classes, ...].
        logits_teacher_in: Teacher logits of the same shape.
        temperature: Temperature, a positive number or a 0-dim tensor.
        logit_stand: Whether to give the logits of each sample mean 0 and standard deviation 1 first; [batch, classes].

    Returns:
        The loss in fp32 (fp64 for fp64).

    """
    if logit_stand and logits_student_in.dim() != 2:
        raise ValueError(
            f"logits_student_in has shape {tuple(logits_student_in.shape)}; with logit_stand=True expected [batch, "
            "classes], because the fork standardizes the last dimension"
        )
    return functional.distillation_loss(
        logits_student_in, logits_teacher_in, temperature=temperature, dim=1, standardize=bool(logit_stand)
    )


def dkd_loss(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, alpha: float, beta: float,
    temperature: float | Tensor,
) -> Tensor:  # fmt: skip
    r"""Decoupled distillation: :math:`T^2 (\alpha\,\mathrm{TCKD} + \beta\,\mathrm{NCKD})`, mean over the batch.

    TCKD is the divergence of the two outcomes "target class" and "other class", NCKD that of the softmax over the
    other classes. Both stay finite where the project's logarithm of a saturated probability is -inf.

    Args:
        logits_student: Student logits, [batch, classes].
        logits_teacher: Teacher logits, [batch, classes].
        target: Class of each sample, int64, [batch]; every one counts.
        alpha: Weight of TCKD.
        beta: Weight of NCKD.
        temperature: Temperature, a positive number or a 0-dim tensor.

    Returns:
        The loss in fp32 (fp64 for fp64).

    """
    if logits_student.dim() != 2 or target.shape != logits_student.shape[:1]:
        raise ValueError(
            f"logits_student has shape {tuple(logits_student.shape)} and target {tuple(target.shape)}; expected "
            "[batch, classes] and [batch]"
        )
    return functional.decoupled_distillation_loss(
        logits_student, logits_teacher, target, alpha=alpha, beta=beta, temperature=temperature,
        ignore_index=_NO_LABEL,
    )  # fmt: skip
