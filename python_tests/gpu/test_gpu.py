"""What only a GPU can show: CUDA graphs, streams, a host that never waits, and values that are not checked."""

import gc
import importlib.util
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products need it
if not torch.cuda.is_available():
    pytest.skip(
        "PyTorch finds no CUDA device; `make gpu` runs these tests on a machine with one", allow_module_level=True
    )

from contract import TARGET, Call
from torch import Tensor

import kdkernels
from kdkernels import functional
from kdkernels.functional import (
    batch_norm_stat_loss,
    batch_norm_stats,
    batch_norm_tap,
    distillation_loss,
    gradient_reversal,
    gradient_reversal_linear,
    image_prior_losses,
    js_div_with_logits,
    kl_div_with_logits,
    total_variation,
)
from kdkernels.ops import _loader
from kdkernels.testing.selftest import tensors_of


def normal(*shape: int, seed: int = 0, **options: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda", **options)


def classes(*shape: int, count: int) -> Tensor:
    return torch.randint(0, count, shape, generator=torch.Generator("cuda").manual_seed(9), device="cuda")


def calls() -> Iterator[Call]:
    """Yield a call of every public function, and of every option that selects another kernel."""
    rows, maps = (normal(64, 1000), normal(64, 1000, seed=1)), (normal(2, 19, 24, 33), normal(2, 19, 24, 33, seed=1))
    labels, both = classes(64, count=1000), (0, 1)
    yield Call("kl_div_with_logits", kl_div_with_logits, rows, both)
    yield Call("kl_div_with_logits, maps", partial(kl_div_with_logits, dim=1, reverse=True), maps, both)
    yield Call("kl_div_with_logits, long rows", kl_div_with_logits, (normal(5, 70001), normal(5, 70001, seed=1)), both)
    yield Call("js_div_with_logits", partial(js_div_with_logits, beta=0.3, reduction="none"), rows, both)
    yield Call("js_div_with_logits, clamped", partial(js_div_with_logits, legacy_clamp=True), rows, both)
    yield Call("distillation_loss", distillation_loss, (*rows, labels), both)
    yield Call("distillation_loss, bf16", distillation_loss, (*(x.bfloat16() for x in rows), labels), both)
    activation = normal(6, 40, 9, 14)
    channels_last = activation.contiguous(memory_format=torch.channels_last)
    running = (normal(40, seed=2), normal(40, seed=3).abs() + 0.5)
    yield Call("batch_norm_stats", batch_norm_stats, (activation,))
    yield Call("batch_norm_stats, channels_last", batch_norm_stats, (channels_last,))
    yield Call("batch_norm_tap", batch_norm_tap, (activation,))
    yield Call("batch_norm_stat_loss", batch_norm_stat_loss, (activation, *running), (0, 1, 2))
    images = normal(4, 3, 50, 61)
    yield Call("image_prior_losses", image_prior_losses, (images,))
    for norm_type in ("l1", "l2", "l2_squared", "isotropic"):
        yield Call(f"total_variation, {norm_type}", partial(total_variation, norm_type=norm_type), (images,))
    yield Call("gradient_reversal", partial(gradient_reversal, lambd=0.3), (activation,))
    inputs = (normal(30, 20), normal(10, 20, seed=1), normal(10, seed=2))
    yield Call("gradient_reversal_linear", partial(gradient_reversal_linear, lambd=0.3), inputs, (0, 1, 2))


CALLS = list(calls())
every_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
TRITON = importlib.util.find_spec("triton") is not None
of_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")


if TARGET == "cpu" and (reason := _loader.why_missing("cuda")):
    pytest.skip(f"{reason}; `make gpu` builds them and runs these tests", allow_module_level=True)


@pytest.fixture(autouse=True)
def _native():
    with kdkernels.set_backend("native"):
        yield
    gc.collect()
    torch.cuda.empty_cache()


@dataclass
class Prepared:
    """A call with its own leaf tensors and fixed incoming gradients."""

    call: Call
    leaves: tuple[Tensor, ...]
    incoming: list[Tensor]

    def results(self) -> list[Tensor]:
        outputs = tensors_of(self.call.function(*self.leaves))
        wanted = [self.leaves[i] for i in self.call.differentiable]
        gradients = torch.autograd.grad(outputs, wanted, self.incoming)
        return [*(output.detach() for output in outputs), *gradients]


def prepared(call: Call, device: str = "cuda") -> Prepared:
    leaves = tuple(
        x.detach().clone().to(device).requires_grad_(i in call.differentiable) for i, x in enumerate(call.inputs)
    )
    outputs = tensors_of(call.function(*leaves))
    incoming = [normal(*o.shape, seed=5).to(device, o.dtype) for o in outputs]
    return Prepared(call, leaves, incoming)


def same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b.to(a.device))
        assert not a.isnan().any()


