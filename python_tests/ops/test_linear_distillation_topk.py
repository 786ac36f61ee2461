"""The loss of hidden states from a teacher of whom only the likeliest classes are stored."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import kdkernels
from kdkernels.functional import linear_distillation_loss, topk_kl_div_with_logits, topk_teacher
from kdkernels.testing.selftest import results_of

F64 = torch.float64
Y = torch.tensor([3, -100, 10, 0, 5, 5, -100])
WEIGHT = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 3.0, 1.0], dtype=F64)


def drawn():
    h, w, u = (torch.randn(*size, dtype=F64) for size in ((7, 4), (11, 4), (7, 11)))
    return h, w, *topk_teacher(u, 3, temperature=2.0)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
def test_equals_the_loss_of_whole_logits(tail, divergence, reduction, backend):
    h, w, values, indices = drawn()
    options = {"tail": tail, "temperature": 2.0, "reduction": reduction}

    def ours(h, w, values):
        return linear_distillation_loss(
            h, w, values, target_indices=indices, target_type="log_probs", divergence=divergence, logit_scale=0.5,
            position_weight=WEIGHT, memory_budget=80000 if backend == "reference" else 8000, **options,
        )  # fmt: skip

    def whole(h, w, values):
        logits = 0.5 * h @ w.T
        return 4.0 * topk_kl_div_with_logits(
            logits, values, indices, reverse=divergence == "reverse_kl", position_weight=WEIGHT, **options
        )

    found = results_of(ours, (h, w, values), (0, 1, 2))
    with kdkernels.set_backend("reference"):
        truth = results_of(whole, (h, w, values), (0, 1, 2))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("ignored", ["both", "cross_entropy"])
def test_with_labels(reduction, ignored):
    h, w, values, indices = drawn()
    kept = Y != -100
    counted = kept if ignored == "both" else torch.ones_like(kept)

    def ours(h, w, values):
        return linear_distillation_loss(
            h, w, values, None, Y, target_indices=indices.int(), target_type="log_probs", temperature=2.0,
            kd_weight=0.7, ce_weight=0.3, label_smoothing=0.1, ignore_index_in=ignored, reduction=reduction,
        )  # fmt: skip

    def whole(h, w, values):
        logits = h @ w.T
        kd = topk_kl_div_with_logits(
            logits, values, indices, temperature=2.0, position_weight=counted, reduction=reduction
        )
        return 0.7 * 4.0 * kd + 0.3 * F.cross_entropy(logits, Y, label_smoothing=0.1, reduction=reduction)

    for a, b in zip(
        results_of(ours, (h, w, values), (0, 1, 2)), results_of(whole, (h, w, values), (0, 1, 2)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_second_derivative():
    h, w, values, indices = drawn()
    call = partial(linear_distillation_loss, target_indices=indices, target_type="log_probs", temperature=2.0)
    h.requires_grad_(), w.requires_grad_()

    def through(loss):
        (grad,) = torch.autograd.grad(loss, h, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (h, w))

    truth = 4.0 * topk_kl_div_with_logits(h @ w.T, values, indices, temperature=2.0)
    for a, b in zip(through(call(h, w, values)), through(truth), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"target_type": "logits"}, ValueError, "pass target_type='log_probs'"),
        ({"divergence": "js"}, ValueError, "with target_indices, accepted are 'forward_kl', 'reverse_kl'"),
        ({"target_indices": torch.zeros(7, 2).long()}, ValueError, r"target_indices has shape \(7, 2\); expected"),
        ({"target_indices": torch.zeros(7, 3)}, TypeError, "target_indices must be a tensor of class indices"),
        ({"target_linear_weight": torch.zeros(11, 3)}, ValueError, "leave target_linear_weight out|leave one of them"),
        ({"tail": "drop"}, ValueError, "tail is 'drop'"),
    ],
)
def test_wrong_calls(change, error, text):
    h, w, values, indices = drawn()
    with pytest.raises(error, match=text):
        linear_distillation_loss(h, w, values, **{"target_indices": indices, "target_type": "log_probs", **change})
