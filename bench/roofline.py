"""What this machine can do at most: bytes per second of a copy, operations per second of a matrix product."""

import torch

from kdkernels.testing.timing import Clock, HostClock, Timed, interleaved_medians

COPY_BYTES = 256 << 20
SIDE = 2048


def copy_bandwidth(clock: Clock | None = None, device: str = "cpu", size: int = COPY_BYTES) -> float:
    """Return bytes per second of a copy between tensors larger than every cache, reads and writes counted."""
    source = torch.ones(size // 4, device=device)
    destination = torch.empty_like(source)
    copy = Timed(lambda: destination.copy_(source))
    return 2 * size / interleaved_medians({"copy": copy}, clock or HostClock(), rounds=10)["copy"]


def peak_operations(clock: Clock | None = None, device: str = "cpu") -> float:
    """Return floating-point operations per second of a large product of fp32 matrices."""
    left, right = (torch.ones(SIDE, SIDE, device=device) for _ in range(2))
    result = torch.empty_like(left)
    product = Timed(lambda: torch.mm(left, right, out=result))
    return 2 * SIDE**3 / interleaved_medians({"product": product}, clock or HostClock(), rounds=10)["product"]