def captured(function: Any) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Capture a call in a CUDA graph, after warm-up calls on another stream that load and compile its kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@contextmanager
def waiting_raises() -> Iterator[None]:
    """Turn every wait of the host for the device into an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_public_function_is_called():
    assert {call.name.split(",")[0] for call in CALLS} == set(functional.__all__)


def check_no_wait(call: Call) -> None:
    of_call = prepared(call)
    of_call.results()
    with waiting_raises():
        of_call.results()


def check_graph(call: Call) -> None:
    """A graph of forward and backward, replayed on other values, matches the calls themselves bit for bit."""
    of_call = prepared(call)
    graph, results = captured(of_call.results)
    for factor in (1.0, -0.7):
        with torch.no_grad():
            for leaf in (leaf for leaf in of_call.leaves if leaf.dim() > 1 and leaf.is_floating_point()):
                leaf.mul_(factor)
        graph.replay()
        found = [result.clone() for result in results]
        same_bits(found, of_call.results())


@every_call
def test_the_host_never_waits(call):
    check_no_wait(call)


@every_call
def test_cuda_graph(call):
    check_graph(call)


@pytest.mark.parametrize(
    ("function", "scalar", "values"),
    [
        (kl_div_with_logits, "temperature", (1.0, 4.0, 0.5)),
        (js_div_with_logits, "beta", (0.5, 0.1, 0.0)),
        (distillation_loss, "temperature", (4.0, 1.0)),
        (distillation_loss, "kd_weight", (0.9, 0.2)),
        (gradient_reversal, "lambd", (1.0, -0.25)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_scalar_on_the_device_changes_between_replays(function, scalar, values):
    tensors = (normal(32, 100), normal(32, 100, seed=1), classes(32, count=100))[: _count_of_tensors(function)]
    number = torch.full((), values[0], device="cuda")
    others = {"ce_weight": 0.1} if scalar == "kd_weight" else {}
    on_device = prepared(Call("", partial(function, **{scalar: number}, **others), tensors))
    graph, results = captured(on_device.results)
    for value in values:
        number.fill_(value)
        graph.replay()
        found = [result.clone() for result in results]
        known = replace(on_device, call=Call("", partial(function, **{scalar: value}, **others), tensors))
        for a, b in zip(found, known.results(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def _count_of_tensors(function: Any) -> int:
    return sum(name in {"input", "target", "labels"} for name in inspect.signature(function).parameters)


@every_call
def test_two_streams_at_once(call):
    """Calls on two streams share no workspace and no ticket."""
    first, second = prepared(call), prepared(replace(call, inputs=tuple(reversed_halves(x) for x in call.inputs)))
    expected = [of_call.results() for of_call in (first, second)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    found: list[list[list[Tensor]]] = [[], []]
    for _ in range(5):
        for i, of_call in enumerate((first, second)):
            with torch.cuda.stream(streams[i]):
                found[i].append(of_call.results())
    torch.cuda.synchronize()
    for i in range(2):
        for results in found[i]:
            same_bits(results, expected[i])


def reversed_halves(x: Tensor) -> Tensor:
    return x.flip(0) if x.dim() > 1 else x


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a second GPU is needed")
@every_call
def test_another_device_than_the_current_one(call):
    same_bits(prepared(call, "cuda:1").results(), prepared(call).results())


@pytest.mark.parametrize("label", [100, -1])
def test_a_label_out_of_range(label):
    """The loss is NaN by default, and kdkernels.set_debug turns the label into an error."""
    labels = classes(8, count=100)
    labels[3] = label
    student = normal(8, 100).requires_grad_()
    loss = distillation_loss(student, normal(8, 100, seed=1), labels)
    loss.backward()
    assert loss.isnan()
    kdkernels.set_debug(True)
    try:
        with pytest.raises(IndexError, match=str(label)):
            distillation_loss(student, normal(8, 100, seed=1), labels)
    finally:
        kdkernels.set_debug(False)


def test_a_temperature_on_the_device_that_is_not_positive():
    temperature = torch.zeros((), device="cuda")
    assert kl_div_with_logits(normal(4, 10), normal(4, 10, seed=1), temperature=temperature).isnan()
    kdkernels.set_debug(True)
    try:
        with pytest.raises(ValueError, match="temperature"):
            kl_div_with_logits(normal(4, 10), normal(4, 10, seed=1), temperature=temperature)
    finally:
        kdkernels.set_debug(False)


def test_a_gpu_that_was_not_compiled_for(monkeypatch):
    """An explicit request raises, naming the capability and the compiled architectures; auto uses another backend."""
    major, minor = torch.cuda.get_device_capability()
    monkeypatch.setitem(_loader._compiled, "_cuda", {**_loader._compiled["_cuda"], "architectures": ["sm_10"]})
    monkeypatch.setattr(_loader, "_devices", {})
    rows = normal(4, 10), normal(4, 10, seed=1)
    with pytest.raises(RuntimeError, match=rf"compute capability {major}\.{minor}, but .* compiled for sm_10"):
        kl_div_with_logits(*rows)
    with kdkernels.set_backend("auto"):
        assert kl_div_with_logits(*rows).isfinite()


# Triton kernels, compiled at their first call


@of_triton
@every_call
def test_triton_never_lets_the_host_wait(call):
    with kdkernels.set_backend("triton"):
        check_no_wait(call)


@of_triton
@every_call
def test_triton_under_a_cuda_graph(call):
    with kdkernels.set_backend("triton"):
        check_graph(call)
