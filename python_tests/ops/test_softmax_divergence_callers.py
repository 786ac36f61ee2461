"""Divergences with teachers of every origin, transforms of torch.func, masks, one class, and the divisor."""

import math
import warnings
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from contract import TARGET

from kdkernels.functional import distillation_loss, js_div_with_logits, kl_div_with_logits

F64 = torch.float64
FUNCTIONS = {
    "forward_kl": kl_div_with_logits,
    "reverse_kl": partial(kl_div_with_logits, reverse=True),
    "js": js_div_with_logits,
    "js 0.3": partial(js_div_with_logits, beta=0.3),
    "js 0": partial(js_div_with_logits, beta=0.0),
    "js 1": partial(js_div_with_logits, beta=1.0),
    "clamped_js": partial(js_div_with_logits, legacy_clamp=True),
    "distillation": distillation_loss,
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)

# Teachers made under inference_mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_function
def test_teachers_made_under_inference_mode(backend, function, dtype):
    """Values, gradients and second derivatives are those of ordinary tensors."""

    def results(t, temperature):
        s = student.clone().requires_grad_()
        loss = function(s, t, temperature=temperature)
        (grad,) = torch.autograd.grad(loss * 0.7, s, create_graph=True)
        (second,) = torch.autograd.grad(grad.float().square().sum(), s)
        s = student.clone().requires_grad_()
        function(s, t, temperature=temperature).backward()
        learned = torch.tensor(2.0, requires_grad=True)
        (by_temperature,) = torch.autograd.grad(function(s, t, temperature=learned), learned)
        return loss, grad, second, s.grad, by_temperature

    student = torch.randn(6, 40).to(dtype)
    with torch.inference_mode():
        teacher, temperature = torch.randn(6, 40).to(dtype), torch.tensor(2.0)
        function(student, teacher, temperature=temperature)
    for a, b in zip(results(teacher, temperature), results(teacher.clone(), 2.0), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    found = torch.func.grad(lambda s: function(s, teacher, temperature=temperature))(student)
    torch.testing.assert_close(found, torch.func.grad(lambda s: function(s, teacher.clone(), temperature=2.0))(student))


def test_labels_and_weights_made_under_inference_mode(backend):
    with torch.inference_mode():
        t, labels, weight = torch.randn(4, 6), torch.tensor([0, -100, 5, 2]), torch.tensor(0.5)
    s, temperature = torch.randn(4, 6, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    for x in (temperature, 2.0):
        found = distillation_loss(s, t, labels, temperature=x, kd_weight=weight, ce_weight=weight)
        expected = distillation_loss(s, t.clone(), labels.clone(), temperature=x, kd_weight=0.5, ce_weight=0.5)
        assert torch.equal(found, expected)
        assert torch.equal(torch.autograd.grad(found, s)[0], torch.autograd.grad(expected, s)[0])


@pytest.mark.skipif(TARGET != "cpu", reason="the kernels of a GPU save no gradient")
@every_function
def test_a_compiled_graph_takes_a_teacher_made_under_inference_mode(function):
    torch._dynamo.reset()
    s = torch.randn(6, 40, requires_grad=True)
    with torch.inference_mode():
        t = torch.randn(6, 40)
    (found,) = torch.autograd.grad(torch.compile(function, backend="aot_eager", fullgraph=True)(s, t), s)
    torch.testing.assert_close(found, torch.autograd.grad(function(s, t.clone()), s)[0])


def test_a_teacher_that_was_overwritten_is_still_noticed(backend):
    s, t = torch.randn(3, 4).bfloat16().requires_grad_(), torch.randn(3, 4)
    loss = kl_div_with_logits(s, t)
    t.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Second derivatives and forward mode, with masked classes

KEEP, REST = [0, 2, 4, 5], [1, 3, 6]


def masked(x):
    return torch.full_like(x, -math.inf).index_copy(1, torch.tensor(KEEP), x[:, KEEP])


def hessian_products(function, s, t, direction):
    """Return the loss, its gradients, and the products of its Hessian with a direction, of both sides."""
    leaves = [s.clone().requires_grad_(), t.clone().requires_grad_()]
    loss = function(*leaves)
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    seconds = torch.autograd.grad(sum((g * direction).sum() for g in grads), leaves)
    return loss, *grads, *seconds


@every_function
def test_second_derivatives_leave_out_masked_classes(backend, function):
    """-inf on both sides gives what the other classes alone give, and 0 at the masked ones."""
    s, t, direction = (torch.randn(3, 7, dtype=F64) for _ in range(3))
    large = hessian_products(function, masked(s), masked(t), direction)
    small = hessian_products(function, s[:, KEEP], t[:, KEEP], direction[:, KEEP])
    torch.testing.assert_close(large[0], small[0])
    for a, b in zip(large[1:], small[1:], strict=True):
        torch.testing.assert_close(a[:, KEEP], b)
        assert torch.equal(a[:, REST], torch.zeros(3, 3, dtype=F64))


@pytest.mark.parametrize("side", [0, 1])
@every_function
def test_second_derivatives_where_one_side_is_masked(backend, function, side):
    """They are those of a logit far below, or 0 in the direction of the infinite divergence."""
    pair = [torch.randn(3, 7, dtype=F64), torch.randn(3, 7, dtype=F64)]
    direction = torch.randn(3, 7, dtype=F64)
    pair[side][:, 3] = -math.inf
    found = hessian_products(function, *pair, direction)
    assert all(x.isfinite().all() for x in found[1:])
    if found[0].isfinite():
        pair[side] = pair[side].clamp(min=-750.0 * 4)
        torch.testing.assert_close(found, hessian_products(function, *pair, direction))


@every_function
def test_forward_mode_and_hessians(backend, function):
    """Every nesting of transforms gives the Hessian of the reverse mode, with masked classes too."""
    s, t = torch.randn(2, 5, dtype=F64), torch.randn(2, 5, dtype=F64)
    for x in (s, t):
        x[:, 3] = -math.inf
    leaves = (s, t)
    expected = torch.autograd.functional.hessian(function, leaves)
    for hessian in (
        torch.func.hessian(function, argnums=(0, 1)),
        torch.func.jacrev(torch.func.jacrev(function, argnums=(0, 1)), argnums=(0, 1)),
        torch.func.jacrev(torch.func.jacfwd(function, argnums=(0, 1)), argnums=(0, 1)),
    ):
        for a, b in zip(hessian(*leaves), expected, strict=True):
            torch.testing.assert_close(a, b)
    tangents = (torch.randn(2, 5, dtype=F64), torch.randn(2, 5, dtype=F64))
    gradients = torch.func.grad(function, argnums=(0, 1))(*leaves)
    slope = sum((a * b).sum() for a, b in zip(gradients, tangents, strict=True))
    torch.testing.assert_close(torch.func.jvp(function, leaves, tangents)[1], slope)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, b) for a, b in zip(leaves, tangents, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(function(*duals)).tangent, slope)
    single = [x.float() for x in (*leaves, *tangents)]
    value, tangent = torch.func.jvp(function, tuple(single[:2]), tuple(single[2:]))
    assert value.dtype == tangent.dtype == torch.float32


def test_forward_mode_with_labels_and_temperature():
    s, t, labels = torch.randn(4, 6, dtype=F64), torch.randn(4, 6, dtype=F64), torch.tensor([0, -100, 5, 2])
    temperature = torch.tensor(2.0, dtype=F64)
    for reduction in ("mean", "sum", "batchmean"):

        def loss(s, temperature, reduction=reduction):
            return distillation_loss(s, t, labels, temperature=temperature, reduction=reduction)

        found = torch.func.hessian(loss, argnums=(0, 1))(s, temperature)
        expected = torch.autograd.functional.hessian(loss, (s, temperature))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    wrong, negative = torch.tensor([0, 6, 5, 2]), torch.tensor(-1.0)
    with pytest.raises(IndexError, match=r"labels\[1\].* is 6"):
        torch.func.jvp(lambda s: distillation_loss(s, t, wrong), (s,), (s,))
    with pytest.raises(ValueError, match="temperature is -1"):
        torch.func.jvp(lambda s: kl_div_with_logits(s, t, temperature=negative), (s,), (s,))


# The divisor, symmetry, one class, rows without a finite logit


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, F64], ids=str)
def test_batchmean_of_one_row_divides_by_its_size_as_kl_div_does(backend, dtype):
    s, t = torch.tensor([0.0, 1.0, 2.0], dtype=dtype), torch.tensor([2.0, 1.0, 0.0], dtype=dtype)
    expected = F.kl_div(s.double().log_softmax(0), t.double().softmax(0), reduction="batchmean").item()
    assert expected == pytest.approx(0.3835, abs=5e-5)
    for function in (kl_div_with_logits, partial(distillation_loss, temperature=1.0)):
        found = function(s.requires_grad_(), t, reduction="batchmean")
        assert found.item() == pytest.approx(expected, rel=1e-6)
        (grad,) = torch.autograd.grad(found, s)
        torch.testing.assert_close(
            grad.double(), (s.double().softmax(0) - t.double().softmax(0)) / 3, rtol=1e-3, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_js_div_is_symmetric_to_the_last_bit(backend, dtype):
    for classes in (2, 10, 19, 50, 1000):
        for spread in (1.0, 30.0, 1e3):
            s, t = ((torch.randn(64, classes) * spread).to(dtype) for _ in range(2))
            t[0] = s[0]
            t[1] = s[1] + t[1] / 100
            s[2, 1] = -math.inf
            s[3, 0] = t[3, 0] = -math.inf
            s, t = s.requires_grad_(), t.requires_grad_()
            for options in ({"reduction": "none"}, {"temperature": 3.0}):
                one, other = js_div_with_logits(s, t, **options), js_div_with_logits(t, s, **options)
                assert torch.equal(one, other)
                for a, b in zip(
                    torch.autograd.grad(one.sum(), (s, t)), torch.autograd.grad(other.sum(), (s, t)), strict=True
                ):
                    assert torch.equal(a, b)


@pytest.mark.parametrize("function", [kl_div_with_logits, js_div_with_logits, distillation_loss])
def test_one_class_warns_where_a_gradient_is_asked_for(backend, function):
    s, t = torch.randn(4, 1, requires_grad=True), torch.randn(4, 1)
    with pytest.warns(UserWarning, match=r"input has one class.*nothing is learned.*binary sigmoid head"):
        loss = function(s, t)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(s.grad, torch.zeros(4, 1))
    assert function(s.detach(), t).item() == 0
    with torch.no_grad():
        assert function(s, t).item() == 0


def test_one_class_warns_while_a_graph_is_compiled():
    torch._dynamo.reset()
    s, t = torch.randn(4, 1, requires_grad=True), torch.randn(4, 1)
    compiled = torch.compile(kl_div_with_logits, backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match="input has one class.*nothing is learned"):
        assert compiled(s, t).item() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert compiled(s.detach(), t).item() == 0


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_binary_head_as_two_logits_is_the_bernoulli_divergence(temperature):
    """What the warning advises: softmax of (0, z) is (1 - sigmoid(z), sigmoid(z))."""
    s, t = torch.randn(6, 1, dtype=F64), torch.randn(6, 1, dtype=F64)
    q, p = torch.sigmoid(s / temperature), torch.sigmoid(t / temperature)
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    two = [torch.cat([torch.zeros_like(z), z], 1) for z in (s, t)]
    torch.testing.assert_close(kl_div_with_logits(*two, temperature=temperature), expected)


@every_function
def test_rows_without_a_finite_logit_are_nan(backend, function):
    """As are the logarithms of probabilities that are all 0; other rows are untouched."""
    s, t = torch.randn(3, 5), torch.randn(3, 5).softmax(1)
    t[1] = 0
    loss = function(s, t.log(), reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(loss[::2], function(s[::2], t[::2].log(), reduction="none"))
    labels = torch.tensor([0, -100, 1])
    assert distillation_loss(s, t.log(), labels).isfinite()
