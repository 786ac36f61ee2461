"""The benchmark's rows as functions without arguments: forward and backward, gradients made anew."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kdkernels.cases import Workload


def forward_and_backward(function: Callable[..., object], tensors: tuple[Tensor, ...], wanted: list[Tensor]) -> None:
    for tensor in wanted:
        tensor.grad = None
    result = function(*tensors)
    loss = sum(result) if isinstance(result, tuple) else result
    loss.backward()


def runnable(workload: Workload) -> dict[str, Callable[[], None]]:
    """Return kdkernels, eager PyTorch and torch.compile on the same tensors."""
    tensors = workload.make()
    wanted = [tensors[i].requires_grad_() for i in workload.differentiable]
    torch._dynamo.reset()
    functions = {
        "kdkernels": workload.function,
        "eager": workload.eager,
        "compile": torch.compile(workload.eager),
    }
    return {name: partial(forward_and_backward, f, tensors, wanted) for name, f in functions.items()}
