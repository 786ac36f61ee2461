"""What every op does where its calls are transformed or recorded: tests that the contract of an op includes."""

import io
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from kdkernels.ops._cases import Call
from kdkernels.testing.selftest import results_of, tensors_of


def leaves_of(call: Call) -> list[Tensor]:
    """Return the inputs of a call as leaves; those that are differentiable require grad."""
    return [
        tensor.detach().clone().requires_grad_(i in call.differentiable) if tensor.is_floating_point() else tensor
        for i, tensor in enumerate(call.inputs)
    ]


def loss_of(call: Call, *inputs: Tensor) -> Tensor:
    """Return a curved scalar of all results of a call."""
    return sum(out.sin().sum() for out in tensors_of(call.function(*inputs)) if out.is_floating_point())


class UnderTransforms:
    """Part of the contract; ``call`` is each small call of the op."""

    def test_gradients_under_torch_func(self, call: Call):
        loss = partial(loss_of, call)
        leaves = leaves_of(call)
        expected = torch.autograd.grad(loss(*leaves), [leaves[i] for i in call.differentiable])
        found = torch.func.grad(loss, call.differentiable)(*call.inputs)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("batched", [False, True])
    def test_compiled_transforms(self, call: Call, batched: bool):
        """``torch.compile`` of ``torch.func.grad``, where Dynamo would drop the backward of an autograd function."""

        loss = partial(loss_of, call)
        transformed = torch.func.grad(loss, call.differentiable)
        inputs = call.inputs
        if batched:
            transformed = torch.func.vmap(transformed)
            inputs = tuple(torch.stack((x, 0.5 * x if x.is_floating_point() else x)) for x in inputs)
        torch._dynamo.reset()
        expected = transformed(*inputs)
        found = torch.compile(transformed, backend="eager" if batched else "aot_eager", fullgraph=True)(*inputs)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b)

    def test_nested_reverse_mode_under_torch_func(self, call: Call):
        loss = partial(loss_of, call)
        first = call.differentiable[0]

        def slope(*inputs: Tensor) -> Tensor:
            return torch.func.grad(loss, first)(*inputs).square().sum()

        leaves = leaves_of(call)
        (grad,) = torch.autograd.grad(loss(*leaves), leaves[first], create_graph=True)
        (expected,) = torch.autograd.grad(grad.square().sum(), leaves[first])
        torch.testing.assert_close(torch.func.grad(slope, first)(*call.inputs), expected)

    def test_forward_mode(self, call: Call):
        """The derivative along a direction is its product with the gradient, and that of the gradient is symmetric."""
        first = call.differentiable[0]

        def loss(moving: Tensor) -> Tensor:
            return loss_of(call, *call.inputs[:first], moving, *call.inputs[first + 1 :])

        x = call.inputs[first]
        direction = torch.randn_like(x)
        expected = (torch.func.grad(loss)(x) * direction).sum()
        found = torch.func.jvp(loss, (x,), (direction,))[1]
        torch.testing.assert_close(found, expected)
        slope = torch.func.grad(loss)
        expected_slope = torch.func.vjp(slope, x)[1](direction)[0]
        torch.testing.assert_close(torch.func.jvp(slope, (x,), (direction,))[1], expected_slope)
        with forward_ad.dual_level():
            dual = loss(forward_ad.make_dual(x, direction))
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes that the checks compare
    def test_jit_trace_keeps_the_gradients(self, call: Call):
        class Traced(torch.nn.Module):
            def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
                return tuple(tensors_of(call.function(*inputs)))

        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(Traced(), call.inputs), file)
        file.seek(0)
        loaded = torch.jit.load(file)
        expected = results_of(call.function, call.inputs, call.differentiable)
        for a, b in zip(expected, results_of(loaded, call.inputs, call.differentiable), strict=True):
            torch.testing.assert_close(a, b)

    def test_make_fx_keeps_the_gradients(self, call: Call):
        recorded = make_fx(lambda *inputs: tuple(tensors_of(call.function(*inputs))))(*call.inputs)
        expected = results_of(call.function, call.inputs, call.differentiable)
        for a, b in zip(expected, results_of(recorded, call.inputs, call.differentiable), strict=True):
            torch.testing.assert_close(a, b)

    def test_inference_tensors_as_constants(self, call: Call):
        """What needs no gradient may have been made under ``torch.inference_mode``."""
        first = call.differentiable[0]
        expected = results_of(call.function, call.inputs, (first,))
        with torch.inference_mode():
            copies = [tensor.clone() for tensor in call.inputs]
        copies[first] = call.inputs[first]
        for a, b in zip(expected, results_of(call.function, tuple(copies), (first,)), strict=True):
            torch.testing.assert_close(a, b)
