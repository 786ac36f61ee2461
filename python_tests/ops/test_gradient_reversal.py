"""Gradient reversal."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from contract import OpContract
from torch._dynamo.testing import CompileCounterWithBackend

from kdkernels import nn
from kdkernels.functional import gradient_reversal, gradient_reversal_linear
from kdkernels.ops._cases import layouts

F64 = torch.float64


class TestGradientReversal(OpContract):
    op = "gradient_reversal"

    @classmethod
    def op_samples(cls):
        x = torch.randn(2, 3, 4)
        for g in (x, x.transpose(0, 2), x[..., ::2], x[:0], x.bfloat16(), torch.randn(())):
            for grad in (False, True):
                for op in ("gradient_reversal_backward", "gradient_reversal_copy"):
                    yield op, (g.detach().requires_grad_(grad), torch.tensor(0.7, dtype=F64))
        yield "gradient_reversal_backward", (x, torch.tensor(0.7, requires_grad=True))

    @classmethod
    def extended(cls, case, arrays, cotangents):
        lambd = case.function.keywords.get("lambd", 1.0) if isinstance(case.function, partial) else 1.0
        (g,) = cotangents
        if case.name == "linear":
            x, w, b = arrays
            return [x @ w.T + b, -lambd * (g @ w), g.T @ x, g.sum(0)]
        return [arrays[0], -lambd * g]

    # A numerical derivative sees the identity, so these tests compare with -lambda times the true derivative.

    def test_gradcheck(self):
        x = torch.randn(4, 3, dtype=F64, requires_grad=True)
        (reversed_grad,) = torch.autograd.grad((gradient_reversal(x, 0.5) ** 3).sum(), x)
        torch.testing.assert_close(reversed_grad, -0.5 * 3 * x.detach() ** 2)

    def test_gradgradcheck(self):
        """The second derivative flips the sign again: d/dx of -lambda f'(x) along v is -lambda (-lambda) f''(x) v."""
        x = torch.randn(4, 3, dtype=F64, requires_grad=True)
        y = gradient_reversal(x, 0.5)
        (grad,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), x)
        torch.testing.assert_close(second, 0.25 * 6 * x.detach())

    def test_inductor(self):
        self._check_compiled(self.calls()[0], "inductor", None)


def test_forward_is_a_view():
    x = torch.randn(5, requires_grad=True)
    y = gradient_reversal(x)
    assert y.data_ptr() == x.data_ptr()
    with pytest.raises(RuntimeError, match="view"):
        y.mul_(2)


def test_linear_folds_the_factor():
    x = torch.randn(4, 6, 5, dtype=F64, requires_grad=True)
    w, b = torch.randn(3, 5, dtype=F64, requires_grad=True), torch.randn(3, dtype=F64, requires_grad=True)
    grad = torch.randn(4, 6, 3, dtype=F64)
    ours = torch.autograd.grad(gradient_reversal_linear(x, w, b, 0.3), (x, w, b), grad)
    plain = torch.autograd.grad(F.linear(gradient_reversal(x, 0.3), w, b), (x, w, b), grad)
    for a, c in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, c)
    assert torch.autograd.grad(gradient_reversal_linear(x, w).sum(), w)[0].shape == w.shape
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gradient_reversal_linear(x.float(), w.float(), b.float())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad.dtype == F64


def test_linear_second_derivative():
    x, w = torch.randn(4, 3, dtype=F64, requires_grad=True), torch.randn(2, 3, dtype=F64, requires_grad=True)

    def first(function):
        (grad,) = torch.autograd.grad((function(x, w) ** 3).sum(), x, create_graph=True)
        return torch.autograd.grad((grad**2).sum(), (x, w))

    ours = first(lambda x, w: gradient_reversal_linear(x, w, None, 0.3))
    plain = first(lambda x, w: F.linear(gradient_reversal(x, 0.3), w))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_schedule_may_advance_before_the_backward():
    lambd = torch.tensor(1.0)
    x = torch.randn(3, requires_grad=True)
    y = gradient_reversal(x, lambd)
    lambd.fill_(5.0)
    y.sum().backward()
    assert torch.equal(x.grad, -torch.ones(3))


