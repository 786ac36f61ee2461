"""Total variation along every axis: volumes, weights, spacing, masks and Huber's loss."""

import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from contract import OnTheCPU, OpContract
from hypothesis import given
from hypothesis import strategies as st

import kdkernels
from kdkernels import nn
from kdkernels.functional import total_variation
from kdkernels.ops._cases import layouts
from kdkernels.testing.selftest import error_in_ulp, results_of

F64 = torch.float64
L = np.longdouble
NORMS = ("l1", "l2", "l2_squared", "huber", "isotropic")
REDUCTIONS = ("none", "mean", "sum")


class TestVolumes(OnTheCPU, OpContract):
    op = "total_variation"

    @classmethod
    def op_samples(cls):
        x = torch.randn(2, 3, 4, 5, 6)
        mask = torch.rand(2, 1, 4, 5, 6) < 0.7
        inputs = [
            x,
            x.permute(0, 4, 1, 2, 3),
            x[..., ::2],
            x[:, :, :1, :1, :1],
            x[:0],
            x[:, :, 0],
            x[:, :, 0, 0],
            x.half(),
        ]
        for i, volume in enumerate(inputs):
            for grad, average in product((False, True), ("nothing", "sample", "batch")):
                volume = volume.detach().requires_grad_(grad)
                axes = volume.dim() - 2
                fits = mask if volume.shape == x.shape and i % 2 == 0 else None
                scale, threshold = torch.rand(axes, dtype=F64), torch.rand(axes, dtype=F64) + 0.1
                norm_type = NORMS[(i + (average == "batch")) % 5]
                options = (0.5 if norm_type == "isotropic" else 0.0, norm_type, average, REDUCTIONS[i % 3])
                yield "total_variation_nd", (volume, fits, scale, threshold, *options)
                op = getattr(torch.ops.kdkernels.total_variation_nd, cls.backends()[0])
                loss, coefficients = (r.detach() for r in op(volume, fits, scale, threshold, *options))
                incoming = torch.randn_like(loss).requires_grad_(grad)
                tensors = (incoming, volume, fits, scale, threshold, coefficients)
                yield "total_variation_nd_backward", (*tensors, *options)

    @classmethod
    def extended(cls, case, arrays, cotangents):
        return variation(arrays[0], cotangents[0], *arrays[1:], **options_of(case.function))

    def test_inductor(self):
        for call in (self.calls()[0], self.calls()[3], self.calls()[5]):
            self._check_compiled(call, "inductor", None)


def options_of(function):
    if isinstance(function, partial):
        return function.keywords
    return function.__closure__[[*function.__code__.co_freevars].index("options")].cell_contents


