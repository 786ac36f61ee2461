"""DeepInversion: the statistics of a network, the objective and the synthesis."""

import copy
import doctest
from dataclasses import replace

import pytest
import torch
from networks import trained_like
from torch import nn

import kdkernels.inversion
from kdkernels.functional import js_div_with_logits
from kdkernels.inversion import PRESETS, DeepInversion, InversionConfig, NonFiniteLossError, Stage
from kdkernels.models import SmallCNN

F64 = torch.float64


# The synthesis

SHORT = replace(PRESETS["digits"], stages=(Stage(3, pool=2), Stage(4)), jitter=2, flip=0.5)


def test_synthesis_is_seeded_and_leaves_the_networks_unchanged():
    teacher, student = trained_like(SmallCNN(4)), trained_like(SmallCNN(3), 1)
    before = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    labels = torch.arange(10)
    config = replace(SHORT, compete_weight=1.0)
    inverter = DeepInversion(teacher, (1, 8, 8), config, student=student)
    first = inverter.synthesize(labels, generator=torch.Generator().manual_seed(3))
    again = inverter.synthesize(labels, generator=torch.Generator().manual_seed(3))
    other = inverter.synthesize(labels, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(first.labels, labels)
    assert set(first.history) == {"cross_entropy", "features", "tv_l2", "l2", "compete", "loss", "compete_dead"}
    assert all(len(values) == 7 for values in first.history.values())
    for model, state in zip((teacher, student), before, strict=True):
        assert model.training
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_images_approach_the_statistics(digits_teacher):
    inverter = DeepInversion(digits_teacher, (1, 8, 8), PRESETS["digits"].with_iterations(100))
    result = inverter.synthesize(torch.arange(100) % 10, generator=torch.Generator().manual_seed(0))
    assert result.history["features"][-1] < 0.5 * result.history["features"][0]


def test_best_images_are_those_of_the_lowest_loss():
    teacher = trained_like(SmallCNN(4))
    config = replace(PRESETS["digits"], stages=(Stage(6),), jitter=0, keep="best", learning_rate=3.0)
    inverter = DeepInversion(teacher, (1, 8, 8), config)
    result = inverter.synthesize(torch.arange(10), generator=torch.Generator().manual_seed(0))
    loss = inverter.objective(result.images, result.labels)["loss"].item()
    assert loss == pytest.approx(min(result.history["loss"]), rel=1e-6)


def test_clipped_images_are_valid_pixels():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    config = replace(SHORT, clip=True, mean=mean, std=std, learning_rate=1.0)
    teacher = trained_like(SmallCNN(4, in_channels=3))
    images = DeepInversion(teacher, (3, 8, 8), config).synthesize(torch.arange(10)).images
    pixels = images * torch.tensor(std).view(1, 3, 1, 1) + torch.tensor(mean).view(1, 3, 1, 1)
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6


def test_terms_without_weight_are_not_computed():
    teacher = trained_like(SmallCNN(4))
    config = replace(SHORT, feature_weight=0.0, tv_l2=0.0, l2=0.0)
    history = DeepInversion(teacher, (1, 8, 8), config).synthesize(torch.arange(4)).history
    assert set(history) == {"cross_entropy", "loss"}


def test_competition_makes_teacher_and_student_disagree():
    teacher, student = trained_like(SmallCNN(8)), trained_like(SmallCNN(4), 1)
    disagreement = []
    for weight in (0.0, 10.0):
        config = replace(PRESETS["digits"].with_iterations(60), compete_weight=weight)
        inverter = DeepInversion(teacher, (1, 8, 8), config, student=student)
        images = inverter.synthesize(torch.arange(40) % 10, generator=torch.Generator().manual_seed(0)).images
        teacher.eval(), student.eval()
        with torch.no_grad():
            disagreement.append(js_div_with_logits(student(images), teacher(images), temperature=3.0).item())
    assert disagreement[1] > disagreement[0]


class Undifferentiable(nn.Sequential):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Asserting(nn.Sequential):
    def forward(self, x):
        if x.shape[-1] != 32:
            raise AssertionError
        return super().forward(x)


def poisoned(model):
    model[1].running_var[1] = float("nan")
    return model


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda t: DeepInversion(t, (8, 8), SHORT), "image_shape is"),
        (lambda t: DeepInversion(t, 8, SHORT), r"image_shape is 8; expected \[C, H, W\]"),
        (lambda t: DeepInversion(t, (1, 0, 8), SHORT), "H of image_shape is 0; expected 1 or more"),
        (lambda t: DeepInversion(torch.jit.script(t), (1, 8, 8), SHORT), "model is a ScriptModule"),
        (lambda t: DeepInversion(t, (1, 8, 8), replace(SHORT, clip=True)), "needs config.mean and config.std"),
        (
            lambda t: DeepInversion(t, (1, 8, 8), PRESETS["nvlabs-imagenet-1"]),
            "3 and 3 values; expected 1, one per channel",
        ),
        (lambda t: DeepInversion(t, (1, 8, 8), SHORT).synthesize(torch.zeros(3)), "labels must be"),
        (lambda t: DeepInversion(t, (1, 8, 8), SHORT).synthesize(torch.zeros(0).long()), "labels must be"),
        (lambda t: InversionConfig.preset("imagenet"), "preset is 'imagenet'; expected one of nvlabs-imagenet-0"),
        (lambda t: replace(SHORT, stages=()), "stages is"),
        (lambda t: replace(SHORT, learning_rate=0.0), "learning_rate is 0.0"),
        (lambda t: replace(SHORT, flip=2.0), "flip is 2.0; expected a probability"),
        (lambda t: replace(SHORT, jitter=-1), "jitter is -1"),
        (lambda t: replace(SHORT, mean=(0.5,)), "expected both mean and std, or neither"),
        (lambda t: replace(SHORT, mean=(0.5,), std=(0.0,)), r"std is \(0.0,\); expected positive"),
        (lambda t: replace(SHORT, mean=(float("nan"),), std=(1.0,)), "mean is .*; expected finite numbers"),
        (lambda t: replace(SHORT, tv_l2=float("inf")), "tv_l2 is inf; expected a finite number"),
        (lambda t: replace(SHORT, betas=(0.5, 1.0)), r"betas is \(0.5, 1.0\); expected two numbers in"),
        (lambda t: replace(SHORT, keep="first"), "keep is 'first'; accepted are 'last', 'best'"),
        (lambda t: replace(SHORT, ce_weight=0, feature_weight=0, tv_l2=0, l2=0), "every weight is 0"),
        (lambda t: DeepInversion(Undifferentiable(t), (1, 8, 8), SHORT), "teacher returns logits that pass no"),
        (lambda t: DeepInversion(t, (1, 8, 8), SHORT, student=Undifferentiable(t)), "student returns logits that pass"),
        (lambda t: DeepInversion(Asserting(t), (1, 8, 8), SHORT), r"images of shape \[1, 8, 8\]: AssertionError"),
        (lambda t: DeepInversion(t, (1, 1, 1), SHORT), "smaller than the pooling of a stage, 2"),
        (lambda t: DeepInversion(t, (3, 8, 8), SHORT), "teacher does not accept images of shape"),
        (lambda t: DeepInversion(nn.Sequential(t, nn.Softmax(1)), (1, 8, 8), SHORT), "teacher returns probabilities"),
        (
            lambda t: DeepInversion(t, (1, 8, 8), SHORT, student=SmallCNN(3, 9)),
            "student returns 9 classes and teacher 10",
        ),
        (
            lambda t: DeepInversion(nn.Sequential(t[0], t[1]), (1, 8, 8), SHORT),
            r"teacher must return logits \[B, C\], but returned",
        ),
        (lambda t: DeepInversion(t, (1, 8, 8), SHORT).synthesize(torch.tensor([10])), "has the classes 0 to 9"),
        (lambda t: DeepInversion(nn.Flatten(), (1, 8, 8), SHORT), "has no BatchNorm layer"),
        (lambda t: DeepInversion(poisoned(t), (1, 8, 8), SHORT), "not finite in 1.running_var; load weights"),
        (lambda t: DeepInversion(t, (1, 8, 8), SHORT, student=poisoned(SmallCNN(3))), "student holds values"),
    ],
)
def test_wrong_calls(call, text):
    with pytest.raises(ValueError, match=text):
        call(SmallCNN(4))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda t: DeepInversion(t, (1, 8, 8), "digits"), "config must be an InversionConfig"),
        (lambda t: DeepInversion(t, (1, 8, 8.0), SHORT), "W of image_shape must be an integer, got 8.0"),
        (lambda t: DeepInversion(t, (1, 8, 8), SHORT).synthesize([1, 2]), "got list; pass torch.tensor"),
        (
            lambda t: DeepInversion(t, (1, 8, 8), SHORT).synthesize(torch.arange(2), generator=0),
            r"generator is 0; expected torch.Generator\(\)",
        ),
        (lambda t: replace(SHORT, stages=(100,)), r"stages holds 100; expected Stage\(100\)"),
        (lambda t: replace(SHORT, batch_size=2.5), "batch_size must be an integer, got 2.5"),
        (lambda t: replace(SHORT, tv_l2="1e-3"), "tv_l2 must be a number, got '1e-3'"),
        (lambda t: replace(SHORT, jitter=1.5), "jitter must be an integer, got 1.5"),
        (lambda t: replace(SHORT, betas=0.9), r"betas is 0.9; expected a tuple of numbers, such as \(0.5, 0.9\)"),
        (lambda t: replace(SHORT, betas=(0.9, "a")), "a value of betas must be a number, got 'a'"),
        (lambda t: replace(SHORT, mean=0.5, std=0.5), "mean is 0.5; expected a tuple of numbers"),
        (lambda t: replace(SHORT, mean=(0.5,), std=("1",)), "a value of std must be a number, got '1'"),
        (lambda t: replace(SHORT, clip="no"), "clip is 'no'; expected True or False"),
        (lambda t: replace(SHORT, unbiased=1), "unbiased is 1; expected True or False"),
    ],
)
def test_wrong_types(call, text):
    with pytest.raises(TypeError, match=text):
        call(SmallCNN(4))


