"""The rivals in the routine benchmarks compute the same as ours, and the benchmarked loop is that of the package."""

import copy
from dataclasses import replace

import pytest
import torch
from networks import trained_like
from torch import nn

from bench.routines import bench_data_free, bench_distillation
from bench.routines.bench_deep_inversion import OurIteration, stepping
from bench.routines.contest import CifarResNet, Contender, check_and_race, with_statistics
from bench.routines.published_inversion import PublishedInversion, total_variation
from kdkernels.inversion import PRESETS, DeepInversion, InversionConfig, Stage
from kdkernels.models import SmallCNN

SHAPE = (6, 3, 12, 10)
CONFIG = InversionConfig(
    stages=(Stage(5),), learning_rate=0.2, betas=(0.5, 0.9), feature_weight=0.3, first_layer_weight=10.0,
    tv_l1=0.7, tv_l2=0.02, l2=0.05, jitter=3, flip=0.5, clip=True, keep="last",
    mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4),
)  # fmt: skip
CONFIGS = {
    "all terms": CONFIG,
    "norm of the batch": replace(CONFIG, l2_norm="batch", clip=False),
    # In the published code the priors see the augmented images; the student's term is not part of it.
    **{name: replace(preset, stages=(Stage(5),), prior_of="augmented", clip=False) for name, preset in PRESETS.items()},
}


