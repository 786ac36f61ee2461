"""A forward and a backward of each op, for profilers: python -m bench.gpu.small_calls [--large]."""

import sys
from collections.abc import Callable, Iterator

import torch

import kdkernels
from kdkernels.functional import (
    batch_norm_stat_loss,
    batch_norm_tap,
    distillation_loss,
    gradient_reversal,
    image_prior_losses,
    js_div_with_logits,
    kl_div_with_logits,
    total_variation,
)


def calls(large: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield calls whose sizes leave a tail in every vector, or two that fill a GPU."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).cuda().requires_grad_()

    if large:
        student, teacher = leaf(4096, 32000), leaf(4096, 32000)
        yield "kl_div_with_logits", lambda: kl_div_with_logits(student, teacher.detach())
        return
    student, teacher = leaf(7, 1001), leaf(7, 1001)
    labels = torch.randint(0, 1001, (7,), generator=generator).cuda()
    maps = leaf(2, 19, 5, 7)
    features, running = leaf(3, 5, 7, 9), leaf(5).detach()
    images = leaf(2, 3, 13, 37)
    yield "distillation_loss", lambda: distillation_loss(student, teacher, labels)
    yield "js_div_with_logits", lambda: js_div_with_logits(student, teacher)
    yield "kl_div_with_logits, dim=1", lambda: kl_div_with_logits(maps, maps.detach().flip(0), dim=1)
    yield "batch_norm_stat_loss", lambda: batch_norm_stat_loss(features, running, running.abs())
    yield "batch_norm_tap", lambda: sum(x.square().sum() for x in batch_norm_tap(features))
    yield "image_prior_losses", lambda: sum(image_prior_losses(images))
    yield "total_variation", lambda: total_variation(images, norm_type="isotropic", eps=1e-3)
    yield "gradient_reversal", lambda: gradient_reversal(features, 0.5).sum()


def main() -> None:
    with kdkernels.set_backend("native"):
        for name, call in calls("--large" in sys.argv):
            call().backward()
            torch.cuda.synchronize()
            print(f"done: {name}", flush=True)


if __name__ == "__main__":
    main()
