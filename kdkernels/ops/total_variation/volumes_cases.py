"""Cases of the total variation along every axis: sizes around the vector widths, layouts, norms and masks."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels.ops._cases import Call, Case, draw, layouts
from kdkernels.ops.total_variation import total_variation

NORMS = ("l1", "l2", "l2_squared", "huber", "isotropic")
REDUCTIONS = ("none", "mean", "sum")
SHAPES = ((2, 3, 4, 5, 7), (1, 12, 8, 16, 16), (2, 1, 3, 2, 40), (1, 2, 3, 5, 300), (2, 3, 1, 6, 1), (1, 1, 20, 30, 33))


def eager(
    input: Tensor,
    mask: Tensor | None = None,
    *,
    spatial_dims: int = 2,
    reduction: str = "sum",
    norm_type: str = "l1",
    eps: float = 0.0,
    axis_weight: tuple[float, ...] = (1.0, 1.0, 1.0),
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    axis_reduction: str | None = None,
    delta: float = 1.0,
) -> Tensor:
    """Return the total variation along every axis as users write it."""
    others = tuple(range(1, input.dim()))
    terms, pairs = [], []
    squares, present = torch.zeros_like(input), torch.zeros_like(input, dtype=torch.bool)
    for i in range(spatial_dims):
        axis, size = i + 2, input.shape[i + 2]
        d = input.diff(dim=axis) / spacing[i]
        keep = torch.ones_like(d, dtype=torch.bool)
        if mask is not None:
            inside = mask.expand(input.shape)
            keep = inside.narrow(axis, 0, size - 1) & inside.narrow(axis, 1, size - 1)
        d = torch.where(keep, d, 0.0)
        if norm_type == "isotropic":
            padding = (0, 0) * (spatial_dims - 1 - i) + (0, 1)
            squares = squares + axis_weight[i] * torch.nn.functional.pad(d, padding) ** 2
            present = present | torch.nn.functional.pad(keep, padding)
        term = d.abs() if norm_type == "l1" else d**2
        if norm_type == "huber":
            term = torch.nn.functional.huber_loss(d, torch.zeros_like(d), reduction="none", delta=delta)
        terms.append(axis_weight[i] * term.sum(others))
        pairs.append(keep.sum(others))
    if norm_type == "isotropic":
        values = torch.where(present, (squares + eps).clamp(min=1e-30).sqrt(), 0.0).sum(others)
    else:
        if axis_reduction is None and reduction == "mean" and norm_type != "l2":
            return sum((t.sum() / n.sum().clamp(min=1) for t, n in zip(terms, pairs, strict=True)), input.new_zeros(()))
        if axis_reduction == "mean":
            terms = [t / n.clamp(min=1) for t, n in zip(terms, pairs, strict=True)]
        values = torch.stack(terms).sum(0)
        if norm_type == "l2":
            values = values.clamp(min=1e-30).sqrt()
    return {"none": values, "mean": values.mean(), "sum": values.sum()}[reduction]


def masked(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """Return a function of a volume and its mask."""

    def call(volume: Tensor, mask: Tensor) -> Tensor:
        return function(volume, mask=mask, **options)

    return call


def _options(i: int) -> dict[str, Any]:
    norm_type = NORMS[i % len(NORMS)]
    options: dict[str, Any] = {"spatial_dims": 3, "norm_type": norm_type, "reduction": REDUCTIONS[i % 3]}
    if norm_type == "isotropic":
        options["eps"] = 0.01 * (i % 2)
    elif i % 4 == 1:
        options["axis_reduction"] = "mean"
    if norm_type == "huber":
        options["delta"] = 0.75
    if i % 2:
        options |= {"axis_weight": (0.5, 0.0 if i % 4 == 1 else 3.0, 1.25), "spacing": (2.0, 0.5, 1.0)}
    return options


def cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yield the cases: every norm with every reduction, size, layout and kind of mask."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(draw, dtype=dtype, device=device, generator=generator)

    def mask(shape: tuple[int, ...]) -> Tensor:
        return (torch.rand(shape, generator=generator) < 0.8).to(device)

    for i in range(3 * len(SHAPES)):
        shape, options = SHAPES[i % len(SHAPES)], _options(i)
        name = f"{options['norm_type']}, {options['reduction']} of {list(shape)}"
        samples = tuple((normal(shape),) for _ in range(3))
        yield Case(f"volumes, {i}: {name}", partial(total_variation, **options), partial(eager, **options), samples)
        masks = mask(shape if i % 2 else shape[2:])
        given = tuple((normal(shape), masks) for _ in range(3))
        yield Case(f"masked volumes, {i}: {name}", masked(total_variation, **options), masked(eager, **options), given)
    for i, layout in enumerate(("transposed", "sliced", "part", "offset", "channels_last")):
        for j, shape in enumerate(((2, 3, 3, 4, 21), (1, 20, 2, 5, 6))):
            options = _options(i + 2 * j)
            samples = tuple((layouts(normal(shape))[layout],) for _ in range(3))
            name = f"volumes, {layout}, {options['norm_type']}, {list(shape)}"
            yield Case(name, partial(total_variation, **options), partial(eager, **options), samples)
            given = tuple((x, mask((1, 1, *shape[2:]))) for (x,) in samples)
            yield Case(f"masked {name}", masked(total_variation, **options), masked(eager, **options), given)
    for spatial_dims, sizes in ((1, (2, 3, 50)), (2, (2, 3, 8, 21))):
        options = {
            "spatial_dims": spatial_dims,
            "norm_type": "huber",
            "reduction": "none",
            "spacing": (0.5, 2.0)[:spatial_dims],
        }
        samples = tuple((normal(sizes),) for _ in range(3))
        yield Case(
            f"huber along {spatial_dims}", partial(total_variation, **options), partial(eager, **options), samples
        )


def calls() -> list[Call]:
    """Return small calls in float64."""
    x = torch.randn(2, 2, 2, 3, 2, dtype=torch.float64)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    mask = torch.rand(2, 1, 2, 3, 2) < 0.8
    result = []
    for i in range(len(NORMS)):
        options = _options(i + 5)
        if options["norm_type"] == "isotropic":
            options["eps"] = 0.1
        result.append(
            Call(f"volumes, {options['norm_type']}", partial(total_variation, **options), ((x, last)[i % 2],))
        )
    options = {"spatial_dims": 3, "norm_type": "l2", "axis_reduction": "mean", "reduction": "none"}
    result.append(Call("masked volumes", masked(total_variation, **options), (x, mask)))
    huber = partial(total_variation, norm_type="huber", delta=0.5, spatial_dims=1)
    result.append(Call("one sequence", huber, (x[0, :, 0, :, 0],)))
    return result