@pytest.fixture(autouse=True)
def _one_thread():
    """These networks are too small for more threads, and threads of several processes would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def teacher_of(dtype=torch.float32):
    return trained_like(CifarResNet("ResNet-8")).to(dtype)


def batch_of(dtype=torch.float32):
    return torch.randn(SHAPE, dtype=dtype), torch.arange(SHAPE[0])


def loss_and_gradient(loss_terms, images, *arguments, **options):
    images = images.clone().requires_grad_()
    terms = loss_terms(images, *arguments, **options)
    (gradient,) = torch.autograd.grad(terms["loss"], images)
    return {name: term.item() for name, term in terms.items()}, gradient


def state_of(model):
    return (
        copy.deepcopy(model.state_dict()),
        [module.training for module in model.modules()],
        [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    )


def assert_as_before(model, before):
    after = state_of(model)
    assert after[1:] == before[1:]
    assert not any(after[3])
    assert all(torch.equal(value, before[0][key]) for key, value in after[0].items())


# The published iteration


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("offsets", "flip"), [((0, 0), False), ((2, -3), False), ((-1, 1), True)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_published_terms_equal_ours(name, memory_format, offsets, flip, dtype):
    config, teacher, (images, labels) = CONFIGS[name], teacher_of(dtype), batch_of(dtype)
    ours = DeepInversion(teacher, SHAPE[1:], config, memory_format=memory_format)
    expected, expected_gradient = loss_and_gradient(ours.objective, images, labels, shift=offsets, flip=flip)
    published = PublishedInversion(teacher, config)
    terms, gradient = loss_and_gradient(published.loss_terms, images, labels, offsets, flip)
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    for term, value in expected.items():
        assert terms[term] == pytest.approx(value, rel=bound), term
    assert all(terms[term] == 0 for term in set(terms) - set(expected))
    # In fp32 rounding flips the sign of some inputs to ReLU.
    bound = 1e-4 if dtype == torch.float32 else 1e-12
    assert (gradient - expected_gradient).norm() <= bound * expected_gradient.norm()


def test_terms_of_two_pixels_by_hand():
    """Images [[1, 3], [2, 7]] and 0 in a network of one BatchNorm layer and the means of its outputs."""
    teacher = nn.Sequential(nn.BatchNorm2d(1, eps=0.0), nn.Flatten(), nn.Linear(4, 2)).double()
    teacher[0].running_mean.fill_(0.625)
    teacher[0].running_var.fill_(3.0)
    nn.init.zeros_(teacher[2].weight), nn.init.zeros_(teacher[2].bias)
    images = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    images[0, 0] = torch.tensor([[1.0, 3.0], [2.0, 7.0]])
    config = InversionConfig(feature_weight=2.0, first_layer_weight=5.0, tv_l1=1.0, tv_l2=1.0, l2=1.0)
    published = PublishedInversion(teacher, config)
    terms = {name: term.item() for name, term in published.loss_terms(images, torch.tensor([0, 1])).items()}
    # Sum 13, sum of squares 63, of 8 values
    mean, var = 13 / 8, 63 / 8 - (13 / 8) ** 2
    assert terms["features"] == pytest.approx(2 * 5 * (mean - 0.625 + var - 3.0))
    # Differences: right 2 and 5, down 1 and 4, diagonals 1 (2 and 3) and 6 (1 and 7)
    assert terms["tv_l1"] == pytest.approx((2 + 5) / 4 + (1 + 4) / 4 + 1 / 2 + 6 / 2)
    assert terms["tv_l2"] == pytest.approx(29**0.5 + 17**0.5 + 1 + 6)
    assert terms["l2"] == pytest.approx(63**0.5 / 2)
    assert terms["cross_entropy"] == pytest.approx(0.6931471805599453)
    assert terms["loss"] == pytest.approx(sum(value for name, value in terms.items() if name != "loss"))


def test_roll_comes_before_the_flip_and_before_the_prior():
    teacher, images = teacher_of(torch.float64), batch_of(torch.float64)[0]
    moved = torch.roll(images, (1, 2), (2, 3)).flip(3)
    published = PublishedInversion(teacher, CONFIG)
    terms = published.loss_terms(images, torch.arange(SHAPE[0]), (1, 2), True)
    assert terms["tv_l2"].item() == pytest.approx(CONFIG.tv_l2 * total_variation(moved)[1].item())
    assert terms["tv_l2"].item() != pytest.approx(CONFIG.tv_l2 * total_variation(images)[1].item())


@pytest.mark.parametrize("name", ["all terms", "nvlabs-cifar10"])
def test_published_synthesis_equals_ours(name):
    config = replace(CONFIGS[name], stages=(Stage(5),))
    teacher, labels = teacher_of(torch.float64), torch.arange(4)
    expected = DeepInversion(teacher, SHAPE[1:], config).synthesize(labels, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(4, *SHAPE[1:], generator=generator).double()
    published = PublishedInversion(teacher, config)
    torch.testing.assert_close(published.synthesize(images, labels, generator), expected.images)


def test_best_images_follow_the_step_after_the_best_loss():
    config = replace(CONFIG, keep="best", learning_rate=3.0)
    teacher, (images, labels) = teacher_of(), batch_of()
    published = PublishedInversion(teacher, config)
    published.begin(images, labels)
    losses, after = [], []
    for _ in range(6):
        losses.append(published.iteration())
        after.append(published.images.detach().clone())
    assert published.best_loss == min(losses)
    assert torch.equal(published.best_images, after[losses.index(min(losses))])


@pytest.mark.parametrize("freeze", [False, True])
def test_teacher_is_left_alone(freeze):
    teacher = teacher_of().train()
    teacher[3].conv1.weight.requires_grad_(False)
    before = state_of(teacher)
    published = PublishedInversion(teacher, CONFIG, freeze=freeze)
    published.begin(*batch_of())
    published.iteration((1, 1), True)
    parameters = list(published.teacher.parameters())
    computes = [parameter.grad is not None for parameter in parameters if parameter.requires_grad]
    assert all(computes)  # the published code computes gradients of the teacher's parameters
    assert len(computes) == (0 if freeze else len(parameters) - 1)
    assert not published.teacher.training
    assert_as_before(teacher, before)


@pytest.mark.parametrize(
    "change",
    [{"stages": (Stage(2, pool=2), Stage(2))}, {"mode": "squared"}, {"moment": "std"}, {"prior_of": "plain"}],
    ids=str,
)
def test_unpublished_settings_raise(change):
    with pytest.raises(ValueError, match=r"config\.(stages|mode)"):
        PublishedInversion(SmallCNN(4), replace(CONFIG, **change))


# What the benchmarks time


@pytest.mark.parametrize("keep", ["last", "best"])
def test_the_timed_iteration_is_that_of_the_package(keep):
    config, teacher, labels = replace(CONFIG, keep=keep), teacher_of(), torch.arange(4)
    expected = DeepInversion(teacher, SHAPE[1:], config).synthesize(labels, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(4, *SHAPE[1:], generator=generator)
    before = state_of(teacher)
    ours = OurIteration(DeepInversion(teacher, SHAPE[1:], config), images, labels, generator)
    with ours.watching():
        for _ in range(config.stages[0].iterations):
            ours.iteration()
        found = ours.loop.result()
    assert torch.equal(found.images, expected.images)
    assert found.history == expected.history
    assert_as_before(teacher, before)


def test_all_contenders_get_the_same_augmentations():
    drawn = [[], []]
    steps = [stepping(CONFIG, lambda *augmentation, into=into: into.append(augmentation)) for into in drawn]
    for _ in range(8):
        for step in steps:
            step()
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1


def test_losses_of_the_training_step_are_equal():
    student, images = SmallCNN(4), torch.randn(8, 1, 8, 8)
    logits, labels = torch.randn(8, 10), torch.arange(8)
    arguments = images.double(), logits.double(), labels
    results = [
        bench_distillation.Training(student, loss, *arguments).results()
        for loss in (bench_distillation.our_loss, bench_distillation.eager_loss)
    ]
    torch.testing.assert_close(*results)


def test_rounds_of_data_free_distillation_are_equal(monkeypatch):
    monkeypatch.setattr(bench_data_free, "INVERSION", replace(bench_data_free.INVERSION, stages=(Stage(4),)))
    teacher = trained_like(SmallCNN(4)).eval().double()
    student = SmallCNN(3).double()
    before = state_of(teacher)
    runs = (bench_data_free.our_round, bench_data_free.reference_round, bench_data_free.published_round(teacher))
    ours, *others = [bench_data_free.Round(run, teacher, student).results() for run in runs]
    for other in others:
        torch.testing.assert_close(other, ours)
    assert_as_before(teacher, before)


def failing():
    raise RuntimeError("cannot run")


def test_only_contenders_that_are_right_are_timed():
    truth = [torch.ones(3, dtype=torch.float64)]
    raced = {}

    def race(timed, **info):
        raced.update(info, timed=list(timed))

    contenders = {
        "kdkernels": Contender(list, results=lambda: [torch.ones(3)]),
        "eager": Contender(list, results=lambda: [torch.ones(3) + 1e-3]),
        "compile": Contender(list, results=failing, compiled=True),
        "alone": Contender(list),
    }
    check_and_race(race, contenders, truth, 1e-4, function="f", not_timed={"other": "why"})
    assert raced["timed"] == ["kdkernels", "alone"]
    assert raced["errors"]["eager"] == pytest.approx(1e-3, rel=1e-3)
    assert set(raced["not_timed"]) == {"eager", "compile", "other"}
    assert "relative error 1.0e-03" in raced["not_timed"]["eager"]
    assert "cannot run" in raced["not_timed"]["compile"]
    assert raced["kind"] == "routine"


def test_no_contender_is_timed_if_ours_is_wrong():
    contenders = {"kdkernels": Contender(list, results=lambda: [torch.full((3,), float("nan"))])}
    with pytest.raises(pytest.fail.Exception, match="relative error nan"):
        check_and_race(failing, contenders, [torch.ones(3)], 1e-4, function="f")


def test_networks_take_the_statistics_of_images():
    images = torch.randn(16, 3, 8, 8)
    model = with_statistics(CifarResNet("ResNet-8"), images)
    assert not model.training
    assert model(images).shape == (16, 10)
    hidden = model[0](images)
    torch.testing.assert_close(model[1].running_mean, hidden.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, hidden.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert model[1].momentum == 0.1
