"""What only a GPU can show: CUDA graphs, streams, a host that never waits, and unchecked values."""

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
    distillation_loss,
    gradient_reversal,
    js_div_with_logits,
    kl_div_with_logits,
)
from kdkernels.ops import _loader
from kdkernels.ops._cases import registry
from kdkernels.testing.selftest import tensors_of


def normal(*shape: int, seed: int = 0, **options: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda", **options)


def classes(*shape: int, count: int) -> Tensor:
    return torch.randint(0, count, shape, generator=torch.Generator("cuda").manual_seed(9), device="cuda")


def calls() -> Iterator[Call]:
    """Yield every small call that the ops register, the quick rows of the benchmark, and each op's largest case."""
    for name, op in registry().items():
        for call in op.calls():
            inputs = tuple(x.float().cuda() if x.is_floating_point() else x.cuda() for x in call.inputs)
            yield replace(call, name=f"{name}, {call.name}", inputs=inputs)
        for one in (row.workload for row in op.benchmarks if row.quick):
            yield Call(one.name, one.ours, one.make("cuda"))
        largest = max(op.accuracy(torch.float32, "cuda"), key=lambda case: case.samples[0][0].numel())
        yield Call(f"{name}, {largest.name}", largest.function, largest.samples[0], largest.differentiable)


ELSEWHERE = {"batch_norm_stat_distances"}  # batch_norm_stat_loss calls it
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
    functions = {getattr(call.function, "func", call.function) for call in CALLS}
    assert {name for name in functional.__all__ if name.islower()} - {f.__name__ for f in functions} <= ELSEWHERE


def check_no_wait(call: Call) -> None:
    of_call = prepared(call)
    of_call.results()
    with waiting_raises():
        of_call.results()


def check_graph(call: Call) -> None:
    """A graph of forward and backward, replayed on other values, gives the same bits as the calls themselves."""
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
def test_a_device_other_than_the_current_one(call):
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
    """An explicit request raises and names the capability and the compiled architectures; auto uses another backend."""
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
def test_triton_never_makes_the_host_wait(call):
    with kdkernels.set_backend("triton"):
        check_no_wait(call)


@of_triton
@every_call
def test_triton_under_a_cuda_graph(call):
    with kdkernels.set_backend("triton"):
        check_graph(call)
