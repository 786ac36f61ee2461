"""The loss of hidden states as users call it: graphs, autocast, layouts, and positions that do not count."""

import math

import pytest
import torch
import torch.nn.functional as F

from kdkernels.functional import distillation_loss, linear_distillation_loss

F64 = torch.float64


def sides(*shape, classes=50, dtype=F64, hidden=6):
    """Hidden states and weights of both sides; those of the student require grad."""
    student, teacher = torch.randn(*shape, 4, dtype=dtype), torch.randn(*shape, hidden, dtype=dtype)
    weight, other = torch.randn(classes, 4, dtype=dtype), torch.randn(classes, hidden, dtype=dtype)
    return student.requires_grad_(), weight.requires_grad_(), teacher, other


def head(rows, hidden, classes, dtype=torch.float32):
    h = torch.randn(rows, hidden, dtype=dtype).requires_grad_()
    return h, torch.randn(classes, hidden, dtype=dtype).requires_grad_(), torch.randint(0, classes, (rows,))


# Graphs


def test_backward_again_gives_the_same():
    h, w, t, v = sides(9)
    loss = linear_distillation_loss(h, w, t, v) * 3
    grads = [torch.autograd.grad(loss, (h, w), retain_graph=True) for _ in range(3)]
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            assert torch.equal(a, b)


def test_saved_gradients_are_not_those_of_a_user():
    """A gradient that the user keeps is not written by a later backward."""
    h, w, t, v = sides(9)
    loss = linear_distillation_loss(h, w, t, v)
    (first,) = torch.autograd.grad(loss, h, retain_graph=True)
    copy = first.clone()
    torch.autograd.grad(5 * loss, h)
    assert torch.equal(first, copy)


def test_batch_of_incoming_gradients():
    h, w, t, v = sides(5)
    incoming = torch.randn(3, dtype=F64)
    loss = linear_distillation_loss(h, w, t, v)
    (found,) = torch.autograd.grad(loss, h, incoming, retain_graph=True, is_grads_batched=True)
    (one,) = torch.autograd.grad(loss, h)
    torch.testing.assert_close(found, incoming[:, None, None] * one)


def test_meta_tensors():
    given = [x.detach().to("meta") for x in sides(5)]
    assert linear_distillation_loss(*given, reduction="none").shape == (5,)


