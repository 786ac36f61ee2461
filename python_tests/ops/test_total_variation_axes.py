"""Total variation along every axis: values derived by hand, and the edges of volumes, masks and numbers."""

import math
from functools import partial
from itertools import product

import pytest
import torch

from kdkernels.functional import total_variation
from kdkernels.testing.selftest import results_of

F64 = torch.float64
NORMS = ("l1", "l2", "l2_squared", "huber", "isotropic")
REDUCTIONS = ("none", "mean", "sum")

# Values derived by hand


# A volume [1, 1, 2, 2, 2]: along D the differences are 4, 5, 5, 9; along H 2, 2, 3, 6; along W 1, 1, 2, 5.
CUBE = [[[0.0, 1.0], [2.0, 3.0]], [[4.0, 6.0], [7.0, 12.0]]]


def cube():
    return torch.tensor(CUBE, dtype=F64)[None, None]


def test_a_cube_by_hand(cpu_backend):
    assert [x.abs().flatten().tolist() for x in (cube().diff(dim=d) for d in (2, 3, 4))] == [
        [4, 5, 5, 9],
        [2, 2, 3, 6],
        [1, 1, 2, 5],
    ]
    value = partial(total_variation, cube(), spatial_dims=3)
    assert value().item() == 23 + 13 + 9
    assert value(axis_weight=(1, 10, 100)).item() == 23 + 130 + 900
    assert value("mean").item() == 23 / 4 + 13 / 4 + 9 / 4
    assert value(axis_reduction="mean").item() == 45 / 4
    assert value(spacing=(2, 1, 0.5)).item() == 11.5 + 13 + 18
    squares = (16 + 25 + 25 + 81, 4 + 4 + 9 + 36, 1 + 1 + 4 + 25)
    assert value(norm_type="l2_squared").item() == sum(squares)
    assert value(norm_type="l2_squared", spacing=(2, 1, 0.5)).item() == squares[0] / 4 + squares[1] + squares[2] * 4
    assert value(norm_type="l2").item() == pytest.approx(math.sqrt(sum(squares)), abs=1e-14)
    assert value(norm_type="l2", axis_weight=(1, 0, 0), axis_reduction="mean").item() == pytest.approx(
        math.sqrt(squares[0] / 4), abs=1e-14
    )
    # Differences beyond 2 count 2 * (|d| - 1), the others d^2 / 2.
    huber = (2 * (23 - 4), 2 + 2 + 2 * (9 - 2), 0.5 + 0.5 + 2 + 2 * (5 - 1))
    assert value(norm_type="huber", delta=2).item() == sum(huber)
    # The points have the differences (4, 2, 1), (5, 2), (5, 1), 9, (3, 2), 6, 5.
    lengths = [math.sqrt(s) for s in (21, 29, 26, 81, 13, 36, 25)]
    assert value(norm_type="isotropic").item() == pytest.approx(sum(lengths), abs=1e-13)
    with_eps = [math.sqrt(s + 3) for s in (21, 29, 26, 81, 13, 36, 25)]
    assert value(norm_type="isotropic", eps=3.0).item() == pytest.approx(sum(with_eps), abs=1e-13)


def test_the_gradient_of_a_row_by_hand(cpu_backend):
    """[0, 3, 1, 1] has the differences -3, 2, 0 between a number and the next."""
    x = torch.tensor([[0.0, 3.0, 1.0, 1.0]], dtype=F64)
    value = partial(total_variation, spatial_dims=1)
    by_hand = {
        "l1": [-1, 2, -1, 0],
        "l2_squared": [-6, 10, -4, 0],
        "huber": [-1, 2, -1, 0],
        "isotropic": [-1, 2, -1, 0],
        "l2": [-3 / math.sqrt(13), 5 / math.sqrt(13), -2 / math.sqrt(13), 0],
    }
    for norm_type, expected in by_hand.items():
        row = x.clone().requires_grad_()
        value(row, norm_type=norm_type).backward()
        torch.testing.assert_close(row.grad, torch.tensor([expected], dtype=F64), rtol=0, atol=1e-15)
    row = x.clone().requires_grad_()
    value(row, norm_type="huber", delta=2.5, spacing=0.5, axis_weight=3).backward()  # d = -6, 4, 0; beyond 2.5 / 0.5
    torch.testing.assert_close(row.grad, torch.tensor([[-15.0, 30.0, -15.0, 0.0]], dtype=F64), rtol=0, atol=1e-14)


