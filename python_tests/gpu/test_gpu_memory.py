"""GPU memory: the peak of a loss beyond its inputs, and tensors with more elements than 32 bits can count."""

import gc
from functools import partial
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip(
        "PyTorch finds no CUDA device; `make gpu` runs these tests on a machine with one", allow_module_level=True
    )

from contract import TARGET
from torch import Tensor

import kdkernels
from kdkernels.functional import (
    batch_norm_stats,
    batch_norm_tap,
    gradient_reversal,
    image_prior_losses,
    js_div_with_logits,
    kl_div_with_logits,
    total_variation,
)
from kdkernels.ops import _loader
from kdkernels.testing.selftest import tensors_of

MIB = 1 << 20
SAVED_NUMBERS = 9  # of each position, that a forward may keep for its backward


def normal(*shape: int, seed: int = 0, **options: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda", **options)


if TARGET == "cpu" and (reason := _loader.why_missing("cuda")):
    pytest.skip(f"{reason}; `make gpu` builds them and runs these tests", allow_module_level=True)


@pytest.fixture(autouse=True)
def _native():
    with kdkernels.set_backend("native"):
        yield
    gc.collect()
    torch.cuda.empty_cache()


LOSSES = [
    (kl_div_with_logits, (normal, (4096, 4096)), True),
    (partial(kl_div_with_logits, reduction="none"), (normal, (4096, 4096)), True),
    (js_div_with_logits, (normal, (512, 50257)), True),
    (partial(kl_div_with_logits, dim=1), (normal, (4, 150, 256, 256)), True),
    (batch_norm_tap, (normal, (32, 64, 112, 112)), False),
    (batch_norm_stats, (normal, (32, 64, 112, 112)), False),
    (image_prior_losses, (normal, (84, 3, 224, 224)), False),
    (partial(total_variation, norm_type="isotropic"), (normal, (84, 3, 224, 224)), False),
]


@pytest.mark.parametrize(("function", "drawn", "pair"), LOSSES, ids=range(len(LOSSES)))
def test_memory_beyond_the_inputs_is_one_gradient(function, drawn, pair):
    draw, shape = drawn
    inputs = [draw(*shape, seed=i) for i in range(1 + pair)]
    inputs[0].requires_grad_()
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = [o for o in tensors_of(function(*inputs)) if o.data_ptr() != inputs[0].data_ptr()]
        torch.autograd.grad(outputs, inputs[0], [torch.ones_like(o) for o in outputs])
        peak = torch.cuda.max_memory_allocated() - before
        del outputs
    gradient = inputs[0].numel() * 4
    positions = inputs[0].numel() // shape[1] if pair else 0
    small = 8 * MIB + 4 * SAVED_NUMBERS * positions + 8 * positions
    assert peak <= gradient + small


def needs_memory(gib: float) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib:g} GiB of GPU memory, of which {free:.1f} GiB are free")


def norm_of_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def halves(*shape: int, seed: int) -> Tensor:
    return normal(*shape, seed=seed, dtype=torch.bfloat16)


@pytest.mark.parametrize("function", [kl_div_with_logits, js_div_with_logits], ids=["kl", "js"])
def test_more_logits_than_32_bits_count(function):
    needs_memory(24)
    rows = 2**31 // 32000 + 100
    student, teacher = halves(rows, 32000, seed=0).requires_grad_(), halves(rows, 32000, seed=1)
    loss = function(student, teacher, reduction="none")
    incoming = normal(rows, seed=2)
    (gradient,) = torch.autograd.grad(loss, student, incoming)
    for start in range(0, rows, 4096):
        part = slice(start, start + 4096)
        s, t = student.detach()[part].float().requires_grad_(), teacher[part].float()
        with kdkernels.set_backend("reference"):
            expected = function(s, t, reduction="none")
        (by_student,) = torch.autograd.grad(expected, s, incoming[part])
        torch.testing.assert_close(loss[part], expected, rtol=1e-4, atol=1e-6)
        assert norm_of_error(gradient[part], by_student) < 5e-3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
def test_more_activations_than_32_bits_count(layout):
    needs_memory(24)
    activation = halves(130, 64, 512, 512, seed=0).contiguous(memory_format=layout)
    assert activation.numel() > 2**31
    activation.requires_grad_()
    mean, var = batch_norm_stats(activation)
    (gradient,) = torch.autograd.grad((mean, var), activation, (torch.ones_like(mean), torch.ones_like(var)))
    count = activation.numel() // 64
    for channel in range(0, 64, 9):
        values = activation.detach()[:, channel].double()
        torch.testing.assert_close(mean[channel].double(), values.mean(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(var[channel].double(), values.var(unbiased=False), rtol=1e-5, atol=1e-7)
        assert norm_of_error(gradient[:, channel], (1 + 2 * (values - values.mean())) / count) < 5e-3


def test_more_pixels_than_32_bits_count():
    needs_memory(24)
    images = halves(720, 3, 1000, 1000, seed=0).requires_grad_()
    loss = total_variation(images, reduction="none", norm_type="l2_squared", directions=4)
    (gradient,) = torch.autograd.grad(loss.sum(), images)
    for start in range(0, 720, 90):
        part = images.detach()[start : start + 90].float().requires_grad_()
        with kdkernels.set_backend("reference"):
            expected = total_variation(part, reduction="none", norm_type="l2_squared", directions=4)
        (by_images,) = torch.autograd.grad(expected.sum(), part)
        torch.testing.assert_close(loss[start : start + 90], expected, rtol=1e-4, atol=0)
        assert norm_of_error(gradient[start : start + 90], by_images) < 5e-3


def test_more_features_than_32_bits_count():
    needs_memory(16)
    features = halves(2**31 + 7, seed=0).requires_grad_()
    incoming = features.detach()
    (gradient,) = torch.autograd.grad(gradient_reversal(features, 2.0), features, incoming)
    for start in range(0, features.numel(), 2**28):
        assert torch.equal(gradient[start : start + 2**28], incoming[start : start + 2**28] * -2)
