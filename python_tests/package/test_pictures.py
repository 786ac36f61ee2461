"""Image grids and curves."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from kdkernels.cli._pictures import CAPTION, arranged, report_missing_packages, save_curves, save_grid, to_pixels


def read(path):
    return np.asarray(Image.open(path)).astype(int)


def tile(grid, column, row, width, height, scale):
    """Return the pixels of an image in a grid, each once."""
    left, top = column * (width * scale + 2), row * (height * scale + CAPTION + 2) + CAPTION
    return grid[top : top + height * scale : scale, left : left + width * scale : scale]


def test_normalization_is_undone():
    images = torch.tensor([[[[-1.0, 0.0]], [[2.0, 9.0]]]])
    pixels = to_pixels(images, mean=[0.5, 0.4], std=[0.5, 0.1])
    assert pixels.flatten().tolist() == [0, 128, 153, 255]  # 0.5 * 255 is rounded to even
    assert to_pixels(images, None, None).flatten().tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_grids_are_sorted_by_class_in_true_colour(tmp_path, channels):
    images = torch.rand(5, channels, 6, 4)
    labels = torch.tensor([7, 2, 7, 2, 2])
    save_grid(tmp_path / "grid.png", images, labels)
    grid, scale = read(tmp_path / "grid.png"), 12
    assert grid.shape == (2 * (6 * scale + CAPTION + 2) - 2, 3 * (4 * scale + 2) - 2, 3)
    for index, column, row in ((1, 0, 0), (3, 1, 0), (4, 2, 0), (0, 0, 1), (2, 1, 1)):
        expected = to_pixels(images, None, None)[index].expand(3, -1, -1).permute(1, 2, 0)
        assert (tile(grid, column, row, 4, 6, scale) == expected.numpy()).all()
    # The class is written above each image, and nothing above a free place.
    heading = grid[:CAPTION, : 4 * scale]
    assert heading.min() < 100
    assert grid[6 * scale + CAPTION + 2 :, 2 * (4 * scale + 2) :].min() == 255


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_every_channel_is_shown(tmp_path, channels):
    images = torch.rand(1, channels, 48, 48)
    save_grid(tmp_path / "grid.png", images, torch.tensor([3]))
    grid = read(tmp_path / "grid.png")
    pixels = to_pixels(images, None, None)[0]
    assert grid.shape == (48 + CAPTION, 49 * channels - 1, 3)
    for channel in range(channels):
        shown = grid[CAPTION:, 49 * channel : 49 * channel + 48]
        assert (shown == pixels[channel, :, :, None].numpy()).all()


def test_classes_share_a_grid():
    few = arranged(torch.arange(400) % 10, 16)
    assert len(few) == 160
    assert all(index % 10 == row for index, _, row in few)
    one = arranged(torch.full((300,), 4), 16)
    assert [index for index, _, _ in one] == list(range(256))
    many = arranged(torch.arange(600) % 100, 16)
    assert [index % 100 for index, _, _ in many] == [label for label in range(100) for _ in range(2)]
    most = arranged(torch.arange(1000), 16)
    assert [index for index, _, _ in most] == list(range(256))
    assert most[-1] == (255, 15, 15)


def test_a_missing_package_costs_its_pictures(tmp_path, monkeypatch, capsys):
    images, labels, curves = torch.rand(1, 1, 8, 8), torch.tensor([3]), {"loss": {"all": [2.0, 1.0]}}

    def written():
        save_grid(tmp_path / "grid.png", images, labels)
        save_curves(tmp_path / "curves.png", curves, "epoch")
        names = {path.name for path in tmp_path.iterdir()}
        for name in names:
            (tmp_path / name).unlink()
        return names

    report_missing_packages()
    assert capsys.readouterr().err == ""
    assert written() == {"grid.png", "curves.png"}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report_missing_packages()
    assert capsys.readouterr().err == (
        "Some pictures will be left out: matplotlib cannot be imported; run `pip install matplotlib`.\n"
    )
    assert written() == {"grid.png"}
    monkeypatch.setitem(sys.modules, "PIL", None)
    report_missing_packages()
    assert "pillow and matplotlib cannot be imported; run `pip install pillow matplotlib`" in capsys.readouterr().err
    assert written() == set()
