"""Modules of the losses: coefficients that are tensors, and tracing."""

import copy
import math
import pickle
import types

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from kdkernels import functional, nn

LOGITS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]]), torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
LABELS = torch.tensor([2, 0])
STATISTICS = torch.tensor([0.1, 0.2, -0.3]), torch.tensor([1.0, 2.0, 0.5])
IMAGES = torch.linspace(-1, 1, 72).sin().view(2, 3, 4, 3)


class WithoutLabels(nn.DistillationLoss):
    def forward(self, input, target):
        return super().forward(input, target)


LOSSES = {
    "kl": (nn.KLDivWithLogitsLoss(temperature=2.0), LOGITS),
    "kl, tensor": (nn.KLDivWithLogitsLoss(temperature=torch.tensor(2.0)), LOGITS),
    "js": (nn.JSDivWithLogitsLoss(beta=torch.tensor(0.3)), LOGITS),
    "kl of probabilities": (nn.KLDivLoss(reduction="batchmean", log_target=True), LOGITS),
    "binary kl": (nn.BinaryKLDivWithLogitsLoss(temperature=torch.tensor(2.0), reverse=True), LOGITS),
    "distillation": (nn.DistillationLoss(), (*LOGITS, LABELS)),
    "distillation without labels": (WithoutLabels(kd_weight=torch.tensor(0.7)), LOGITS),
    "batch norm": (nn.BatchNormStatLoss(), (IMAGES, *STATISTICS)),
    "top-k": (
        nn.TopKKLDivWithLogitsLoss(temperature=torch.tensor(2.0)),
        (LOGITS[0], *functional.topk_teacher(LOGITS[1], 2)),
    ),
    "total variation": (nn.TotalVariationLoss("mean", norm_type="l2"), (IMAGES,)),
    "priors": (nn.ImagePriorLoss(tv_l1=0.5, l2=0.1), (IMAGES,)),
}


def with_gradient(module, inputs):
    leaf = inputs[0].clone().requires_grad_()
    loss = module(leaf, *inputs[1:])
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_symbolic_tracing(name):
    module, inputs = LOSSES[name]
    traced = torch.fx.symbolic_trace(module)
    expected = with_gradient(module, inputs)
    for graph in (traced, pickle.loads(pickle.dumps(traced)), torch.fx.Transformer(traced).transform()):
        torch.testing.assert_close(with_gradient(graph, inputs), expected)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("module", [nn.KLDivWithLogitsLoss(temperature=torch.tensor(2.0)), nn.GradientReversal(0.3)])
