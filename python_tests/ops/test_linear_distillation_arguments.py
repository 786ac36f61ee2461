"""Wrong calls of the loss of hidden states."""

import pytest
import torch

import kdkernels
from kdkernels.functional import linear_distillation_loss


def sides(*shape, classes=50):
    """Hidden states and weights of both sides."""
    sizes = (*shape, 4), (classes, 4), (*shape, 6), (classes, 6)
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


def arguments(**change):
    h, w, t, v = sides(5)
    given = {"input": h, "linear_weight": w, "target": t, "target_linear_weight": v, "labels": torch.zeros(5).long()}
    return {**given, **change}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"input": torch.zeros(5, 4).long()}, TypeError, "input must be float16"),
        ({"input": torch.tensor(1.0)}, ValueError, "input has no dimensions; expected hidden states"),
        (
            {"linear_weight": torch.randn(4, 50)},
            ValueError,
            r"linear_weight has shape \(4, 50\); expected \(classes, 4\)",
        ),
        ({"linear_weight": torch.randn(4, 50)}, ValueError, r"; pass linear_weight.t\(\)$"),
        (
            {"target_linear_weight": torch.zeros(5).long(), "labels": None},
            TypeError,
            "target_linear_weight must be floating-point, got torch.int64; pass class indices by name, as labels=",
        ),
        (
            {"target_linear_weight": None, "target": torch.randn(5, 50), "target_softcap": 30.0},
            ValueError,
            "target_softcap is 30.0, but without target_linear_weight a teacher's logits are taken as they are",
        ),
        (
            {"target_linear_weight": None, "target": torch.randn(5, 50), "target_logit_scale": 1.0},
            ValueError,
            "target_logit_scale is 1.0, but without target_linear_weight",
        ),
        ({"tail": "ignore"}, ValueError, "tail is 'ignore', but there are no target_indices"),
        ({"target_indices": torch.zeros(5, 2).long()}, ValueError, "leave target_linear_weight out"),
        ({"linear_weight": torch.randn(0, 4)}, ValueError, "linear_weight has 0 classes"),
        (
            {"linear_weight": torch.randn(60, 4)},
            ValueError,
            r"60 classes and target_linear_weight 50.*linear_weight\[:50\]",
        ),
        ({"target_linear_weight": torch.randn(60, 6)}, ValueError, r"pass target_linear_weight\[:50\]"),
        ({"linear_bias": torch.randn(4)}, ValueError, r"linear_bias has shape \(4,\); expected \(50,\)"),
        ({"target": torch.randn(4, 6)}, ValueError, r"target has shape \(4, 6\) and input \(5, 4\)"),
        ({"target": None}, ValueError, "target_linear_weight was given without target"),
        ({"target": None, "target_linear_weight": None}, ValueError, "target is None, but kd_weight is its default"),
        ({"target_linear_weight": None}, ValueError, "target has 6 classes and linear_weight 50"),
        (
            {"target_linear_weight": None, "target_linear_bias": torch.randn(50)},
            ValueError,
            "target_linear_bias was given",
        ),
        ({"target_type": "probs"}, ValueError, "target_type is 'probs', but target_linear_weight makes logits"),
        ({"target_type": "hidden"}, ValueError, "target_type is 'hidden'; accepted are 'logits'"),
        ({"labels": torch.zeros(4).long()}, ValueError, r"have shape \(4,\); expected \(5,\)"),
        ({"labels": torch.zeros(5).int()}, TypeError, r"torch.int32; pass labels.long\(\)"),
        (
            {"labels": torch.zeros(5)},
            ValueError,
            r"labels of dtype torch.float32 have shape \(5,\); expected \(5, 50\)",
        ),
        (
            {"labels": torch.tensor([0, 1, 50, 2, 3])},
            IndexError,
            r"labels\[2\] .* is 50; expected a class from 0 to 49",
        ),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0; expected a positive"),
        ({"temperature": torch.tensor(2.0, requires_grad=True)}, ValueError, "temperature requires grad"),
        ({"beta": 1.5}, ValueError, r"beta is 1.5; expected a number in \[0, 1\]"),
        ({"divergence": "kl"}, ValueError, "divergence is 'kl'; accepted are 'forward_kl'"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'"),
        ({"kd_weight": 1.0}, ValueError, "kd_weight alone was given"),
        ({"labels": None, "ce_weight": 1.0}, ValueError, "ce_weight is 1.0, but there are no labels"),
        ({"labels": None, "label_smoothing": 0.1}, ValueError, "label_smoothing is 0.1, but there are no labels"),
        ({"labels": None, "class_weight": torch.ones(50)}, ValueError, "class_weight applies to the cross-entropy"),
        ({"class_weight": torch.ones(5)}, ValueError, r"class_weight has shape \(5,\); expected one weight per class"),
        ({"position_weight": torch.ones(4)}, ValueError, "position_weight has shape"),
        ({"position_weight": -torch.ones(5)}, ValueError, r"position_weight\[0\].* is -1"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale is 0.0; expected a positive, finite number"),
        ({"logit_scale": torch.tensor(2.0)}, TypeError, r"logit_scale is a tensor; expected a number"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"memory_budget": 100}, ValueError, "memory_budget is 100 bytes; this call needs at least"),
        ({"memory_budget": "1GB"}, TypeError, "memory_budget must be an integer"),
        ({"memory_budget": 0}, ValueError, "memory_budget is 0; expected 1 or more"),
    ],
)
def test_wrong_calls(change, error, text):
    with pytest.raises(error, match=text):
        linear_distillation_loss(**arguments(**change))


def test_the_budget_in_the_message_is_enough():
    given = arguments()
    with pytest.raises(ValueError, match="needs at least") as error:
        linear_distillation_loss(**given, memory_budget=1)
    least = int(str(error.value).partition("needs at least ")[2].partition(",")[0])
    found = linear_distillation_loss(**given, memory_budget=least)
    torch.testing.assert_close(found, linear_distillation_loss(**given))
    with pytest.raises(ValueError, match="needs at least"):
        linear_distillation_loss(**given, memory_budget=least - 1)


def test_a_requested_backend_that_is_missing_raises():
    h, w, t, v = sides(5)
    with kdkernels.set_backend("triton"), pytest.raises(RuntimeError, match="'triton' was requested"):
        linear_distillation_loss(h, w, t, v)


def test_a_refused_position_of_a_later_block_is_told_with_its_place():
    h, w, *_ = sides(5)
    target = torch.softmax(torch.randn(5, 50, dtype=torch.float64), -1)
    target[4] *= 2
    options = {"target_type": "probs", "divergence": "reverse_kl", "memory_budget": 5000}
    with pytest.raises(ValueError, match=r"at position 0 .* sum to 2.*; positions are counted from 4"):
        linear_distillation_loss(h, w, target, **options)
