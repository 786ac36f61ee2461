"""What the loss of hidden states allocates and multiplies."""

import pytest
import torch
from contract import of_cpu

from kdkernels.functional import linear_distillation_loss
from kdkernels.testing.comparison import peak_bytes


def head(rows, hidden, classes, dtype=torch.float32):
    h = torch.randn(rows, hidden, dtype=dtype).requires_grad_()
    return h, torch.randn(classes, hidden, dtype=dtype).requires_grad_(), torch.randint(0, classes, (rows,))


@of_cpu
@pytest.mark.parametrize("budget", [1_000_000, 3_000_000])
@pytest.mark.parametrize(("reduction", "softcap"), [("mean", None), ("none", 30.0)])
def test_peak_memory_is_within_the_budget(budget, reduction, softcap, backend):
    """Beyond the gradients. Whole logits would take 4 MB a side."""
    rows, classes = 256, 4000
    h, w, y = head(rows, 32, classes)
    t, v = torch.randn(rows, 48), torch.randn(classes, 48)
    b = torch.randn(classes, requires_grad=True)

    def step():
        h.grad = w.grad = b.grad = None
        options = {"reduction": reduction, "softcap": softcap, "logit_scale": 0.5, "memory_budget": budget}
        linear_distillation_loss(h, w, t, v, y, linear_bias=b, **options).sum().backward()

    step()
    gradients = h.nbytes + w.nbytes + b.nbytes
    results = rows * 4 if reduction == "none" else 4
    assert peak_bytes(step) <= budget + gradients + 2 * results
    h.grad = w.grad = b.grad = None
    if budget > 1_000_000:
        assert peak_bytes(step) >= budget / 3 + gradients  # and makes use of it


@of_cpu
@pytest.mark.parametrize("change", ["teacher's gradient", "16 bits", "given logits", "sliced", "weights"])
def test_peak_memory_of_other_calls(change):
    budget, classes, rows = 2_500_000, 2000, 512
    dtype = torch.bfloat16 if change == "16 bits" else torch.float32
    h, w, y = head(rows, 64, classes, dtype)
    t, v, _ = head(rows, 96, classes, dtype)
    learned, held = [h, w], 0
    options = {"memory_budget": budget}
    if change == "teacher's gradient":
        learned += [t, v]
    else:
        t, v = t.detach(), v.detach()
    if change == "16 bits":
        held = 2 * sum(x.nbytes for x in learned)  # the gradients in fp32, before they are rounded
    if change == "given logits":
        t, v = torch.randn(rows, 2 * classes)[:, ::2], None
    if change == "sliced":
        h = torch.randn(4, 129, 64).requires_grad_()
        t = torch.randn(4, 129, 96)[:, :-1]
        y, learned = y.view(4, 128), [h, w]
        held = rows * 64 * 4  # the gradient of the slice
    if change == "weights":
        options |= {"position_weight": torch.rand(rows) > 0.5, "label_smoothing": 0.1}

    def step():
        for leaf in learned:
            leaf.grad = None
        states = h[:, :-1] if change == "sliced" else h
        linear_distillation_loss(states, w, t, v, y, **options).backward()

    step()
    for leaf in learned:
        leaf.grad = None
    assert peak_bytes(step) <= budget + held + sum(leaf.nbytes for leaf in learned)


@of_cpu
def test_no_gradient_is_computed_where_none_is_asked_for():
    h, w, y = head(512, 16, 5000)
    with torch.no_grad():
        used = peak_bytes(lambda: linear_distillation_loss(h, w, h, w, y, memory_budget=2_000_000))
    assert used <= 2_000_000
    t, frozen = h.detach(), w.detach()
    used = peak_bytes(lambda: linear_distillation_loss(h, frozen, t, frozen, y, memory_budget=2_000_000))
    assert used <= 2_000_000 + h.nbytes


def products(call):
    """Count the matrix products of a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm_"))


@of_cpu
def test_counts_of_products():
    """Two for the value, four with the gradients of hidden states and weight, none in the backward."""
    h, w, _ = head(6, 4, 9)
    t, v = torch.randn(6, 5), torch.randn(9, 5)
    assert products(lambda: linear_distillation_loss(h, w, t, v)) == 4
    assert products(lambda: linear_distillation_loss(h.detach(), w, t, v)) == 3
    assert products(lambda: linear_distillation_loss(h.detach(), w.detach(), t, v)) == 2
    y = torch.zeros(6).long()
    assert products(lambda: linear_distillation_loss(h, w, None, None, y, kd_weight=0, ce_weight=1)) == 3
    loss = linear_distillation_loss(h, w, t, v)
    assert products(loss.backward) == 0
