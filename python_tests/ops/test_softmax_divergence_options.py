"""Smoothed and soft labels, joint dimensions, the parts of a loss, and standardized logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from contract import BACKENDS

import kdkernels
from kdkernels.functional import DivergenceParts, distillation_loss, js_div_with_logits, kl_div_with_logits

F64 = torch.float64
FUNCTIONS = (kl_div_with_logits, js_div_with_logits, distillation_loss)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with kdkernels.set_backend("auto" if request.param == "native" else request.param):
        yield request.param


def rows(*shape, dtype=F64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def two_classes(ratio):
    """Logits of two classes whose first one is so many times as likely as the second."""
    return torch.tensor([[math.log(ratio), 0.0]], dtype=F64)


# Labels


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("shape", [(6, 9), (2, 40, 3), (2, 5, 3, 4)])
def test_cross_entropy_is_that_of_torch(reduction, smoothing, weighted, kind, shape):
    s, t = rows(*shape), torch.randn(*shape, dtype=F64)
    weight = torch.rand(shape[1], dtype=F64) if weighted else None
    if kind == "hard":
        labels = torch.randint(shape[1], (shape[0], *shape[2:]))
        labels.view(-1)[1] = -100
    else:
        labels = torch.randn(*shape, dtype=F64).softmax(1).requires_grad_()
    options = {"label_smoothing": smoothing, "reduction": reduction}
    ours = distillation_loss(s, t, labels, kd_weight=0, ce_weight=1, dim=1, class_weight=weight, **options)
    theirs = F.cross_entropy(s, labels, weight, **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    wanted = (s, labels) if kind == "soft" else (s,)
    for a, b in zip(*(torch.autograd.grad(x.sum(), wanted) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, F64])
def test_labels_may_have_another_dtype(dtype):
    s, t = rows(3, 20, dtype=torch.float32), torch.randn(3, 20)
    labels = torch.randn(3, 20, dtype=F64).softmax(1).to(dtype).requires_grad_()
    loss = distillation_loss(s, t, labels, kd_weight=0, ce_weight=1)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(s, labels.float())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close(labels.grad, torch.autograd.grad(expected, labels)[0])


def test_each_term_has_its_own_denominator():
    s, t, labels = rows(4, 5), rows(4, 5), torch.tensor([1, -100, 2, -100])
    kd = kl_div_with_logits(s, t)
    ce = F.cross_entropy(s, labels)
    options = {"temperature": 1.0, "kd_weight": 0.3, "ce_weight": 0.7}
    loss = distillation_loss(s, t, labels, ignore_index_in="cross_entropy", **options)
    torch.testing.assert_close(loss, 0.3 * kd + 0.7 * ce)
    kept = kl_div_with_logits(s[::2], t[::2])
    torch.testing.assert_close(distillation_loss(s, t, labels, **options), 0.3 * kept + 0.7 * ce)
    weight = torch.rand(5, dtype=F64)
    loss = distillation_loss(s, t, labels, class_weight=weight, **options)
    torch.testing.assert_close(loss, 0.3 * kept + 0.7 * F.cross_entropy(s, labels, weight))


def test_position_and_class_weights_multiply():
    s, t, labels = rows(3, 4), rows(3, 4), torch.tensor([1, 3, 0])
    position, classes = torch.rand(3, dtype=F64), torch.rand(4, dtype=F64)
    loss = distillation_loss(s, t, labels, kd_weight=0, ce_weight=1, position_weight=position, class_weight=classes)
    each = F.cross_entropy(s, labels, classes, reduction="none")
    torch.testing.assert_close(loss, (position * each).sum() / (position * classes[labels]).sum())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing is 1\.5; expected a number in \[0, 1\]"),
        ({"class_weight": torch.ones(4)}, ValueError, r"class_weight has shape \(4,\); expected one .*, \(5,\)"),
        ({"class_weight": torch.ones(5).long()}, TypeError, "class_weight must be float16"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got None"),
        ({"ignore_index_in": "neither"}, ValueError, "ignore_index_in is 'neither'; accepted are 'both'"),
        ({"target_type": "softmax"}, ValueError, "target_type is 'softmax'; accepted are 'logits'"),
        ({"standardize": True, "target_type": "probs"}, ValueError, "standardize=True needs the teacher's logits"),
    ],
    ids=str,
)
def test_options_that_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        distillation_loss(rows(2, 5), rows(2, 5), torch.tensor([1, 2]), **options)


def test_options_of_labels_need_labels():
    s, t = rows(2, 5), rows(2, 5)
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.1, but there are no labels"):
        distillation_loss(s, t, label_smoothing=0.1)
    with pytest.raises(ValueError, match="class_weight applies to the cross-entropy, but there are no labels"):
        distillation_loss(s, t, class_weight=torch.rand(5))
    with pytest.raises(ValueError, match=r"probabilities, of shape \(2,\); expected the shape of input.*labels.long"):
        distillation_loss(s, t, torch.tensor([1.0, 2.0]))


# Dimensions


def test_mistakes_in_joint_dimensions_are_told_as_they_were_made():
    s, t = rows(2, 3, 4), rows(2, 3, 4)
    for labels in (torch.tensor([[1, 2, 3]]), torch.rand(2, 12)):
        with pytest.raises(ValueError, match=r"expected \(2,\), .* without dim \(1, 2\), .* or \(2, 3, 4\) for prob"):
            distillation_loss(s, t, labels, dim=(1, 2))
    with pytest.raises(ValueError, match=r"input has 0 classes: shape \(2, 0, 4\), dim=\(1, 2\)"):
        kl_div_with_logits(s[:, :0], t[:, :0], dim=(1, -1))


def test_classes_in_several_dimensions():
    s, t = rows(2, 3, 4, 5), rows(2, 3, 4, 5)
    for dims, order in (((2, 3), (0, 1, 2, 3)), ((-1, 1), (0, 2, 3, 1)), ((3,), (0, 1, 2, 3))):
        flat = [x.permute(order).flatten(-len(dims)) for x in (s, t)]
        expected = kl_div_with_logits(*flat, dim=-1, reduction="none")
        loss = kl_div_with_logits(s, t, dim=dims, reduction="none")
        assert torch.equal(loss, expected)
    labels = torch.tensor([[0, 19, 7], [3, 4, 5]])
    loss = distillation_loss(s, t, labels, dim=(2, 3))
    torch.testing.assert_close(loss, distillation_loss(s.flatten(2), t.flatten(2), labels, dim=-1))


@pytest.mark.parametrize(
    ("dim", "text"),
    [
        ((1, 1), "names a dimension twice"),
        ((), "expected dimensions of the 3-dimensional input"),
        ((1, 3), "expected dimensions of the 3-dimensional input"),
    ],
)
def test_dimensions_that_are_refused(dim, text):
    with pytest.raises(ValueError, match=text):
        kl_div_with_logits(rows(2, 3, 4), rows(2, 3, 4), dim=dim)
    with pytest.raises(ValueError, match="divides by the size of dimension 0, which is one of the classes'"):
        kl_div_with_logits(rows(2, 3, 4), rows(2, 3, 4), dim=(0, 2), reduction="batchmean")


# Parts


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_parts_of_a_loss(reduction):
    s, t, labels = rows(3, 6), rows(3, 6), torch.tensor([1, -100, 2])
    weight = torch.tensor([2.0, 1.0, 0.5], dtype=F64)
    options = {"temperature": 2.0, "position_weight": weight, "reduction": reduction}
    parts = distillation_loss(s, t, labels, kd_weight=0.3, ce_weight=0.7, return_parts=True, **options)
    assert isinstance(parts, DivergenceParts)
    kept = torch.tensor([1.0, 0.0, 1.0], dtype=F64)
    kd = weight * kept * kl_div_with_logits(s, t, temperature=2.0, reduction="none")
    ce = weight * kept * F.cross_entropy(s, labels, reduction="none")
    if reduction == "mean":
        kd, ce = kd.sum() / 2.5, ce.sum() / 2.5
    torch.testing.assert_close(parts.divergence, kd.detach())
    torch.testing.assert_close(parts.cross_entropy, ce.detach())
    torch.testing.assert_close(parts.loss, 0.3 * 4 * kd + 0.7 * ce)
    p = (t / 2).softmax(1)
    torch.testing.assert_close(parts.input_logsumexp, kept * (s / 2).logsumexp(1).detach())
    torch.testing.assert_close(parts.target_logsumexp, kept * (t / 2).logsumexp(1).detach())
    torch.testing.assert_close(parts.target_entropy, kept * -(p * p.log()).sum(1).detach())
    assert torch.equal(parts.agreement, (s.argmax(1) == t.argmax(1)) & (kept != 0))
    expected = torch.autograd.grad((0.3 * 4 * kd + 0.7 * ce).sum(), (s, t))
    for a, b in zip(torch.autograd.grad(parts.loss.sum(), (s, t)), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert not any(part.requires_grad for part in parts[1:])


def test_parts_by_hand():
    """Odds of 3 and 1: p = (3/4, 1/4), q = (1/2, 1/2)."""
    parts = kl_div_with_logits(two_classes(1.0), two_classes(3.0), return_parts=True)
    assert parts.divergence.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-15)
    assert parts.input_logsumexp.item() == pytest.approx(math.log(2), abs=1e-15)
    assert parts.target_logsumexp.item() == pytest.approx(math.log(4), abs=1e-15)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert parts.target_entropy.item() == pytest.approx(entropy, abs=1e-15)
    assert parts.agreement.item()  # equal logits: the first class is the largest
    assert parts.cross_entropy.item() == 0


@pytest.mark.parametrize("classes", [7, 100])
@pytest.mark.parametrize("kind", ["probs", "log_probs"])
def test_parts_of_probabilities(kind, classes):
    s, p = rows(4, classes), torch.rand(4, classes, dtype=F64)
    target = p if kind == "probs" else p.log()
    parts = kl_div_with_logits(s, target, target_type=kind, return_parts=True)
    torch.testing.assert_close(parts.target_logsumexp, p.sum(1).log())
    torch.testing.assert_close(parts.target_entropy, -(p * p.log()).sum(1))
    assert torch.equal(parts.agreement, s.argmax(1) == p.argmax(1))


def test_terms_of_weight_zero_are_still_among_the_parts():
    s, t, labels = rows(3, 6), rows(3, 6), torch.tensor([1, 5, 2])
    parts = distillation_loss(s, t, labels, temperature=2.0, kd_weight=0, ce_weight=1, return_parts=True)
    torch.testing.assert_close(parts.divergence, kl_div_with_logits(s, t, temperature=2.0).detach())
    torch.testing.assert_close(parts.loss, F.cross_entropy(s, labels))
    torch.testing.assert_close(torch.autograd.grad(parts.loss, s), torch.autograd.grad(F.cross_entropy(s, labels), s))


# Standardized logits


def test_standardized_logits():
    s, t, labels = rows(4, 8), rows(4, 8), torch.tensor([0, 7, 3, 3])

    def standardized(z):
        return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7)

    kd = F.kl_div(
        (standardized(s) / 2).log_softmax(1), (standardized(t) / 2).log_softmax(1), reduction="batchmean",
        log_target=True,
    )  # fmt: skip
    torch.testing.assert_close(kl_div_with_logits(s, t, temperature=2.0, standardize=True), kd, rtol=0, atol=1e-12)
    options = {"temperature": 2.0, "kd_weight": 9.0, "ce_weight": 0.1, "standardize": True}
    expected = 9.0 * 4 * kd + 0.1 * F.cross_entropy(s, labels)
    loss = distillation_loss(s, t, labels, **options)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(*(torch.autograd.grad(x, (s, t), retain_graph=True) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b)
    parts = distillation_loss(s, t, labels, **options, return_parts=True)
    torch.testing.assert_close(parts.loss, expected)
    torch.testing.assert_close(parts.cross_entropy, F.cross_entropy(s, labels).detach())


def test_equal_logits_are_standardized_to_zero():
    s, t = torch.ones(2, 4, dtype=F64, requires_grad=True), torch.randn(2, 4, dtype=F64)
    loss = kl_div_with_logits(s, t, standardize=True)
    assert torch.autograd.grad(loss, s)[0].isfinite().all()
    with pytest.raises(ValueError, match="standardize=True needs two classes or more, but input has 1"):
        kl_div_with_logits(torch.ones(2, 1), torch.ones(2, 1), standardize=True)


@pytest.mark.parametrize("kd_only", [False, True])
@pytest.mark.parametrize("ignored_in", ["both", "cross_entropy"])
def test_standardized_positions_that_do_not_count_may_hold_nan(ignored_in, kd_only):
    s, t, labels, mask = rows(4, 8), rows(4, 8), torch.tensor([0, -100, 3, 3]), torch.tensor([True, True, True, False])
    counted = [0, 2] if ignored_in == "both" and not kd_only else [0, 1, 2]
    with torch.no_grad():
        for row in {0, 1, 2, 3} - set(counted):
            s[row], t[row] = math.nan, math.inf

    def loss(s, t, labels, mask):
        if kd_only:
            return kl_div_with_logits(s, t, standardize=True, position_weight=mask)
        options = {"standardize": True, "position_weight": mask, "ignore_index_in": ignored_in}
        return distillation_loss(s, t, labels, **options)

    found, expected = loss(s, t, labels, mask), loss(s[counted], t[counted], labels[counted], None)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(x, (s, t)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_standardized_logits_are_as_exact_as_the_loss():
    s, t = rows(3, 8), rows(3, 8, dtype=torch.float32)
    loss = kl_div_with_logits(s, t, standardize=True)
    assert loss.dtype == F64
    torch.testing.assert_close(loss, kl_div_with_logits(s, t.double(), standardize=True), rtol=1e-13, atol=0)


# Derivatives


@pytest.mark.parametrize("kind", ["logits", "log_probs", "probs"])
def test_a_learned_temperature(kind):
    s, t, temperature = rows(3, 5), torch.randn(3, 5, dtype=F64), torch.tensor(2.0, dtype=F64, requires_grad=True)
    target = {"logits": t, "log_probs": t.log_softmax(1), "probs": t.softmax(1)}[kind]
    weight = torch.tensor([1.0, 0.0, 0.5], dtype=F64)

    def loss(s, temperature):
        return distillation_loss(s, target, temperature=temperature, target_type=kind, position_weight=weight)

    assert torch.autograd.gradcheck(loss, (s, temperature))
    assert torch.autograd.gradgradcheck(loss, (s, temperature))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_labels_that_are_probabilities_have_second_derivatives(reduction):
    s, t, labels = rows(3, 5), rows(3, 5), torch.rand(3, 5, dtype=F64, requires_grad=True)

    def loss(s, t, labels):
        return distillation_loss(s, t, labels, label_smoothing=0.1, reduction=reduction)

    assert torch.autograd.gradgradcheck(loss, (s, t, labels))


def test_tensors_made_under_inference_mode():
    s = rows(3, 5)
    with torch.inference_mode():
        t, weight, labels = torch.randn(3, 5, dtype=F64), torch.rand(3), torch.rand(3, 5, dtype=F64)
        classes = torch.rand(5)
    loss = distillation_loss(s, t, labels, position_weight=weight, class_weight=classes)
    loss.backward()
    clones = [x.clone() for x in (t, labels)]
    other = distillation_loss(s, *clones, position_weight=weight.clone(), class_weight=classes.clone())
    torch.testing.assert_close(s.grad, torch.autograd.grad(other, s)[0])
