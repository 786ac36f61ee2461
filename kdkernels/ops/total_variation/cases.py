"""Cases of the image priors: sizes around the vector widths, layouts, norms, and images of one pixel."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels.functional import image_prior_losses, total_variation
from kdkernels.ops._cases import Case, Workload, draw, layouts, one_of

SHAPES = ((2, 3, 5, 7), (1, 1, 1, 1), (2, 3, 1, 9), (2, 1, 9, 1), (3, 3, 40, 37), (2, 5, 17, 16), (1, 2, 3, 200))
NORMS = (("l1", 1), ("l1", 2), ("l1", 4), ("l2", 2), ("l2", 4), ("l2_squared", 2), ("l2_squared", 4), ("isotropic", 2))
REDUCTIONS = ("none", "mean", "sum")
WORKLOADS = ("image_prior_losses", "total_variation")


def _differences(x: Tensor) -> tuple[Tensor, ...]:
    return (
        x[:, :, :, :-1] - x[:, :, :, 1:],
        x[:, :, :-1, :] - x[:, :, 1:, :],
        x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
        x[:, :, :-1, :-1] - x[:, :, 1:, 1:],
    )


def eager_priors(img: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three image priors as users write them."""
    d = [k for k in _differences(img) if k.numel()]
    zero = img.new_zeros(()) * img.sum()
    tv_l1 = sum((k.abs().mean() for k in d), zero)
    tv_l2 = sum((k.norm() for k in d), zero)
    return tv_l1, tv_l2, img.flatten(1).norm(dim=1).mean()


def eager_variation(
    img: Tensor, reduction: str = "sum", norm_type: str = "l1", directions: int = 2, eps: float = 0.0
) -> Tensor:
    """Return the total variation as users write it."""
    if norm_type == "isotropic":
        pad = torch.nn.functional.pad
        right, down = _differences(img)[:2]
        squares = pad(right, (0, 1)) ** 2 + pad(down, (0, 0, 0, 1)) ** 2 + eps
        mask = torch.ones_like(squares)
        mask[..., -1, -1] = 0
        values = (squares * mask).clamp(min=1e-30).sqrt().mul(mask).sum((1, 2, 3))
    else:
        terms = [k.abs() if norm_type == "l1" else k**2 for k in _differences(img)[:directions]]
        if reduction == "mean" and norm_type != "l2":
            return torch.stack([k.mean() if k.numel() else k.sum() for k in terms]).sum()
        values = torch.stack([k.sum((1, 2, 3)) for k in terms]).sum(0)
        if norm_type == "l2":
            values = values.sqrt()
    return {"none": values, "mean": values.mean(), "sum": values.sum()}[reduction]


def cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yield the cases: every size, layout, norm and reduction at least once."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(draw, dtype=dtype, device=device, generator=generator)

    def samples(shape: tuple[int, ...], change: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[tuple[Tensor], ...]:
        return tuple((change(normal(shape)),) for _ in range(3))

    for shape in SHAPES:
        yield Case(f"priors of {list(shape)}", image_prior_losses, eager_priors, samples(shape))
    for i, (norm_type, directions) in enumerate(NORMS):
        for j, reduction in enumerate(REDUCTIONS):
            options: dict[str, Any] = {"reduction": reduction, "norm_type": norm_type, "directions": directions}
            if norm_type == "isotropic":
                options["eps"] = 0.01 * j
            ours, eager = partial(total_variation, **options), partial(eager_variation, **options)
            shape = [s for s in SHAPES if s[2] > 1 and s[3] > 1][(i + j) % 4]
            yield Case(f"{norm_type} in {directions} directions, {reduction}", ours, eager, samples(shape))
    for layout in ("transposed", "sliced", "offset", "channels_last"):
        for shape in ((2, 3, 8, 21), (2, 20, 5, 6)):
            of = samples(shape, lambda x, layout=layout: layouts(x)[layout])  # type: ignore[misc]
            yield Case(f"priors of {layout} {list(shape)}", image_prior_losses, eager_priors, of)
            isotropic = {"norm_type": "isotropic", "eps": 1e-3}
            ours, eager = partial(total_variation, **isotropic), partial(eager_variation, **isotropic)  # type: ignore[arg-type]
            yield Case(f"isotropic, {layout} {list(shape)}", ours, eager, of)
    yield Case("priors of large images", image_prior_losses, eager_priors, samples((4, 3, 150, 260)))


def workload(function: str, shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Workload:
    """Return a row of the benchmark: the weighted priors of images, or their anisotropic total variation."""
    one_of(variant, ("",))
    if len(shape) != 4:
        raise ValueError(f"shape must be [B, C, H, W], got {list(shape)}")

    def make(device: str) -> tuple[Tensor, ...]:
        return (torch.rand(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype),)

    def weights(losses: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(loss.new_tensor(weight) for loss, weight in zip(losses, (1.0, 1e-2, 1e-2), strict=True))

    passes = {"cpu": (1, 2), "cuda": (1, 2)}
    if function == "total_variation":
        ours, eager = partial(total_variation, reduction="sum"), partial(eager_variation, reduction="sum")
        return Workload("total_variation", function, shape, dtype, variant, ours, eager, make, passes)
    return Workload(
        "total_variation", function, shape, dtype, variant, image_prior_losses, eager_priors, make, passes, weights
    )