def test_coefficients_are_recorded_by_make_fx(module, tracing_mode):
    inputs = LOGITS[: 1 if isinstance(module, nn.GradientReversal) else 2]

    def gradient(*inputs):
        leaf = inputs[0].detach().requires_grad_()
        return torch.autograd.grad(module(leaf, *inputs[1:]).sum(), leaf)[0]

    recorded = make_fx(gradient, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(*inputs)
    torch.testing.assert_close(recorded(*inputs), gradient(*inputs))


def test_each_function_is_compiled_by_itself():
    """The limit of recompilations of torch.compile is one for each code object."""
    functions = [getattr(functional, name) for name in functional.__all__]
    codes = {id(function.__code__) for function in functions if isinstance(function, types.FunctionType)}
    assert len(codes) == sum(isinstance(function, types.FunctionType) for function in functions)


def test_coefficients_beside_fake_tensors():
    modules = nn.KLDivWithLogitsLoss(temperature=torch.tensor(2.0)), nn.GradientReversal()
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes = [modules[0](*(torch.randn(4, 3),) * 2).shape, modules[1](torch.randn(4, 3)).shape]
    assert shapes == [(), (4, 3)]


def test_a_temperature_that_is_a_tensor_moves_with_its_module_and_is_not_rounded():
    module = nn.KLDivWithLogitsLoss(temperature=torch.tensor(2.1))
    parent = torch.nn.Sequential(torch.nn.Linear(3, 3), module).bfloat16()
    assert torch.equal(module.temperature, torch.tensor(2.1))
    expected = functional.kl_div_with_logits(*LOGITS, temperature=2.1)
    torch.testing.assert_close(module(*LOGITS), expected)
    torch.testing.assert_close(copy.deepcopy(module)(*LOGITS), expected)
    assert not module.state_dict()
    assert repr(module) == "KLDivWithLogitsLoss(KL(teacher || student), temperature=2.1, reduction='mean')"
    parent.to("meta")
    assert module.temperature.is_meta
    assert "temperature=?" in repr(module)


@pytest.mark.parametrize("number", [3, 3.0, np.float32(3), np.int64(3)], ids=repr)
def test_a_number_may_be_assigned_to_a_coefficient(number):
    module = nn.DistillationLoss(temperature=torch.tensor(2.0))
    module.temperature = number
    torch.testing.assert_close(module(*LOGITS), functional.distillation_loss(*LOGITS, temperature=3.0))
    schedule = nn.WarmStartGradientReversal(max_iters=6)
    with pytest.raises(TypeError, match="cannot assign"):
        schedule.iteration = 2.5
    schedule.iteration = int(number)
    assert schedule.state_dict()["iteration"].item() == 3
    assert schedule.lambd.item() == pytest.approx(math.tanh(2.5), rel=1e-12)


def test_an_assigned_coefficient_is_compiled_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = nn.GradientReversal()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for step in range(4):
        module.lambd = step / 8
        x = torch.ones(3, requires_grad=True)
        compiled(x).sum().backward()
        assert torch.equal(x.grad, torch.full((3,), -step / 8))
        assert module.lambd.dtype == torch.float64
    assert counter.frame_count == 2  # forward and backward


def test_a_coefficient_without_a_value_is_refused():
    """A tensor on meta has none, and the memory that replaces it holds anything."""
    with torch.device("meta"):
        module = nn.DistillationLoss(temperature=torch.tensor(2.0))
    with pytest.raises(ValueError, match="temperature is nan; expected a positive, finite number"):
        module.to_empty(device="cpu")(*LOGITS)
    module.temperature.fill_(3.0)
    torch.testing.assert_close(module(*LOGITS), functional.distillation_loss(*LOGITS, temperature=3.0))


def test_repr_shows_any_argument():
    """A mistake is named by the call; printing the module must not hide it."""
    assert "T=tensor of shape (3,)," in repr(nn.DistillationLoss(temperature=torch.ones(3)))
    assert "* kl +" in repr(nn.DistillationLoss(divergence="kl"))
    assert "l3" in repr(nn.BatchNormStatLoss(mode="l3"))
    assert "l3" in repr(nn.TotalVariationLoss(norm_type="l3"))
    with FakeTensorMode():
        assert "temperature=?" in repr(nn.KLDivWithLogitsLoss(temperature=torch.tensor(2.0)))


def test_a_schedule_may_write_into_a_coefficient():
    temperature = torch.tensor(1.0)
    module = nn.DistillationLoss(temperature=temperature).half()
    temperature.fill_(3.0)
    torch.testing.assert_close(module(*LOGITS), functional.distillation_loss(*LOGITS, temperature=3.0))


def test_a_learned_temperature_is_a_parameter():
    module = nn.KLDivWithLogitsLoss(temperature=torch.nn.Parameter(torch.tensor(2.0)))
    assert list(dict(module.named_parameters())) == ["temperature"]
    assert "temperature=2," in repr(module)
    module(*LOGITS).backward()
    step = 1e-3
    losses = [functional.kl_div_with_logits(*(x.double() for x in LOGITS), temperature=2.0 + d) for d in (step, -step)]
    torch.testing.assert_close(
        module.temperature.grad, ((losses[0] - losses[1]) / (2 * step)).float(), rtol=1e-4, atol=1e-6
    )
