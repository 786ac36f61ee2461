"""Modules of the losses of softmax distributions: what they compute, show and carry."""

import pytest
import torch

from kdkernels import functional, nn

PAIRED = {
    "KLDivWithLogitsLoss": (functional.kl_div_with_logits, {"reverse": True}),
    "JSDivWithLogitsLoss": (functional.js_div_with_logits, {"beta": 0.25}),
    "SkewKLDivWithLogitsLoss": (functional.skew_kl_div_with_logits, {"alpha": 0.3, "reverse": True}),
    "SoftCrossEntropyLoss": (functional.soft_cross_entropy, {}),
}
LABELLED = {
    "DistillationLoss": (functional.distillation_loss, {"kd_weight": 0.4, "ce_weight": 0.6}),
    "DecoupledDistillationLoss": (functional.decoupled_distillation_loss, {"alpha": 2.0, "beta": 3.0}),
    "NormalizedDistillationLoss": (functional.normalized_distillation_loss, {"gamma": 0.7}),
}


@pytest.fixture
def sides():
    return torch.randn(6, 10), torch.randn(6, 10), torch.tensor([0, 9, -1, 3, 3, 7]), torch.rand(6)


@pytest.mark.parametrize("name", PAIRED)
def test_modules_of_two_sides(name, sides):
    function, options = PAIRED[name]
    s, t, _, weight = sides
    options = {**options, "temperature": 2.0, "reduction": "sum"}
    module = getattr(nn, name)(**options)
    assert torch.equal(module(s, t), function(s, t, **options))
    found = module(s, t, position_weight=weight)
    assert torch.equal(found, function(s, t, position_weight=weight, **options))
    given = t.log_softmax(1)
    module = getattr(nn, name)(**options, target_type="log_probs")
    assert torch.equal(module(s, given), function(s, given, target_type="log_probs", **options))
    module = getattr(nn, name)(**options, standardize=True, dim=(1,))
    assert torch.equal(module(s, t), function(s, t, standardize=True, dim=(1,), **options))


@pytest.mark.parametrize("name", LABELLED)
def test_modules_with_labels(name, sides):
    function, options = LABELLED[name]
    s, t, labels, weight = sides
    options = {**options, "temperature": 2.0, "reduction": "none", "ignore_index": -1, "standardize": True, "dim": 1}
    module = getattr(nn, name)(**options)
    found = module(s, t, labels, position_weight=weight)
    assert torch.equal(found, function(s, t, labels, position_weight=weight, **options))


def test_modules_compute_what_they_show():
    s, t = torch.randn(6, 10), torch.randn(6, 10)
    labels = torch.randint(0, 10, (6,))
    module = nn.KLDivWithLogitsLoss(temperature=2.0, reverse=True)
    assert torch.equal(module(s, t), functional.kl_div_with_logits(s, t, temperature=2.0, reverse=True))
    assert repr(module) == "KLDivWithLogitsLoss(KL(student || teacher), temperature=2.0, reduction='mean')"
    module = nn.JSDivWithLogitsLoss(beta=0.25)
    assert torch.equal(module(s, t), functional.js_div_with_logits(s, t, beta=0.25))
    assert "JS, beta=0.25" in repr(module)
    module = nn.DistillationLoss(temperature=3.0)
    assert torch.equal(module(s, t, labels), functional.distillation_loss(s, t, labels, temperature=3.0))
    assert torch.equal(module(s, t), functional.distillation_loss(s, t, temperature=3.0))
    assert "T^2 * KL(teacher || student)" in repr(module)


def test_every_option_of_the_distillation_loss(sides):
    s, t, labels, weight = sides
    options = {
        "label_smoothing": 0.1, "class_weight": torch.rand(10), "ignore_index": -1, "ignore_index_in": "cross_entropy",
        "target_type": "probs", "divergence": "js", "beta": 0.2,
    }  # fmt: skip
    module, p = nn.DistillationLoss(**options), t.softmax(1)
    expected = functional.distillation_loss(s, p, labels, position_weight=weight, **options)
    assert torch.equal(module(s, p, labels, position_weight=weight), expected)
    with pytest.raises(ValueError, match="class_weight applies to the cross-entropy, but there are no labels"):
        module(s, p)


def test_class_weights_move_with_the_module_and_keep_their_value():
    weight = torch.rand(10, dtype=torch.float64)
    module = nn.DistillationLoss(class_weight=weight, label_smoothing=torch.tensor(0.25))
    assert dict(module.named_buffers())["class_weight"] is weight
    module.half()
    assert torch.equal(module.class_weight, weight)
    assert not module.state_dict()
    assert not nn.DistillationLoss().state_dict()


def test_learned_temperatures_are_parameters(sides):
    s, t, labels, _ = sides
    module = nn.DecoupledDistillationLoss(temperature=torch.nn.Parameter(torch.tensor(2.0)), ignore_index=-1)
    module(s, t, labels).backward()
    tau = torch.tensor(2.0, requires_grad=True)
    functional.decoupled_distillation_loss(s, t, labels, temperature=tau, ignore_index=-1).backward()
    assert torch.equal(module.temperature.grad, tau.grad)
    assert "T=2" in repr(module)


@pytest.mark.parametrize(
    ("module", "shown"),
    [
        (
            nn.SkewKLDivWithLogitsLoss(alpha=0.1),
            "KL(teacher || alpha * teacher + (1 - alpha) * student), alpha=0.1, temperature=1.0, reduction='mean'",
        ),
        (
            nn.SoftCrossEntropyLoss(dim=(2, 3), target_type="probs"),
            "temperature=1.0, dim=(2, 3), reduction='mean', target_type='probs'",
        ),
        (
            nn.KLDivWithLogitsLoss(standardize=True),
            "KL(teacher || student), temperature=1.0, reduction='mean', standardize=True",
        ),
        (
            nn.DecoupledDistillationLoss(beta=2),
            "T^2 * (alpha * TCKD + beta * NCKD), alpha=1.0, beta=2, T=4.0, ignore_index=-100, reduction='mean'",
        ),
        (
            nn.NormalizedDistillationLoss(temperature=torch.tensor(2.0)),
            "-p_y * ln(q_y) + gamma * T^2 * CE of the others, gamma=1.5, T=2, ignore_index=-100, reduction='mean'",
        ),
        (
            nn.DistillationLoss(label_smoothing=0.1, class_weight=torch.ones(3), ignore_index_in="cross_entropy"),
            "kd_weight * T^2 * KL(teacher || student) + ce_weight * CE, T=4.0, kd_weight=0.9, ce_weight=0.1 "
            "(1 and 0 without labels), ignore_index=-100, reduction='mean', label_smoothing=0.1, "
            "class_weight=tensor of shape (3,), ignore_index_in='cross_entropy'",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_modules_show_what_they_compute(module, shown):
    assert repr(module) == f"{type(module).__name__}({shown})"


def test_a_number_is_no_weight_of_the_classes():
    loss = nn.DistillationLoss(class_weight=torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(TypeError, match="cannot assign 'float' as buffer 'class_weight'"):
        loss.class_weight = 2.0
    assert loss.class_weight.tolist() == [1, 2, 3]
