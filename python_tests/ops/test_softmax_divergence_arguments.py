"""Kinds of numbers and of tensors that the divergences accept, and those that they refuse with a remedy."""

from functools import partial

import numpy as np
import pytest
import torch

from kdkernels import nn
from kdkernels.functional import (
    distillation_loss,
    gradient_reversal,
    gradient_reversal_linear,
    js_div_with_logits,
    kl_div_with_logits,
)

# Scalars

FOUR = [
    np.float32(4), np.float64(4), np.float16(4), np.int64(4), np.uint8(4), np.array(4.0), 4, torch.tensor(4),
    torch.tensor(4, dtype=torch.int32), torch.tensor(4.0), torch.tensor(4.0, dtype=torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("value", FOUR, ids=repr)
@pytest.mark.parametrize("compiled", [False, True])
def test_numbers_of_every_kind(value, compiled):
    torch._dynamo.reset()
    s, t, labels = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, 4, 2])
    function = torch.compile(distillation_loss, backend="aot_eager", fullgraph=True) if compiled else distillation_loss
    expected = distillation_loss(s, t, labels, temperature=4.0, kd_weight=4.0, ce_weight=4.0)
    found = function(s, t, labels, temperature=value, kd_weight=value, ce_weight=value)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(nn.KLDivWithLogitsLoss(temperature=value)(s, t), kl_div_with_logits(s, t, temperature=4))


@pytest.mark.parametrize("value", [np.float32(0.5), np.float16(0.5), torch.tensor(0.5, dtype=torch.float16)], ids=repr)
def test_other_scalars_of_every_kind(value):
    s, t = torch.randn(3, 5), torch.randn(3, 5)
    assert torch.equal(js_div_with_logits(s, t, beta=value), js_div_with_logits(s, t))
    x = torch.randn(3, requires_grad=True)
    gradient_reversal(x, value).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), -0.5))


def test_squares_of_numbers_in_16_bits_do_not_overflow():
    s, t = torch.randn(3, 5), torch.randn(3, 5)
    expected = distillation_loss(s, t, temperature=300.0)
    for value in (np.float16(300), torch.tensor(300.0, dtype=torch.float16)):
        torch.testing.assert_close(distillation_loss(s, t, temperature=value), expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "got bool"), (np.bool_(True), r"got torch\.bool"), (torch.tensor(True), r"torch\.bool"),
        ("4", "got str"), (4j, "got complex"), (torch.tensor(4j), "complex64"), (np.ones(1), "got ndarray"),
        (None, "got NoneType"),
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_number_is_refused(value, text):
    with pytest.raises(TypeError, match=f"temperature must be .*number.*{text}"):
        kl_div_with_logits(torch.randn(3, 4), torch.randn(3, 4), temperature=value)


@pytest.mark.parametrize(
    "beta", [0.5, np.float32(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16)], ids=repr
)
def test_the_clamped_form_takes_one_half_of_every_kind(beta):
    s, t = torch.randn(3, 5), torch.randn(3, 5)
    expected = js_div_with_logits(s, t, legacy_clamp=True)
    assert torch.equal(js_div_with_logits(s, t, beta=beta, legacy_clamp=True), expected)
    with pytest.raises(ValueError, match=r"legacy_clamp=True is defined for beta=0\.5 only"):
        js_div_with_logits(s, t, beta=beta / 2, legacy_clamp=True)


def test_one_half_that_cannot_be_read_is_refused():
    s, t, half = torch.randn(3, 5), torch.randn(3, 5), torch.tensor(0.5)
    with pytest.raises(ValueError, match=r"beta=0\.5 only, got beta='a tensor'; leave beta out"):
        torch.func.vmap(lambda beta: js_div_with_logits(s, t, beta=beta, legacy_clamp=True))(half[None])


@pytest.mark.parametrize("weight", [0, np.float32(0), torch.tensor(0.0)], ids=repr)
def test_without_labels_a_weight_of_zero_of_every_kind_is_none(weight):
    s, t = torch.randn(3, 5), torch.randn(3, 5)
    assert torch.equal(distillation_loss(s, t, ce_weight=weight), distillation_loss(s, t))
    with pytest.raises(ValueError, match=r"ce_weight is .*, but there are no labels; pass labels or leave it out"):
        distillation_loss(s, t, ce_weight=weight + 1)


