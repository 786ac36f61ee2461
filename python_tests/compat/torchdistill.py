import torch
import torch.nn.functional as F

from kdkernels.compat.torchdistill import KDLoss

from .conventions import Convention, Project, Trial, normal


def documented(temperature, alpha=None, beta=None, reduction="batchmean", **kwargs):
    beta = 1 - alpha if beta is None else beta

    def kd(student, teacher, targets=None):
        p = F.softmax(teacher / temperature, 1)
        elements = p * (p.log() - F.log_softmax(student / temperature, 1))
        divisor = {"batchmean": student.shape[0], "sum": 1, "mean": elements.numel()}.get(reduction)
        soft = elements if divisor is None else elements.sum() / divisor
        if not alpha or targets is None:
            return soft
        of_labels = "mean" if reduction == "batchmean" else reduction
        hard = F.cross_entropy(student, targets, reduction=of_labels, **kwargs)
        return alpha * hard + beta * temperature**2 * soft

    return kd


def ours(**options):
    module = KDLoss("fc", "output", "fc", "output", **options)

    def kd(student, teacher, targets=None):
        return module({"fc": {"output": student}}, {"fc": {"output": teacher}}, targets)

    return kd


def trials():
    logits = normal(5, 10, seed=0, scale=3), normal(5, 10, seed=1, scale=3)
    labels = torch.tensor([3, 0, -100, 9, 5])
    for options in (
        {"temperature": 4.0, "alpha": 0.5},
        {"temperature": 4.0, "alpha": 0.3, "beta": 0.9, "label_smoothing": 0.1},
        {"temperature": 2.0, "alpha": 0.0},
        {"temperature": 2.0, "beta": 0.7},
        {"temperature": 2.0, "alpha": 0.5, "reduction": "sum"},
        {"temperature": 2.0, "alpha": 0.5, "reduction": "mean", "ignore_index": 0},
    ):
        name = ", ".join(f"{key}={value}" for key, value in options.items())
        kept = labels.clamp(min=0) if "ignore_index" in options else labels
        yield Trial(name, ours(**options), documented(**options), logits, (0, 1))
        names = {}
        if list(options) == ["temperature", "alpha"] and options["alpha"]:
            names = {"student": logits[0], "teacher": logits[1], "targets": kept, "T": options["temperature"]}
            names |= {"alpha": options["alpha"], "beta": 1 - options["alpha"]}
        yield Trial(f"{name}, targets", ours(**options), documented(**options), (*logits, kept), (0, 1), names)
    options = {"temperature": 2.0, "alpha": 0.5, "reduction": "none"}
    yield Trial("none", ours(**options), documented(**options), logits, (0, 1))
    options = {"temperature": 2.0, "alpha": 0.5}
    maps = normal(2, 5, 3, 4, seed=4), normal(2, 5, 3, 4, seed=5), torch.zeros(2, 3, 4, dtype=torch.long)
    yield Trial("feature maps", ours(**options), documented(**options), maps, (0, 1))


PROJECT = Project(
    name="torchdistill",
    repository="yoshitomo-matsubara/torchdistill",
    module="torchdistill",
    before="from torchdistill.losses.mid_level import KDLoss",
    after="from kdkernels.compat.torchdistill import KDLoss",
    conventions=(
        Convention(
            call="KDLoss(student_module_path, student_module_io, teacher_module_path, teacher_module_io, temperature, "
            'alpha=None, beta=None, reduction="batchmean")(student_io_dict, teacher_io_dict, targets=None)',
            takes="dictionaries of logits, classes in dimension 1",
            computes="α CE + β T² KL(teacher ‖ student), β = 1 − α; KL alone without targets or α",
            temperature="multiplied by T² only with targets and an α other than 0",
            divisor='"batchmean": batch size, CE by the labels that count; "mean": batch × classes',
            ours="distillation_loss(student, teacher, targets, temperature=T, ce_weight=alpha, kd_weight=beta, dim=1, "
            'ignore_index_in="cross_entropy")',
            traps="without targets T² and β vanish from the loss; α is the weight of the cross-entropy; ignored labels "
            "still count in the divergence; maps [B, C, H, W] are divided by B in the divergence, by B·H·W in CE",
            trials=tuple(trials()),
        ),
    ),
)