def variation(
    x,
    cotangent,
    mask=None,
    *,
    spatial_dims=2,
    reduction="sum",
    norm_type="l1",
    eps=0.0,
    axis_weight=(1, 1, 1),
    spacing=(1, 1, 1),
    axis_reduction=None,
    delta=1.0,
):
    """Return the value and the gradient in extended precision, pair by pair along each axis."""
    mask = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    over = tuple(range(1, x.ndim))
    images = len(x)

    def per_image(v):
        return np.asarray(v).reshape(-1, *[1] * (x.ndim - 1))

    first, second, keep, d = [], [], [], []
    for a in range(spatial_dims):
        before = tuple(slice(None, -1) if i == a + 2 else slice(None) for i in range(x.ndim))
        after = tuple(slice(1, None) if i == a + 2 else slice(None) for i in range(x.ndim))
        first.append(before)
        second.append(after)
        keep.append(mask[before] & mask[after])
        d.append(np.where(keep[a], (x[before] - x[after]) / L(spacing[a]), L(0)))
    count = [k.sum(over) for k in keep]
    w = [L(one) for one in axis_weight]
    if norm_type == "isotropic":
        square, present = np.zeros_like(x), np.zeros(x.shape, bool)
        for a in range(spatial_dims):
            square[first[a]] += w[a] * d[a] ** 2
            present[first[a]] |= keep[a]
        length = np.where(present, np.sqrt(square + L(eps)), 0)
        inverse = np.where(length == 0, 0, 1 / np.where(length == 0, 1, length))
        values = length.sum(over)
        slopes = [w[a] * d[a] * inverse[first[a]] / L(spacing[a]) for a in range(spatial_dims)]
    else:
        term, slope = {
            "l1": (np.abs, np.sign),
            "l2": (np.square, lambda k: k),
            "l2_squared": (np.square, lambda k: 2 * k),
            "huber": (
                lambda k: np.where(np.abs(k) <= delta, k**2 / 2, delta * (np.abs(k) - L(delta) / 2)),
                lambda k: np.clip(k, -delta, delta),
            ),
        }[norm_type]
        divisor = [np.ones(images, dtype=L)] * spatial_dims
        if axis_reduction == "mean":
            divisor = [np.maximum(n, 1).astype(L) for n in count]
        elif axis_reduction is None and reduction == "mean" and norm_type != "l2":
            divisor = [np.full(images, max(n.sum(), 1), dtype=L) / images for n in count]
        values = sum(w[a] * term(d[a]).sum(over) / divisor[a] for a in range(spatial_dims))
        slopes = [w[a] * slope(d[a]) / per_image(divisor[a]) / L(spacing[a]) for a in range(spatial_dims)]
        if norm_type == "l2":
            values = np.sqrt(values)
            slopes = [s / per_image(np.where(values == 0, 1, values)) for s in slopes]
    gradient = np.zeros_like(x)
    for a in range(spatial_dims):
        gradient[first[a]] += slopes[a]
        gradient[second[a]] -= slopes[a]
    if reduction == "none":
        return [values, per_image(cotangent) * gradient]
    share = L(1) / images if reduction == "mean" else L(1)
    return [values.sum() * share, cotangent * share * gradient]


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 9), st.integers(1, 12), st.integers(1, 40)),
    norm_type=st.sampled_from(NORMS),
    reduction=st.sampled_from(REDUCTIONS),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "part", "offset", "channels_last"]),
    mask=st.sampled_from(["none", "whole", "axes", "channels", "row"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_any_combination(shape, norm_type, reduction, layout, mask, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = layouts(torch.randn(shape, generator=generator).to(dtype))[layout]
    of = {"none": (), "whole": shape, "axes": shape[2:], "channels": (1, *shape[1:]), "row": (1, 1, 1, 1, shape[-1])}
    inside = torch.rand(of[mask], generator=generator) < 0.7 if mask != "none" else None
    function = partial(
        total_variation,
        norm_type=norm_type,
        reduction=reduction,
        spatial_dims=3,
        mask=inside,
        axis_weight=(0.5, 2, 1),
        spacing=(1, 2, 0.5),
    )
    ours = results_of(function, (x,), (0,))
    with kdkernels.set_backend("reference"):
        truth = results_of(function, (x,), (0,), F64)
    for a, b in zip(ours, truth, strict=True):
        assert error_in_ulp(a, b) <= 8


def test_numbers_of_every_kind(cpu_backend):
    x = torch.randn(1, 2, 3, 4, 5)
    value = partial(total_variation, x, spatial_dims=3, norm_type="huber")
    expected = value(axis_weight=(0.5, 2.0, 1.0), delta=0.5)
    for weight in (
        [0.5, 2, 1],
        np.array([0.5, 2.0, 1.0]),
        torch.tensor([0.5, 2.0, 1.0]),
        (np.float32(0.5), 2, torch.tensor(1)),
    ):
        for delta in (0.5, np.float64(0.5), torch.tensor(0.5)):
            assert torch.equal(value(axis_weight=weight, delta=delta), expected)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"spatial_dims": 4}, ValueError, "spatial_dims is 4; accepted are 1, 2 and 3"),
        ({"spatial_dims": 2}, ValueError, r"input must be \[B, C, H, W\] or .* need spatial_dims=3"),
        ({"spatial_dims": 1}, ValueError, r"input must be \[B, C, L\] or \[C, L\], got shape \(2, 3, 4, 4, 4\)"),
        ({"axis_weight": (1, 2)}, ValueError, r"axis_weight has 2 numbers; .* \[D, H, W\]"),
        ({"axis_weight": (1, -1, 1)}, ValueError, r"axis_weight\[1\] is -1.*; expected a finite number, 0 or more"),
        ({"axis_weight": (1, math.nan, 1)}, ValueError, r"axis_weight\[1\] is nan"),
        ({"axis_weight": "abc"}, TypeError, r"axis_weight\[0\] must be a number"),
        ({"axis_weight": torch.ones(3, requires_grad=True)}, ValueError, r"axis_weight.* requires grad.*detach"),
        ({"axis_weight": torch.ones(3, 1)}, ValueError, r"axis_weight\[0\] must be a number or a 0-dim tensor"),
        ({"spacing": "1"}, TypeError, r"spacing\[0\] must be a number or a 0-dim tensor, got str"),
        (
            {"spacing": 1e-200, "norm_type": "l2"},
            (ValueError, RuntimeError),
            "the factor.* inf.*; expected finite numbers",
        ),
        ({"eps": "a"}, TypeError, "eps must be a number, got 'a'"),
        ({"spacing": 0}, ValueError, r"spacing\[0\] is 0.*; expected a positive, finite number"),
        ({"spacing": (1, 1, math.inf)}, ValueError, r"spacing\[2\] is inf"),
        ({"norm_type": "huber", "delta": 0.0}, ValueError, "delta is 0.0; expected a positive"),
        ({"delta": 2.0}, ValueError, "delta is 2.0; it is the threshold of norm_type='huber' only"),
        ({"directions": 4}, ValueError, "directions is 4; with spatial_dims=3"),
        ({"axis_reduction": "max"}, ValueError, "axis_reduction is 'max'; accepted are"),
        ({"axis_reduction": "mean", "norm_type": "isotropic"}, ValueError, "axis_reduction is 'mean', but"),
        ({"mask": torch.ones(4, 4, 4)}, TypeError, "mask must be boolean, got torch.float32; pass mask != 0"),
        ({"mask": [True]}, TypeError, "mask must be a tensor, got list"),
        ({"mask": torch.ones(2, 4, 4, 4) > 0}, ValueError, r"mask has shape \(2, 4, 4, 4\).*mask.unsqueeze\(1\)"),
        ({"eps": 0.1}, ValueError, "eps is 0.1; expected 0, or"),
    ],
)
def test_wrong_calls(options, error, text):
    with pytest.raises(error, match=text):
        total_variation(torch.randn(2, 3, 4, 4, 4), **{"spatial_dims": 3, **options})


