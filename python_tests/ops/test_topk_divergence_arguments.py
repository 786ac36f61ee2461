"""The divergence from a teacher's top classes: derivatives of every argument, masses, stored teachers, and mistakes."""

import math
import pickle

import pytest
import torch
from contract import KERNELS, of_cpu

import kdkernels
from kdkernels import nn
from kdkernels.functional import TopKLoss, topk_kl_div_with_logits, topk_teacher

F64 = torch.float64
TAILS = ("bucket", "renormalize", "ignore")
INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tail", TAILS)
def test_derivatives_of_every_argument(tail, reverse, backend):
    """Also of the temperature and of target_logsumexp, to the second order, where there is padding."""
    student, teacher = torch.randn(2, 6, dtype=F64, requires_grad=True), torch.randn(2, 6, dtype=F64)
    logits, indices = teacher.topk(3)
    logits[1, 2], indices[1, 2] = -INF, -1
    logits.requires_grad_()
    sums = (teacher.logsumexp(-1) + 0.1).requires_grad_()
    temperature = torch.tensor(1.0, dtype=F64, requires_grad=True)

    def loss(student, present, sums, temperature):
        values = torch.where(logits == -INF, -INF, present)
        return topk_kl_div_with_logits(
            student, values, indices, values_type="logits", target_logsumexp=sums, temperature=temperature, tail=tail,
            reverse=reverse,
        )  # fmt: skip

    present = torch.where(logits == -INF, 0.0, logits).detach().requires_grad_()
    inputs = student, present, sums, temperature
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("tail", TAILS)
def test_masses(tail, backend):
    student, teacher = torch.randn(3, 4, 9, dtype=F64, requires_grad=True), torch.randn(3, 4, 9, dtype=F64)
    values, indices = topk_teacher(teacher, 3)
    values[0, 0, 2] = -INF
    result = topk_kl_div_with_logits(student, values, indices, tail=tail, return_masses=True)
    assert type(result) is TopKLoss
    p = torch.where(values == -INF, 0.0, values.exp()).sum(-1)
    q = torch.where(values == -INF, 0.0, student.softmax(-1).gather(-1, indices)).sum(-1)
    torch.testing.assert_close(result.target_mass, p)
    torch.testing.assert_close(result.input_mass, q.detach())
    plain = topk_kl_div_with_logits(student, values, indices, tail=tail)
    assert torch.equal(result.loss, plain)
    for a, b in zip(torch.autograd.grad(result.loss, student), torch.autograd.grad(plain, student), strict=True):
        assert torch.equal(a, b)

    def call(student, values, indices):
        return topk_kl_div_with_logits(student, values, indices, tail=tail, return_masses=True)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(student, values, indices)
    program = torch.export.export(AsModule(call), (student.detach(), values, indices))
    for other in (compiled, program.module()(student.detach(), values, indices)):
        assert type(other) is TopKLoss
        for a, b in zip(other, result, strict=True):
            torch.testing.assert_close(a, b)


