"""Image grids in true colour, and loss curves. Where a package is missing, its pictures are left out."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels._files import atomic_file

PACKAGES = {"PIL": "pillow", "matplotlib": "matplotlib"}
ROWS, COLUMNS = 16, 16
SMALLEST = 48  # screen pixels of an image's shorter side, if it is enlarged
CAPTION = 12  # screen pixels


def report_missing_packages() -> None:
    """Say once which pictures will be left out, and how to get them."""
    missing = [package for module, package in PACKAGES.items() if not _is_installed(module)]
    if missing:
        names = " and ".join(missing)
        print(
            f"Some pictures will be left out: {names} cannot be imported; run `pip install {' '.join(missing)}`.",
            file=sys.stderr,
        )


def _is_installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def to_pixels(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Undo the normalization of images [B, C, H, W]; return 8-bit pixels.

    Images are not stretched one by one, so brightness is comparable between them. Without a normalization, images are
    assumed to be in [0, 1].
    """
    images = images.detach().float().cpu()
    if mean is not None and std is not None:
        m, s = (torch.tensor(list(values)).view(1, -1, 1, 1) for values in (mean, std))
        images = images * s + m
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def arranged(labels: Tensor, columns: int) -> list[tuple[int, int, int]]:
    """Choose images for a grid and arrange them by class; return the index, column and row of each.

    Every class has the same share of the grid. If there are few classes, each begins a row.
    """
    members = [(labels == label).nonzero().flatten().tolist() for label in labels.unique().tolist()]
    if len(members) > ROWS:
        share = max(1, columns * ROWS // len(members))
        shown = [index for of_class in members for index in of_class[:share]][: columns * ROWS]
        return [(index, place % columns, place // columns) for place, index in enumerate(shown)]
    placed, row = [], 0
    for of_class in members:
        shown = of_class[: columns * (ROWS // len(members))]
        placed += [(index, place % columns, row + place // columns) for place, index in enumerate(shown)]
        row = placed[-1][2] + 1
    return placed


def save_grid(
    path: str | os.PathLike[str],
    images: Tensor,
    labels: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> None:
    """Write images side by side as a PNG, sorted by class, each below the number of its class.

    Small images are enlarged. An image of one or three channels is shown in grey or in colour; of any other number,
    as its channels in grey from left to right. Of many images, the same number of each class is shown.

    Args:
        path: Output file.
        images: Normalized images [B, C, H, W].
        labels: Classes [B].
        mean: Mean of each channel in the normalization to undo.
        std: Standard deviation of each channel in the normalization to undo.

    """
    if not _is_installed("PIL"):
        return
    from PIL import Image, ImageDraw

    strip = images.shape[1] if images.shape[1] not in (1, 3) else 1
    placed = arranged(labels.cpu(), max(1, COLUMNS // strip))
    pixels = to_pixels(images[[index for index, _, _ in placed]], mean, std)
    if strip > 1:
        gap = (0, 1)  # on the right
        pixels = torch.cat([F.pad(channel, gap, value=255) for channel in pixels.split(1, 1)], 3)[..., :-1]
    _, _, height, width = pixels.shape
    scale = max(1, round(SMALLEST / min(images.shape[2:])))
    between = 2 if strip == 1 else 3 * scale  # more than between the channels of an image
    right, down = width * scale + between, height * scale + CAPTION + 2
    columns, rows = (max(place[axis] for place in placed) + 1 for axis in (1, 2))
    grid = Image.new("RGB", (columns * right - between, rows * down - 2), "white")
    text = ImageDraw.Draw(grid)
    for image, (index, column, row) in zip(pixels, placed, strict=True):
        corner = column * right, row * down
        text.text(corner, str(int(labels[index])), fill="black")
        tile = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
        tile = tile.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        grid.paste(tile, (corner[0], corner[1] + CAPTION))
    with atomic_file(path) as file:
        grid.save(file, format="PNG")


def save_curves(path: str | os.PathLike[str], panels: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str) -> None:
    """Write curves as a PNG: one panel per entry, one line per series."""
    if not _is_installed("matplotlib"):
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, values in series.items():
            axes.plot(range(1, len(values) + 1), values, label=label, linewidth=1.2)
        axes.set_title(title)
        axes.set_xlabel(xlabel)
        if all(value > 0 for values in series.values() for value in values):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_file(path) as file:
        figure.savefig(file, dpi=110, format="png")
