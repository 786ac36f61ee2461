"""How DeepInversion runs its networks: memory format and autocast; and that it gives them back."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from inverted import EVERYTHING, assert_as_before, inverter_of, pair, seeded, state_of
from networks import trained_like
from torch import nn

from kdkernels._memory_format import weights_in, why_not_channels_last
from kdkernels.inversion import PRESETS, DeepInversion, NonFiniteLossError, Stage
from kdkernels.inversion import _network as networks
from kdkernels.models import SmallCNN

F64 = torch.float64
FORMATS = [torch.channels_last, torch.contiguous_format, torch.preserve_format]


# The memory format


class Seeing(nn.Module):
    """A network that tells the memory formats of its images, activations and weights."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = nn.Sequential(*model), set()

    def forward(self, x):
        self.seen.add(is_channels_last(x))
        hidden = self.model[0](x)
        self.seen |= {is_channels_last(hidden), is_channels_last(self.model[3].weight)}
        return self.model[1:](hidden)


def is_channels_last(x):
    """Tell what strides say; those of one channel, which fit both formats, are those that torch gives to it."""
    return x.stride(1) == 1 and x.stride(3) == x.shape[1]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("given", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("asked", ["auto", *FORMATS], ids=str)
def test_networks_compute_in_the_memory_format_and_are_given_back(asked, given, channels):
    teacher = Seeing(trained_like(SmallCNN(4, in_channels=channels)).to(memory_format=given))
    student = trained_like(SmallCNN(3, in_channels=channels), 1)
    config = replace(EVERYTHING, clip=False, mean=None, std=None)
    before = [state_of(model) for model in (teacher, student)]
    inverter = DeepInversion(teacher, (channels, 12, 10), config, student=student, memory_format=asked)
    teacher.seen.clear()
    images = inverter.synthesize(torch.arange(5)).images
    assert images.is_contiguous()
    expected = {"auto": {True}, torch.channels_last: {True}, torch.contiguous_format: {False}}
    # Those of images are then the contiguous ones of the loop, until a convolution prefers those of its weights.
    as_given = {False, True} if given == torch.channels_last else {False}
    assert teacher.seen == expected.get(asked, as_given)
    for model, state in zip((teacher, student), before, strict=True):
        assert_as_before(model, state)


def test_networks_are_given_back_after_an_error():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.calls = trained_like(SmallCNN(4)), 0

        def forward(self, x):
            self.calls += len(x) > 2
            if self.calls == 3:
                raise KeyboardInterrupt
            return self.model(x) * (float("nan") if self.calls == 7 else 1)

    teacher = Failing()
    before = state_of(teacher)
    inverter = DeepInversion(teacher, (1, 8, 8), PRESETS["digits"].with_iterations(20))
    for error in (KeyboardInterrupt, NonFiniteLossError):
        with pytest.raises(error):
            inverter.synthesize(torch.arange(4))
        assert_as_before(teacher, before)


class Shared(nn.Module):
    """A convolution used twice, another with its weight, a parametrized one, a view of a weight, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.tied = nn.Conv2d(4, 4, 3, padding=1)
        self.tied.weight = self.inner.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
        self.old = nn.utils.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, (3, 1)))
        self.transposed = nn.ConvTranspose2d(4, 4, 2)
        self.part = nn.Conv2d(4, 2, 3, padding=1)
        self.part.weight = nn.Parameter(self.inner.weight.detach()[:2])  # in the memory of another
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        x = self.inner(self.first(x)).relu()
        x = self.inner(self.tied(x)).tanh()
        x = self.transposed(self.spectral(self.old(self.normed(x))))
        return self.head(self.norm(self.part(x)).mean((2, 3)))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_shared_and_computed_weights_are_right():
    torch.manual_seed(1)
    model = trained_like(Shared()).double().eval()
    x = torch.randn(3, 2, 6, 5, dtype=F64)
    expected, before = model(x), state_of(model)
    weights = model.inner.weight
    with weights_in(model, torch.channels_last):
        assert model.inner.weight is model.tied.weight is weights
        assert all(is_channels_last(m.weight) for m in (model.first, model.inner, model.transposed, model.part))
        torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-12, atol=1e-13)
        assert not is_channels_last(model.normed.parametrizations.weight.original1)
    assert_as_before(model, before)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


class Viewing(nn.Module):
    """A network that flattens its features, or its weight, by a view that channels_last does not allow."""

    def __init__(self, what):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LazyLinear(10)
        self.what = what
        self(torch.zeros(1, 3, 12, 10))

    def forward(self, x):
        shift = self.conv.weight.view(4, -1).sum() if self.what == "weight" else 0
        x = self.norm(self.conv(x))
        return self.head(x.view(len(x), -1) if self.what == "features" else x.flatten(1)) + shift


class Strided(Viewing):
    """A network that reads the memory of its features."""

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.head(x.as_strided((len(x), x[0].numel()), (x[0].numel(), 1)))


@pytest.mark.parametrize("model", [Viewing("features"), Viewing("weight"), Strided("")], ids=lambda m: m.what)
def test_networks_that_do_not_accept_channels_last_run_as_they_are(model):
    config = replace(PRESETS["digits"].with_iterations(3), batch_size=4)
    expected = DeepInversion(model, (3, 12, 10), config, memory_format=torch.preserve_format)
    found = DeepInversion(model, (3, 12, 10), config)
    images = [one.synthesize(torch.arange(4), generator=seeded()).images for one in (expected, found)]
    assert torch.equal(*images)
    with pytest.raises(
        ValueError, match=r"channels_last, in which the teacher cannot compute \(.*\); use memory_format"
    ):
        DeepInversion(model, (3, 12, 10), config, memory_format=torch.channels_last)


def test_why_a_network_cannot_compute_in_channels_last():
    assert why_not_channels_last(SmallCNN(4), (1, 8, 8)) is None
    assert why_not_channels_last(SmallCNN(4).bfloat16(), (1, 1, 1)) is None
    assert "view size is not compatible" in why_not_channels_last(Viewing("features"), (3, 12, 10))
    assert why_not_channels_last(Strided(""), (3, 12, 10)) == "its logits are others than for contiguous images"


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("name", PRESETS)
def test_both_memory_formats_have_the_same_loss_and_gradient(name, pool):
    mean, std = EVERYTHING.mean, EVERYTHING.std
    config = replace(PRESETS[name], mean=mean, std=std, compete_weight=0.5)
    images, labels, results = torch.randn(4, 3, 12, 10, dtype=F64, requires_grad=True), torch.arange(4), []
    for memory_format in FORMATS:
        inverter = inverter_of(config, F64, memory_format=memory_format)
        loss = inverter.objective(images, labels, pool=pool, shift=(2, -1), flip=True)["loss"]
        results.append((loss.detach(), torch.autograd.grad(loss, images)[0]))
    for loss, gradient in results[1:]:
        assert abs(loss - results[0][0]) <= 1e-12 * abs(loss)
        assert (gradient - results[0][1]).norm() <= 1e-12 * gradient.norm()


# Autocast


@pytest.mark.parametrize("autocast", ["bf16", "fp16", None])
def test_autocast_is_of_the_networks_alone(autocast, monkeypatch):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}[autocast]
    config = replace(EVERYTHING, stages=(Stage(3),))
    inverter = inverter_of(config, autocast=autocast)
    seen = {"convolution": set(), "images": set(), "logits": set()}
    for model in (inverter.teacher, inverter.student):
        model[3].register_forward_hook(lambda module, inputs, output: seen["convolution"].add(output.dtype))
        model.register_forward_pre_hook(lambda module, inputs: seen["images"].add(inputs[0].dtype))
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(
        F, "cross_entropy", lambda logits, *rest: seen["logits"].add(logits.dtype) or cross_entropy(logits, *rest)
    )
    with inverter.loop(torch.arange(4)) as loop:
        assert loop.scaler.is_enabled() == (autocast == "fp16")
        while loop.done < loop.total:
            loop.step()
        (state,) = loop.optimizer.state.values()
        kept = {loop.images.dtype, loop.images.grad.dtype, state["exp_avg"].dtype, loop.terms()["features"].dtype}
    assert kept == {torch.float32}
    assert seen == {"convolution": {dtype}, "images": {torch.float32}, "logits": {torch.float32}}
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_callers_autocast_does_what_the_argument_does(dtype):
    config, name = replace(EVERYTHING, stages=(Stage(6),)), {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    expected = inverter_of(config, autocast=name).synthesize(torch.arange(4), generator=seeded())
    inverter = inverter_of(config)
    with torch.autocast("cpu", dtype):
        found = inverter.synthesize(torch.arange(4), generator=seeded())
    assert found.history["loss"] == pytest.approx(expected.history["loss"], rel=1e-5)


@pytest.mark.parametrize("bf16", [True, False])
def test_auto_takes_bf16_where_the_processor_computes_in_it(bf16, monkeypatch):
    monkeypatch.setattr(networks, "AUTO_TAKES_BF16_ON_CPU", True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    cpu = torch.device("cpu")
    assert networks.autocast_dtype("auto", cpu, torch.float32) == (torch.bfloat16 if bf16 else None)
    assert networks.autocast_dtype("auto", cpu, F64) is None
    monkeypatch.setattr(networks, "AUTO_TAKES_BF16_ON_CPU", False)
    assert networks.autocast_dtype("auto", cpu, torch.float32) is None
    for capability, expected in (((7, 5), None), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, value=capability: value)
        assert networks.autocast_dtype("auto", torch.device("cuda"), torch.float32) == expected


# Wrong calls


@pytest.mark.parametrize(
    ("execution", "text"),
    [
        (
            {"memory_format": "channels_last"},
            r"memory_format is 'channels_last'; accepted are 'auto', torch.channels_last",
        ),
        ({"memory_format": torch.channels_last_3d}, "memory_format is torch.channels_last_3d; accepted are"),
        ({"autocast": "bfloat16"}, "autocast is 'bfloat16'; accepted are 'bf16', 'fp16', 'auto'"),
        ({"cuda_graph": True}, "cuda_graph is True, but teacher is on cpu; use cuda_graph='auto'"),
        ({"cuda_graph": "yes"}, "cuda_graph is 'yes'; accepted are True, False, 'auto'"),
    ],
    ids=str,
)
def test_wrong_calls(execution, text):
    with pytest.raises(ValueError, match=text):
        inverter_of(EVERYTHING, **execution)


def test_autocast_needs_a_network_in_fp32():
    for dtype in (torch.float16, F64):
        with pytest.raises(ValueError, match=f"autocast is 'bf16', but the teacher is in {dtype}; expected"):
            inverter_of(EVERYTHING, dtype, autocast="bf16")
    assert inverter_of(EVERYTHING, F64, autocast="auto").synthesize(torch.arange(2)).images.dtype == F64


def test_compile_is_a_flag():
    with pytest.raises(TypeError, match="compile is 'inductor'; expected True or False"):
        DeepInversion(pair()[0], (3, 12, 10), EVERYTHING, compile="inductor")