COMPILED = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).square().sum()),
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](2 * x)[0],
    "jacrev": lambda f: lambda x: torch.func.jacrev(f)(x).diagonal() * 2 * x,
    "vmap of grad": lambda f: lambda x: torch.func.vmap(torch.func.grad(lambda x: f(x).square().sum()))(x[None])[0],
    "vmap": lambda f: lambda x: torch.func.grad(lambda x: torch.func.vmap(f)(x[None]).square().sum())(x),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (2 * x,))[1],
    "jacfwd": lambda f: lambda x: torch.func.jacfwd(f)(x).diagonal() * 2 * x,
}


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("transform", COMPILED)
def test_transforms_reverse(transform, backend):
    """Each computes the derivative of x^2, which is 2 x, reversed."""
    torch._dynamo.reset()
    x = torch.randn(3, dtype=F64)
    for reverse in (
        lambda x: gradient_reversal(x, 0.5),
        lambda x: gradient_reversal_linear(x, torch.eye(3, dtype=F64), None, 0.5),
    ):
        function = COMPILED[transform](reverse)
        if backend is not None:
            function = torch.compile(function, backend=backend, fullgraph=True)
        torch.testing.assert_close(function(x), -0.5 * 2 * x)


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_second_derivatives_reverse_twice(backend):
    """The Hessian of sum x^2 / 2 is the identity; reversed twice it is lambd^2 times that, in either mode."""
    torch._dynamo.reset()
    x = torch.randn(3, dtype=F64)

    def f(x):
        return gradient_reversal(x, 0.5).square().sum() / 2

    for twice in (
        torch.func.hessian(f),
        torch.func.jacrev(torch.func.jacrev(f)),
        torch.func.jacfwd(torch.func.grad(f)),
    ):
        function = twice if backend is None else torch.compile(twice, backend=backend, fullgraph=True)
        torch.testing.assert_close(function(x), 0.25 * torch.eye(3, dtype=F64))


def test_tangents_of_the_gradient():
    """Forward over reverse mode: -lambd * dy along t is -lambd * t."""
    x, dy, tangent, lambd = (*torch.randn(3, 3, dtype=F64), torch.tensor(0.5, dtype=F64))

    def gradient(dy, lambd):
        return torch.func.vjp(lambda x: gradient_reversal(x, lambd), x)[1](dy)[0]

    found = torch.func.jvp(lambda dy: gradient(dy, lambd), (dy,), (tangent,))[1]
    torch.testing.assert_close(found, -0.5 * tangent)


def test_new_coefficients_do_not_compile_again():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(lambda x, lambd: gradient_reversal(x, lambd) * 2, backend=counter, fullgraph=True)
    for i in range(10):
        x = torch.randn(3, requires_grad=True)
        function(x, 0.1 * (i + 1)).sum().backward()
        torch.testing.assert_close(x.grad, torch.full((3,), -0.2 * (i + 1)))
    assert counter.frame_count <= 2


def test_functional_transforms():
    x = torch.randn(4, dtype=F64)
    grad = torch.func.grad(lambda x: (gradient_reversal(x, 0.5) ** 2).sum())
    torch.testing.assert_close(grad(x), -x)
    torch.testing.assert_close(torch.func.vmap(grad)(torch.stack((x, 2 * x))), torch.stack((-x, -2 * x)))


def test_expanded_and_odd_gradients():
    for layout in ("transposed", "sliced", "channels_last"):
        x = layouts(torch.randn(2, 3, 4, 5))[layout].detach().requires_grad_()
        gradient_reversal(x, 2.0).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, -2.0))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: gradient_reversal(x.int()), TypeError, "input must be float16.*int32"),
        (lambda x: gradient_reversal(x, "1"), TypeError, "lambd must be a number or a 0-dim tensor, got str"),
        (lambda x: gradient_reversal(x, math.nan), ValueError, "lambd is nan; expected a finite number"),
        (lambda x: gradient_reversal(x, torch.ones(1)), ValueError, "lambd must be a number or a 0-dim"),
        (lambda x: gradient_reversal(x, torch.tensor(1.0, requires_grad=True)), ValueError, "lambd requires grad"),
        (lambda x: gradient_reversal_linear(x, torch.ones(2, 2)), ValueError, r"weight \(2, 2\); expected"),
        (lambda x: nn.WarmStartGradientReversal(max_iters=0), ValueError, "max_iters is 0"),
    ],
)
def test_wrong_calls(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.randn(4, 3))
