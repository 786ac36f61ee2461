import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import OpContract
from hypothesis import given
from hypothesis import strategies as st

import kdkernels
from kdkernels.functional import binary_kl_div_with_logits, kl_div
from kdkernels.ops._cases import layouts
from kdkernels.testing.selftest import error_in_ulp, results_of

F64 = torch.float64
INF, NAN = math.inf, math.nan
L = np.longdouble


def extended_elements(kind, arrays, beta, temperature):
    """Values and slopes of both sides in extended precision, from the textbook forms."""
    x, y = arrays[:2]
    if kind == "kl":
        ratio = np.log(y) - x
        return y * ratio, -y, ratio + 1
    if kind == "kl_log" or (kind == "js" and beta in (0, 1)):
        w, v = (x, y) if beta == 1 and kind == "js" else (y, x)
        by_w, by_v = np.exp(w) * (w - v + 1), -np.exp(w)
        sides = (by_w, by_v) if w is x else (by_v, by_w)
        return np.exp(w) * (w - v), *sides
    if kind == "js":
        beta = L(beta)
        q, p = np.exp(x), np.exp(y)
        ratio = np.expm1(x - y)  # q / p - 1
        of_p = -np.log1p((1 - beta) * ratio)
        of_q = (x - y) + of_p
        return beta * p * of_p + (1 - beta) * q * of_q, (1 - beta) * q * of_q, beta * p * of_p
    temperature = L(temperature)
    s, t = x / temperature, np.log(y) - np.log1p(-y) if "probs" in kind else y / temperature
    w, v = (s, t) if "reverse" in kind else (t, s)
    sign = np.where(w > 0, -1, 1)
    w, d = w * sign, (v - w) * sign
    p, rest = np.exp(w) / (1 + np.exp(w)), 1 / (1 + np.exp(w))
    with np.errstate(over="ignore"):
        log = np.where(d < 100, np.log1p(p * np.expm1(np.minimum(d, 100))), d + w - np.log1p(np.exp(w)))
        by_v = np.where(d < 100, p * rest * np.expm1(np.minimum(d, 100)) / (1 + p * np.expm1(np.minimum(d, 100))), rest)
    value, by_w, by_v = log - p * d, -sign * p * rest * d, sign * by_v
    by_s, by_t = (by_w, by_v) if "reverse" in kind else (by_v, by_w)
    return value, by_s / temperature, by_t / (y * (1 - y)) if "probs" in kind else by_t / temperature


def options_of(case):
    function, options = case.function, {}
    while isinstance(function, partial):
        options = {**function.keywords, **options}
        function = function.func
    return function.__name__, options


class TestPointwiseDivergence(OpContract):
    op = "pointwise_divergence"

    @classmethod
    def op_samples(cls):
        kinds = ("kl", "kl_log", "js_log", "binary_kl", "reverse_binary_kl_probs")
        x = torch.rand(4, 3, 5) * 0.8 + 0.1
        inputs = [x, x.permute(2, 0, 1), x[:, ::2], x[0, 0, 0], x[:0], x.bfloat16()]
        for i, input in enumerate(inputs):
            for j in (i, i + 2):  # two of the kinds for each input
                kind = kinds[j % len(kinds)]
                side = -input if "log" in kind else input
                reduction = ("none", "mean", "sum")[(i + j) % 3]
                weight = torch.rand(side.shape) if "kl_log" not in kind and i % 2 == 0 else None
                for grad in (False, True):
                    scalars = [torch.tensor(v, dtype=F64) for v in (2.0, 0.3)]
                    sides = [s.detach().clone().requires_grad_(grad) for s in (side, side * 0.9)]
                    arguments = (*sides, weight, *scalars, kind, reduction)
                    yield "pointwise_divergence", arguments
                    loss = torch.ops.kdkernels.pointwise_divergence.reference(*arguments).detach()
                    incoming = torch.randn_like(loss).requires_grad_(grad)
                    wanted = ((True, False, False), (True, True, True), (False, True, False))[(i + j) % 3]
                    yield "pointwise_divergence_backward", (incoming, *arguments, *wanted)

    @classmethod
    def extended(cls, case, arrays, cotangents):
        name, options = options_of(case)
        kind = {"kl_div": "kl", "ours_js": "js", "js_div": "js"}.get(name, "binary")
        kind += "_log" if options.get("log_target") else ""
        kind += "_reverse" if options.get("reverse") else ""
        kind += "_probs" if options.get("target_type") == "probs" else ""
        value, *slopes = extended_elements(kind, arrays, options.get("beta", 0.5), options.get("temperature", 1.0))
        weight = arrays[2] if len(arrays) > 2 else np.ones_like(value)
        reduction = options.get("reduction", "batchmean" if kind == "js" else "mean")
        scale = weight
        loss = weight * value
        if reduction != "none":
            divisor = {"mean": weight.sum(), "sum": L(1), "batchmean": L(value.shape[0])}[reduction]
            loss, scale = loss.sum() / divisor, weight / divisor
        gradients = [slope * scale * cotangents[0] for slope in slopes]
        return [loss, *gradients[: len(case.differentiable)]]

    def test_inductor(self):
        for call in (self.calls()[0], self.calls()[5]):
            self._check_compiled(call, "inductor", None)


