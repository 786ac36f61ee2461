"""Image grids in true colour, and loss curves."""

import os
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

MISSING = 'pictures need pillow and matplotlib, which are not installed; run `pip install "kdkernels[demo]"`'


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


def save_grid(
    path: str | os.PathLike[str],
    images: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    columns: int = 16,
    scale: int = 1,
) -> None:
    """Write images [B, C, H, W] with one or three channels side by side as a PNG.

    Args:
        path: Output file.
        images: Normalized images.
        mean: Mean of each channel in the normalization to undo.
        std: Standard deviation of each channel in the normalization to undo.
        columns: Images per row.
        scale: Screen pixels per pixel.

    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(MISSING) from error
    pixels = to_pixels(images, mean, std)
    count, channels, height, width = pixels.shape
    if channels not in (1, 3):
        pixels, channels = pixels[:, :1], 1
    columns = min(columns, count)
    rows = ceil(count / columns)
    grid = torch.full((channels, rows * (height + 1) - 1, columns * (width + 1) - 1), 255, dtype=torch.uint8)
    for index, image in enumerate(pixels):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        grid[:, top : top + height, left : left + width] = image
    array = grid.permute(1, 2, 0).squeeze(2).numpy() if channels == 1 else grid.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def save_curves(path: str | os.PathLike[str], panels: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str) -> None:
    """Write curves as a PNG: one panel per entry, one line per series."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(MISSING) from error
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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
