"""Layers that are computed again in the backward, as activation checkpointing does."""

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

lock = threading.Lock()  # of none of them, because their owners may be copied and pickled


class FirstRun:
    """The first run of a layer that is computed again in the backward, and the gradients of its statistics.

    Attributes:
        layer: Number of the layer.
        mean: By which the second run is recognized.
        grads: Gradients of mean and variance, while a backward runs.
        taken: Whether the second run has taken them.

    """

    def __init__(self, recomputation: "Recomputation", layer: int, mean: Tensor) -> None:
        self.recomputation = recomputation
        self.layer = layer
        self.mean = mean
        self.grads: tuple[Tensor | None, ...] | None = None
        self.taken = False


class Recomputation:
    """The statistics of layers whose forward runs without gradients, and again in the backward.

    ``torch.utils.checkpoint`` with ``use_reentrant=True`` does so. The loss is made of the first run's statistics;
    their gradients are there when the second run comes, because the loss is computed after the network and therefore
    differentiated before it. Gradients that no second run has taken when a backward ends are an error.

    Args:
        names: Names of the layers.

    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.received: list[FirstRun] = []

    def leave(self, layer: int, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Return the statistics of a first run, such that their gradients are collected."""
        run = FirstRun(self, layer, mean.detach())  # lives as long as the graph of the loss
        with torch.enable_grad():
            return left(mean.new_zeros(()).requires_grad_(), mean, var, run)

    def receive(self, run: FirstRun, grads: tuple[Tensor | None, ...]) -> None:
        """Keep the gradients of a first run until the backward ends."""
        run.grads, run.taken = grads, False
        with lock:
            self.received.append(run)
        torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def take(self, layer: int, mean: Tensor) -> tuple[Tensor | None, ...] | None:
        """Return the gradients that the first run has got, or None if there are none."""
        with lock:
            same = [
                run
                for run in self.received
                if run.layer == layer and run.mean.device == mean.device and torch.equal(run.mean, mean.detach())
            ]
            if not same:
                return None
            # A backward goes from the last run to the first; one that was taken before is computed once more.
            run = max(same, key=lambda run: not run.taken)
            run.taken = True
            return run.grads

    def _finish(self) -> None:
        with lock:
            received, self.received = self.received, []
        for run in received:
            run.grads = None
        lost = sorted({run.layer for run in received if not run.taken})
        if lost:
            raise RuntimeError(
                f"the gradient of the statistics of {', '.join(self.names[layer] for layer in lost)} did not reach the "
                "network: these layers ran inside an autograd function, as torch.utils.checkpoint with "
                "use_reentrant=True runs them, which needs one backward() of the network's output and the loss "
                "together, inside the with block. Add both, or use use_reentrant=False"
            )


class Left(torch.autograd.Function):
    """Returns the statistics of a first run; its backward hands their gradients to the second."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, mean: Tensor, var: Tensor, run: FirstRun) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.run = run
        return mean.detach(), var.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None, None, None]:
        ctx.run.recomputation.receive(ctx.run, grads)
        return None, None, None, None


left: Callable[..., tuple[Tensor, Tensor]] = Left.apply


class Joined(torch.autograd.Function):
    """Returns an activation; its backward gives the statistics of the activation their gradients."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, mean: Tensor, var: Tensor, *grads: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad[0], *ctx.saved_tensors, None, None)


joined: Callable[..., Tensor] = Joined.apply


def in_backward() -> bool:
    """Tell whether autograd is running a backward, so that a layer that runs is computed again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def in_first_run() -> bool:
    """Tell whether the forward of an autograd function runs without gradients, as a reentrant checkpoint's does."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _APPLY:
        frame = frame.f_back
    return frame is not None


_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
