"""Cases of the image priors: sizes around the vector widths, layouts, norms, and images of one pixel."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels.ops._cases import Benchmark, Call, Case, FarCall, Workload, draw, layouts, one_of, register
from kdkernels.ops.total_variation import PASSES, image_prior_losses, total_variation, volumes_cases

SHAPES = ((2, 3, 5, 7), (1, 1, 1, 1), (2, 3, 1, 9), (2, 1, 9, 1), (3, 3, 40, 37), (2, 5, 17, 16), (1, 2, 3, 200))
NORMS = (("l1", 1), ("l1", 2), ("l1", 4), ("l2", 2), ("l2", 4), ("l2_squared", 2), ("l2_squared", 4), ("isotropic", 2))
REDUCTIONS = ("none", "mean", "sum")
PRIORS, VARIATION = "image_prior_losses", "total_variation"
# The regularizers of voxel grids, of displacement fields and of bilateral grids
VOLUMES: dict[str, dict[str, Any]] = {
    "l1 of volumes": {"spatial_dims": 3},
    "huber of volumes": {"spatial_dims": 3, "norm_type": "huber", "reduction": "mean", "delta": 0.1},
    "isotropic of volumes": {"spatial_dims": 3, "norm_type": "isotropic", "eps": 1e-3},
    "l2_squared of volumes, mean": {"spatial_dims": 3, "norm_type": "l2_squared", "reduction": "mean"},
}


def _differences(x: Tensor) -> tuple[Tensor, ...]:
    return (
        x[:, :, :, :-1] - x[:, :, :, 1:],
        x[:, :, :-1, :] - x[:, :, 1:, :],
        x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
        x[:, :, :-1, :-1] - x[:, :, 1:, 1:],
    )


def eager_priors(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three image priors as users write them."""
    d = [k for k in _differences(input) if k.numel()]
    zero = input.new_zeros(()) * input.sum()
    tv_l1 = sum((k.abs().mean() for k in d), zero)
    tv_l2 = sum((k.norm() for k in d), zero)
    return tv_l1, tv_l2, input.flatten(1).norm(dim=1).mean()


def eager_variation(
    input: Tensor, reduction: str = "sum", norm_type: str = "l1", directions: int = 2, eps: float = 0.0
) -> Tensor:
    """Return the total variation as users write it."""
    if norm_type == "isotropic":
        pad = torch.nn.functional.pad
        right, down = _differences(input)[:2]
        squares = pad(right, (0, 1)) ** 2 + pad(down, (0, 0, 0, 1)) ** 2 + eps
        mask = torch.ones_like(squares)
        mask[..., -1, -1] = 0
        values = (squares * mask).clamp(min=1e-30).sqrt().mul(mask).sum((1, 2, 3))
    else:
        terms = [k.abs() if norm_type == "l1" else k**2 for k in _differences(input)[:directions]]
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
    for layout in ("transposed", "sliced", "part", "offset", "channels_last"):
        for shape in ((2, 3, 8, 21), (2, 20, 5, 6)):
            of = samples(shape, lambda x, layout=layout: layouts(x)[layout])  # type: ignore[misc]
            yield Case(f"priors of {layout} {list(shape)}", image_prior_losses, eager_priors, of)
            isotropic = {"norm_type": "isotropic", "eps": 1e-3}
            ours, eager = partial(total_variation, **isotropic), partial(eager_variation, **isotropic)  # type: ignore[arg-type]
            yield Case(f"isotropic, {layout} {list(shape)}", ours, eager, of)
    yield Case("priors of large images", image_prior_losses, eager_priors, samples((4, 3, 150, 260)))


