"""Gradient reversal in graphs: torch.export, TorchScript, torch.fx, ONNX."""

import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

from kdkernels import nn

# Of torch's own code.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


class Domain(torch.nn.Module):
    """A reversal between two layers: the gradient of the first is minus that of the plain network times lambd."""

    def __init__(self, reversal):
        super().__init__()
        self.features = torch.nn.Linear(4, 3)
        self.reversal = reversal
        self.classifier = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.classifier(self.reversal(self.features(x)))


REVERSALS = {
    "fixed": lambda: nn.GradientReversal(0.5),
    "warm start": lambda: advanced(nn.WarmStartGradientReversal(max_iters=10), 3),
    "linear": lambda: nn.GradientReversalLinear(3, 3, lambd=0.5),
}


def advanced(module, steps):
    for _ in range(steps):
        module.step()
    return module


def assert_reverses(model, original, x):
    """Compare with the true gradients: plain(x) has the original's weights and no reversal."""
    reversal = original.reversal
    lambd = float(reversal.lambd)
    middle = F.linear(original.features(x), reversal.weight, reversal.bias) if hasattr(reversal, "weight") else None
    plain = original.classifier(original.features(x) if middle is None else middle)
    (true,) = torch.autograd.grad(plain.sin().sum(), original.features.weight)
    model.zero_grad(set_to_none=True)
    output = model(x)
    torch.testing.assert_close(output, plain)
    output.sin().sum().backward()
    torch.testing.assert_close(dict(model.named_parameters())["features.weight"].grad, -lambd * true)


@pytest.mark.parametrize("reversal", REVERSALS)
def test_symbolic_tracing_keeps_the_sign(reversal):
    torch.manual_seed(0)
    model, x = Domain(REVERSALS[reversal]()), torch.randn(5, 4)
    traced = torch.fx.symbolic_trace(model)
    assert_reverses(traced, model, x)
    assert_reverses(pickle.loads(pickle.dumps(traced)), model, x)


def test_a_symbolically_traced_schedule_advances():
    torch.manual_seed(0)
    model, x = Domain(nn.WarmStartGradientReversal(max_iters=10)), torch.randn(5, 4)
    traced = torch.fx.symbolic_trace(model)
    advanced(model.reversal, 4)
    assert_reverses(traced, model, x)


@pytest.mark.parametrize("reversal", REVERSALS)
def test_a_torchscript_file_keeps_the_sign_without_this_package(reversal):
    torch.manual_seed(0)
    model, x = Domain(REVERSALS[reversal]()), torch.randn(5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert "kdkernels::" not in str(loaded.inlined_graph)
    assert_reverses(loaded, model, torch.randn(5, 4))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("reversal", REVERSALS)
def test_an_export_keeps_the_sign(reversal, strict):
    torch.manual_seed(0)
    model, x = Domain(REVERSALS[reversal]()), torch.randn(5, 4)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), strict=strict), file)
    file.seek(0)
    assert_reverses(torch.export.load(file).module(), model, torch.randn(5, 4))


def test_an_export_of_the_reversal_alone_keeps_the_sign():
    """The input of the example needs no gradient; that of the training will."""
    exported = torch.export.export(nn.GradientReversal(0.5), (torch.randn(3),)).module()
    x = torch.randn(3, requires_grad=True)
    exported(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), -0.5))


@pytest.mark.parametrize("reversal", REVERSALS)
def test_an_inference_export_has_only_ops_of_torch(reversal):
    model, x = Domain(REVERSALS[reversal]()), torch.randn(5, 4)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).run_decompositions()
    assert "kdkernels" not in exported.graph_module.code
    assert "sub" not in exported.graph_module.code
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize("reversal", REVERSALS)
def test_onnx_exporters_see_the_identity(reversal, monkeypatch):
    """Both exporters set this flag; they need packages that the tests do not install."""
    model, x = Domain(REVERSALS[reversal]()), torch.randn(5, 4)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    exported = torch.export.export(model, (x,)).run_decompositions()
    assert "kdkernels" not in exported.graph_module.code
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        graph = str(torch.jit.trace(model, x).inlined_graph)
    assert "kdkernels::" not in graph
    assert "aten::sub" not in graph
