"""The rows of the benchmark: which functions, shapes and dtypes, and the speed-ups that are aimed for."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from kdkernels.ops._cases import COMMON_ROWS, Workload, workload
from kdkernels.testing.comparison import MODES

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# With two threads of a CPU, forward and backward, against eager PyTorch and the default mode of torch.compile.
GOALS: dict[tuple[str, tuple[int, ...]], tuple[float, float]] = {
    ("batch_norm_stat_loss", (64, 64, 32, 32)): (6.0, 1.0),
    ("distillation_loss", (256, 1000)): (4.0, 2.5),
    ("js_div_with_logits", (256, 1000)): (4.0, 2.5),
    ("distillation_loss", (8192, 100)): (4.0, 2.5),
    ("js_div_with_logits", (8192, 100)): (4.0, 2.5),
    ("distillation_loss", (64, 32000)): (4.0, 2.5),
    ("js_div_with_logits", (64, 32000)): (4.0, 2.5),
    ("kl_div_with_logits", (8, 19, 128, 128)): (4.0, 4.0),
    ("kl_div_with_logits", (8, 19, 256, 256)): (6.0, 2.5),
    ("image_prior_losses", (64, 3, 128, 128)): (25.0, 4.0),
    ("image_prior_losses", (64, 3, 224, 224)): (35.0, 2.0),
}
LARGEST_SHARE_OF_MEMORY = 0.5
COPIES = 20  # of a large tensor that eager PyTorch, in fp32, has at once at most, truth and rivals included


@dataclass(frozen=True)
class Row:
    """A workload, the modes in which it is timed, and its goals by name."""

    workload: Workload
    modes: tuple[str, ...]
    goals: dict[str, float] = field(default_factory=dict)


def rows(full: bool) -> Iterator[Row]:
    """Yield the rows: a chosen set for some minutes, or all that this machine's memory allows."""
    shapes = [*QUICK, *(FULL if full else ())]
    for function, shape, dtype, variant in shapes:
        one = workload(function, shape, dtype, variant)
        if COPIES * 4 * one.tensor_bytes / dtype.itemsize > LARGEST_SHARE_OF_MEMORY * memory_bytes():
            continue
        goals = GOALS.get((function, shape), ()) if dtype == FP32 else ()
        named = dict(zip(("faster than eager", "faster than compile"), goals, strict=False))
        yield Row(one, MODES if full else ("full",), named)


def memory_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


QUICK = [
    *((function, shape, FP32, variant) for function, shape, variant in COMMON_ROWS),
    ("distillation_loss", (128, 100), FP32, ""),
    ("kl_div_with_logits", (256, 1000), BF16, ""),
    ("total_variation", (64, 3, 128, 128), FP32, ""),
    ("batch_norm_tap", (64, 64, 32, 32), FP32, "channels_last"),
    ("gradient_reversal", (1024, 1024), FP32, ""),
]
FULL = [
    # Overhead of a call
    ("kl_div_with_logits", (128, 100), FP32, ""),
    ("js_div_with_logits", (128, 10), FP32, ""),
    ("batch_norm_stat_loss", (32, 16, 8, 8), FP32, ""),
    ("image_prior_losses", (16, 3, 32, 32), FP32, ""),
    ("gradient_reversal", (64, 256), FP32, ""),
    # CIFAR and ImageNet classifiers, and what their inversion watches
    ("kl_div_with_logits", (256, 1000), FP32, ""),
    ("kl_div_with_logits", (8192, 100), FP32, ""),
    *(("distillation_loss", (256, 1000), dtype, "") for dtype in (BF16, FP16)),
    *(("js_div_with_logits", (256, 1000), dtype, "") for dtype in (BF16, FP16)),
    ("image_prior_losses", (256, 3, 32, 32), FP32, ""),
    ("image_prior_losses", (64, 3, 224, 224), BF16, ""),
    ("total_variation", (64, 3, 224, 224), FP32, ""),
    ("batch_norm_tap", (64, 64, 32, 32), FP32, ""),
    ("batch_norm_tap", (64, 64, 32, 32), BF16, ""),
    ("batch_norm_tap", (8, 256, 56, 56), FP32, "channels_last"),
    ("batch_norm_tap", (8, 256, 56, 56), FP32, ""),
    ("batch_norm_stat_loss", (64, 512, 7, 7), FP32, ""),
    # Cityscapes: 19 classes of every pixel
    ("kl_div_with_logits", (8, 19, 128, 128), BF16, "dim=1"),
    ("kl_div_with_logits", (1, 19, 512, 1024), FP32, "dim=1"),
    ("js_div_with_logits", (1, 19, 512, 1024), FP32, "dim=1"),
    ("distillation_loss", (1, 19, 512, 1024), FP32, "dim=1"),
    # Language models
    *((function, (256, classes), dtype, "")
      for classes in (32000, 128256, 151936)
      for function in ("kl_div_with_logits", "js_div_with_logits", "distillation_loss")
      for dtype in (FP32, BF16)),
    ("gradient_reversal", (4096, 4096), FP32, ""),
]  # fmt: skip
