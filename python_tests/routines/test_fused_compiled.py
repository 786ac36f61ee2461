"""Fused networks under compilers and transforms."""

import copy

import pytest
import torch
from fusable import VGG, EfficientNet, ResNet, batch, leaves, made, result_of
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from kdkernels.inversion import BatchNormStatistics


@pytest.mark.parametrize(
    ("network", "fullgraph", "first"),
    [(ResNet, False, "compiled"), (ResNet, True, "compiled"), (VGG, True, "eager"), (EfficientNet, True, "eager")],
)
def test_compiled(network, fullgraph, first):
    model, x = made(network), batch()
    torch._dynamo.reset()
    outputs, _, losses, grad, _ = result_of(model, x, False)
    with BatchNormStatistics(model) as statistics:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        calls = [compiled] * 2 + [model, compiled, compiled]
        for call in calls if first == "compiled" else calls[2:]:
            y = x.detach().clone().requires_grad_()
            found = leaves(call(y))
            total = sum(value.square().sum() for value in found) + 0.7 * statistics.loss()
            total.backward()
            torch.testing.assert_close(found, outputs, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(torch.stack(list(statistics.losses().values())), losses, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(y.grad, grad, rtol=1e-10, atol=1e-11)


def test_a_compiled_network_uses_the_graph_of_an_eager_call():
    model, x = made(ResNet), batch()
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with BatchNormStatistics(model) as statistics:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        compiled(x)
        model(x)
        compiled(x)
        compiled(x)
        relus = [sum("relu" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
        assert "layer1.1.bn2: BatchNorm + add + ReLU" in statistics.describe()
    assert relus == [9, 0]


def test_transforms():
    model, x = made(ResNet), batch().detach()
    model.eval()
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    expected = result_of(model, x, False)[3]
    with BatchNormStatistics(model) as statistics:

        def objective(x):
            output = torch.func.functional_call(model, tensors, (x,))
            return output.square().sum() + 0.7 * statistics.loss()

        for _ in range(2):
            torch.testing.assert_close(torch.func.grad(objective)(x), expected, rtol=1e-11, atol=1e-12)
            model(x)  # decides
        small = x[:2].clone().requires_grad_()
        assert torch.autograd.gradcheck(objective, small, fast_mode=True)
        weights = {name: value.detach() for name, value in model.named_parameters()}

        def of_weights(weights):
            return torch.func.functional_call(model, weights, (x,)).square().sum()

        found = torch.func.grad(of_weights)(weights)
    plain = torch.func.grad(of_weights)(weights)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10)


def test_what_changes_after_compiling():
    model, x = made(ResNet), batch()
    torch._dynamo.reset()
    with BatchNormStatistics(model):
        model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        first = compiled(x)
        for replaced in (nn.SiLU(), nn.ReLU()):
            model.layer1[0].relu = replaced
            torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(compiled(x), first)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x), rtol=1e-11, atol=1e-12)
        model.eval()
        calls = []
        model.layer1[0].register_forward_hook(lambda *arguments: calls.append(1))
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), first)
        assert calls


def test_recorded_by_others():
    """Networks that are traced or exported inside the context compute what the network computes."""
    model, x = made(ResNet).eval(), batch().detach()
    expected = model(x)
    with BatchNormStatistics(model) as statistics:
        for _ in range(2):
            recorded = torch.fx.symbolic_trace(model)
            torch.testing.assert_close(recorded(x), expected)
            torch.testing.assert_close(make_fx(model)(x)(x), expected)
            torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
            torch.testing.assert_close(model(x), expected)  # decides
        assert "traced; it" in statistics.describe()


def test_other_derivatives():
    model, x = made(EfficientNet).eval(), batch()
    tangent, results = torch.randn_like(x), []
    for fuse in (False, "auto"):
        with BatchNormStatistics(model, fuse=fuse) as statistics:
            model(x)
            total = model(x)["logits"].square().sum() + statistics.loss()
            (grad,) = torch.autograd.grad(total, x, create_graph=True)
            second = torch.autograd.grad(grad.square().sum(), x)[0]
            forward = torch.func.jvp(lambda y: model(y)["logits"], (x.detach(),), (tangent,))
            results.append((second, *forward))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)
