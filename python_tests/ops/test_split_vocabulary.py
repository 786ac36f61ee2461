"""Losses of logits whose classes are split over ranks, against the loss of whole logits."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from contract import OpContract
from hypothesis import given
from hypothesis import strategies as st

from kdkernels.functional import (
    distillation_loss,
    split_vocabulary_loss,
    split_vocabulary_mixture,
    split_vocabulary_statistics,
)
from kdkernels.ops.split_vocabulary.cases import losses_of_ranks, of_all_ranks
from kdkernels.testing.comparison import peak_bytes
from kdkernels.testing.selftest import accuracy_of, results_of

F64 = torch.float64
REFUSED = "split_vocabulary_loss has no second derivative"


class TestSplitVocabulary(OpContract):
    op = "split_vocabulary"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)  # float64: test_equals_the_loss_of_whole_logits

    @classmethod
    def op_samples(cls):
        for shape, dtype in (((4, 6), F64), ((2, 3, 5), torch.float32), ((0, 3), F64), ((7,), torch.bfloat16)):
            wide = F64 if dtype == F64 else torch.float32
            reduction = "none" if len(shape) > 2 else "mean"
            for grad in (False, True):
                s, t = (torch.randn(shape, dtype=dtype).requires_grad_(grad) for _ in range(2))
                labels = torch.zeros(shape[:-1], dtype=torch.int64) if grad else None
                numbers = [torch.tensor(x, dtype=F64) for x in (2.0, 1.0, 0.5, 0.3)]
                kind = "js" if grad else "forward_kl"
                constants = s.detach(), t.detach()
                yield "split_vocabulary_statistics", (*constants, labels, numbers[0], kind, 0, -100)
                own = split_vocabulary_statistics(*constants, labels, temperature=2.0, divergence=kind)
                every = torch.stack([own, own])
                yield "split_vocabulary_mixture", (*constants, every, numbers[0], numbers[3])
                mixture = torch.rand(2, *shape[:-1], dtype=wide) if grad else None
                common = (labels, None, every, mixture, *numbers, kind, 0, -100, reduction)
                yield "split_vocabulary_loss", (s, t, *common)
                grad_output = torch.randn(shape[:-1] if reduction == "none" else (), dtype=wide)
                yield "split_vocabulary_loss_backward", (grad_output, *constants, *common, True, grad)

    @classmethod
    def extended(cls, case, arrays, cotangents):
        raise NotImplementedError("float64 is compared with the loss of whole logits")

    def test_accuracy(self, case):
        """The bar of the kernels; the op has none, so that the contract's test does not run."""

        def whole(case, inputs):
            wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
            return results_of(case.eager, wide, case.differentiable)

        for row in accuracy_of(case, whole):
            assert row.passed, row

    def test_reference_backend_agrees(self, case):
        """There is nothing but the reference; test_accuracy compares it."""

    def test_opcheck(self):
        """The backward has no derivative to check."""
        for name, arguments in self.op_samples():
            torch.library.opcheck(getattr(torch.ops.kdkernels, name).reference, arguments)

    def test_gradgradcheck(self, call):
        s, t, *rest = call.inputs
        s = s.detach().requires_grad_()
        (grad,) = torch.autograd.grad(call.function(s, t, *rest).sum(), s, create_graph=True)
        with pytest.raises(NotImplementedError, match=REFUSED):
            torch.autograd.grad(grad.sum(), s)

    def test_nested_reverse_mode_under_torch_func(self, call):
        def slope(s):
            return torch.func.grad(lambda s: call.function(s, *call.inputs[1:]).sum())(s).square().sum()

        with pytest.raises(NotImplementedError, match=REFUSED):
            torch.func.grad(slope)(call.inputs[0])

    def test_forward_mode(self, call):
        s, *rest = call.inputs
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            torch.func.jvp(lambda s: call.function(s, *rest), (s,), (torch.ones_like(s),))


# Values derived by hand


def test_by_hand():
    """Logits (0, 0) and (ln 3, 0), a class on each rank: q = (1/2, 1/2), p = (3/4, 1/4)."""
    s, t = torch.tensor([[0.0, 0.0]], dtype=F64), torch.tensor([[math.log(3), 0.0]], dtype=F64)
    shards = [(s[:, k : k + 1].clone().requires_grad_(), t[:, k : k + 1]) for k in range(2)]
    own = [split_vocabulary_statistics(*shard, temperature=1.0) for shard in shards]
    assert own[0][:5, 0].tolist() == [0.0, math.log(3), 0.0, 0.0, 0.0]
    losses = [split_vocabulary_loss(*shard, torch.stack(own), temperature=1.0) for shard in shards]
    for loss, (shard, _), slope in zip(losses, shards, (-0.25, 0.25), strict=True):
        assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-15)
        loss.backward()
        assert shard.grad.item() == pytest.approx(slope, abs=1e-15)


