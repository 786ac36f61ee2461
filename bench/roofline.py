"""What this machine can move, and the least that a workload can take on it."""

import torch
from torch import Tensor

from kdkernels.timing import interleaved_medians

COPY_BYTES = 256 << 20


def copy_bandwidth() -> float:
    """Return bytes per second of a copy between tensors larger than every cache, reads and writes counted."""
    source = torch.ones(COPY_BYTES // 4)
    destination = torch.empty_like(source)
    seconds = interleaved_medians({"copy": lambda: destination.copy_(source)}, rounds=10)["copy"]
    return 2 * COPY_BYTES / seconds


def floor_seconds(tensors: tuple[Tensor, ...], wanted: list[Tensor]) -> tuple[float, float]:
    """Return the time to read the inputs and write fresh gradients, and what of it is the pages being fresh.

    Above 32 MB the C allocator maps a tensor anew each time, and the first write to each page costs a fault: so it is
    with the gradients of eager PyTorch and torch.compile.
    """
    inputs = [t.detach() for t in tensors if t.is_floating_point()]
    gradients = [t.detach() for t in wanted]
    used = [torch.empty_like(g) for g in gradients]
    times = interleaved_medians(
        {
            "read": lambda: [t.sum() for t in inputs],
            "fresh": lambda: [torch.full_like(g, 1.0) for g in gradients],
            "again": lambda: [u.fill_(1.0) for u in used],
        },
        rounds=15,
    )
    return times["read"] + times["fresh"], max(times["fresh"] - times["again"], 0.0)
