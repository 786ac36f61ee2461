"""Total variation and the image priors of DeepInversion."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from contract import OpContract
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

import kdkernels
from kdkernels import nn
from kdkernels.ops._cases import layouts
from kdkernels.ops.total_variation import image_prior_losses, total_variation
from kdkernels.ops.total_variation.cases import NORMS, REDUCTIONS
from kdkernels.testing.selftest import error_in_ulp, results_of

F64 = torch.float64
L = np.longdouble


class TestTotalVariation(OpContract):
    op = "total_variation"

    @classmethod
    def op_samples(cls):
        x = torch.randn(2, 3, 4, 5)
        inputs = [x, x.permute(0, 3, 1, 2), x[..., ::2], x[:, :, :1, :1], x[:0], x.half()]
        for i, img in enumerate(inputs):
            for grad in (False, True):
                img = img.detach().requires_grad_(grad)
                yield "image_prior_losses", (img,)
                *_, norms = (r.detach() for r in torch.ops.kdkernels.image_prior_losses.reference(img))
                scalars = [torch.randn(()).requires_grad_(grad) for _ in range(3)]
                for given_ in (scalars, [None, scalars[1], None], [scalars[0], None, scalars[2]]):
                    yield "image_prior_losses_backward", (*given_, img, norms)
                for norm_type, directions in (NORMS[i % len(NORMS)], NORMS[(i + 3) % len(NORMS)]):
                    options = (norm_type, directions, 0.5 if norm_type == "isotropic" else 0.0, REDUCTIONS[i % 3])
                    yield "total_variation", (img, *options)
                    loss, norms = (r.detach() for r in torch.ops.kdkernels.total_variation.reference(img, *options))
                    incoming = torch.randn_like(loss).requires_grad_(grad)
                    yield "total_variation_backward", (incoming, img, norms, *options)

    @classmethod
    def extended(cls, case, arrays, cotangents):
        if case.function is image_prior_losses:
            return priors(arrays[0], cotangents)
        return variation(arrays[0], cotangents[0], **case.function.keywords)

    def test_inductor(self):
        for call in (self.calls()[0], self.calls()[4]):
            self._check_compiled(call, "inductor", None)


def shifted(x):
    """Return the pairs of each direction as two views: pixel and neighbour."""
    return [
        (x[..., :, :-1], x[..., :, 1:]),
        (x[..., :-1, :], x[..., 1:, :]),
        (x[..., 1:, :-1], x[..., :-1, 1:]),
        (x[..., :-1, :-1], x[..., 1:, 1:]),
    ]


def spread(slopes, shape):
    """Return the gradient of the pixels from that of the differences."""
    gradient = np.zeros(shape, dtype=L)
    for slope, (pixel, neighbour) in zip(slopes, shifted(gradient), strict=False):
        pixel += slope
        neighbour -= slope
    return gradient


def over(a, b):
    return a / b if b else np.zeros_like(a)


def priors(x, cotangents):
    d = [pixel - neighbour for pixel, neighbour in shifted(x)]
    norms = [np.sqrt((k**2).sum()) for k in d]
    image_norms = np.sqrt((x**2).sum((1, 2, 3)))
    losses = [sum(np.abs(k).mean() if k.size else L(0) for k in d), sum(norms), image_norms.mean()]
    slopes = [
        cotangents[0] * np.sign(k) / max(k.size, 1) + cotangents[1] * over(k, n) for k, n in zip(d, norms, strict=True)
    ]
    by_norm = cotangents[2] * x / image_norms[:, None, None, None] / len(x)
    return [*losses, spread(slopes, x.shape) + by_norm]


def variation(x, cotangent, *, norm_type="l1", directions=2, reduction="sum", eps=0.0):
    d = [pixel - neighbour for pixel, neighbour in shifted(x)][:directions]
    images = (1, 2, 3)
    if norm_type == "isotropic":
        dx, dy = np.zeros_like(x), np.zeros_like(x)
        dx[..., :, :-1], dy[..., :-1, :] = d
        length = np.sqrt(dx**2 + dy**2 + L(eps))
        length[..., -1, -1] = 0
        values = length.sum(images)
        safe = np.where(length == 0, 1, length)
        slopes = [np.where(length == 0, 0, dx / safe)[..., :, :-1], np.where(length == 0, 0, dy / safe)[..., :-1, :]]
    elif norm_type == "l2":
        values = np.sqrt(sum((k**2).sum(images) for k in d))
        slopes = [k / np.where(values == 0, 1, values)[:, None, None, None] for k in d]
    else:
        power = 1 if norm_type == "l1" else 2
        counts = [max(k.size, 1) if reduction == "mean" else 1 for k in d]
        values = sum((np.abs(k) ** power).sum(images) / c for k, c in zip(d, counts, strict=True))
        slopes = [(np.sign(k) if power == 1 else 2 * k) / c for k, c in zip(d, counts, strict=True)]
    scale = cotangent[:, None, None, None] if reduction == "none" else cotangent
    if reduction == "mean" and norm_type in ("l2", "isotropic"):
        return [values.mean(), scale / len(x) * spread(slopes, x.shape)]
    return [values if reduction == "none" else values.sum(), scale * spread(slopes, x.shape)]


# Values derived by hand


def test_two_pixels():
    x = torch.tensor([[[0.0, 1.0]]], dtype=F64)
    for norm_type in ("l1", "l2", "l2_squared"):
        assert total_variation(x, norm_type=norm_type, directions=1).item() == 1.0
    assert total_variation(x, norm_type="isotropic").item() == 1.0
    assert total_variation(x, norm_type="isotropic", eps=3.0).item() == 2.0


def test_priors_of_four_pixels():
    """[[0, 1], [2, 4]]: differences right 1, 2; down 2, 3; diagonals 1 (2 - 1) and 4 (0 - 4)."""
    x = torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]]], dtype=F64)
    tv_l1, tv_l2, l2 = image_prior_losses(x)
    assert tv_l1.item() == pytest.approx(1.5 + 2.5 + 1 + 4, abs=1e-15)
    assert tv_l2.item() == pytest.approx(math.sqrt(5) + math.sqrt(13) + 1 + 4, abs=1e-15)
    assert l2.item() == pytest.approx(math.sqrt(21), abs=1e-15)


def test_norm_of_the_batch_grows_with_its_root():
    x = torch.randn(1, 3, 8, 8, dtype=F64)
    one, four = image_prior_losses(x), image_prior_losses(x.expand(4, -1, -1, -1))
    torch.testing.assert_close(four[0], one[0])
    torch.testing.assert_close(four[1], 2 * one[1])
    torch.testing.assert_close(four[2], one[2])


def test_mean_divides_each_direction_by_its_own_pairs():
    x = torch.randn(2, 3, 5, 9, dtype=F64)
    right, down = (x[..., :-1] - x[..., 1:]), (x[..., :-1, :] - x[..., 1:, :])
    torch.testing.assert_close(total_variation(x, "mean"), right.abs().mean() + down.abs().mean())
    squares = total_variation(x, "mean", norm_type="l2_squared")
    torch.testing.assert_close(squares, (right**2).mean() + (down**2).mean())


# Edges


def test_constant_images_have_no_variation_and_no_gradient(backend):
    x = torch.full((2, 3, 6, 7), 0.7)
    for norm_type, directions in NORMS:
        function = partial(total_variation, norm_type=norm_type, directions=directions)
        for result in results_of(function, (x,), (0,)):
            assert torch.equal(result, torch.zeros_like(result))
    black = torch.zeros(2, 3, 6, 7)
    for result in results_of(image_prior_losses, (black,), (0,)):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty_images_give_0(backend, shape):
    x = torch.randn(shape)
    for function in (image_prior_losses, *(partial(total_variation, norm_type=n, directions=d) for n, d in NORMS)):
        *losses, grad = results_of(function, (x,), (0,))
        assert [loss.item() for loss in losses] == [0.0] * len(losses)
        assert grad.shape == shape
    assert total_variation(x, "none").shape == (shape[0],)


@pytest.mark.parametrize(("shape", "kept"), [((2, 3, 1, 6), -1), ((2, 3, 6, 1), -2)])
def test_a_direction_without_pairs_adds_0(backend, shape, kept):
    x = torch.randn(shape, dtype=F64)
    d = x.diff(dim=kept)
    torch.testing.assert_close(image_prior_losses(x)[0], d.abs().mean())
    torch.testing.assert_close(image_prior_losses(x)[1], d.norm())
    torch.testing.assert_close(total_variation(x, directions=4), d.abs().sum())
    torch.testing.assert_close(total_variation(x, norm_type="isotropic"), d.abs().sum())


def test_one_image_is_a_batch_of_one(backend):
    x = torch.randn(3, 5, 6)
    for reduction in REDUCTIONS:
        one = total_variation(x, reduction)
        assert one.shape == ()
        torch.testing.assert_close(one, total_variation(x[None], reduction).squeeze())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: image_prior_losses(x[0]), ValueError, r"input must be \[B, C, H, W\]"),
        (lambda x: total_variation(x[0, 0]), ValueError, r"input must be \[B, C, H, W\] or \[C, H, W\]"),
        (lambda x: total_variation(x.int()), TypeError, "input must be float16.*int32"),
        (lambda x: total_variation(x, "batchmean"), ValueError, "reduction is 'batchmean'; accepted"),
        (lambda x: total_variation(x, norm_type="l3"), ValueError, "norm_type is 'l3'; accepted"),
        (lambda x: total_variation(x, directions=3), ValueError, "directions is 3; accepted are 1, 2 and 4"),
        (lambda x: total_variation(x, norm_type="isotropic", directions=4), ValueError, "isotropic' has directions=2"),
        (lambda x: total_variation(x, eps=0.1), ValueError, "eps is 0.1; expected 0, or"),
        (lambda x: total_variation(x, norm_type="isotropic", eps=-1.0), ValueError, "eps is -1.0"),
    ],
)
def test_wrong_calls(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.randn(2, 3, 4, 4))


def test_export():
    class Prior(torch.nn.Module):
        def forward(self, x):
            return image_prior_losses(x)

    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    exported = torch.export.export(Prior(), (x,)).module()
    for a, b in zip(results_of(exported, (x,), (0,)), results_of(Prior(), (x,), (0,)), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_leaves_the_dtype_alone():
    x = torch.randn(2, 3, 8, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert image_prior_losses(x)[0].dtype == torch.float32


def test_modules_show_what_they_compute():
    x = torch.randn(2, 3, 6, 6)
    module = nn.TotalVariationLoss("mean", norm_type="l2_squared", directions=4)
    assert torch.equal(module(x), total_variation(x, "mean", norm_type="l2_squared", directions=4))
    assert repr(module) == "TotalVariationLoss(sum d^2, directions=4, reduction='mean')"
    module = nn.ImagePriorLoss(tv_l1=0.5, tv_l2=0.0, l2=2.0)
    tv_l1, _, l2 = image_prior_losses(x)
    torch.testing.assert_close(module(x), 0.5 * tv_l1 + 2 * l2)
    assert "0.5 * TV_l1" in repr(module)
    x.requires_grad_()
    nn.ImagePriorLoss(tv_l2=0.0)(x).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 20), st.integers(1, 40)),
    norm=st.sampled_from([*NORMS, None]),
    reduction=st.sampled_from(REDUCTIONS),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "part", "offset", "channels_last"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_any_combination(shape, norm, reduction, layout, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = layouts(torch.randn(shape, generator=generator).to(dtype))[layout]
    function = image_prior_losses
    if norm is not None:
        function = partial(total_variation, norm_type=norm[0], directions=norm[1], reduction=reduction)
    ours = results_of(function, (x,), (0,))
    with kdkernels.set_backend("reference"):
        truth = results_of(function, (x,), (0,), F64)
    for a, b in zip(ours, truth, strict=True):
        assert error_in_ulp(a, b) <= 8


def test_forms_of_other_packages():
    """kornia sums or averages each channel, [B, C]; torchmetrics sums each image; piq takes norms of each image."""
    x = torch.randn(2, 3, 5, 4, dtype=F64)
    right, down = x.diff(dim=-1), x.diff(dim=-2)
    kornia_sum = right.abs().sum((-2, -1)) + down.abs().sum((-2, -1))
    kornia_mean = right.abs().mean((-2, -1)) + down.abs().mean((-2, -1))
    assert kornia_sum.shape == (2, 3)
    torch.testing.assert_close(kornia_sum.sum(1), total_variation(x, "none"))
    torch.testing.assert_close(kornia_mean.mean(), total_variation(x, "mean"))
    torchmetrics_none = right.abs().sum((1, 2, 3)) + down.abs().sum((1, 2, 3))
    torch.testing.assert_close(torchmetrics_none, total_variation(x, "none"))
    torch.testing.assert_close(torchmetrics_none.sum(), total_variation(x, "sum"))
    piq_squared = right.square().sum((1, 2, 3)) + down.square().sum((1, 2, 3))
    torch.testing.assert_close(piq_squared, total_variation(x, "none", norm_type="l2_squared"))
    torch.testing.assert_close(piq_squared.sqrt(), total_variation(x, "none", norm_type="l2"))


def test_forward_mode_at_a_constant_image():
    """The derivative of a norm at 0 is 0 in every direction, as in reverse mode."""
    images, direction = torch.ones(2, 1, 3, 3, dtype=F64), torch.randn(2, 1, 3, 3, dtype=F64)
    for function in (partial(total_variation, norm_type="l2"), lambda x: image_prior_losses(x).tv_l2):
        value, tangent = torch.func.jvp(function, (images,), (direction,))
        assert (value, tangent) == (0.0, 0.0)


def test_tangents_of_a_gradient_alone_are_refused():
    """The forward ran before there were tangents, so that its kernels are what is differentiated."""
    images = torch.rand(2, 1, 3, 3, dtype=F64, requires_grad=True)
    loss = total_variation(images)
    with forward_ad.dual_level():
        incoming = forward_ad.make_dual(torch.ones_like(loss), torch.ones_like(loss))
        with pytest.raises(NotImplementedError, match="total_variation_backward has no forward-mode"):
            torch.autograd.grad(loss, images, incoming)