def test_a_scripted_network_without_the_feature_term():
    """Its gradient is that of the network it was made from."""
    network, config = trained_like(SmallCNN(4)).eval(), replace(SHORT, feature_weight=0.0)
    images = [
        DeepInversion(model, (1, 8, 8), config).synthesize(torch.arange(4), generator=torch.Generator().manual_seed(0))
        for model in (network, torch.jit.script(network))
    ]
    torch.testing.assert_close(images[1].images, images[0].images)


def test_example():
    (example,) = doctest.DocTestFinder(recurse=False).find(
        DeepInversion, globs={"torch": torch, "teacher": SmallCNN(4), **vars(kdkernels.inversion)}
    )
    assert doctest.DocTestRunner().run(example).failed == 0
    assert len(example.examples) == 4


# Dtypes, and callers in other modes


def test_a_default_device_is_not_that_of_the_network():
    teacher = trained_like(SmallCNN(4))
    expected = DeepInversion(teacher, (1, 8, 8), SHORT).synthesize(
        torch.arange(4), generator=torch.Generator().manual_seed(0)
    )
    labels = torch.arange(4)
    with torch.device("meta"):
        found = DeepInversion(teacher, (1, 8, 8), SHORT).synthesize(labels, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.images, expected.images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["network", "autocast", "argument"])
