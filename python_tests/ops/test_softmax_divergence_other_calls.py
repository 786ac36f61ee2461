"""How soft cross-entropy, skewed divergences, total variation distance and entropy are called, and wrong calls."""

from functools import partial

import pytest
import torch
from test_softmax_divergence_others import FORMULAS, PAIRED, every_formula

from kdkernels.functional import (
    decoupled_distillation_loss,
    entropy_with_logits,
    normalized_distillation_loss,
    skew_kl_div_with_logits,
)
from kdkernels.ops.softmax_divergence.cases import REDUCTIONS

F64 = torch.float64


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "kind",
    [
        "entropy", "decoupled", pytest.param("normalized", marks=slow), pytest.param("reverse_skew_kl", marks=slow),
        pytest.param("soft_cross_entropy", marks=slow),
    ],
)  # fmt: skip
def test_opcheck(cpu_backend, kind):
    s, t = torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 5, 3).transpose(1, 2)
    labels = torch.randint(5, (4, 3)) if kind in ("decoupled", "normalized") else None
    numbers = (torch.tensor(value, dtype=F64) for value in (2.0, 1.0, 0.5, 0.3, 0.0))
    options = (2, kind, "logits", "mean", -100, True)
    arguments = (s, t, labels, torch.rand(4, 3), None, *numbers, *options)
    torch.library.opcheck(getattr(torch.ops.kdkernels.softmax_loss, cpu_backend), (*arguments, True, "gradient"))
    backward = getattr(torch.ops.kdkernels.softmax_loss_backward, cpu_backend)
    torch.library.opcheck(backward, (torch.ones((), requires_grad=True), *arguments, True, False))


@every_formula
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(cpu_backend, name, shape, reduction):
    ours, _ = FORMULAS[name]
    s = torch.randn(shape, requires_grad=True)
    loss = ours(s, torch.randn(shape), dim=-1, reduction=reduction)
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    loss.sum().backward()
    assert loss.sum().item() == 0
    assert s.grad.shape == shape


def test_one_class(cpu_backend):
    s, t = torch.randn(3, 1), torch.randn(3, 1)
    for function in (*PAIRED, lambda s, _: entropy_with_logits(s)):
        assert function(s, t).item() == 0
        with pytest.warns(UserWarning, match="input has one class"):
            loss = function(s.clone().requires_grad_(), t)
        assert loss.item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_computed_in_32(cpu_backend, dtype):
    s, t = torch.randn(8, 40).to(dtype), torch.randn(8, 40).to(dtype)
    for function in (*PAIRED, lambda s, _: entropy_with_logits(s)):
        loss = function(s, t)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, function(s.float(), t.float()))
        assert function(s.double(), t).dtype == F64


def test_teachers_of_inference_mode():
    with torch.inference_mode():
        t = torch.randn(3, 5)
    for function in PAIRED:
        s = torch.randn(3, 5, requires_grad=True)
        function(s, t).backward()
        expected = s.grad.clone()
        s.grad = None
        function(s, t.clone()).backward()
        assert torch.equal(s.grad, expected)
        with torch.inference_mode():
            assert entropy_with_logits(t).isfinite()


@pytest.mark.parametrize("function", [*PAIRED, entropy_with_logits])
def test_wrong_calls(function):
    s, t = torch.randn(3, 5), torch.randn(3, 5)
    sides = (s,) if function is entropy_with_logits else (s, t)
    call = partial(function, *sides)
    with pytest.raises(ValueError, match=r"temperature is 0; expected a positive, finite number"):
        call(temperature=0)
    with pytest.raises(ValueError, match=r"position_weight has shape \(2,\); expected one weight per position, \(3,\)"):
        call(position_weight=torch.ones(2))
    with pytest.raises(ValueError, match="reduction is 'average'"):
        call(reduction="average")
    with pytest.raises(ValueError, match="dim is 2; expected a dimension of the 2-dimensional input"):
        call(dim=2)
    with pytest.raises(ValueError, match="dim is required"):
        function(*(x.view(1, 3, 5) for x in sides))
    with pytest.raises(TypeError, match="input must be float16"):
        function(*(x.long() for x in sides))
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        function(*([1.0] for _ in sides))
    with pytest.raises(ValueError, match="0 classes"):
        function(*(x[:, :0] for x in sides))
    if function is not entropy_with_logits:
        with pytest.raises(ValueError, match="target_type is 'softmax'"):
            call(target_type="softmax")
        with pytest.raises(ValueError, match=r"input has shape \(3, 5\) and target \(3, 4\)"):
            function(s, t[:, 1:])


@pytest.mark.parametrize("kind", ["skew_kl", "reverse_skew_kl"])
def test_a_share_that_only_the_op_can_read(cpu_backend, kind):
    """As in a compiled call with a tensor."""
    s, t, one = torch.randn(3, 5), torch.randn(3, 5), torch.ones(())
    numbers = (one, one, one, torch.tensor(1.5), torch.zeros(()))
    op = getattr(torch.ops.kdkernels.softmax_loss, cpu_backend)
    with pytest.raises((ValueError, RuntimeError), match=r"alpha must be in \[0, 1\], got 1.5"):
        op(s, t, None, None, None, *numbers, 1, kind, "logits", "mean", -100, True, False, "nothing")


def test_wrong_shares():
    s, t = torch.randn(3, 5), torch.randn(3, 5)
    for alpha in (-0.1, 1.5, torch.tensor(2.0)):
        with pytest.raises(ValueError, match=r"alpha is .*; expected a number in \[0, 1\]"):
            skew_kl_div_with_logits(s, t, alpha=alpha)
    with pytest.raises(ValueError, match="alpha requires grad, but no gradient is computed for it"):
        skew_kl_div_with_logits(s, t, alpha=torch.tensor(0.5, requires_grad=True))
    with pytest.raises(ValueError, match="sum to 3"):
        skew_kl_div_with_logits(s[:, :3], torch.ones(3, 3), target_type="probs")


@pytest.mark.parametrize("function", [decoupled_distillation_loss, normalized_distillation_loss])
def test_weights_of_every_kind(function):
    s, t, labels = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, 4, 2])
    names = ("alpha", "beta") if function is decoupled_distillation_loss else ("gamma",)
    options = dict.fromkeys((*names, "temperature"), 2.0)
    expected = function(s, t, labels, **options)
    for form in (int, torch.tensor, lambda v: torch.tensor(v, dtype=torch.bfloat16)):
        found = function(s, t, labels, **{name: form(value) for name, value in options.items()})
        torch.testing.assert_close(found, expected)
