import math

import torch
import torch.nn.functional as F

from kdkernels.compat.trl import generalized_jsd_loss

from .conventions import Convention, Project, Trial, normal


def documented(beta=0.5, temperature=1.0, reduction="batchmean"):
    def generalized_jsd(student_logits, teacher_logits, labels=None):
        log_q = F.log_softmax(student_logits / temperature, -1)
        log_p = F.log_softmax(teacher_logits / temperature, -1)
        q, p = log_q.exp(), log_p.exp()
        if beta == 0:
            elements = p * (log_p - log_q)
        elif beta == 1:
            elements = q * (log_q - log_p)
        else:
            log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
            elements = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
        if labels is not None:
            elements = elements[labels != -100]
        divisor = {"batchmean": elements.shape[0], "sum": 1, "mean": elements.numel()}.get(reduction)
        return elements if divisor is None else elements.sum() / divisor

    return generalized_jsd


def trials():
    logits = normal(3, 4, 11, seed=0, scale=2), normal(3, 4, 11, seed=1, scale=2)
    labels = torch.randint(11, (3, 4), generator=torch.Generator().manual_seed(2))
    labels[0, :2] = labels[2] = -100
    for beta in (0.0, 0.1, 0.5, 1.0):
        for reduction in ("batchmean", "sum", "mean", "none"):
            options = {"beta": beta, "temperature": 1.5, "reduction": reduction}

            def ours(student_logits, teacher_logits, labels=None, options=options):
                return generalized_jsd_loss(student_logits, teacher_logits, labels, **options)

            for name, inputs in (("", logits), (", labels", (*logits, labels))):
                names = dict(zip(("student_logits", "teacher_logits", "labels"), inputs, strict=False))
                names = names | {"beta": beta, "T": 1.5} if "labels" in names and reduction == "batchmean" else {}
                yield Trial(f"beta={beta}, {reduction}{name}", ours, documented(**options), inputs, (0, 1), names)
    far = normal(2, 3, 7, seed=3, scale=300), normal(2, 3, 7, seed=4, scale=300)
    yield Trial("logits of 300", generalized_jsd_loss, documented(), far, (0, 1))


PROJECT = Project(
    name="TRL",
    repository="huggingface/trl",
    module="trl",
    before="loss = GKDTrainer.generalized_jsd_loss(student_logits, teacher_logits, labels, beta=0.5)",
    after="from kdkernels.compat.trl import generalized_jsd_loss\n\n"
    "loss = generalized_jsd_loss(student_logits, teacher_logits, labels, beta=0.5)",
    conventions=(
        Convention(
            call="generalized_jsd_loss(student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, "
            'reduction="batchmean")',
            takes="logits, classes last",
            computes="β KL(teacher ‖ m) + (1 − β) KL(student ‖ m), m = β teacher + (1 − β) student; "
            "β = 0: KL(teacher ‖ student), β = 1: KL(student ‖ teacher)",
            temperature="no T²",
            divisor='"batchmean": tokens not labelled −100, or the batch without labels; "mean": tokens × classes',
            ours="js_div_with_logits(student_logits, teacher_logits, beta=beta, temperature=T, dim=-1, "
            "position_weight=labels != -100)",
            traps="the divisor of the default changes with labels; β = 0 and 1 are not the limits of the formula, "
            "which are 0; TRL gives NaN where no token counts, this 0",
            trials=tuple(trials()),
        ),
    ),
)
