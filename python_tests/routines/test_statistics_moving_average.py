"""The moving average of statistics: what is compared, its updates, and its state."""

import io

import pytest
import torch
from networks import trained_like
from stages import F64, Ranks, close, expected_of, images, plain
from torch import nn

from kdkernels.functional import batch_norm_stats
from kdkernels.inversion import BatchNormStatistics


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def test_a_moving_average_by_hand():
    """One channel with running mean 0 and variance 1; batches with mean and variance 2, 1 and 7, 4, share 3 / 4."""
    layer = nn.BatchNorm1d(1).double().eval()
    a, b = tensor([1.0], [3.0]), tensor([5.0], [9.0]).requires_grad_()
    with BatchNormStatistics(layer, ema=0.75) as statistics:
        layer(a)
        close(statistics.loss(), torch.tensor(2.0, dtype=F64))
        layer(b)
        close(statistics.loss(), torch.tensor(7.0 + 3.0, dtype=F64))  # nothing but update_ema moves the average
        layer(a)
        statistics.update_ema()
        close(statistics.state_dict(), {".0.mean": tensor(2.0), ".0.var": tensor(1.0)})
        layer(b)
        loss = statistics.loss()
        # (7 + 3 * 2) / 4 and (4 + 3 * 1) / 4 - 1
        close(loss, torch.tensor(3.25 + 0.75, dtype=F64))
        (grad,) = torch.autograd.grad(loss, b)
        close(grad, 0.25 * (1 / 2 + (b.detach() - 7)))
        statistics.update_ema()
        close(statistics.state_dict(), {".0.mean": tensor(3.25), ".0.var": tensor(1.75)})
    with statistics:
        layer(b)
        close(statistics.loss(), torch.tensor((7 + 3 * 3.25) / 4 + (4 + 3 * 1.75) / 4 - 1, dtype=F64))


@pytest.mark.parametrize("mode", ["l2", "l1", "squared", "gaussian_kl"])
def test_a_moving_average_of_every_use(mode):
    """What is compared is what given targets would be compared with; a share of 0 changes nothing."""
    model = trained_like(Ranks()).double()
    x, y = (torch.randn(4, 3, 5, 6, dtype=F64, requires_grad=True) for _ in range(2))
    with BatchNormStatistics(model, mode=mode) as statistics:
        model(y)
        plain_losses = statistics.losses()
    with BatchNormStatistics(model, mode=mode, ema=0.0) as statistics:
        model(x)
        statistics.update_ema()
        model(y)
        close(torch.stack(list(statistics.losses().values())), torch.stack(list(plain_losses.values())))
    with BatchNormStatistics(model, mode=mode, ema=0.9) as statistics:
        model(x)
        statistics.update_ema()
        assert set(statistics.state_dict()) == {
            f"{layer}.{use}.{name}"
            for layer, use in (("volume", 0), ("image", 0), ("image", 1), ("vector", 0))
            for name in ("mean", "var")
        }
        saved = statistics.state_dict()
        model(y)
        losses = statistics.losses()
    seen = []
    model.image.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.eval()(y)
    for use, z in enumerate(seen):
        mean, var = (
            0.1 * now + 0.9 * saved[f"image.{use}.{name}"]
            for name, now in zip(("mean", "var"), batch_norm_stats(z), strict=True)
        )
        d, v, m, r = mean - model.image.running_mean, var, mean, model.image.running_var
        expected = {
            "l2": d.norm() + (v - r).norm(),
            "l1": (d.abs() + (v - r).abs()).mean(),
            "squared": (d**2 + (v - r) ** 2).mean(),
            "gaussian_kl": (torch.log((v + 1e-8) / (r + 1e-8)) / 2 - (1 - (r + 1e-8 + d**2) / (v + 1e-8)) / 2).mean(),
        }[mode]
        assert m.requires_grad
        close(losses["image", use], expected)


def test_a_moving_average_of_forwards_without_gradients():
    model, x = plain(), images()
    with BatchNormStatistics(model, ema=0.9) as statistics:
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                model(x)
                statistics.update_ema()
        model(x)
        (statistics.loss() + model(x).square().sum()).backward()
        close(statistics.loss(), expected_of(model, x)[0])


def test_a_moving_average_is_saved_and_loaded():
    model, x = plain(), images()
    with BatchNormStatistics(model, ema=0.9) as statistics:
        model(x)
        statistics.update_ema()
        model(images(1))
        expected = statistics.loss()
        file = io.BytesIO()
        torch.save(statistics.state_dict(), file)
        statistics.update_ema()
    file.seek(0)
    other = BatchNormStatistics(model, ema=0.9)
    other.load_state_dict(torch.load(file, weights_only=True))
    with other:
        model(images(1))
        assert torch.equal(other.loss(), expected)
        other.load_state_dict({})
        close(other.loss(), expected_of(model, images(1))[0])


def test_wrong_uses_of_a_moving_average():
    model = plain()
    for ema in (1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"ema is .*; expected a number in \[0, 1\)"):
            BatchNormStatistics(model, ema=ema)
    with pytest.raises(TypeError, match="ema must be a number"):
        BatchNormStatistics(model, ema="0.9")
    for over in ("image", "class"):
        with pytest.raises(ValueError, match=f"ema is 0.9, but over='{over}' has no statistics that last"):
            BatchNormStatistics(model, ema=0.9, over=over)
    without = BatchNormStatistics(model)
    assert without.state_dict() == {}
    without.load_state_dict({})
    with pytest.raises(ValueError, match="state has a moving average, but ema is None"):
        without.load_state_dict({"stages.0.1.0.mean": torch.ones(4)})
    with without:
        model(images())
        with pytest.raises(ValueError, match="ema is None, so that there is no moving average to update"):
            without.update_ema()
    statistics = BatchNormStatistics(model, ema=0.9)
    with statistics, pytest.raises(RuntimeError, match="no BatchNorm layer has run yet"):
        statistics.update_ema()
    ones = torch.ones(4)
    for state, text in (
        ({"stages.0.0.0.mean": ones}, r"state has the key 'stages.0.0.0.mean'; expected <layer>.<use>.mean"),
        ({"mean": ones}, "state has the key 'mean'"),
        ({"stages.0.1.0.mean": ones}, "state has only the mean of stages.0.1.0; expected both"),
        ({"stages.0.1.0.mean": torch.ones(3)}, r"shape \[3\]; expected \[4\]"),
    ):
        with pytest.raises(ValueError, match=text):
            statistics.load_state_dict(state)