def test_images_of_a_16_bit_network_are_close_to_those_of_fp32(digits_teacher, dtype, how):
    """The images are fp32, and come 95 % of the way that those of fp32 come, measured with the network in fp32.

    The mean of three seeds, because the last loss of one depends on rounding, in fp32 too, by some percent of the way.
    """
    config = replace(PRESETS["digits"].with_iterations(60), jitter=0)
    labels = torch.arange(40) % 10
    measure = DeepInversion(digits_teacher, (1, 8, 8), config)

    def reached(teacher, **execution):
        inverter, losses = DeepInversion(teacher, (1, 8, 8), config, **execution), []
        for seed in range(3):
            images = inverter.synthesize(labels, generator=torch.Generator().manual_seed(seed)).images
            assert images.dtype == torch.float32
            assert images.isfinite().all()
            losses.append(measure.objective(images, labels)["loss"].item())
        return sum(losses) / 3

    in_fp32 = reached(digits_teacher)
    if how == "network":
        found = reached(copy.deepcopy(digits_teacher).to(dtype))
    elif how == "argument":
        found = reached(digits_teacher, autocast={torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype])
    else:
        with torch.autocast("cpu", dtype):
            found = reached(digits_teacher)
    start = measure.objective(torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)), labels)["loss"]
    assert found < in_fp32 + 0.05 * (start - in_fp32)


