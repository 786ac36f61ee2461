"""The limit of this machine: the bandwidth of a copy."""

import torch

from kdkernels.testing.timing import Clock, HostClock, Timed, interleaved_medians


def copy_bandwidth(clock: Clock | None = None, device: str = "cpu", size: int = 256 << 20) -> float:
    """Return the bytes per second of a copy between tensors larger than every cache, counting reads and writes."""
    source = torch.ones(size // 4, device=device)
    destination = torch.empty_like(source)
    copy = Timed(lambda: destination.copy_(source))
    return 2 * size / interleaved_medians({"copy": copy}, clock or HostClock(), rounds=10)["copy"]