class AsModule(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def test_stored_teacher_can_be_passed_back_as_it_is():
    teacher, student = torch.randn(4, 50), torch.randn(4, 50)
    values, indices = topk_teacher(teacher, 8, temperature=2.0)
    stored = values.bfloat16(), indices.int()
    loss = topk_kl_div_with_logits(student, *stored, temperature=2.0)
    assert torch.equal(loss, topk_kl_div_with_logits(student, stored[0].float(), indices, temperature=2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
def test_topk_teacher(dtype, monkeypatch):
    """Exact, in rows at once or a few at a time, and of what autocast or inference mode leave."""
    logits = (torch.randn(3, 4, 60, dtype=F64) * 4).to(dtype)
    log_p = (logits.double() / 2).log_softmax(-1)
    for at_once in (1 << 22, 130):
        monkeypatch.setattr("kdkernels.ops.topk_divergence._ROWS_AT_ONCE", at_once)
        for temperature in (2, torch.tensor(2.0), torch.tensor(2.0, requires_grad=True)):
            values, indices = topk_teacher(logits.requires_grad_(), 5, temperature=temperature)
            assert values.dtype == (F64 if dtype == F64 else torch.float32)
            assert not values.requires_grad
            assert indices.dtype == torch.int64
            assert (values.diff(dim=-1) <= 0).all()
            torch.testing.assert_close(values.double(), log_p.gather(-1, indices), rtol=1e-6, atol=1e-6)
    assert topk_teacher(torch.tensor([0.0, -INF]), 2).values.tolist() == [0.0, -INF]


def test_learned_temperature_and_module():
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    stored = topk_teacher(teacher, 3)
    module = nn.TopKKLDivWithLogitsLoss(temperature=torch.nn.Parameter(torch.tensor(2.0)), tail="ignore", reverse=True)
    assert repr(module) == (
        "TopKKLDivWithLogitsLoss(KL(student || teacher) of listed classes, temperature=2, values_type='log_probs', "
        "tail='ignore', reduction='mean')"
    )
    loss = module(student, *stored, position_weight=torch.tensor([1.0, 0.0, 1.0, 2.0]))
    (grad,) = torch.autograd.grad(loss, module.temperature)
    step = 1e-3
    of = [
        topk_kl_div_with_logits(
            student.double(), stored.values.double(), stored.indices, temperature=t, tail="ignore", reverse=True,
            position_weight=torch.tensor([1.0, 0.0, 1.0, 2.0]),
        )
        for t in (2.0 - step, 2.0 + step)
    ]  # fmt: skip
    assert grad.item() == pytest.approx(((of[1] - of[0]) / (2 * step)).item(), rel=1e-4)
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(student, *stored), module(student, *stored))


def test_autocast_and_inference_mode():
    student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    with torch.inference_mode():
        stored = topk_teacher(teacher, 3)
        frozen = topk_kl_div_with_logits(student, *stored)
    with torch.autocast("cpu", torch.bfloat16):
        loss = topk_kl_div_with_logits(student, *stored)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, frozen)
    loss.backward()
    assert student.grad.abs().sum() > 0


# Mistakes


GOOD = {
    "input": torch.randn(2, 5),
    "values": torch.full((2, 2), -1.5),
    "indices": torch.tensor([[0, 1], [3, 2]]),
}
META = torch.device("meta")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"input": None}, TypeError, "input must be a tensor, got NoneType"),
        ({"input": torch.ones(2, 5, dtype=torch.int64)}, TypeError, "input must be float16, bfloat16, float32 or fl"),
        ({"input": torch.randn(())}, ValueError, "input has no dimensions; expected at least one, for the classes"),
        ({"input": torch.randn(2, 0)}, ValueError, r"input has 0 classes: shape \(2, 0\)"),
        ({"values": [1.0]}, TypeError, "values must be a tensor, got list"),
        ({"values": torch.ones(2, 2).long()}, TypeError, "values must be float16"),
        (
            {"values": torch.randn(2)},
            ValueError,
            r"values have shape \(2,\); expected \(2, K\), K classes per position",
        ),
        ({"values": torch.randn(3, 2)}, ValueError, r"values have shape \(3, 2\); expected \(2, K\)"),
        ({"indices": [0]}, TypeError, "indices must be a tensor, got list"),
        (
            {"indices": torch.randn(2, 2)},
            TypeError,
            "indices must be int64 or int32, got torch.float32; are values and",
        ),
        ({"indices": torch.ones(2, 2, dtype=torch.int16)}, TypeError, r"got torch.int16; pass indices.long\(\)"),
        ({"indices": torch.ones(2, 2, dtype=torch.bool)}, TypeError, "indices must be int64 or int32, got torch.bool$"),
        (
            {"indices": torch.zeros(2, 3).long()},
            ValueError,
            r"indices have shape \(2, 3\) and values \(2, 2\); they mu",
        ),
        ({"values": torch.zeros(2, 0), "indices": torch.zeros(2, 0).long()}, ValueError, "K = 0 .* expected 1 to 5"),
        ({"values": torch.zeros(2, 6), "indices": torch.zeros(2, 6).long()}, ValueError, "K = 6 .* expected 1 to 5"),
        ({"values": torch.zeros(2, 2, device=META)}, ValueError, "input is on cpu and values on meta; they must be on"),
        ({"values_type": "probs"}, ValueError, "values_type is 'probs'; accepted are 'log_probs', 'logits'"),
        ({"tail": "none"}, ValueError, "tail is 'none'; accepted are 'bucket', 'renormalize', 'ignore'"),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'; accepted are 'none', 'mean', 'sum', 'batchmean'"),
        ({"reverse": "yes"}, TypeError, "reverse must be a bool, got 'yes'"),
        ({"return_masses": 1}, TypeError, "return_masses must be a bool, got 1"),
        (
            {"values_type": "logits"},
            ValueError,
            "target_logsumexp is missing, which .* needs with tail='bucket': pass to",
        ),
        ({"values_type": "logits", "tail": "ignore"}, ValueError, "target_logsumexp is missing, .* with tail='ignore'"),
        (
            {"values_type": "logits", "tail": "renormalize", "return_masses": True},
            ValueError,
            "return_masses=True needs target_logsumexp with values_type='logits'",
        ),
        ({"target_logsumexp": torch.zeros(2)}, ValueError, "target_logsumexp applies to values_type='logits'"),
        (
            {"values_type": "logits", "target_logsumexp": torch.zeros(2, 1)},
            ValueError,
            r"target_logsumexp has shape \(2, 1\); expected one number per position, \(2,\); pass target_logsumexp.squ",
        ),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0; expected a positive, finite number"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number or a 0-dim tensor, got str"),
        (
            {"position_weight": torch.ones(2, 5)},
            ValueError,
            r"position_weight has shape \(2, 5\); expected one weight p",
        ),
        ({"position_weight": torch.ones(2).long()}, TypeError, "position_weight must be boolean or floating-point"),
        (
            {"position_weight": torch.tensor([1.0, -1.0])},
            ValueError,
            r"position_weight\[1\].* is -1.0.*; expected a fin",
        ),
        ({"position_weight": torch.tensor([NAN, 1.0])}, ValueError, r"position_weight\[0\]"),
        (
            {"indices": torch.tensor([[0, 1], [5, 2]])},
            IndexError,
            r"indices\[2\] .* is 5; expected a class from 0 to 4, o",
        ),
        (
            {"indices": torch.tensor([[0, -1], [3, 2]])},
            IndexError,
            r"indices\[1\] .* is -1; expected a class from 0 to 4",
        ),
        (
            {"indices": torch.tensor([[0, 1], [3, 3]])},
            ValueError,
            r"indices\[3\] .* is 3, which the same position lists",
        ),
        (
            {"values": torch.tensor([[-1.5, -1.5], [3.0, 1.0]])},
            ValueError,
            "add up to 22.8.* at position 1 .*; expected",
        ),
        ({"values": torch.tensor([[-0.5, -0.5], [-9.0, -9.0]])}, ValueError, r"add up to 1.213.* pass values_type="),
    ],
)
def test_wrong_calls(change, error, text, backend):
    with pytest.raises(error, match=text):
        topk_kl_div_with_logits(**{**GOOD, **change})