def test_a_double_network_gives_double_images():
    teacher = trained_like(SmallCNN(4)).double()
    assert DeepInversion(teacher, (1, 8, 8), SHORT).synthesize(torch.arange(4)).images.dtype == F64


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_synthesis_inside_other_modes(mode):
    teacher = trained_like(SmallCNN(4))
    inverter = DeepInversion(teacher, (1, 8, 8), SHORT)
    expected = inverter.synthesize(torch.arange(4), generator=torch.Generator().manual_seed(0))
    with mode():
        inverter = DeepInversion(teacher, (1, 8, 8), SHORT)
        found = inverter.synthesize(torch.arange(4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.images, expected.images)
    assert not found.images.is_inference()


def test_a_network_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        teacher = SmallCNN(4)
    with pytest.raises(ValueError, match=r"teacher was made inside torch.inference_mode\(\)"):
        DeepInversion(teacher, (1, 8, 8), SHORT)
    assert DeepInversion(copy.deepcopy(teacher), (1, 8, 8), SHORT).num_classes == 10


def test_no_batch_norm_is_needed_without_the_feature_term():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    result = DeepInversion(teacher, (1, 8, 8), replace(SHORT, stages=(Stage(4),), feature_weight=0.0)).synthesize(
        torch.arange(4)
    )
    assert "features" not in result.history


class Failing(nn.Module):
    """A network whose logits or gradient are not finite from one call on."""

    def __init__(self, call, what):
        super().__init__()
        self.model, self.call, self.what, self.calls = trained_like(SmallCNN(4)), call, what, 0

    def forward(self, x):
        self.calls += len(x) > 2  # a network is tried on two images
        logits = self.model(x)
        if self.calls != self.call:
            return logits
        return logits * float("nan") if self.what == "logits" else logits + (x.sum() * 0).sqrt()


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("iteration", [1, 20, 21, 25, 30])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_finite_images(iteration, keep):
    config = replace(SHORT, stages=(Stage(30),), jitter=0, flip=0.0, keep=keep)
    inverter = DeepInversion(Failing(iteration, "logits"), (1, 8, 8), config)
    text = f"'cross_entropy' of the loss is nan in iteration {iteration} of 30"
    seen = []  # the images of each call
    inverter.teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    with pytest.raises(NonFiniteLossError, match=text) as caught:
        inverter.synthesize(torch.arange(4), generator=torch.Generator().manual_seed(0))
    error = caught.value
    assert (error.term, error.iteration) == ("cross_entropy", iteration)
    assert all(len(values) == iteration - 1 for values in error.state.history.values())
    assert torch.equal(error.state.images, seen[max(iteration - 2, 0)])


def test_a_gradient_that_is_not_finite_stops_the_run():
    inverter = DeepInversion(Failing(7, "gradient"), (1, 8, 8), replace(SHORT, stages=(Stage(7),)))
    with pytest.raises(NonFiniteLossError, match="the gradient of the loss is not finite") as caught:
        inverter.synthesize(torch.arange(4))
    assert (caught.value.term, caught.value.iteration) == ("gradient", 7)
    assert caught.value.state.images.isfinite().all()
