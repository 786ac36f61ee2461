"""A step of the loop as a CUDA graph, which the host launches at once."""

import warnings
from collections.abc import Callable

import torch

WARM_UP = 3  # iterations; libraries choose their kernels in the first ones, and the optimizer makes its state


class CudaGraph:
    """The kernels of a step, recorded once and replayed on the same memory.

    Args:
        device: Device of the step.

    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graph = torch.cuda.CUDAGraph()
        self.stream = torch.cuda.Stream(device)

    def warm_up(self, step: Callable[[], None]) -> None:
        """Take a step on a stream of its own, as the capture demands of what comes before it."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            step()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def capture(self, step: Callable[[], None]) -> None:
        """Record a step without taking it."""
        with torch.cuda.device(self.device), torch.cuda.graph(self.graph, stream=self.stream):
            step()

    def replay(self) -> None:
        """Take a step."""
        self.graph.replay()


class GraphedStep:
    """A step that is taken as it is for some iterations, then captured, and replayed from there on.

    The step reads and writes tensors of the device alone, always the same ones.

    Args:
        graph: Graph to capture it in.
        required: Whether a step that cannot be captured raises; otherwise it is taken as it is, with a warning.

    """

    def __init__(self, graph: CudaGraph, *, required: bool) -> None:
        self.graph, self.required = graph, required
        self.done = 0
        self.captured: bool | None = None  # until it was tried

    def __call__(self, step: Callable[[], None]) -> None:
        """Take a step, which is the same function each time."""
        if self.done < WARM_UP:
            self.graph.warm_up(step)
            self.done += 1
            return
        if self.captured is None:
            self.captured = self._capture(step)
        if self.captured:
            self.graph.replay()
        else:
            step()

    def _capture(self, step: Callable[[], None]) -> bool:
        try:
            self.graph.capture(step)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            if self.required:
                raise RuntimeError(
                    f"the step cannot be captured in a CUDA graph ({reason}); use cuda_graph=False, or remove from the "
                    "networks what waits for the device, such as .item()"
                ) from error
            warnings.warn(
                f"the synthesis runs without a CUDA graph, because the step cannot be captured ({reason}); "
                "cuda_graph=False silences this",
                stacklevel=2,
            )
            return False
        return True
