"""The fused BatchNorm layer: output, statistics of its input, and their gradients."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import OpContract, of_kernels
from hypothesis import given
from hypothesis import strategies as st

import kdkernels
from kdkernels.functional import batch_norm_act_stats
from kdkernels.ops._cases import layouts
from kdkernels.ops.batch_norm_act_stats.cases import eager, ours
from kdkernels.testing.selftest import error_in_ulp, results_of

F64 = torch.float64


class TestBatchNormActStats(OpContract):
    op = "batch_norm_act_stats"

    @classmethod
    def op_samples(cls):
        x = torch.randn(2, 4, 3, 5)
        inputs = [x, x.permute(0, 3, 1, 2), x[:, :, ::2], x[..., 0, 0], torch.randn(6, 4, 2), x.bfloat16()]
        options = [
            (1e-5, "relu", 0.0, False, True),
            (1e-3, "silu", 0.0, True, False),
            (1e-5, "none", 0.0, False, False),
        ]
        for i, input in enumerate(inputs):
            channels = input.shape[1]
            parameters = torch.randn(channels), torch.rand(channels) + 0.5, torch.randn(channels), None
            for grad in (False, True):
                input = input.detach().requires_grad_(grad)
                eps, activation, slope, by_image, unbiased = options[i % 3]
                given_ = (eps, activation, slope, by_image and input.dim() > 2, unbiased)
                residual = torch.randn_like(input).requires_grad_(grad) if activation != "silu" else None
                yield "batch_norm_act_stats", (input, *parameters, residual, *given_)
                reference = torch.ops.kdkernels.batch_norm_act_stats.reference
                output, mean, var = (s.detach() for s in reference(input.detach(), *parameters, residual, *given_))
                incoming = [torch.randn_like(s).requires_grad_(grad) for s in (output, mean, var)]
                masked = output if residual is not None and activation != "none" else None
                for grads in (
                    incoming,
                    (None, *incoming[1:]),
                    (incoming[0], None, None),
                    (incoming[0], None, incoming[2]),
                ):
                    yield "batch_norm_act_stats_backward", (*grads, input, masked, mean, *parameters, *given_)

    @classmethod
    def extended(cls, case, arrays, cotangents):
        options = case.function.keywords
        x, running_mean, running_var, *rest = arrays
        weight, bias = rest[:2] if len(rest) >= 2 else (np.ones_like(running_mean), np.zeros_like(running_mean))
        residual = rest[2] if len(rest) == 3 else None
        channel = (slice(None), *[None] * (x.ndim - 2))
        scale = weight / np.sqrt(running_var + options.get("eps", 1e-5))
        u = (x - running_mean[channel]) * scale[channel] + bias[channel] + (0 if residual is None else residual)
        value, slope = activation_of(u, options.get("activation"))

        axes = tuple(range(2, x.ndim)) if options.get("statistics") == "image" else (0, *range(2, x.ndim))
        count = math.prod(x.shape[a] for a in axes)
        divisor = count - options.get("unbiased", False)
        centered = x - x.mean(axes, keepdims=True)
        mean, var = x.mean(axes), (centered**2).sum(axes) / divisor
        by_output, by_mean, by_var = cotangents
        at = (..., *[None] * (x.ndim - 2))
        back = by_output * slope
        by_input = back * scale[channel] + by_mean[at] / count + 2 * by_var[at] * centered / divisor
        return [value, mean, var, by_input, *([] if residual is None else [back])]

    def test_inductor(self):
        for call in (self.calls()[0], self.calls()[2]):
            self._check_compiled(call, "inductor", None)


def activation_of(u, name):
    """Return the value of an activation and its derivative in extended precision."""
    one = np.ones_like(u)
    if name == "relu":
        return np.maximum(u, 0), one * (u > 0)
    if name == "relu6":
        return np.clip(u, 0, 6), one * ((u > 0) & (u < 6))
    if name == "leaky_relu":
        slope = np.where(u > 0, one, np.longdouble(0.01))
        return u * slope, slope
    if name == "silu":
        sigmoid = 1 / (1 + np.exp(-u))
        return u * sigmoid, sigmoid * (1 + u * (1 - sigmoid))
    if name == "hardswish":
        return u * np.clip(u + 3, 0, 6) / 6, np.where(u <= -3, 0 * one, np.where(u >= 3, one, u / 3 + one / 2))
    return u, one


# Values derived by hand


def test_by_hand():
    """One channel of x = 1, 3, 5: mean 3, variance 8/3; normalized by mean 1 and variance 4, times 3, minus 1."""
    x = torch.tensor([[1.0], [3.0], [5.0]], dtype=F64, requires_grad=True)
    one = torch.ones(1, dtype=F64)
    y, mean, var = batch_norm_act_stats(x, one, 4 * one, 3 * one, -one, eps=0.0, activation="relu")
    assert y.flatten().tolist() == [0.0, 2.0, 5.0]
    assert (mean.item(), var.item()) == (3.0, pytest.approx(8 / 3, abs=1e-15))
    # d(sum y) = 3/2 where y > 0; dmean/dx = 1/3; dvar/dx = 2 (x - 3) / 3
    (grad,) = torch.autograd.grad(y.sum() + 3 * mean + 3 * var, x)
    torch.testing.assert_close(grad.flatten(), torch.tensor([1 - 4.0, 1.5 + 1, 1.5 + 1 + 4], dtype=F64))


def test_residual_by_hand():
    x = torch.tensor([[1.0], [3.0]], dtype=F64, requires_grad=True)
    residual = torch.tensor([[-2.0], [4.0]], dtype=F64, requires_grad=True)
    one = torch.ones(1, dtype=F64)
    y, mean, _ = batch_norm_act_stats(x, 0 * one, 4 * one, eps=0.0, activation="relu6", residual=residual)
    assert y.flatten().tolist() == [0.0, 5.5]
    by_x, by_residual = torch.autograd.grad(y.sum() + 2 * mean, (x, residual))
    assert by_x.flatten().tolist() == [1.0, 1.5]
    assert by_residual.flatten().tolist() == [0.0, 1.0]


def test_statistics_of_images_by_hand():
    x = torch.tensor([[[1.0, 3.0]], [[10.0, 14.0]]], dtype=F64, requires_grad=True)
    _, mean, var = batch_norm_act_stats(x, torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64), statistics="image")
    assert mean.tolist() == [[2.0], [12.0]]
    assert var.tolist() == [[1.0], [4.0]]
    (grad,) = torch.autograd.grad((var * torch.tensor([[1.0], [2.0]], dtype=F64)).sum(), x)
    assert grad.tolist() == [[[-1.0, 1.0]], [[-4.0, 4.0]]]


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "silu", "hardswish"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_the_layer_of_torch(activation, residual, memory_format, backend):
    layer = torch.nn.BatchNorm2d(20).eval().requires_grad_(False)
    with torch.no_grad():
        for values in (layer.running_mean, layer.weight, layer.bias):
            values.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    x = torch.randn(3, 20, 5, 7).contiguous(memory_format=memory_format)
    parameters = layer.running_mean, layer.running_var, layer.weight, layer.bias
    inputs = (x, *parameters, *([torch.randn_like(x)] if residual else []))
    places = (0, 5) if residual else (0,)
    found = results_of(partial(ours, activation=activation), inputs, places)
    expected = results_of(partial(eager, activation=activation), inputs, places)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert found[0].is_contiguous(memory_format=memory_format)
    assert found[3].is_contiguous(memory_format=memory_format)


# What is kept, and edges


@pytest.mark.parametrize(("activation", "residual", "kept"), [("relu", False, 1), ("relu", True, 2), (None, True, 1)])
def test_keeps_neither_the_normalized_input_nor_the_residual(activation, residual, kept, backend):
    """What autograd saves as large as the input: the input, and with a residual the output for its mask."""
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    added = torch.randn_like(x, requires_grad=True) if residual else None
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = batch_norm_act_stats(x, torch.zeros(3), torch.ones(3), activation=activation, residual=added).output
    large = {t.data_ptr() for t in saved if t.numel() == x.numel()}
    assert large == ({x.data_ptr(), output.data_ptr()} if kept == 2 else {x.data_ptr()})


def test_residual_of_another_dtype_is_promoted_as_torch_does():
    x = torch.randn(4, 3, 2, 2).bfloat16()
    residual = torch.randn(4, 3, 2, 2)
    output = batch_norm_act_stats(x, torch.zeros(3), torch.ones(3), activation="relu", residual=residual).output
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, (x / (1 + 1e-5) ** 0.5 + residual).relu(), rtol=1e-2, atol=1e-2)


def test_leaky_relu_with_a_negative_slope_after_a_residual():
    inputs = (
        torch.randn(4, 3, 5, dtype=F64),
        *(torch.rand(3, dtype=F64) + 0.5 for _ in range(4)),
        torch.randn(4, 3, 5).double(),
    )
    found, expected = (
        results_of(partial(f, activation="leaky_relu", negative_slope=-0.5), inputs, (0, 5)) for f in (ours, eager)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_nan_passes(backend):
    x = torch.tensor([[float("nan")], [1.0]]).expand(2, 20).contiguous()
    for activation in (None, "relu", "relu6", "leaky_relu", "silu", "hardswish"):
        output, mean, var = batch_norm_act_stats(x, torch.zeros(20), torch.ones(20), activation=activation)
        assert output[0].isnan().all()
        assert output[1].isfinite().all()
        assert mean.isnan().all()
        assert var.isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_statistics_without_a_gradient_spread_no_nan(bad, memory_format, backend):
    x = torch.randn(4, 20, 3, 3)
    x[0, 0, 0, 0] = bad
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    output = batch_norm_act_stats(x, torch.zeros(20), torch.ones(20), eps=0.0).output
    (grad,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(grad, torch.ones_like(x))


@of_kernels
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("outliers", [False, True])
def test_large_mean_does_not_spoil_mean_and_variance(memory_format, outliers):
    """Also where the values that come first are far from the others."""
    x = torch.randn(16, 4, 20, 20) + 1000.0
    if outliers:
        x[0, :, 0, :4] = 0
    x = x.contiguous(memory_format=memory_format)
    _, *found = batch_norm_act_stats(x, torch.full((4,), 1000.0), torch.ones(4))
    dims = (0, 2, 3)
    eager = x.mean(dims), x.var(dims, unbiased=False)
    truth = x.double().mean(dims), x.double().var(dims, unbiased=False)
    for a, b, t in zip(found, eager, truth, strict=True):
        assert (a - t).abs().max() <= max(2 * (b - t).abs().max(), 1e-6 * t.abs().max())


def test_no_channels_and_empty_planes(backend):
    output, mean, _ = batch_norm_act_stats(torch.randn(3, 0, 2), torch.zeros(0), torch.ones(0))
    assert output.shape == (3, 0, 2)
    assert mean.shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"input": torch.randn(3)}, ValueError, r"2 to 5 dimensions, got shape \(3,\)"),
        ({"input": torch.randn(0, 3)}, ValueError, "has 0 values per channel.*at least 1"),
        ({"input": torch.randn(4, 3), "statistics": "image", "unbiased": True}, ValueError, "1 values per image and"),
        ({"input": torch.ones(2, 3, dtype=torch.int32)}, TypeError, "input must be float16"),
        ({"running_mean": None}, TypeError, "running_mean must be a tensor, got NoneType"),
        ({"running_var": torch.ones(2)}, ValueError, r"running_var has shape \(2,\); expected \(3,\)"),
        ({"weight": torch.ones(3, requires_grad=True)}, ValueError, r"weight requires grad.*weight.detach\(\)"),
        ({"running_mean": torch.ones(3, requires_grad=True)}, ValueError, "running_mean requires grad"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu'; accepted are 'relu'"),
        ({"statistics": "class"}, ValueError, "statistics is 'class'; accepted are 'batch', 'image'"),
        ({"residual": torch.randn(4, 3, 1)}, ValueError, "residual"),
        ({"eps": "small"}, TypeError, "eps must be a number"),
        ({"eps": -1.0}, ValueError, "eps is -1.0; expected a number that is not negative"),
        ({"unbiased": "yes"}, TypeError, "unbiased must be a bool, got 'yes'"),
    ],
)
def test_wrong_calls(change, error, text):
    arguments = {"input": torch.randn(4, 3), "running_mean": torch.zeros(3), "running_var": torch.ones(3), **change}
    with pytest.raises(error, match=text):
        batch_norm_act_stats(**arguments)


def test_parameters_may_require_grad_where_no_gradient_is_taken():
    layer = torch.nn.BatchNorm1d(3)
    with torch.no_grad():
        output = batch_norm_act_stats(torch.randn(4, 3), layer.running_mean, layer.running_var, layer.weight).output
    assert not output.requires_grad


@given(
    samples=st.integers(1, 9),
    channels=st.sampled_from([1, 2, 3, 16, 17, 40, 70]),
    sizes=st.sampled_from([(), (1,), (5,), (3, 4), (1, 1), (7, 33), (2, 3, 4)]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "part", "offset", "channels_last"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    activation=st.sampled_from([None, "leaky_relu", "silu"]),
    residual=st.booleans(),
    statistics=st.sampled_from(["batch", "image"]),
    mean=st.sampled_from([0.0, 3.0, -50.0]),
    seed=st.integers(0, 2**16),
)
def test_any_combination(samples, channels, sizes, layout, dtype, activation, residual, statistics, mean, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        values = (torch.randn((samples, channels, *sizes), generator=generator) + mean).to(dtype)
        forms = layouts(values)
        return forms.get(layout, forms["contiguous"])

    parameters = [torch.randn(channels, generator=generator) + mean, torch.rand(channels, generator=generator) + 0.5]
    parameters += [torch.randn(channels, generator=generator) for _ in range(2)]
    inputs = (draw(), *parameters, *([draw() - mean] if residual and activation != "leaky_relu" else []))
    function = partial(ours, activation=activation, statistics=statistics)
    found = results_of(function, inputs, (0,))
    with kdkernels.set_backend("reference"):
        truth = results_of(function, inputs, (0,), F64)
    for a, b in zip(found, truth, strict=True):
        # The variance of a single value is 0, and so is the truth, up to the rounding error of the mean.
        assert error_in_ulp(a, b) <= 64 or (a - b).abs().max() <= 1e-9 * (1 + mean**2)


def test_batch_norm_of_torch_is_the_layer_without_activation():
    x = torch.randn(4, 3, 5)
    running = torch.randn(3), torch.rand(3) + 0.5
    torch.testing.assert_close(batch_norm_act_stats(x, *running).output, F.batch_norm(x, *running))
