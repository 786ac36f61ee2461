"""Functions of other packages that compute what ours compute; each package is optional, and reported if missing."""

import importlib
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops._cases import Workload

Function = Callable[..., Any]
PACKAGES = {"liger": "liger-kernel", "kornia": "kornia", "torchmetrics": "torchmetrics", "piq": "piq"}
TEMPERATURE = 2.0  # as in the cases of the softmax divergences


def rivals_of(workload: Workload, device: str) -> tuple[dict[str, Function], dict[str, str]]:
    """Return equivalent functions on the same tensors, by package, and why others are missing."""
    functions: dict[str, Function] = {}
    missing: dict[str, str] = {}
    kind = ", ".join(filter(None, (workload.function, workload.variant)))
    for (rival, function), make in MAKERS.items():
        if function != kind:
            continue
        if rival == "liger" and device == "cpu":
            missing[rival] = "needs a GPU"
            continue
        try:
            functions[rival] = make()
        except ModuleNotFoundError as error:
            missing[rival] = "not installed" if error.name == rival_module(rival) else f"does not import: {error}"
        except Exception as error:
            missing[rival] = f"does not import: {error}"
    return functions, missing


def versions() -> dict[str, str]:
    """Return the installed version of each package."""
    found = {}
    for rival, package in PACKAGES.items():
        try:
            found[rival] = version(package)
        except PackageNotFoundError:
            found[rival] = "not installed"
    return found


def rival_module(rival: str) -> str:
    return {"liger": "liger_kernel"}.get(rival, rival)


def _liger(module: str, name: str, kind: str, **options: Any) -> Function:
    loss = getattr(importlib.import_module(f"liger_kernel.transformers.{module}"), name)(**options)

    def from_logits(student: Tensor, teacher: Tensor) -> Tensor:
        """Pass log-probabilities; for KL, the teacher's probabilities."""
        log_q = F.log_softmax(student / TEMPERATURE, -1)
        if kind == "js":
            return loss(log_q, F.log_softmax(teacher / TEMPERATURE, -1))
        return loss(log_q, F.softmax(teacher / TEMPERATURE, -1))

    return from_logits


def _torchmetrics_kl() -> Function:
    kl_divergence = importlib.import_module("torchmetrics.functional").kl_divergence

    def from_logits(student: Tensor, teacher: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(teacher / TEMPERATURE, -1), F.log_softmax(student / TEMPERATURE, -1)
        return kl_divergence(log_p, log_q, log_prob=True, reduction="mean")

    return from_logits


def _torchmetrics_variation() -> Function:
    return partial(importlib.import_module("torchmetrics.functional.image").total_variation, reduction="sum")


def _kornia_variation() -> Function:
    total_variation = importlib.import_module("kornia.losses").total_variation
    return lambda images: total_variation(images, reduction="sum").sum()  # it returns a value for each channel


def _piq_variation() -> Function:
    return partial(importlib.import_module("piq").total_variation, reduction="sum", norm_type="l1")


def _linear_cross_entropy() -> Function:
    """Return the function of PyTorch 2.13 that computes chunks, without which it holds whole logits."""
    return partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


# By rival and function, with the variant if that is another function
MAKERS: dict[tuple[str, str], Callable[[], Function]] = {
    ("liger", "kl_div_with_logits"): partial(_liger, "kl_div", "LigerKLDIVLoss", "kl", reduction="batchmean"),
    ("liger", "js_div_with_logits"): partial(_liger, "jsd", "LigerJSD", "js", beta=0.5),
    ("F.linear_cross_entropy", "linear_distillation_loss, cross-entropy"): _linear_cross_entropy,
    ("torchmetrics", "kl_div_with_logits"): _torchmetrics_kl,
    ("torchmetrics", "total_variation"): _torchmetrics_variation,
    ("kornia", "total_variation"): _kornia_variation,
    ("piq", "total_variation"): _piq_variation,
}
