from functools import partial

import torch
import torch.nn.functional as F

from kdkernels.compat.mdistiller import dkd_loss, kd_loss

from .conventions import Convention, Project, Trial, normal


def documented_kd(temperature, logit_stand=False):
    def kd(student, teacher):
        if logit_stand:
            student, teacher = (
                (side - side.mean(-1, keepdim=True)) / (1e-7 + side.std(-1, keepdim=True))
                for side in (student, teacher)
            )
        p = F.softmax(teacher / temperature, 1)
        elements = p * (p.log() - F.log_softmax(student / temperature, 1))
        return elements.sum(1).mean() * temperature**2

    return kd


def documented_dkd(alpha, beta, temperature):
    """The two outcomes, and the softmax over the classes that are left, in which the label has no place."""

    def dkd(student, teacher, target):
        of_class = F.one_hot(target, student.shape[1]).bool()
        sides = []
        for logits in (student / temperature, teacher / temperature):
            label, others = logits[of_class], logits[~of_class].view(len(target), -1)
            both = torch.stack([label, others.logsumexp(1)], 1)
            sides.append((both.log_softmax(1), others.log_softmax(1)))
        of_target, of_others = ((log_p.exp() * (log_p - log_q)).sum(1) for log_q, log_p in zip(*sides, strict=True))
        return temperature**2 * (alpha * of_target + beta * of_others).mean()

    return dkd


def kd_trials():
    logits = normal(5, 10, seed=0, scale=3), normal(5, 10, seed=1, scale=3)
    for temperature in (1.0, 4.0):
        for logit_stand in (False, True):
            options = {"temperature": temperature, "logit_stand": logit_stand}
            names = {"student": logits[0], "teacher": logits[1], "T": temperature, "logit_stand": logit_stand}
            yield Trial(
                f"T={temperature}, logit_stand={logit_stand}", partial(kd_loss, **options), documented_kd(**options),
                logits, (0, 1), names,
            )  # fmt: skip
    maps = normal(2, 5, 3, 4, seed=4), normal(2, 5, 3, 4, seed=5)
    yield Trial("feature maps", partial(kd_loss, temperature=4.0), documented_kd(4.0), maps, (0, 1))


def dkd_trials():
    target = torch.tensor([3, 0, 9, 9, 5])
    for alpha, beta, temperature in ((1.0, 8.0, 4.0), (0.5, 0.0, 1.0), (0.0, 2.0, 1.0)):
        options = {"alpha": alpha, "beta": beta, "temperature": temperature}
        for scale in (3, 100):
            inputs = normal(5, 10, seed=6, scale=scale), normal(5, 10, seed=7, scale=scale), target
            yield Trial(
                f"alpha={alpha}, beta={beta}, T={temperature}, logits of {scale}", partial(dkd_loss, **options),
                documented_dkd(**options), inputs, (0, 1),
                {**dict(zip(("student", "teacher", "target"), inputs, strict=True)), "alpha": alpha, "beta": beta,
                 "T": temperature},
            )  # fmt: skip


PROJECT = Project(
    name="mdistiller",
    repository="megvii-research/mdistiller",
    module="mdistiller",
    before="from mdistiller.distillers.DKD import dkd_loss\nfrom mdistiller.distillers.KD import kd_loss",
    after="from kdkernels.compat.mdistiller import dkd_loss, kd_loss",
    conventions=(
        Convention(
            call="kd_loss(logits_student_in, logits_teacher_in, temperature, logit_stand=False)",
            takes="logits, classes in dimension 1",
            computes="KL(teacher ‖ student)",
            temperature="multiplied by T²",
            divisor="batch size, times the positions of maps",
            ours="distillation_loss(student, teacher, temperature=T, dim=1, standardize=logit_stand)",
            traps="logit_stand is an argument of the fork sunshangquan/logit-standardization-KD; it takes logits to "
            "standard deviation 1 before the temperature",
            trials=tuple(kd_trials()),
        ),
        Convention(
            call="dkd_loss(logits_student, logits_teacher, target, alpha, beta, temperature)",
            takes="logits, [batch, classes]",
            computes="α KL of the two outcomes label and not label + β KL of the softmax over the other classes, "
            "teacher ‖ student",
            temperature="multiplied by T²",
            divisor="batch size",
            ours="decoupled_distillation_loss(student, teacher, target, alpha=alpha, beta=beta, temperature=T)",
            traps="the project masks the label by subtracting 1000 and takes the logarithm of a sum of probabilities: "
            "-inf or NaN once the student is certain, where this is finite; α and β are no weights of CE and KD",
            trials=tuple(dkd_trials()),
        ),
    ),
)
