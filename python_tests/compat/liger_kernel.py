import warnings

import torch

from kdkernels.compat.liger_kernel import LigerJSD, LigerKLDIVLoss

from .conventions import Convention, Project, Trial, normal


def documented_jsd(beta):
    def jsd(log_q, log_p, shift_labels=None):
        log_p = log_p.detach()
        q, p = log_q.exp(), log_p.exp()
        if beta == 0:
            elements = p * (log_p - log_q)
        elif beta == 1:
            elements = q * (log_q - log_p)
        else:
            m = beta * p + (1 - beta) * q
            elements = beta * p * log_p + (1 - beta) * q * log_q - m * m.log()
        if shift_labels is None:
            return elements.sum() / log_q.shape[0]
        counts = shift_labels != -100
        return elements[counts].sum() / max(int(counts.sum()), 1)

    return jsd


def documented_kl(reduction, log_target=False, eps=1e-10):
    def kl(y_pred, y_true):
        y = y_true.detach()
        elements = y.exp() * (y - y_pred) if log_target else y * (y.clamp(min=eps).log() - y_pred)
        divisor = {"sum": 1, "mean": y.numel(), "batchmean": y.shape[0]}.get(reduction)
        return elements if divisor is None else elements.sum() / divisor

    return kl


def jsd_trials():
    logs = tuple(normal(6, 9, seed=seed, scale=2).log_softmax(1) for seed in (0, 1))
    labels = torch.tensor([3, -100, 0, 8, -100, 1])
    for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
        for name, inputs in (("", logs), (", labels", (*logs, labels)), (", all ignored", (*logs, labels * 0 - 100))):
            names = {} if name else {"log_q": logs[0], "log_p": logs[1], "beta": beta}
            yield Trial(f"beta={beta}{name}", LigerJSD(beta), documented_jsd(beta), inputs, names=names)


def kl_trials():
    log_q, log_p = (normal(6, 9, seed=seed, scale=2).log_softmax(1) for seed in (2, 3))
    p = log_p.exp()
    below = torch.where(normal(6, 9, seed=4) > 0.5, 1e-12, p)
    below[0, :2] = 0
    for reduction in ("none", "mean", "sum", "batchmean"):
        module = LigerKLDIVLoss(reduction=reduction)
        names = {"y_pred": log_q, "y_true": p} if reduction == "batchmean" else {}
        yield Trial(reduction, module, documented_kl(reduction), (log_q, p), names=names)
        yield Trial(f"{reduction}, below eps", module, documented_kl(reduction), (log_q, below))
        logs = LigerKLDIVLoss(reduction=reduction, log_target=True)
        yield Trial(f"{reduction}, log_target", logs, documented_kl(reduction, True), (log_q, log_p))
    large = LigerKLDIVLoss(0.1, None, None, "sum")
    yield Trial("eps=0.1", large, documented_kl("sum", eps=0.1), (log_q, p))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Trial("size_average=False", LigerKLDIVLoss(1e-10, False), documented_kl("sum"), (log_q, p))


PROJECT = Project(
    name="Liger-Kernel",
    repository="linkedin/Liger-Kernel",
    module="liger_kernel",
    before="from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss",
    after="from kdkernels.compat.liger_kernel import LigerJSD, LigerKLDIVLoss",
    conventions=(
        Convention(
            call="LigerJSD(beta=0.5, ignore_index=-100)(log_q, log_p, shift_labels=None)",
            takes="two log-probabilities, [tokens, classes]",
            computes="β KL(teacher ‖ m) + (1 − β) KL(student ‖ m), m = β teacher + (1 − β) student; "
            "β = 0: KL(teacher ‖ student), β = 1: KL(student ‖ teacher)",
            temperature="no temperature",
            divisor="tokens whose label is not ignored",
            ours="js_div(log_q, log_p, beta=beta)",
            traps="no gradient for the target; from logits, js_div_with_logits is one pass instead of three",
            trials=tuple(jsd_trials()),
        ),
        Convention(
            call='LigerKLDIVLoss(eps=1e-10, size_average=None, reduce=None, reduction="mean", log_target=False)'
            "(y_pred, y_true)",
            takes="log-probabilities, and probabilities or log-probabilities; [tokens, classes]",
            computes="KL(teacher ‖ student) as Σ y (ln max(y, eps) − x)",
            temperature="no temperature",
            divisor='"mean": tokens × classes; "batchmean": tokens',
            ours='kl_div(y_pred, y_true, reduction="batchmean")',
            traps="the first positional argument is eps, so that arguments of torch.nn.KLDivLoss passed by position "
            "move by one; the default is no divergence but its share of a class; no gradient for the target",
            trials=tuple(kl_trials()),
        ),
    ),
)
