"""Batch-norm statistics, the tap, and the distance from the running statistics."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from contract import OpContract, of_kernels
from hypothesis import given
from hypothesis import strategies as st

import kdkernels
from kdkernels import nn
from kdkernels.functional import batch_norm_stat_distances, batch_norm_stat_loss, batch_norm_stats, batch_norm_tap
from kdkernels.ops._cases import layouts
from kdkernels.testing.selftest import error_in_ulp, results_of

F64 = torch.float64
L = np.longdouble


def options_of(case):
    return dict(case.function.keywords) if isinstance(case.function, partial) else {}


class TestBatchNormStats(OpContract):
    op = "batch_norm_stats"

    @classmethod
    def op_samples(cls):
        x = torch.randn(2, 4, 3, 5)
        inputs = [x, x.permute(0, 3, 1, 2), x[:, :, ::2], x[..., 0, 0], torch.randn(6, 4, 2), x.bfloat16()]
        for i, input in enumerate(inputs):
            for grad in (False, True):
                input = input.detach().requires_grad_(grad)
                yield "batch_norm_stats", (input, bool(i % 2))
                mean, var, error = (s.detach() for s in torch.ops.kdkernels.batch_norm_stats.reference(input, False))
                incoming = torch.randn_like(input), torch.randn_like(mean), torch.randn_like(var)
                incoming = tuple(g.requires_grad_(grad) for g in incoming)
                for given_ in (incoming, (None, *incoming[1:]), (None, incoming[1], None), (incoming[0], None, None)):
                    yield "batch_norm_tap_backward", (*given_, input, mean, error, bool(i % 2))
        for options in (
            ("l2", "var", "mean", 1.0, 1.0),
            ("l2", "std", "mean", 0.5, 3.0),
            ("l1", "std", "mean", 1.0, 1.0),
            ("l1", "var", "sum", 2.0, 0.0),
            ("squared", "std", "sum", 0.3, 1.0),
            ("gaussian_kl", "var", "mean", 1.0, 1.0),
        ):
            for grad in (False, True):
                stats = [(torch.randn(5).abs() + 0.1).requires_grad_(grad) for _ in range(4)]
                yield "batch_norm_stat_distances", (*stats, [2, 3], *options)
                losses = torch.randn(2, requires_grad=grad)
                yield "batch_norm_stat_distances_backward", (losses, *stats, [2, 3], *options)

    @classmethod
    def extended(cls, case, arrays, cotangents):
        options = options_of(case)
        x = np.moveaxis(arrays[0], 1, 0)
        flat = x.reshape(len(x), -1)
        count = flat.shape[1]
        mean = flat.mean(1)
        centered = flat - mean[:, None]
        divisor = count - options.get("unbiased", False)
        var = (centered**2).sum(1) / divisor
        name = (case.function.func if options else case.function).__name__

        def back(d_mean, d_var, grad=0.0):
            by_channel = d_mean[:, None] / count + 2 * d_var[:, None] * centered / divisor
            return np.moveaxis(by_channel.reshape(x.shape), 0, 1) + grad

        if name == "batch_norm_stats":
            return [mean, var, back(*cotangents)]
        if name == "batch_norm_tap":
            return [arrays[0], mean, var, back(*cotangents[1:], cotangents[0])]
        options.pop("unbiased", None)
        loss, *grads = distance(mean, var, *arrays[1:], **options)
        return [loss, back(grads[0] * cotangents[0], grads[1] * cotangents[0]), *(g * cotangents[0] for g in grads[2:])]

    def test_inductor(self):
        for call in (self.calls()[2], self.calls()[4]):
            self._check_compiled(call, "inductor", None)


def distance(
    mean, var, running_mean, running_var, mode="l2", moment="var", reduction=None, mean_weight=1.0, var_weight=1.0
):
    """Return the loss and the gradients of the four statistics in extended precision."""
    d, over = mean - running_mean, 1 if reduction == "sum" else len(mean)
    if mode == "gaussian_kl":
        v, r = var + L(1e-8), running_var + L(1e-8)
        loss = (np.log(np.sqrt(v) / np.sqrt(r)) - (1 - (r + d**2) / v) / 2).sum() / over
        return loss, d / v / over, (v - r - d**2) / (2 * v**2) / over, -d / v / over, (r - v) / (2 * v * r) / over
    s, r = (np.sqrt(var), np.sqrt(running_var)) if moment == "std" else (var, running_var)
    slopes = (1 / (2 * s), 1 / (2 * r)) if moment == "std" else (1, 1)
    loss, grads = 0, []
    for weight, x in ((L(mean_weight), d), (L(var_weight), s - r)):
        norm = np.sqrt((x**2).sum())
        value, grad = {
            "l2": (norm, x / norm),
            "l1": (abs(x).sum() / over, np.sign(x) / over),
            "squared": ((x**2).sum() / over, 2 * x / over),
        }[mode]
        loss, grads = loss + weight * value, [*grads, weight * grad]
    return loss, grads[0], grads[1] * slopes[0], -grads[0], -grads[1] * slopes[1]


# Values derived by hand


def test_statistics_of_four_numbers():
    x = torch.tensor([[1.0], [2.0], [3.0], [6.0]], dtype=F64)
    mean, var = batch_norm_stats(x)
    assert (mean.item(), var.item()) == (3.0, 3.5)
    assert batch_norm_stats(x, unbiased=True)[1].item() == pytest.approx(14 / 3, abs=1e-15)


def test_loss_and_gradient_by_hand():
    """One channel: R = |mu - m| + |v - r|, dR/dx = sign / n + 2 (x - mu) sign / n."""
    x = torch.tensor([[1.0], [2.0], [3.0], [6.0]], dtype=F64, requires_grad=True)
    loss = batch_norm_stat_loss(x, torch.tensor([1.0], dtype=F64), torch.tensor([4.0], dtype=F64))
    loss.backward()
    assert loss.item() == pytest.approx(2.5, abs=1e-15)
    expected = 1 / 4 - 2 * (x.detach() - 3.0) / 4
    torch.testing.assert_close(x.grad, expected)


def test_gaussian_kl_by_hand():
    x = torch.tensor([[0.0], [2.0]], dtype=F64)
    loss = batch_norm_stat_loss(x, torch.tensor([0.0], dtype=F64), torch.tensor([4.0], dtype=F64), mode="gaussian_kl")
    assert loss.item() == pytest.approx(math.log(1 / 2) - 0.5 * (1 - (4 + 1) / 1), abs=1e-7)


BY_HAND = {
    # Two channels: differences of the means 3 and -4, of the variances 5 and 12, of the deviations 1 and 2.
    ("l2", "var"): 5 + 13,
    ("l2", "std"): 5 + 5**0.5,
    ("l1", "var"): (7 + 17) / 2,
    ("l1", "std"): (7 + 3) / 2,
    ("squared", "var"): (25 + 169) / 2,
    ("squared", "std"): (25 + 5) / 2,
}


@pytest.mark.parametrize(("mode", "moment"), BY_HAND)
def test_modes_reductions_and_weights_by_hand(mode, moment, backend):
    """With the weights 2 and 0.5 and no reduction: the parts of the mean twice, those of the variance half."""
    statistics = [torch.tensor(x, dtype=F64) for x in ([3.0, -4.0], [9.0, 16.0], [0.0, 0.0], [4.0, 4.0])]
    found = partial(batch_norm_stat_distances, *statistics, [2], mode=mode, moment=moment)
    assert found().item() == pytest.approx(BY_HAND[mode, moment], rel=1e-14)
    parts = [found(mean_weight=1.0, var_weight=0.0).item(), found(mean_weight=0.0).item()]
    assert sum(parts) == pytest.approx(BY_HAND[mode, moment], rel=1e-14)
    weighted = found(mean_weight=2, var_weight=np.float32(0.5)).item()
    assert weighted == pytest.approx(2 * parts[0] + 0.5 * parts[1], rel=1e-14)
    if mode != "l2":
        assert found(reduction="mean").item() == pytest.approx(BY_HAND[mode, moment], rel=1e-14)
        assert found(reduction="sum").item() == pytest.approx(2 * BY_HAND[mode, moment], rel=1e-14)


def test_l1_gradient_by_hand(backend):
    """Sign of each difference, 0 where there is none."""
    given_ = ([3.0, -4.0, 1.0], [9.0, 2.0, 5.0], [0.0, 0.0, 1.0], [4.0] * 3)
    statistics = [torch.tensor(x, dtype=F64, requires_grad=True) for x in given_]
    loss = batch_norm_stat_distances(*statistics, [3], mode="l1", reduction="sum", mean_weight=2, var_weight=3)
    assert loss.item() == 2 * 7 + 3 * 8
    grads = torch.autograd.grad(loss.sum(), statistics)
    assert [grad.tolist() for grad in grads] == [[2, -2, 0], [3, -3, 3], [-2, 2, 0], [-3, 3, -3]]


def test_reductions_of_gaussian_kl(backend):
    statistics = [torch.rand(5, dtype=F64) + 0.5 for _ in range(4)]
    mean = batch_norm_stat_distances(*statistics, [2, 3], mode="gaussian_kl")
    total = batch_norm_stat_distances(*statistics, [2, 3], mode="gaussian_kl", reduction="sum")
    torch.testing.assert_close(total, mean * torch.tensor([2.0, 3.0], dtype=F64))


def test_statistics_are_those_of_batch_norm():
    layer = torch.nn.BatchNorm2d(5, momentum=1.0)
    x = torch.randn(4, 5, 6, 7)
    layer(x)
    torch.testing.assert_close(batch_norm_stats(x)[0], layer.running_mean)
    torch.testing.assert_close(batch_norm_stats(x, unbiased=True)[1], layer.running_var)


# Edges


def test_equal_statistics_give_no_loss_and_no_gradient(backend):
    x = torch.randn(8, 3, 4, 4, dtype=F64)
    mean, var = batch_norm_stats(x)
    for moment in ("var", "std"):
        results = results_of(partial(batch_norm_stat_loss, moment=moment), (x, mean, var), (0, 1, 2))
        assert all(torch.equal(r, torch.zeros_like(r)) for r in results)


def test_deviation_of_a_constant_has_gradient_0(backend):
    x = torch.full((4, 2), 3.0)
    _, grad = results_of(
        partial(batch_norm_stat_loss, moment="std"), (x, torch.tensor([3.0, 3.0]), torch.ones(2)), (0,)
    )
    assert torch.equal(grad, torch.zeros_like(x))


@of_kernels
def test_large_mean_does_not_spoil_variance_and_gradient():
    x = torch.randn(16, 4, 20, 20) + 1000.0
    with kdkernels.set_backend("reference"):
        truth = results_of(batch_norm_stats, (x,), (0,), F64)
    for a, b in zip(results_of(batch_norm_stats, (x,), (0,)), truth, strict=True):
        assert error_in_ulp(a, b) <= 4


def test_no_channels(backend):
    mean, var = batch_norm_stats(torch.randn(3, 0, 2))
    assert mean.shape == var.shape == (0,)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: batch_norm_stats(torch.randn(3)), ValueError, r"2 to 5 dimensions, got shape \(3,\)"),
        (lambda: batch_norm_stats(torch.randn(0, 3)), ValueError, "has 0 values per.*at least 1"),
        (lambda: batch_norm_stats(torch.randn(1, 3), unbiased=True), ValueError, "has 1 values per.*at least 2"),
        (lambda: batch_norm_stats(torch.ones(2, 3, dtype=torch.int32)), TypeError, "input must be float16"),
        (lambda: batch_norm_tap([1.0]), TypeError, "input must be a tensor, got list"),
        (lambda: loss_of(mode="l3"), ValueError, "mode is 'l3'; accepted are 'l2', 'l1'"),
        (lambda: loss_of(reduction="none"), ValueError, "reduction is 'none'; accepted are 'mean', 'sum'"),
        (lambda: loss_of(reduction="mean"), ValueError, "reduction is 'mean', but mode='l2' is a norm .* leave"),
        (lambda: loss_of(mode="gaussian_kl", var_weight=2), ValueError, "var_weight is 2.0, but mode='gaussian_kl' is"),
        (lambda: loss_of(mean_weight=math.inf), ValueError, "mean_weight is inf; expected a finite number"),
        (lambda: loss_of(mean_weight="1"), TypeError, "mean_weight must be a number, got '1'"),
        (lambda: loss_of(var_weight=torch.ones(())), TypeError, r"is a tensor; .*such as float\(var_weight\)"),
        (lambda: loss_of(moment="skew"), ValueError, "moment is 'skew'; accepted"),
        (lambda: loss_of(mode="gaussian_kl", moment="std"), ValueError, "moment='std' applies to"),
        (lambda: batch_norm_stat_loss(torch.randn(4, 3), torch.ones(2), torch.ones(3)), ValueError, r"expected \(3,\)"),
    ],
)
def test_wrong_calls(call, error, text):
    with pytest.raises(error, match=text):
        call()


def loss_of(**options):
    return batch_norm_stat_loss(torch.randn(4, 3), torch.zeros(3), torch.ones(3), **options)


# The tap


def test_tap_hands_the_activation_on():
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    y, mean, var = batch_norm_tap(x)
    assert torch.equal(y, x)
    assert y.data_ptr() == x.data_ptr()
    (2 * y).sum().backward(retain_graph=True)
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
    with pytest.raises(RuntimeError, match="view"):
        y.add_(1.0)
    a, b = batch_norm_stats(x)
    assert torch.equal(mean, a)
    assert torch.equal(var, b)


def test_tap_equals_separate_statistics():
    x = torch.randn(3, 4, 5, 5, dtype=F64, requires_grad=True)

    def loss(y, mean, var):
        return (y**3).sum() + (mean**2).sum() + var.exp().sum()

    (fused,) = torch.autograd.grad(loss(*batch_norm_tap(x)), x)
    (separate,) = torch.autograd.grad(loss(x, *batch_norm_stats(x)), x)
    torch.testing.assert_close(fused, separate)


def test_tap_under_functional_transforms():
    x = torch.randn(6, 3, dtype=F64)

    def loss(x):
        y, mean, var = batch_norm_tap(x)
        return (y**2).sum() + (mean * var).sum()

    def plain(x):
        return (x**2).sum() + (x.mean(0) * x.var(0, unbiased=False)).sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), torch.func.grad(plain)(x))
    value, pull_back = torch.func.vjp(loss, x)
    torch.testing.assert_close(pull_back(torch.ones_like(value))[0], torch.func.grad(plain)(x))
    batch = torch.randn(2, 6, 3, dtype=F64)
    with pytest.warns(UserWarning, match="performance drop"):
        torch.testing.assert_close(torch.func.vmap(loss)(batch), torch.func.vmap(plain)(batch))


def test_export_of_the_tap():
    class Model(torch.nn.Module):
        def forward(self, x):
            y, mean, var = batch_norm_tap(x)
            return y.relu(), mean + var

    x = torch.randn(4, 3, requires_grad=True)
    exported = torch.export.export(Model(), (x,)).module()
    for a, b in zip(results_of(exported, (x,), (0,)), results_of(Model(), (x,), (0,)), strict=True):
        torch.testing.assert_close(a, b)


def test_module_shows_what_it_computes():
    x, mean, var = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    module = nn.BatchNormStatLoss(moment="std")
    assert torch.equal(module(x, mean, var), batch_norm_stat_loss(x, mean, var, moment="std"))
    assert "||mean - running_mean|| + ||std - running_std||" in repr(module)
    options = {"mode": "l1", "reduction": "sum", "mean_weight": 2.0}
    module = nn.BatchNormStatLoss(**options)
    assert torch.equal(module(x, mean, var), batch_norm_stat_loss(x, mean, var, **options))
    assert "sum over channels of 2.0 |mean - running_mean| + |var - running_var|" in repr(module)


@given(
    samples=st.integers(1, 9),
    channels=st.sampled_from([1, 2, 3, 16, 17, 70]),
    sizes=st.sampled_from([(), (1,), (5,), (3, 4), (1, 1), (7, 33), (2, 3, 4)]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "part", "offset", "channels_last"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    mean=st.sampled_from([0.0, 3.0, -50.0]),
    seed=st.integers(0, 2**16),
)
def test_any_combination(samples, channels, sizes, layout, dtype, mean, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn((samples, channels, *sizes), generator=generator) + mean).to(dtype)
    forms = layouts(x)
    x = forms.get(layout, forms["contiguous"])
    ours = results_of(batch_norm_tap, (x,), (0,))
    with kdkernels.set_backend("reference"):
        truth = results_of(batch_norm_tap, (x,), (0,), F64)
    for a, b in zip(ours, truth, strict=True):
        # The variance of a single value is 0, and so is the truth, up to the rounding error of the mean.
        assert error_in_ulp(a, b) <= 8 or (a - b).abs().max() <= 1e-9 * (1 + mean**2)