def test_second_derivative():
    h, w, t, v = sides(5, classes=7)

    def through(loss):
        (grad,) = torch.autograd.grad(loss, h, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (h, w))

    found = through(linear_distillation_loss(h, w, t, v))
    for a, b in zip(found, through(distillation_loss(h @ w.T, t @ v.T)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_tied_weights():
    """One parameter as embedding, as head of the student and as head of the teacher."""
    w = torch.randn(20, 4, dtype=F64, requires_grad=True)
    ids = torch.tensor([3, 5, 5, 0])

    h, t = w[ids] * 2, w[ids].sin()
    (found,) = torch.autograd.grad(linear_distillation_loss(h, w, t, w, ids), w, retain_graph=True)
    (truth,) = torch.autograd.grad(distillation_loss(h @ w.T, t @ w.T, ids), w)
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12)


def test_teacher_from_inference_mode():
    h, w, t, v = sides(9)
    with torch.inference_mode():
        frozen_t, frozen_v, y = t.clone(), v.clone(), torch.zeros(9, dtype=torch.int64)
    for reduction in ("mean", "none"):
        loss = linear_distillation_loss(h, w, frozen_t, frozen_v, y, reduction=reduction).sum()
        grads = torch.autograd.grad(loss, (h, w))
        truth = distillation_loss(h @ w.T, t @ v.T, torch.zeros(9).long(), reduction=reduction).sum()
        for a, b in zip(grads, torch.autograd.grad(truth, (h, w)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    with torch.inference_mode():
        assert not linear_distillation_loss(frozen_t, frozen_v, frozen_t, frozen_v).requires_grad


def test_module_is_trained_as_with_whole_logits():
    """Three steps of SGD on a head."""
    torch.manual_seed(0)
    t, v = torch.randn(30, 6, dtype=F64), torch.randn(12, 6, dtype=F64)
    x, y = torch.randn(30, 4, dtype=F64), torch.randint(0, 12, (30,))

    def train(fused):
        torch.manual_seed(1)
        body, last = torch.nn.Linear(4, 5, dtype=F64), torch.nn.Linear(5, 12, dtype=F64)
        optimizer = torch.optim.SGD([*body.parameters(), *last.parameters()], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            h = body(x)
            if fused:
                loss = linear_distillation_loss(h, last.weight, t, v, y, linear_bias=last.bias, memory_budget=30000)
            else:
                loss = distillation_loss(last(h), t @ v.T, y)
            loss.backward()
            optimizer.step()
        return loss.detach(), last.weight.detach(), body.weight.detach()

    for a, b in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_exported_with_dynamic_rows():
    class Model(torch.nn.Module):
        def forward(self, h, w, t, v):
            return linear_distillation_loss(h, w, t, v)

    inputs = [x.detach() for x in sides(9)]
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Model(), tuple(inputs), dynamic_shapes=({0: rows}, None, {0: rows}, None))
    others = [x.detach() for x in sides(13)]
    torch.testing.assert_close(program.module()(*others), linear_distillation_loss(*others))


def test_compiled_training_step():
    h, w, t, v = sides(9)

    def step(h, w, t, v):
        return linear_distillation_loss(h, w, t, v, memory_budget=40000)

    expected = torch.autograd.grad(step(h, w, t, v), (h, w))
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss = compiled(h, w, t, v)
    for _ in range(2):
        for a, b in zip(expected, torch.autograd.grad(loss, (h, w), retain_graph=True), strict=True):
            torch.testing.assert_close(a, b)


# Dtypes and layouts


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16])
def test_autocast_rounds_as_linear_does(other):
    """Hidden states in bf16 or fp32, weights in fp32: both are rounded to bf16; gradients have the dtypes given."""
    h, w, t, v = sides(40, dtype=torch.float32)
    h = h.detach().to(other).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_distillation_loss(h, w, t, v)
        loss.backward()
    assert (loss.dtype, h.grad.dtype, w.grad.dtype) == (torch.float32, other, torch.float32)
    hd, wd = (x.detach().bfloat16().double().requires_grad_() for x in (h, w))
    truth = distillation_loss(hd @ wd.T, t.bfloat16().double() @ v.bfloat16().double().T)
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    for a, b in ((h.grad, hd.grad), (w.grad, wd.grad)):
        assert (a.double() - b).abs().max() <= 2**-8 * b.abs().max()


def test_the_gradient_of_a_weight_in_16_bits_is_rounded_once():
    """Summed in bf16 over hundreds of chunks, it would lose what is smaller than 1/256 of the sum."""
    h, w, y = head(1000, 8, 30, torch.bfloat16)
    linear_distillation_loss(h, w, None, None, y, kd_weight=0, ce_weight=1, memory_budget=52_000).backward()
    hd, wd = (x.detach().double().requires_grad_() for x in (h, w))
    F.cross_entropy(hd @ wd.T, y).backward()
    unit = 2.0 ** wd.grad.abs().clamp(min=1e-30).log2().floor() * 2**-7
    assert ((w.grad.double() - wd.grad).abs() <= unit / 2 + 1e-6 * wd.grad.abs().max()).all()


def test_a_loss_scaler_does_not_underflow_in_fp16():
    h, w, y = head(64, 8, 1000, torch.float16)
    loss = linear_distillation_loss(h, w, None, None, y, kd_weight=0, ce_weight=1e-6)
    (scaled,) = torch.autograd.grad(loss * 65536.0, w)
    hd, wd = (x.detach().double().requires_grad_() for x in (h, w))
    (truth,) = torch.autograd.grad(1e-6 * 65536 * F.cross_entropy(hd @ wd.T, y), wd)
    assert (scaled.double() - truth).abs().max() <= 2**-10 * truth.abs().max()


def test_shifted_slices():
    h, w, t, v = sides(3, 6)
    y = torch.randint(0, 50, (3, 6))
    y[1, 3:] = -100
    (by_h, by_w) = torch.autograd.grad(
        linear_distillation_loss(h[:, :-1], w, t[:, :-1], v, y[:, 1:], memory_budget=40000), (h, w)
    )
    truth = distillation_loss(h[:, :-1] @ w.T, t[:, :-1] @ v.T, y[:, 1:], dim=-1)
    for a, b in zip((by_h, by_w), torch.autograd.grad(truth, (h, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


# Positions that do not count


@pytest.mark.parametrize("by", ["label", "mask"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hidden_states_of_positions_that_do_not_count_may_be_nan(by, reduction):
    h, w, t, v = sides(6)
    y = torch.tensor([1, 2, -100, 3, -100, 4]) if by == "label" else torch.tensor([1, 2, 5, 3, 5, 4])
    mask = None if by == "label" else torch.tensor([True, True, False, True, False, True])
    kept = torch.tensor([0, 1, 3, 5])
    spoiled = h.detach().clone()
    spoiled[[2, 4]] = math.nan
    spoiled.requires_grad_()
    t[[2, 4]] = math.inf
    options = {"position_weight": mask, "reduction": reduction, "memory_budget": 40000}
    loss = linear_distillation_loss(spoiled, w, t, v, y, **options)
    by_h, by_w = torch.autograd.grad(loss.sum(), (spoiled, w))
    truth = distillation_loss(h[kept] @ w.T, t[kept] @ v.T, y[kept], reduction=reduction)
    true_h, true_w = torch.autograd.grad(truth.sum(), (h, w))
    torch.testing.assert_close(loss[kept] if reduction == "none" else loss, truth)
    torch.testing.assert_close(by_h, true_h, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(by_w, true_w, rtol=1e-11, atol=1e-12)
    assert reduction == "mean" or loss[[2, 4]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
def test_nothing_counts(rows, reduction):
    h, w, t, v = sides(rows)
    loss = linear_distillation_loss(h, w, t, v, torch.full((rows,), -100), reduction=reduction)
    assert loss.shape == ((rows,) if reduction == "none" else ())
    assert (loss == 0).all()
    for grad in torch.autograd.grad(loss.sum(), (h, w)):
        assert (grad == 0).all()


def test_bias_of_minus_infinity_removes_a_class():
    h, w, t, v = sides(6)
    removed = torch.zeros(50, dtype=F64).index_fill_(0, torch.arange(40, 50), -math.inf)
    loss = linear_distillation_loss(h, w, t, v, linear_bias=removed, target_linear_bias=removed)
    by_h, by_w = torch.autograd.grad(loss, (h, w))
    truth = distillation_loss(h @ w[:40].T, t @ v[:40].T)
    true_h, true_w = torch.autograd.grad(truth, (h, w))
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(by_h, true_h)
    torch.testing.assert_close(by_w, true_w)


def test_equal_sides_give_zero():
    h, w, _, _ = sides(6, dtype=torch.float32)
    loss = linear_distillation_loss(h, w, h.detach(), w.detach())
    assert loss == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (h, w)))