def test_weights_that_a_compiled_call_cannot_read_are_checked_by_the_kernels(cpu_backend):
    x = torch.randn(1, 1, 3, 3, 3)

    def value(weight):
        return total_variation(x, spatial_dims=3, axis_weight=weight)

    compiled = torch.compile(value, backend="aot_eager", fullgraph=True)
    weight = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(compiled(weight), value(weight))
    with pytest.raises((ValueError, RuntimeError), match="expected finite numbers, 0 or more"):
        compiled(-weight)


def test_export():
    class Prior(torch.nn.Module):
        def forward(self, x, mask):
            return total_variation(x, "mean", spatial_dims=3, norm_type="huber", spacing=(2, 1, 1), mask=mask)

    given_ = torch.randn(2, 3, 4, 5, 6, requires_grad=True), torch.rand(4, 5, 6) < 0.8
    exported = torch.export.export(Prior(), given_).module()
    for a, b in zip(results_of(exported, given_, (0,)), results_of(Prior(), given_, (0,)), strict=True):
        torch.testing.assert_close(a, b)


def test_module():
    x, mask = torch.randn(2, 3, 4, 5, 6), torch.rand(4, 5, 6) < 0.8
    options = {"norm_type": "huber", "spatial_dims": 3, "axis_weight": (1.0, 2.0, 3.0), "spacing": 2.0, "delta": 0.5}
    module = nn.TotalVariationLoss("mean", **options)
    assert torch.equal(module(x, mask), total_variation(x, "mean", mask=mask, **options))
    assert repr(module) == (
        "TotalVariationLoss(sum huber(d), delta=0.5, spatial_dims=3, axis_weight=(1.0, 2.0, 3.0), spacing=2.0, "
        "reduction='mean')"
    )
