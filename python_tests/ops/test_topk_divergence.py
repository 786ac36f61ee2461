"""The divergence from a teacher of whom only the likeliest classes are known: the contract, layouts and dtypes."""

import pytest
import torch
from contract import OpContract, of_cpu
from extended import topk_divergence
from hypothesis import given
from hypothesis import strategies as st

import kdkernels
from kdkernels.functional import topk_kl_div_with_logits, topk_teacher
from kdkernels.ops._cases import layouts

F64 = torch.float64
TAILS = ("bucket", "renormalize", "ignore")


class TestTopKDivergence(OpContract):
    op = "topk_divergence"

    @classmethod
    def op_samples(cls):
        x = torch.randn(4, 3, 10)
        options = [("bucket", False, "mean"), ("renormalize", True, "none"), ("ignore", False, "sum")]
        options += [("bucket", True, "batchmean"), ("ignore", True, "none"), ("renormalize", False, "mean")]
        inputs = [x, x.transpose(0, 1), x[..., ::2], x[0, 0], x[:0], x.bfloat16()]
        for i, (input, given_) in enumerate(zip(inputs, options, strict=True)):
            shape = (*input.shape[:-1], 2)
            indices = torch.tensor([4, 1]).expand(shape).clone()
            weight = torch.rand(input.shape[:-1]) if i % 2 else None
            for grad in (True, False):
                input = input.detach().requires_grad_(grad)
                values = torch.randn(shape).log_softmax(-1).sub(0.5).requires_grad_(grad)
                arguments = (input, values, indices, weight, torch.tensor(2.0, dtype=F64), *given_)
                yield "topk_divergence", (*arguments, bool(i % 3))
                plain = (a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
                with kdkernels.set_backend(cls.backends()[0]):
                    backend = getattr(torch.ops.kdkernels.topk_divergence, cls.backends()[0])
                loss, _, _, rest = backend(*plain, False)
                incoming = torch.randn_like(loss).requires_grad_(grad)
                for wanted in ((True, True), (True, False), (False, True)):
                    yield "topk_divergence_backward", (incoming, rest, *arguments, *wanted)

    @classmethod
    def extended(cls, case, arrays, cotangents):
        options = dict(case.function.keywords)
        names = options.pop("names", ())
        more = dict(zip(names, arrays[3:], strict=True))
        loss, *gradients = topk_divergence(*arrays[:3], cotangents[0], **more, **options)
        return [loss, *(gradients[{0: 0, 1: 1, 3: 2}[i]] for i in case.differentiable)]

    def test_inductor(self):
        for call in (self.calls()[0], self.calls()[6]):
            self._check_compiled(call, "inductor", None)


def both(function, *tensors):
    """Return a loss and its gradients by the given tensors."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


# Layouts and dtypes


def test_shifted_slices_are_read_where_they_lie():
    """Logits of a language model without their last position: neither they nor their gradient are copied."""
    logits = torch.randn(2, 6, 50, requires_grad=True)
    values, indices = topk_teacher(torch.randn(2, 6, 50), 4)
    shifted = logits[:, :-1]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = topk_kl_div_with_logits(shifted, values[:, 1:], indices[:, 1:])
    assert logits.data_ptr() in {t.data_ptr() for t in saved}
    loss.backward()
    plain, grad = both(
        lambda s: topk_kl_div_with_logits(s, values[:, 1:].clone(), indices[:, 1:].clone()), shifted.contiguous()
    )
    assert torch.equal(loss, plain)
    assert torch.equal(logits.grad[:, :-1], grad)
    assert not logits.grad[:, -1].any()


@of_cpu
def test_memory_beyond_the_gradient():
    """K numbers per position or fewer, forward and backward."""
    rows, classes, k = 16, 4000, 10
    student = torch.randn(rows, classes, requires_grad=True)
    values, indices = topk_teacher(torch.randn(rows, classes), k)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        topk_kl_div_with_logits(student, values, indices, temperature=2.0).backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.function_events)
    gradient = 4 * student.grad.numel()
    assert gradient <= allocated <= gradient + 4 * rows * k


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_dtypes_of_the_results(dtype, backend):
    student = torch.randn(3, 20).to(dtype).requires_grad_()
    values, indices = topk_teacher(torch.randn(3, 20), 4)
    values = values.to(dtype).requires_grad_()
    result = topk_kl_div_with_logits(student, values, indices.int(), return_masses=True)
    expected = F64 if dtype == F64 else torch.float32
    assert [t.dtype for t in result] == [expected] * 3
    assert (result.target_mass.shape, result.input_mass.shape) == ((3,), (3,))
    by_input, by_values = torch.autograd.grad(result.loss, (student, values))
    assert (by_input.dtype, by_values.dtype) == (dtype, dtype)
    p, q = values.double().exp(), student.double().softmax(-1).gather(-1, indices)
    torch.testing.assert_close(result.target_mass.double(), p.sum(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(result.input_mass.double(), q.sum(-1), rtol=1e-6, atol=0)
    assert not result.target_mass.requires_grad
    assert not result.input_mass.requires_grad


@given(
    positions=st.sampled_from([(), (1,), (7,), (2, 3), (0,), (2, 1, 3)]),
    classes=st.sampled_from([1, 2, 3, 10, 33, 257, 1000]),
    share=st.floats(0, 1),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "offset"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, F64]),
    tail=st.sampled_from(TAILS),
    reverse=st.booleans(),
    masked=st.booleans(),
    reduction=st.sampled_from(["none", "mean", "sum", "batchmean"]),
    seed=st.integers(0, 2**16),
)
def test_any_combination(positions, classes, share, layout, dtype, tail, reverse, masked, reduction, seed):
    generator = torch.Generator().manual_seed(seed)
    k = max(1, round(share * classes))
    logits = torch.randn((*positions, classes), generator=generator, dtype=F64).mul(2).to(dtype)
    student = layouts(logits)[layout] if logits.dim() > 1 else logits
    values, indices = topk_teacher(torch.randn((*positions, classes), generator=generator, dtype=F64), k)
    padding = torch.rand(values.shape, generator=generator) < 0.2
    values = values.masked_fill(padding, -torch.inf).to(dtype)
    indices = indices.masked_fill(padding, 10**9)
    weight = torch.rand(positions, generator=generator) if masked else None
    if weight is not None and weight.numel() > 1:
        weight.view(-1)[0] = 0.0
        student = student.clone(memory_format=torch.preserve_format)
        student[(0,) * len(positions)] = torch.nan
    options = {"temperature": 1.5, "tail": tail, "reverse": reverse, "reduction": reduction, "return_masses": True}

    def results(s, v, w):
        leaves = s.detach().requires_grad_(), v.detach().requires_grad_()
        out = topk_kl_div_with_logits(*leaves, indices, position_weight=w, **options)
        return *out, *torch.autograd.grad(out.loss.sum(), leaves)

    found = results(student, values, weight)
    with kdkernels.set_backend("reference"):
        truth = results(student.double(), values.double(), None if weight is None else weight.double())
    for i, (a, b) in enumerate(zip(found, truth, strict=True)):
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(a.dtype, 2e-4 if i == 0 else 1e-4)
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite)
        scale = b[finite].abs().max().item() if finite.any() else 0.0
        torch.testing.assert_close(
            a.double(), b.double(), rtol=tolerance, atol=tolerance * max(scale, 1e-3), equal_nan=True
        )


def test_bfloat16_student_equals_its_float32_copy():
    student = torch.randn(4, 3, 1000).bfloat16()
    values, indices = topk_teacher(torch.randn(4, 3, 1000), 16)
    assert torch.equal(
        topk_kl_div_with_logits(student, values, indices, reduction="none"),
        topk_kl_div_with_logits(student.float(), values, indices, reduction="none"),
    )
