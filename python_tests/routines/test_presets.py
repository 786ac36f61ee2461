"""Presets of the inversion: their settings, and their objectives rederived in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from networks import hooked_loss, trained_like

from kdkernels.inversion import PRESETS, DeepInversion, InversionConfig
from kdkernels.inversion._loop import learning_rate_at
from kdkernels.models import SmallCNN

F64 = torch.float64


def rederived(name, teacher, student, images, labels, pool, shift, flip):
    """Return the loss of a preset, written out from the formulas."""
    x = F.avg_pool2d(images, pool) if pool > 1 else images
    x = torch.roll(x, shift, (2, 3))
    x = x.flip(3) if flip else x
    features, _, logits = hooked_loss(teacher, x)

    def differences(x):
        return (
            x[:, :, :, :-1] - x[:, :, :, 1:],
            x[:, :, :-1] - x[:, :, 1:],
            x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
            x[:, :, :-1, :-1] - x[:, :, 1:, 1:],
        )

    def j():
        p, q = F.softmax(student(x) / 3, 1), F.softmax(logits / 3, 1)
        m = (p + q) / 2
        p, q, m = p.clamp(0.01, 0.99), q.clamp(0.01, 0.99), m.clamp(0.01, 0.99)
        return (0.5 * m * (m.log() - p.log()) + 0.5 * m * (m.log() - q.log())).sum() / len(p)

    cross_entropy = F.cross_entropy(logits, labels)
    tv_l2 = sum(d.norm() for d in differences(x))
    if name.startswith("nvlabs-imagenet"):
        readme = name.endswith("readme")
        r = 10 * features[0] + sum(features[1:])
        l2 = x.flatten(1).norm(dim=1).mean()
        return cross_entropy + (0.01 if readme else 0.05) * r + 1e-4 * tv_l2 + 1e-5 * l2
    if name == "nvlabs-cifar10":
        return cross_entropy + 100 * sum(features) + 2.5e-5 * tv_l2
    if name == "nvlabs-cifar10-paper":
        return cross_entropy + 10 * sum(features) + 2.5e-5 * tv_l2
    if name == "nvlabs-cifar10-readme":
        return cross_entropy + 10 * sum(features) + 1e-3 * tv_l2
    if name == "datafree-deepinv":
        tv_l1 = sum(d.abs().mean() for d in differences(images))
        return cross_entropy + 10 * sum(features) + 1e-3 * tv_l1 - j()
    assert name == "digits"
    l2 = x.flatten(1).norm(dim=1).mean()
    return cross_entropy + 10 * sum(features) + 1e-3 * tv_l2 + 1e-3 * l2


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_their_formulas(name, memory_format):
    config = InversionConfig.preset(name)
    channels = 3 if config.mean is not None else 1
    if name == "datafree-deepinv":
        config = replace(config, mean=(0.5,), std=(0.2,))
    teacher = trained_like(SmallCNN(4, in_channels=channels)).double().eval()
    # Confident and opposed, so that the clamps of the competition term bind for some images but not all.
    student = trained_like(SmallCNN(3, in_channels=channels), 1).double().eval()
    with torch.no_grad():
        for model in (teacher, student):
            model[-1].weight.mul_(6)
    images = torch.randn(6, channels, 16, 16, dtype=F64, requires_grad=True)
    labels = torch.randint(0, 10, (6,))
    for pool, shift, flip in ((config.stages[0].pool, (1, -2), True), (1, (0, 0), False)):
        inverter = DeepInversion(teacher, (channels, 16, 16), config, student=student, memory_format=memory_format)
        terms = inverter.objective(images, labels, pool=pool, shift=shift, flip=flip)
        expected = rederived(name, teacher, student, images, labels, pool, shift, flip)
        torch.testing.assert_close(terms["loss"], expected, rtol=1e-12, atol=0)
        found, truth = (torch.autograd.grad(loss, images)[0] for loss in (terms["loss"], expected))
        assert (found - truth).norm() <= 1e-12 * truth.norm()
        assert torch.equal(terms["loss"], torch.stack([t for n, t in terms.items() if n != "loss"]).sum())


def test_presets_hold_the_published_settings():
    stages = {name: [(s.iterations, s.pool) for s in config.stages] for name, config in PRESETS.items()}
    assert stages["nvlabs-imagenet-0"] == stages["nvlabs-imagenet-0-readme"] == [(2000, 2), (1000, 1)]
    assert stages["nvlabs-imagenet-1"] == [(2000, 1)]
    assert stages["nvlabs-imagenet-2"] == [(20000, 1)]
    assert stages["datafree-deepinv"] == [(1000, 1)]
    image_net, readme = PRESETS["nvlabs-imagenet-0"], PRESETS["nvlabs-imagenet-0-readme"]
    assert (image_net.batch_size, image_net.learning_rate, image_net.betas) == (64, 0.2, (0.5, 0.9))
    assert (readme.batch_size, readme.learning_rate, readme.flip, image_net.flip) == (84, 0.25, 0.5, 0.0)
    assert PRESETS["nvlabs-cifar10-paper"].learning_rate == 0.05
    assert (image_net.jitter, image_net.clip, PRESETS["nvlabs-imagenet-2"].clip) == (30, True, False)
    cifar = PRESETS["nvlabs-cifar10"]
    assert (cifar.batch_size, cifar.jitter, cifar.schedule, cifar.betas) == (256, 2, "constant", (0.9, 0.999))
    data_free = PRESETS["datafree-deepinv"]
    assert (data_free.betas, data_free.jitter, data_free.flip, data_free.clip) == ((0.5, 0.99), 4, 0.5, True)


def test_learning_rate_warms_up_and_follows_a_cosine():
    config = PRESETS["nvlabs-imagenet-1"]
    rates = [learning_rate_at(config, i, 2000) for i in range(2000)]
    assert rates[0] == pytest.approx(0.2 / 100)
    assert rates[99] == rates[100] == pytest.approx(0.2)
    assert rates[1050] == pytest.approx(0.1)
    assert 0 < rates[-1] < 1e-6
    assert learning_rate_at(PRESETS["digits"], 50, 200) == 0.1