def test_wrong_values_are_not_an_error_where_they_do_not_count():
    values = torch.tensor([[-1.5, -INF], [3.0, 1.0]])
    weight = torch.tensor([True, False])
    loss = topk_kl_div_with_logits(GOOD["input"], values, torch.tensor([[0, 0], [9, 9]]), position_weight=weight)
    assert loss.isfinite()
    of_logits = topk_kl_div_with_logits(
        GOOD["input"], values, GOOD["indices"], values_type="logits", tail="renormalize"
    )
    assert of_logits.isfinite()


@pytest.mark.parametrize(
    ("indices", "values"),
    [([[0, 1], [5, 2]], -1.5), ([[0, 1], [3, 3]], -1.5), ([[0, 1], [3, -1]], -1.5), ([[0, 1], [3, 2]], None)],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_wrong_values_give_nan_where_they_are_not_looked_at(indices, values, reverse, monkeypatch):
    """As on a GPU: the position is NaN, in value and gradient, and the others are not."""
    monkeypatch.setattr("kdkernels.ops._registry.values_are_visible", lambda tensor: False)
    values = torch.tensor([[-1.5, -1.5], [3.0, 3.0]]) if values is None else torch.full((2, 2), values)
    with kdkernels.set_backend("reference"):
        leaf = GOOD["input"].clone().requires_grad_()
        loss = topk_kl_div_with_logits(leaf, values, torch.tensor(indices), reduction="none", reverse=reverse)
        (by_input,) = torch.autograd.grad(loss.sum(), leaf)
    assert loss.isnan().tolist() == [False, True]
    assert by_input.isnan().all(-1).tolist() == [False, True]


@pytest.mark.parametrize(
    ("logits", "k", "options", "error", "text"),
    [
        (
            torch.randn(3, 4),
            5,
            {},
            ValueError,
            r"k is 5; expected 1 to 4, the last dimension of logits of shape \(3, 4\)",
        ),
        (torch.randn(3, 4), 0, {}, ValueError, "k is 0; expected 1 to 4"),
        (torch.randn(3, 4), 2.0, {}, TypeError, "k must be an integer, got 2.0"),
        (torch.randn(3, 4), True, {}, TypeError, "k must be an integer, got True"),
        (torch.randn(()), 1, {}, ValueError, "logits have no dimensions"),
        (torch.ones(3, 4).long(), 1, {}, TypeError, "logits must be float16"),
        (torch.randn(3, 4), 2, {"temperature": -1}, ValueError, "temperature is -1; expected a positive"),
    ],
)
def test_wrong_calls_of_topk_teacher(logits, k, options, error, text):
    with pytest.raises(error, match=text):
        topk_teacher(logits, k, **options)


@of_cpu
@pytest.mark.skipif(not KERNELS, reason="tests the backward of the kernels")
def test_backward_of_indices_that_changed_since_the_forward_is_nan():
    """Written to in the meantime, past autograd's check: no memory outside of the row is touched."""
    values, indices = torch.full((2, 2), -1.5), torch.tensor([[0, 1], [3, 2]])
    student = torch.randn(2, 5, requires_grad=True)
    loss = topk_kl_div_with_logits(student, values, indices, reduction="none")
    indices.data[0, 1] = 10**9
    indices.data[1, 1] = 3
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert grad.isnan().all()