# F.kl_div


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "batchmean"])
@pytest.mark.parametrize(
    "shapes", [((4, 3), (4, 3)), ((4, 3), (3,)), ((3,), (4, 3)), ((4, 1), (1, 3)), ((), ()), ((5,), ())]
)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_kl_div_is_that_of_torch(log_target, reduction, shapes, backend):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(shape, generator=generator, dtype=F64) + 0.1 for shape in shapes)
    inputs = (x.log(), y.log() if log_target else y)
    options = {"reduction": reduction, "log_target": log_target}
    found, expected = (results_of(partial(f, **options), inputs, (0, 1)) for f in (kl_div, F.kl_div))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "flags", [(False, None), (True, None), (None, False), (False, False), (True, True), (None, True)]
)
@pytest.mark.filterwarnings("ignore:.*size_average and reduce")
def test_deprecated_flags_of_torch(flags):
    x, y = torch.randn(4, 3, dtype=F64).log_softmax(1), torch.randn(4, 3, dtype=F64).softmax(1)
    for reduction in ("sum", "none"):
        expected = F.kl_div(x, y, *flags, reduction)
        torch.testing.assert_close(kl_div(x, y, *flags, reduction), expected, rtol=1e-12, atol=1e-12)
    with pytest.warns(UserWarning, match="size_average and reduce are deprecated; use reduction='sum'"):
        kl_div(x, y, False)


def test_module_is_that_of_torch():
    x, y = torch.randn(4, 3, dtype=F64).log_softmax(1), torch.randn(4, 3, dtype=F64).softmax(1)
    for reduction in ("sum", "none", "batchmean"):
        expected = torch.nn.KLDivLoss(reduction=reduction)(x, y)
        torch.testing.assert_close(kdkernels.nn.KLDivLoss(reduction=reduction)(x, y), expected)
    with pytest.warns(UserWarning, match="use reduction='sum'"):
        module = kdkernels.nn.KLDivLoss(False, log_target=True)
    assert repr(module) == "KLDivLoss(reduction='sum', log_target=True)"


def test_kl_div_by_hand(backend):
    x = torch.tensor([-1.0, -INF, -INF, -2.0], dtype=F64, requires_grad=True)
    p = torch.tensor([0.5, 0.0, 0.25, 1.0], dtype=F64, requires_grad=True)
    loss = kl_div(x, p, reduction="none")
    torch.testing.assert_close(loss.detach(), torch.tensor([0.5 * math.log(0.5) + 0.5, 0.0, INF, 2.0], dtype=F64))
    by_x, by_p = torch.autograd.grad(loss.sum(), (x, p))
    assert by_x.tolist() == [-0.5, 0.0, -0.25, -1.0]
    torch.testing.assert_close(by_p, torch.tensor([math.log(0.5) + 2, 0.0, INF, 3.0], dtype=F64))


def test_kl_div_of_log_targets_by_hand(backend):
    x = torch.tensor([-1.0, -INF, -1.0, -INF, 0.5], dtype=F64, requires_grad=True)
    t = torch.tensor([-1.0, -INF, -INF, 0.0, 0.0], dtype=F64, requires_grad=True)
    loss = kl_div(x, t, reduction="none", log_target=True)
    assert loss.tolist() == [0.0, 0.0, 0.0, INF, -0.5]
    by_x, by_t = torch.autograd.grad(loss.sum(), (x, t))
    e = math.exp(-1)
    torch.testing.assert_close(by_x, torch.tensor([-e, 0.0, 0.0, -1.0, -1.0], dtype=F64))
    torch.testing.assert_close(by_t, torch.tensor([e, 0.0, 0.0, INF, 0.5], dtype=F64))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_numbers_that_are_no_probabilities(dtype, backend):
    """As with F.kl_div: a negative target gives NaN, and a logarithm may be positive."""
    x, t = torch.tensor([-1.0, -1.0], dtype=dtype), torch.tensor([-0.5, NAN], dtype=dtype)
    assert kl_div(x, t, reduction="none").isnan().all()
    x, t = torch.tensor([1.0, 70.0, 3.0], dtype=dtype), torch.tensor([2.0, 71.0, 1e4], dtype=dtype)
    found = kl_div(x, t, reduction="none", log_target=True)
    torch.testing.assert_close(found, F.kl_div(x, t, reduction="none", log_target=True), rtol=1e-6, atol=0)


# Any combination


@given(
    shape=st.sampled_from([(1,), (5,), (3, 4), (2, 3, 17), (600, 3), (3, 600), (2, 1, 5, 33), (4, 1100)]),
    forms=st.tuples(*[st.sampled_from(["contiguous", "transposed", "sliced", "offset", "channels_last"])] * 2),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.float16, torch.bfloat16, F64])] * 2),
    reduction=st.sampled_from(["none", "mean", "sum", "batchmean"]),
    reverse=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_combination(shape, forms, dtypes, reduction, reverse, weighted, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(form, dtype):
        values = (torch.randn(shape, generator=generator) * 3).to(dtype)
        every = layouts(values) if len(shape) > 1 else {}
        return every.get(form, values)

    inputs = tuple(draw(form, dtype) for form, dtype in zip(forms, dtypes, strict=True))
    weight = torch.rand(shape, generator=generator) if weighted else None
    function = partial(
        binary_kl_div_with_logits, reverse=reverse, reduction=reduction, temperature=1.5, position_weight=weight
    )
    found = results_of(function, inputs, (0, 1))
    with kdkernels.set_backend("reference"):
        truth = results_of(function, inputs, (0, 1), F64)
    for a, b in zip(found, truth, strict=True):
        assert error_in_ulp(a, b) <= 64 or (a - b).abs().max() <= 1e-6 * b.abs().max()
