"""The memory of the softmax divergences, as sums of allocations."""

import pytest
import torch
from contract import of_cpu, of_kernels

from kdkernels.functional import distillation_loss
from kdkernels.ops.softmax_divergence import other_cases
from kdkernels.testing.comparison import peak_bytes

pytestmark = of_cpu


@of_kernels
@pytest.mark.parametrize(
    "options", [{}, {"mask": True}, {"label_smoothing": 0.1}, {"target_type": "log_probs"}], ids=str
)
def test_shifted_slices_need_no_copy(options):
    """Nothing of the size of the logits is allocated beyond the gradient of the slice and that of the whole."""
    options = dict(options)
    whole, teacher = torch.randn(4, 33, 2000, requires_grad=True), torch.randn(4, 33, 2000)
    labels = torch.randint(2000, (4, 33))[:, 1:]
    if options.pop("mask", False):
        options["position_weight"] = torch.rand(4, 32) > 0.2

    def step():
        whole.grad = None
        distillation_loss(whole[:, :-1], teacher[:, :-1], labels, dim=-1, **options).backward()

    step()
    assert peak_bytes(step) <= 2.05 * whole.numel() * 4


@of_kernels
@pytest.mark.parametrize("name", other_cases.FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_losses_allocate_the_gradient_alone(name, dtype):
    work = other_cases.workload(name, (512, 2000), dtype, "")
    student, *others = work.make("cpu")
    student.requires_grad_()

    def step():
        student.grad = None
        work.ours(student, *others).backward()

    step()
    assert peak_bytes(step) <= 1.05 * student.numel() * dtype.itemsize