def test_a_mask_by_hand(cpu_backend):
    """Of [0, 3, 1, 7] without the third, the pair of the first two is left."""
    x = torch.tensor([[0.0, 3.0, math.nan, 7.0]], dtype=F64, requires_grad=True)
    mask = torch.tensor([True, True, False, True])
    for norm_type, value in (("l1", 3), ("l2", 3), ("l2_squared", 9), ("huber", 2.5), ("isotropic", 3)):
        loss = total_variation(x, norm_type=norm_type, spatial_dims=1, mask=mask)
        assert loss.item() == value
        (grad,) = torch.autograd.grad(loss, x)
        slope = {"l2_squared": 6}.get(norm_type, 1)
        assert grad.tolist() == [[-slope, slope, 0, 0]]
    assert total_variation(x, "mean", spatial_dims=1, mask=mask).item() == 3


def test_the_mean_is_over_the_pairs_that_count(cpu_backend):
    x = torch.randn(2, 3, 3, 4, 5, dtype=F64)
    mask = torch.rand(2, 1, 3, 4, 5) < 0.6
    inside = mask.expand_as(x)
    means = []
    for axis in (2, 3, 4):
        n = x.shape[axis] - 1
        means.append(x.diff(dim=axis).abs()[inside.narrow(axis, 0, n) & inside.narrow(axis, 1, n)].mean())
    torch.testing.assert_close(total_variation(x, "mean", spatial_dims=3, mask=mask), sum(means))
    by_image = [total_variation(x[b : b + 1], "mean", spatial_dims=3, mask=mask[b : b + 1]) for b in range(2)]
    torch.testing.assert_close(
        total_variation(x, "none", spatial_dims=3, mask=mask, axis_reduction="mean"), torch.stack(by_image)
    )


def test_options_of_2_d_images_agree_with_the_plain_call(cpu_backend):
    """A weight of 1 or a full mask gives what is computed without."""
    x = torch.randn(2, 3, 9, 11)
    for norm_type, reduction in product(("l1", "l2", "l2_squared", "isotropic"), REDUCTIONS):
        plain = results_of(partial(total_variation, norm_type=norm_type, reduction=reduction), (x,), (0,))
        for options in ({"axis_weight": 1.0}, {"spacing": (1, 1)}, {"mask": torch.ones(9, 11, dtype=torch.bool)}):
            given_ = partial(total_variation, norm_type=norm_type, reduction=reduction, **options)
            for a, b in zip(plain, results_of(given_, (x,), (0,)), strict=True):
                torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_a_volume_of_one_slice_is_an_image(cpu_backend):
    x = torch.randn(2, 3, 7, 9)
    for norm_type in ("l1", "l2", "l2_squared", "isotropic"):
        volume = total_variation(x[:, :, None], "none", norm_type=norm_type, spatial_dims=3)
        torch.testing.assert_close(volume, total_variation(x, "none", norm_type=norm_type), rtol=1e-6, atol=0)


# Edges


def test_constant_volumes_have_no_variation_and_no_gradient(cpu_backend):
    x = torch.full((2, 3, 4, 5, 6), 0.7)
    for norm_type in NORMS:
        for result in results_of(partial(total_variation, norm_type=norm_type, spatial_dims=3), (x,), (0,)):
            assert torch.equal(result, torch.zeros_like(result))
    wide = partial(total_variation, norm_type="isotropic", spatial_dims=3, eps=4.0)
    assert wide(x[:1, :1]).item() == 2 * (4 * 5 * 6 - 1)  # all points but the last


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 4), (2, 0, 2, 4, 4), (2, 3, 0, 4, 4), (2, 3, 4, 0, 4), (2, 3, 4, 4, 0)])
def test_empty_volumes_give_0(cpu_backend, shape):
    x = torch.randn(shape)
    for norm_type, reduction, masked in product(NORMS, REDUCTIONS, (False, True)):
        mask = torch.ones(shape, dtype=torch.bool) if masked else None
        function = partial(total_variation, norm_type=norm_type, reduction=reduction, spatial_dims=3, mask=mask)
        loss, grad = results_of(function, (x,), (0,))
        assert torch.equal(loss, torch.zeros(shape[0] if reduction == "none" else ()))
        assert grad.shape == shape


