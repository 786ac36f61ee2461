"""Weights, empty tensors and wrong calls of the pointwise divergences."""

import math
from functools import partial

import pytest
import torch
from contract import of_cpu

import kdkernels
from kdkernels.functional import binary_kl_div_with_logits, js_div, kl_div

F64 = torch.float64
INF, NAN = math.inf, math.nan


# Weights and reductions


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "batchmean"])
@pytest.mark.parametrize("form", ["mask", "float", "row mask"])
@pytest.mark.parametrize("function", [js_div, binary_kl_div_with_logits])
def test_weights(reduction, form, function, backend):
    """A weight of 0 hides NaN, in the value and in both gradients."""
    s, t = torch.randn(4, 6, dtype=F64), torch.randn(4, 6, dtype=F64)
    if function is js_div:
        s, t = s.log_softmax(1), t.log_softmax(1)
    weight = {
        "mask": torch.rand(4, 6) > 0.4,
        "float": torch.rand(4, 6, dtype=F64) * (torch.rand(4, 6) > 0.4),
        "row mask": torch.tensor([True, False, True, True])[:, None].expand(4, 6),
    }[form]
    losses = function(s, t, reduction="none")
    w = weight.double()
    divisor = {"none": 1, "mean": w.sum(), "sum": 1, "batchmean": 4}[reduction]
    expected = w * losses / divisor if reduction == "none" else (w * losses).sum() / divisor
    s, t = (torch.where(weight == 0, NAN, side).requires_grad_() for side in (s, t))
    found = function(s, t, position_weight=weight, reduction=reduction)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=1e-12)
    plain = [torch.where(weight == 0, 0.1, side.detach()).requires_grad_() for side in (s, t)]
    for a, b in zip(
        torch.autograd.grad(found.sum(), (s, t)),
        torch.autograd.grad((w / divisor * function(*plain, reduction="none")).sum(), plain),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [js_div, binary_kl_div_with_logits])
def test_nothing_counts(function, backend):
    s, t = torch.full((3, 4), -1.0, requires_grad=True), torch.full((3, 4), -2.0)
    loss = function(s, t, position_weight=torch.zeros(3, 4), reduction="mean")
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, s)[0] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
def test_no_elements(reduction, backend):
    x = torch.zeros(0, 4, requires_grad=True)
    for function in (kl_div, js_div, binary_kl_div_with_logits):
        loss = function(x, torch.zeros(0, 4), reduction=reduction)
        assert loss.shape == ((0, 4) if reduction == "none" else ())
        assert loss.sum().item() == 0
        assert torch.autograd.grad(loss.sum(), x)[0].shape == (0, 4)


def test_an_expanded_mask_takes_no_memory():
    """The weight that the op is given has a stride of 0 where the mask has one."""
    given_weights = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "pointwise_divergence" in str(func):
                given_weights.append(args[2])
            return func(*args, **(kwargs or {}))

    x = torch.randn(4, 6).log_softmax(1)
    with Recorder():
        js_div(x, x, position_weight=torch.ones(4, dtype=torch.bool)[:, None].expand(4, 6))
    assert given_weights[0].stride() == (1, 0)


# Wrong calls

CALLS = {
    "kl": lambda **changes: kl_div(**{"input": torch.zeros(3, 4), "target": torch.ones(3, 4), **changes}),
    "js": lambda **changes: js_div(**{"input": torch.zeros(3, 4), "target": torch.zeros(3, 4), **changes}),
    "binary": lambda **changes: binary_kl_div_with_logits(
        **{"input": torch.zeros(3, 4), "target": torch.zeros(3, 4), **changes}
    ),
}


@pytest.mark.parametrize(
    ("call", "changes", "error", "text"),
    [
        ("kl", {"target": torch.ones(5)}, ValueError, r"input has shape \(3, 4\) and target \(5,\), which cannot"),
        ("kl", {"target": torch.ones(3, 4, dtype=torch.long)}, TypeError, "target must be float16"),
        ("kl", {"reduction": "max"}, ValueError, "reduction is 'max'; accepted are 'none'"),
        ("js", {"target": torch.zeros(4)}, ValueError, r"input has shape \(3, 4\) and target \(4,\)"),
        ("js", {"beta": 1.5}, ValueError, r"beta is 1.5; expected a number in \[0, 1\]"),
        ("js", {"beta": torch.tensor(-0.1)}, ValueError, "beta is -0.1"),
        ("js", {"position_weight": torch.ones(3)}, ValueError, r"position_weight has shape \(3,\); expected.*\(3, 4\)"),
        ("js", {"position_weight": torch.ones(3, 4).long()}, TypeError, r"position_weight.bool\(\) if it is a mask"),
        ("js", {"position_weight": 1.0}, TypeError, "position_weight must be a tensor, got float"),
        ("binary", {"input": [0.0]}, TypeError, "input must be a tensor, got list"),
        ("binary", {"temperature": 0.0}, ValueError, "temperature is 0.0; expected a positive"),
        ("binary", {"temperature": torch.tensor(-1.0)}, ValueError, "temperature is -1.0"),
        ("binary", {"temperature": "2"}, TypeError, "temperature must be a number"),
        ("binary", {"target_type": "log_probs"}, ValueError, "target_type is 'log_probs'; accepted are 'logits'"),
        ("binary", {"position_weight": torch.ones(3, 4, requires_grad=True)}, ValueError, "weight requires grad"),
    ],
)  # fmt: skip
def test_wrong_calls(call, changes, error, text):
    with pytest.raises(error, match=text):
        CALLS[call](**changes)


@of_cpu
@pytest.mark.parametrize("bad", [-1.0, INF, NAN])
@pytest.mark.parametrize("expanded", [False, True])
def test_wrong_weights(bad, expanded, backend):
    weight = torch.ones(3, 4)
    weight[1] = bad
    weight = weight[:, :1].expand(3, 4) if expanded else weight
    for function in (js_div, binary_kl_div_with_logits):
        with pytest.raises(
            ValueError, match=r"position_weight\[4\] \(in flattened order\) is -?[0-9a-z.]+; expected a"
        ):
            function(torch.zeros(3, 4), torch.zeros(3, 4), position_weight=weight)


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_wrong_values_that_nobody_may_read_give_nan(reduction, monkeypatch):
    """As on a GPU without set_debug."""
    monkeypatch.setattr("kdkernels.ops._registry.values_are_visible", lambda tensor: False)
    s, p = torch.zeros(3, 2), torch.full((3, 2), 0.5)
    weight, beyond = torch.ones(3, 2), p.clone()
    weight[1, 1], beyond[1, 1] = -1.0, 1.5
    with kdkernels.set_backend("reference"):
        for function in (js_div, binary_kl_div_with_logits):
            assert function(s, p, position_weight=weight, reduction=reduction).isnan()
        assert binary_kl_div_with_logits(s, beyond, target_type="probs", reduction=reduction).isnan()


@of_cpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_wrong_probabilities(reduction, backend):
    s, p = torch.zeros(3, 2), torch.full((3, 2), 0.5)
    p[1, 1] = 1.5
    call = partial(binary_kl_div_with_logits, s, p, target_type="probs", reduction=reduction)
    with pytest.raises(
        ValueError, match=r"target\[3\] \(in flattened order\) is 1.500000; expected a probability in \[0, 1\]"
    ):
        call()
    weight = torch.ones(3, 2)
    weight[1, 1] = 0
    assert (call(position_weight=weight).isfinite()).all()
    p[1, 1] = NAN
    assert call().isnan().any()
