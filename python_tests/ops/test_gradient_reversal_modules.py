"""Modules of gradient reversal: coefficients and counters in every dtype, on meta, and in checkpoints."""

import copy
import math
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kdkernels import nn
from kdkernels.functional import gradient_reversal, gradient_reversal_linear
from kdkernels.testing.selftest import results_of

F64 = torch.float64


def advanced(module, steps):
    for _ in range(steps):
        module.step()
    return module


def test_modules():
    x = torch.randn(4, 3)
    module = nn.GradientReversal(0.25)
    assert torch.equal(results_of(module, (x,), (0,))[0], x)
    assert repr(module) == "GradientReversal(backward: -0.25 * grad)"
    assert module.state_dict()["lambd"].item() == 0.25
    layer = nn.GradientReversalLinear(3, 2, lambd=0.5)
    assert "backward: -0.5 * grad" in repr(layer)


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to": lambda m: m.to(torch.bfloat16).to("cpu", torch.float16),
    "parent": lambda m: torch.nn.Sequential(torch.nn.Linear(2, 2), m).bfloat16()[1],
    "type": lambda m: m.type(torch.float16),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
}


@pytest.mark.parametrize("cast", CASTS)
def test_coefficients_are_exact_in_every_dtype(cast):
    schedule = CASTS[cast](nn.WarmStartGradientReversal(max_iters=5000))
    advanced(schedule, 2500)
    assert schedule.iteration.item() == 2500
    assert schedule.lambd.item() == pytest.approx(math.tanh(2.5), rel=1e-12)
    for module in (CASTS[cast](nn.GradientReversal(0.1)), CASTS[cast](nn.GradientReversalLinear(2, 2, lambd=0.1))):
        assert module.lambd.item() == 0.1


def test_weights_are_cast():
    layer = nn.GradientReversalLinear(2, 2, lambd=0.1).half()
    assert layer.weight.dtype == torch.float16
    assert nn.GradientReversalLinear(2, 2, device="cpu", dtype=torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gradients_in_every_dtype(dtype):
    for module in (
        nn.GradientReversal(0.1).to(dtype),
        advanced(nn.WarmStartGradientReversal(max_iters=10).to(dtype), 5),
    ):
        x = torch.ones(3, dtype=dtype, requires_grad=True)
        module(x).sum().backward()
        assert torch.equal(x.grad, torch.full((3,), -module.lambd.item(), dtype=dtype))


@pytest.mark.parametrize("module_class", [nn.GradientReversal, nn.GradientReversalLinear])
def test_construction_on_meta(module_class):
    arguments = (3, 2) if module_class is nn.GradientReversalLinear else ()
    with torch.device("meta"):
        module = module_class(*arguments, lambd=0.3).bfloat16()
    assert "backward: -? * grad" in repr(module)
    module.to_empty(device="cpu")
    module.reset_parameters()
    assert module.lambd.item() == 0.3
    assert module.lambd.dtype == F64
    for parameter in module.parameters():
        assert parameter.isfinite().all()
        assert parameter.dtype == torch.bfloat16


def test_memory_after_meta_holds_the_first_values():
    with torch.device("meta"):
        network = torch.nn.Sequential(
            nn.GradientReversal(0.3), nn.GradientReversalLinear(2, 2, lambd=0.25), nn.WarmStartGradientReversal()
        )
    reversal, linear, schedule = network.bfloat16().to_empty(device="cpu")
    assert (reversal.lambd.item(), linear.lambd.item(), schedule.iteration.item()) == (0.3, 0.25, 0)


def test_construction_of_a_schedule_on_meta():
    with torch.device("meta"):
        module = nn.WarmStartGradientReversal(max_iters=4)
    module.to_empty(device="cpu").reset_parameters()
    assert module.iteration.item() == 0
    assert advanced(module, 4).lambd.item() == pytest.approx(math.tanh(5), rel=1e-12)


@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_of_version_0_1(assign):
    """Coefficients and counters were fp32."""
    schedule = nn.WarmStartGradientReversal(max_iters=1000).bfloat16()
    schedule.load_state_dict({"iteration": torch.tensor(777.0)}, assign=assign)
    schedule.bfloat16().step()
    assert (schedule.iteration.dtype, schedule.iteration.item()) == (torch.int64, 778)
    reversal = nn.GradientReversal()
    reversal.load_state_dict({"lambd": torch.tensor(0.25)}, assign=assign)
    assert reversal.half().lambd.item() == 0.25
    restored = nn.GradientReversal()
    restored.load_state_dict(nn.GradientReversal(0.1).half().state_dict())
    assert restored.lambd.item() == 0.1


def test_a_loaded_coefficient_moves_unchanged():
    module = nn.GradientReversal(1.0)
    module.lambd.fill_(0.7)
    assert module.to_empty(device="cpu").half().lambd.item() == 0.7
    module.reset_parameters()
    assert module.lambd.item() == 1.0


def test_a_schedule_compiles_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = nn.WarmStartGradientReversal(max_iters=10)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for i in range(5):
        x = torch.ones(3, dtype=F64, requires_grad=True)
        compiled(x).sum().backward()
        torch.testing.assert_close(x.grad, torch.full((3,), -math.tanh(i / 2), dtype=F64))
        module.step()
    assert counter.frame_count == 1


def test_inference_tensors_as_coefficients():
    with torch.inference_mode():
        lambd, weight = torch.tensor(0.5), torch.eye(3)
    x = torch.ones(3, requires_grad=True)
    (gradient_reversal(x, lambd) + gradient_reversal_linear(x, weight, None, lambd)).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), -1.0))


def test_warm_start_follows_the_published_schedule():
    module = nn.WarmStartGradientReversal(gamma=10.0, hi=2.0, max_iters=4)
    for i in range(7):
        expected = 2.0 * (2 / (1 + math.exp(-10 * min(i / 4, 1.0))) - 1)
        assert module.lambd.item() == pytest.approx(expected, rel=1e-6, abs=1e-7)
        module.step()
    restored = nn.WarmStartGradientReversal(gamma=10.0, hi=2.0, max_iters=4)
    restored.load_state_dict(module.state_dict())
    assert torch.equal(restored.lambd, module.lambd)