def workload(function: str, shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Workload:
    """Return a row of the benchmark: the weighted priors of images, or the total variation of images or volumes."""
    one_of(variant, ("", *VOLUMES) if function == VARIATION else ("",))
    dims = "D, H, W" if variant else "H, W"
    if len(shape) != (5 if variant else 4):
        raise ValueError(f"shape must be [B, C, {dims}], got {list(shape)}")

    def make(device: str) -> tuple[Tensor, ...]:
        return (torch.rand(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype),)

    def weights(losses: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(loss.new_tensor(weight) for loss, weight in zip(losses, (1.0, 1e-2, 1e-2), strict=True))

    passes = dict.fromkeys(("cpu", "cuda"), PASSES)
    if variant:
        options = VOLUMES[variant]
        ours, eager = partial(total_variation, **options), partial(volumes_cases.eager, **options)
        return Workload("total_variation", function, shape, dtype, variant, ours, eager, make, passes)
    if function == VARIATION:
        ours, eager = partial(total_variation, reduction="sum"), partial(eager_variation, reduction="sum")
        return Workload("total_variation", function, shape, dtype, variant, ours, eager, make, passes)
    return Workload(
        "total_variation", function, shape, dtype, variant, image_prior_losses, eager_priors, make, passes, weights
    )


def calls() -> list[Call]:
    """Return small calls in float64."""
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    last = x.contiguous(memory_format=torch.channels_last)
    calls = [
        Call("priors", image_prior_losses, (x,)),
        Call("priors, channels_last", image_prior_losses, (last,)),
        Call("one image", partial(total_variation, reduction="none"), (x[0],)),
    ]
    for i, (norm_type, directions) in enumerate(NORMS):
        options: dict[str, Any] = {"norm_type": norm_type, "directions": directions, "reduction": REDUCTIONS[i % 3]}
        options["eps"] = 0.1 if norm_type == "isotropic" else 0.0
        calls.append(Call(f"{norm_type}, {directions}", partial(total_variation, **options), ((x, last)[i % 2],)))
    return calls


BF16 = torch.bfloat16


def _tv_l1(images: Tensor) -> Tensor:
    return image_prior_losses(images)[0]


register(
    __package__,
    accuracy=cases,
    calls=calls,
    cpu_accuracy=volumes_cases.cases,
    cpu_calls=volumes_cases.calls,
    far_calls=(FarCall(_tv_l1, (2, 3, 9, 20)), FarCall(total_variation, (2, 3, 9, 20), dim=2)),
    functions=(PRIORS, VARIATION),
    workload=workload,
    # Goals for forward and backward with two CPU threads, against the default mode of torch.compile.
    benchmarks=(
        Benchmark(PRIORS, (64, 3, 128, 128), quick=True, compared=True,
                  goals={"faster than eager": 25.0, "faster than compile": 4.0}),
        Benchmark(PRIORS, (64, 3, 224, 224), quick=True, compared=True,
                  goals={"faster than eager": 35.0, "faster than compile": 2.0}),
        Benchmark(VARIATION, (64, 3, 128, 128), quick=True),
        Benchmark(PRIORS, (16, 3, 32, 32)),
        Benchmark(PRIORS, (256, 3, 32, 32)),
        Benchmark(PRIORS, (64, 3, 224, 224), BF16),
        Benchmark(VARIATION, (64, 3, 224, 224)),
        Benchmark(VARIATION, (1, 1, 160, 160, 160), variant="l1 of volumes", quick=True, compared=True),
        Benchmark(VARIATION, (1, 3, 96, 96, 96), variant="huber of volumes"),
        Benchmark(VARIATION, (1, 1, 160, 160, 160), variant="isotropic of volumes"),
        Benchmark(VARIATION, (200, 12, 8, 16, 16), variant="l2_squared of volumes, mean"),
    ),
    gpu_benchmarks=(
        Benchmark(PRIORS, (84, 3, 224, 224)),
        Benchmark(PRIORS, (448, 3, 224, 224)),
        Benchmark(VARIATION, (84, 3, 224, 224)),
        Benchmark(PRIORS, (256, 3, 32, 32)),
    ),
)  # fmt: skip
