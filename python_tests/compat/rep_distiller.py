import torch.nn.functional as F

from kdkernels.compat.rep_distiller import DistillKL

from .conventions import Convention, Project, Trial, normal


def documented(temperature):
    def distill_kl(y_s, y_t):
        log_q = F.log_softmax(y_s / temperature, 1)
        p = F.softmax(y_t / temperature, 1)
        return F.kl_div(log_q, p, reduction="sum") * temperature**2 / y_s.shape[0]

    return distill_kl


def trials():
    for temperature in (1.0, 4.0, 20.0):
        inputs = normal(5, 10, seed=0, scale=3), normal(5, 10, seed=1, scale=3)
        names = dict(zip(("y_s", "y_t"), inputs, strict=True)) | {"T": temperature}
        yield Trial(f"T={temperature}", DistillKL(temperature), documented(temperature), inputs, (0, 1), names)
    far = normal(3, 7, seed=2, scale=1e3), normal(3, 7, seed=3, scale=1e3)
    yield Trial("logits of 1000", DistillKL(4.0), documented(4.0), far)
    maps = normal(2, 5, 3, 4, seed=4), normal(2, 5, 3, 4, seed=5)
    yield Trial("feature maps", DistillKL(4.0), documented(4.0), maps, (0, 1))


PROJECT = Project(
    name="RepDistiller",
    repository="HobbitLong/RepDistiller",
    module="rep_distiller",
    before="from distiller_zoo import DistillKL",
    after="from kdkernels.compat.rep_distiller import DistillKL",
    conventions=(
        Convention(
            call="DistillKL(T)(y_s, y_t)",
            takes="logits, classes in dimension 1",
            computes="KL(teacher ‖ student)",
            temperature="multiplied by T²",
            divisor="batch size",
            ours='distillation_loss(y_s, y_t, temperature=T, dim=1, reduction="batchmean")',
            traps="maps [B, C, H, W] are divided by B, not by B·H·W",
            trials=tuple(trials()),
        ),
    ),
)