@pytest.mark.parametrize("dim", [0, np.int64(0), torch.tensor(0)], ids=repr)
def test_dimensions_of_every_kind(dim):
    s, t = torch.randn(3, 5), torch.randn(3, 5)
    torch.testing.assert_close(kl_div_with_logits(s, t, dim=dim), kl_div_with_logits(s.t(), t.t()))


@pytest.mark.parametrize("dim", [1.0, "1", (0, 1.0)], ids=repr)
def test_what_is_no_dimension_is_refused(dim):
    with pytest.raises(TypeError, match="dim must be an integer, a tuple of integers or None, got "):
        kl_div_with_logits(torch.randn(3, 5), torch.randn(3, 5), dim=dim)


def test_labels_of_another_dtype_are_refused_with_the_remedy():
    s, t = torch.randn(3, 5), torch.randn(3, 5)
    for dtype in (torch.int32, torch.uint8):
        with pytest.raises(TypeError, match=r"torch\.int64, or .*, got torch\.\w+; pass labels\.long\(\)"):
            distillation_loss(s, t, torch.tensor([0, 4, 2], dtype=dtype))
    with pytest.raises(TypeError, match=r"got torch\.complex64$"):
        distillation_loss(s, t, torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"are probabilities, of shape \(3,\); .*pass labels\.long\(\)"):
        distillation_loss(s, t, torch.tensor([0.0, 4.0, 2.0]))


# Tensors that are not plain


@pytest.mark.parametrize("argument", ["input", "target"])
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (torch.Tensor.to_sparse, r"sparse_coo; expected a dense tensor: pass {0}\.to_dense\(\)"),
        (torch.Tensor.to_sparse_csr, r"sparse_csr; expected a dense tensor: pass {0}\.to_dense\(\)"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), r"got torch\.quint8; pass {0}\.dequantize\(\)"),
        (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), r"nested tensor.*{0}\.values\(\)"),
        (lambda x: torch.nested.nested_tensor(list(x)), r"nested tensor.*{0}\.to_padded_tensor"),
        (lambda x: x.numpy(), "{0} must be a tensor, got ndarray"),
        (lambda x: x.long(), r"{0} must be float16, bfloat16, float32 or float64, got torch\.int64"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_tensors_that_are_refused(argument, make, text):
    s, t = torch.randn(3, 4), torch.randn(3, 4)
    wrong = make(s if argument == "input" else t)
    arguments = (wrong, t) if argument == "input" else (s, wrong)
    for function in (kl_div_with_logits, js_div_with_logits, distillation_loss):
        with pytest.raises(TypeError, match=text.format(argument)):
            function(*arguments)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.filterwarnings("ignore")
def test_distributed_tensors_are_refused(tmp_path):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        s, t, labels = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 3])
        for placement in (Replicate(), Shard(0)):
            shard = partial(distribute_tensor, device_mesh=mesh, placements=[placement])
            for arguments, name in (((shard(s), shard(t)), "input"), ((s, shard(t)), "target")):
                with pytest.raises(TypeError, match=rf"{name} is a DTensor.*pass {name}\.to_local\(\)"):
                    kl_div_with_logits(*arguments)
            with pytest.raises(TypeError, match=r"pass labels\.to_local\(\)"):
                distillation_loss(s, t, shard(labels))
        with pytest.raises(TypeError, match=r"pass bias\.to_local\(\)"):
            gradient_reversal_linear(s, torch.randn(2, 4), distribute_tensor(torch.randn(2), mesh, [Replicate()]))
        with pytest.raises(TypeError, match=r"pass temperature\.to_local\(\)"):
            kl_div_with_logits(s, t, temperature=distribute_tensor(torch.tensor(2.0), mesh, [Replicate()]))
    finally:
        torch.distributed.destroy_process_group()


def test_meta_tensors_give_shapes():
    s, t, labels = (x.to("meta") for x in (torch.randn(3, 4), torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)))
    s.requires_grad_()
    loss = distillation_loss(s, t, labels, reduction="none")
    assert loss.shape == (3,)
    loss.sum().backward()
    assert s.grad.shape == (3, 4)