@given(
    shape=st.sampled_from([(5, 24), (2, 3, 24), (24,), (0, 24)]),
    ranks=st.sampled_from([1, 2, 3, 4, 24]),
    kind=st.sampled_from(["forward_kl", "reverse_kl", "js"]),
    beta=st.sampled_from([0.1, 0.5, 0.9]),
    temperature=st.sampled_from([0.05, 1.0, 4.0]),
    reduction=st.sampled_from(["mean", "none", "sum"]),
    labelled=st.booleans(),
    weighted=st.booleans(),
    scale=st.sampled_from([1e-6, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_equals_the_loss_of_whole_logits(
    shape, ranks, kind, beta, temperature, reduction, labelled, weighted, scale, seed
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(shape, generator=generator, dtype=F64) for _ in range(2))
    labels = ()
    if labelled:
        drawn = torch.randint(0, 24, shape[:-1], generator=generator)
        labels = (drawn.masked_fill(torch.rand(shape[:-1], generator=generator) < 0.2, -100),)
    options = {"divergence": kind, "beta": beta, "temperature": temperature, "reduction": reduction}
    if weighted:
        options["position_weight"] = torch.rand(shape[:-1], generator=generator, dtype=F64)
    found = results_of(partial(of_all_ranks, ranks=ranks, **options), (s, t, *labels), (0, 1))
    truth = results_of(partial(distillation_loss, dim=-1, **options), (s, t, *labels), (0, 1))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


# Special values


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
def test_classes_of_no_probability(kind):
    """-inf on one side, on both, in a whole shard of either side and of both; the loss may be infinite, never NaN."""
    s, t = torch.randn(7, 8, dtype=F64), torch.randn(7, 8, dtype=F64)
    s[1, 2], t[2, 5], s[3, 1], t[3, 1] = (-math.inf,) * 4
    s[4, :4] = -math.inf
    t[5, 4:] = -math.inf
    s[6, :4] = t[6, :4] = -math.inf
    options = {"divergence": kind, "temperature": 2.0, "reduction": "none"}
    s.requires_grad_(), t.requires_grad_()
    truth = distillation_loss(s, t, **options)
    true_grads = torch.autograd.grad(truth.sum(), (s, t))
    for ranks in (2, 4, 8):
        losses = losses_of_ranks(s, t, ranks=ranks, **options)
        for loss in losses:
            torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-13)
        for a, b in zip(torch.autograd.grad(sum(losses).sum(), (s, t)), true_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_sides_give_zero(kind, dtype):
    s = (3 * torch.randn(6, 300)).to(dtype)
    loss, *grads = results_of(partial(of_all_ranks, ranks=3, divergence=kind), (s, s.clone()), (0, 1))
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("kind", ["forward_kl", "js"])
@pytest.mark.parametrize("by", ["label", "mask"])
def test_positions_that_do_not_count_may_be_nan(kind, by):
    s, t = torch.randn(5, 12, dtype=F64), torch.randn(5, 12, dtype=F64)
    labels = torch.tensor([3, 11, -100 if by == "label" else 0, 6, 5])
    kept = torch.tensor([0, 1, 3, 4])
    truth = results_of(partial(distillation_loss, divergence=kind), (s[kept], t[kept], labels[kept]), (0, 1))
    s[2], t[2] = math.nan, math.nan
    options = {"divergence": kind, "ranks": 3}
    if by == "mask":
        options["position_weight"] = torch.tensor([True, True, False, True, True])
    loss, *grads = results_of(partial(of_all_ranks, **options), (s, t, labels), (0, 1))
    torch.testing.assert_close(loss, truth[0])
    for grad, true in zip(grads, truth[1:], strict=True):
        torch.testing.assert_close(grad[kept], true)
        assert (grad[2] == 0).all()


def test_memory_of_the_backward():
    """Beyond the gradient of the shard there are blocks of a few rows."""
    s, t = torch.randn(2048, 4000).requires_grad_(), torch.randn(2048, 4000)
    every = torch.stack([split_vocabulary_statistics(s, t)])
    loss = split_vocabulary_loss(s, t, every)
    assert peak_bytes(loss.backward) <= 1.0 * s.nbytes + 48e6
    assert peak_bytes(lambda: split_vocabulary_statistics(s, t)) <= 16e6


# Two processes

WORKER = """
import sys
import torch
import torch.distributed as dist
from kdkernels.functional import *

rank, path = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
torch.manual_seed(0)
s, t = (3 * torch.randn(2, 5, 30, dtype=torch.float64) for _ in range(2))
labels = torch.tensor([[0, 14, 15, 29, -100], [7, 7, 22, 28, 16]])
first, end = (0, 15) if rank == 0 else (15, 30)
for kind in ("forward_kl", "reverse_kl", "js"):
    for y in (None, labels):
        student, teacher = (x[..., first:end].clone().requires_grad_() for x in (s, t))
        options = {"temperature": 2.0, "divergence": kind, "first_class": first}
        own = split_vocabulary_statistics(student, teacher, y, **options)
        every = own.new_empty(2, *own.shape)
        dist.all_gather(list(every.unbind()), own)
        mixture = None
        if kind == "js":
            mixture = split_vocabulary_mixture(student, teacher, every, temperature=2.0, beta=0.3)
            dist.all_reduce(mixture)
        loss = split_vocabulary_loss(student, teacher, every, y, mixture=mixture, beta=0.3, **options)
        loss.backward()
        whole = [x.clone().requires_grad_() for x in (s, t)]
        truth = distillation_loss(*whole, y, temperature=2.0, divergence=kind, beta=0.3, dim=-1)
        truth.backward()
        assert abs(loss.item() - truth.item()) <= 1e-12 * truth.item(), (kind, loss, truth)
        for shard, side in ((student, whole[0]), (teacher, whole[1])):
            torch.testing.assert_close(shard.grad, side.grad[..., first:end], rtol=1e-11, atol=1e-13)
dist.destroy_process_group()
print("equal")
"""


def test_two_processes(tmp_path):
    """Values and gradients of each rank are those of whole logits, with the collectives of a trainer."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    arguments = [[sys.executable, str(script), str(rank), str(tmp_path / "store")] for rank in range(2)]
    ranks = [subprocess.Popen(a, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for a in arguments]
    for process in ranks:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert output.strip().endswith("equal")


# Wrong calls


def arguments(**change):
    s, t = torch.randn(4, 6), torch.randn(4, 6)
    every = torch.stack([split_vocabulary_statistics(s, t, torch.zeros(4).long())] * 2)
    return {"input": s, "target": t, "statistics": every, "labels": torch.zeros(4).long(), **change}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"input": [1.0]}, TypeError, "input must be a tensor"),
        ({"target": torch.randn(4, 5)}, ValueError, r"input has shape \(4, 6\) and target \(4, 5\)"),
        ({"statistics": torch.randn(8, 4)}, ValueError, r"statistics has shape \(8, 4\); expected \(ranks, 8, 4\)"),
        ({"statistics": torch.randn(2, 8, 3)}, ValueError, r"expected \(ranks, 8, 4\)"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels have shape \(3,\); expected \(4,\)"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must be a tensor of class indices"),
        ({"first_class": 1.5}, TypeError, "first_class must be an integer"),
        ({"divergence": "js"}, ValueError, "divergence='js' needs mixture"),
        ({"mixture": torch.zeros(2, 4)}, ValueError, "mixture belongs to divergence='js'"),
        (
            {"divergence": "js", "mixture": torch.zeros(3, 4)},
            ValueError,
            r"mixture has shape \(3, 4\); expected \(2, 4\)",
        ),
        ({"beta": 0.0}, ValueError, "beta is 0.0; .*use divergence='forward_kl'"),
        ({"beta": 1}, ValueError, "use divergence='reverse_kl'"),
        ({"beta": 2.0}, ValueError, r"beta is 2.0; expected a number in \[0, 1\]"),
        ({"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ({"temperature": torch.tensor(1.0, requires_grad=True)}, ValueError, "temperature requires grad"),
        ({"kd_weight": 1.0}, ValueError, "kd_weight alone was given"),
        ({"labels": None, "ce_weight": 0.5}, ValueError, "ce_weight is 0.5, but there are no labels"),
        ({"position_weight": -torch.ones(4)}, ValueError, "position_weight"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'"),
    ],
)
def test_wrong_calls(change, error, text):
    with pytest.raises(error, match=text):
        split_vocabulary_loss(**arguments(**change))


def test_a_label_that_no_rank_has():
    s, t = torch.randn(4, 6), torch.randn(4, 6)
    with pytest.raises(IndexError, match=r"labels\[1\] .* is 6, which no rank has"):
        of_all_ranks(s, t, torch.tensor([0, 6, 5, -100]))


def test_the_mixture_takes_no_end_points():
    s, t = torch.randn(4, 6), torch.randn(4, 6)
    every = torch.stack([split_vocabulary_statistics(s, t, divergence="js")])
    with pytest.raises(ValueError, match="use divergence='forward_kl'"):
        split_vocabulary_mixture(s, t, every, beta=0)


@pytest.mark.parametrize("change", [{"temperature": 1.0}, {"input": 1.0}])
def test_statistics_of_another_call(change, backend):
    """A temperature that only one of the calls was given is seen, in a step of JS too."""
    student, teacher = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    every = torch.stack([split_vocabulary_statistics(student, teacher, temperature=2.0, divergence="js")])
    student, temperature = student + change.get("input", 0.0), change.get("temperature", 2.0)
    for call in (split_vocabulary_loss, split_vocabulary_mixture):
        with pytest.raises(ValueError, match=f"first position at temperature {temperature:g}; pass the same"):
            call(student, teacher, every, temperature=temperature)