def test_an_axis_without_pairs_adds_0(cpu_backend):
    for shape, axis in (((2, 3, 1, 1, 6), -1), ((2, 3, 1, 6, 1), -2), ((2, 3, 6, 1, 1), -3)):
        x = torch.randn(shape, dtype=F64)
        d = x.diff(dim=axis)
        mean = {"l1": d.abs().mean(), "l2_squared": d.square().mean()}
        for norm_type, expected in mean.items():
            torch.testing.assert_close(total_variation(x, "mean", norm_type=norm_type, spatial_dims=3), expected)
        torch.testing.assert_close(total_variation(x, norm_type="isotropic", spatial_dims=3), d.abs().sum())
    point = torch.randn(2, 3, 1, 1, 1)
    for norm_type in NORMS:
        function = partial(total_variation, norm_type=norm_type, spatial_dims=3, reduction="mean")
        for result in results_of(function, (point,), (0,)):
            assert torch.equal(result, torch.zeros_like(result))


def test_a_mask_that_leaves_nothing_gives_0(cpu_backend):
    x = torch.full((2, 3, 4, 5, 6), math.nan)
    for norm_type, reduction in product(NORMS, REDUCTIONS):
        function = partial(
            total_variation, norm_type=norm_type, reduction=reduction, spatial_dims=3, mask=torch.tensor(False)
        )
        for result in results_of(function, (x,), (0,)):
            assert torch.equal(result, torch.zeros_like(result))


def test_nan_and_infinity_reach_their_neighbours_alone(cpu_backend):
    x = torch.randn(1, 1, 5, 5, 40)
    x[0, 0, 2, 2, 20] = math.nan
    neighbours = [(2, 2, 20), (1, 2, 20), (3, 2, 20), (2, 1, 20), (2, 3, 20), (2, 2, 19), (2, 2, 21)]
    for norm_type in ("l1", "l2_squared", "huber"):
        loss, grad = results_of(partial(total_variation, norm_type=norm_type, spatial_dims=3), (x,), (0,))
        assert loss.isnan()
        assert sorted(map(tuple, grad[0, 0].isnan().nonzero().tolist())) == sorted(neighbours)
    x[0, 0, 2, 2, 20] = math.inf
    for norm_type in NORMS:
        loss, grad = results_of(partial(total_variation, norm_type=norm_type, spatial_dims=3), (x,), (0,))
        assert loss.item() == math.inf
    assert total_variation(torch.tensor([[0.0, -0.0]]), spatial_dims=1).item() == 0


def test_one_volume_is_a_batch_of_one(cpu_backend):
    x = torch.randn(3, 4, 5, 6)
    mask = torch.rand(3, 4, 5, 6) < 0.5
    for reduction in REDUCTIONS:
        one = total_variation(x, reduction, spatial_dims=3, mask=mask)
        assert one.shape == ()
        torch.testing.assert_close(one, total_variation(x[None], reduction, spatial_dims=3, mask=mask).squeeze())


def test_formulas_of_volumes_in_use():
    """The mean squares of gsplat's bilateral grids, and DirectVoxGO's mean over the axes inside a mask."""
    grids = torch.randn(3, 12, 4, 6, 5, dtype=F64)
    squares = sum(grids.diff(dim=d).square().flatten(1).mean(1).sum() for d in (2, 3, 4)) / 3
    torch.testing.assert_close(total_variation(grids, "mean", norm_type="l2_squared", spatial_dims=3), squares)
    voxels, mask = torch.randn(1, 2, 5, 4, 3, dtype=F64), torch.rand(1, 2, 5, 4, 3) < 0.7
    means = [
        voxels.diff(dim=2).abs()[mask[:, :, 1:] & mask[:, :, :-1]].mean(),
        voxels.diff(dim=3).abs()[mask[:, :, :, 1:] & mask[:, :, :, :-1]].mean(),
        voxels.diff(dim=4).abs()[mask[..., 1:] & mask[..., :-1]].mean(),
    ]
    found = total_variation(voxels, "mean", spatial_dims=3, mask=mask, axis_weight=1 / 3)
    torch.testing.assert_close(found, sum(means) / 3)
