"""The callables for logits: what they refuse, what they give where a project has NaN, and how they are compiled."""

import math
from functools import partial

import pytest
import torch

from kdkernels.compat.liger_kernel import LigerJSD, LigerKLDIVLoss
from kdkernels.compat.mdistiller import dkd_loss, kd_loss
from kdkernels.compat.rep_distiller import DistillKL
from kdkernels.compat.torchdistill import KDLoss
from kdkernels.compat.trl import generalized_jsd_loss

LOGITS = torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)
ROWS = torch.full((4, 5), math.log(0.2)), torch.full((4, 5), math.log(0.2))


def module(**options):
    return KDLoss("fc", "output", "fc", "output", 2.0, **options)


def of(logits):
    return {"fc": {"output": logits}}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: generalized_jsd_loss(*LOGITS, reduction="tokens"), ValueError, "reduction is 'tokens'; accepted"),
        (lambda: generalized_jsd_loss(*LOGITS, torch.zeros(3)), ValueError, r"shape \(3,\); expected \(2, 3\)"),
        (lambda: generalized_jsd_loss(*LOGITS, [0]), TypeError, "labels must be a tensor, got list"),
        (lambda: generalized_jsd_loss(*LOGITS, temperature=0.0, reduction="none"), ValueError, "temperature is 0.0"),
        (lambda: generalized_jsd_loss([0.0], LOGITS[1]), TypeError, "student_logits must be a tensor, got list"),
        (lambda: LigerJSD()(ROWS[0], None), TypeError, "log_p must be a tensor, got NoneType"),
        (lambda: generalized_jsd_loss(*LOGITS, beta=2.0), ValueError, r"beta is 2.0; expected a number in \[0, 1\]"),
        (lambda: LigerJSD()(*LOGITS), ValueError, r"log_q has shape \(2, 3, 5\); expected \[tokens, classes\]"),
        (lambda: LigerJSD()(*ROWS, torch.zeros(5)), ValueError, r"shift_labels has shape \(5,\); expected \(4,\)"),
        (lambda: LigerKLDIVLoss("batchmean"), TypeError, "eps is 'batchmean'.*pass reduction=... by name"),
        (lambda: LigerKLDIVLoss(None, None, "batchmean"), TypeError, "eps is None"),
        (lambda: LigerKLDIVLoss()(ROWS[0], ROWS[1][:1]), ValueError, r"y_pred has shape \(4, 5\) and y_true \(1, 5\)"),
        (lambda: DistillKL(0.0)(*ROWS), ValueError, "temperature is 0.0; expected a positive"),
        (lambda: kd_loss(LOGITS[0], LOGITS[1], 4.0, True), ValueError, r"logit_stand=True expected \[batch, classes\]"),
        (lambda: dkd_loss(*ROWS, torch.zeros(3).long(), 1, 8, 4), ValueError, r"target \(3,\); expected"),
        (lambda: dkd_loss(*[ROWS[0][:, :1]] * 2, torch.zeros(4).long(), 1, 8, 4), ValueError, "one class: .*needs two"),
        (lambda: module(), TypeError, "alpha and beta are both None"),
        (lambda: module(alpha=0.5, focus=1), TypeError, "focus"),
        (lambda: module(alpha=0.5, reduction="none")(of(ROWS[0]), of(ROWS[1]), torch.zeros(4).long()), ValueError,
         "do not add up; leave out targets"),
        (lambda: module(alpha=0.5)(of(ROWS[0]), of(ROWS[1]), None, 1), TypeError, "positional arguments"),
    ],
)  # fmt: skip
def test_wrong_calls(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_where_no_token_counts():
    """TRL has NaN there, and Liger-Kernel 0."""
    labels = torch.full((2, 3), -100)
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = generalized_jsd_loss(logits, LOGITS[1], labels)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()
    assert LigerJSD()(*ROWS, torch.full((4,), -100)).item() == 0


def test_masked_tokens_may_hold_anything():
    labels = torch.tensor([[1, -100, 2], [-100, 0, -100]])
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    expected = generalized_jsd_loss(student, teacher, labels, temperature=2.0)
    bad = (labels == -100)[..., None]
    found = generalized_jsd_loss(
        student.masked_fill(bad, math.nan), teacher.masked_fill(bad, math.nan), labels, 0.5, 2.0
    )
    torch.testing.assert_close(found, expected)


def test_a_certain_student_leaves_dkd_finite():
    """The margin of the student is 4e4 / T: its other classes have a probability of 0 in fp32."""
    student = torch.tensor([[4e4, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, 0.0]])
    loss = dkd_loss(student, teacher, torch.tensor([0]), 1.0, 8.0, 4.0)
    # The teacher gives 1/3 to the label: KL = (2/3) 1e4 up to what does not grow, times T².
    assert loss.item() == pytest.approx(16 * (2 / 3 * 1e4), rel=1e-3)
    assert torch.autograd.grad(loss, student)[0].tolist()[0][0] == pytest.approx(4 * (1 - 1 / 3), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    """Losses are in fp32, gradients in the dtype of the logits."""
    student, teacher = (torch.randn(6, 9).to(dtype).requires_grad_() for _ in range(2))
    target = torch.zeros(6, dtype=torch.long)
    for function in (
        DistillKL(4.0), partial(kd_loss, temperature=4.0), partial(kd_loss, temperature=4.0, logit_stand=True),
        generalized_jsd_loss, lambda s, t: dkd_loss(s, t, target, 1.0, 8.0, 4.0),
        lambda s, t: LigerJSD()(s.log_softmax(1), t.log_softmax(1)),
        lambda s, t: module(alpha=0.3)(of(s), of(t)),
    ):  # fmt: skip
        loss = function(student, teacher)
        assert loss.dtype == torch.float32
        exact = function(student.detach().double(), teacher.detach().double())
        assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
        (grad,) = torch.autograd.grad(loss, student)
        assert grad.dtype == dtype


def test_compiled():
    rows = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    labels = torch.tensor([1, -100, 2, 0])

    def every(student, teacher, labels):
        kept = labels.clamp(min=0)
        return (
            generalized_jsd_loss(student, teacher, labels)
            + LigerJSD(0.3)(student.log_softmax(1), teacher.log_softmax(1), labels)
            + LigerKLDIVLoss(reduction="batchmean")(student.log_softmax(1), teacher.softmax(1))
            + DistillKL(4.0)(student, teacher)
            + dkd_loss(student, teacher, kept, 1.0, 8.0, 4.0)
            + module(alpha=0.5)(of(student), of(teacher), kept)
        )

    found, expected = torch.compile(every, backend="aot_eager", fullgraph=True)(*rows, labels), every(*rows, labels)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, rows[:1]), torch.autograd.grad(expected, rows[:1]), strict=True):
        torch.testing.assert_close(a, b)


def test_repr():
    assert repr(DistillKL(4.0)) == "DistillKL(T=4.0)"
    assert repr(LigerJSD(0.1)) == "LigerJSD(beta=0.1, ignore_index=-100)"
    assert repr(LigerKLDIVLoss(reduction="sum")) == "LigerKLDIVLoss(eps=1e-10, reduction='sum', log_target=False)"
    assert "temperature=2.0, alpha=0.3, beta=0.7, reduction='batchmean'" in repr(module(alpha=0.3))
