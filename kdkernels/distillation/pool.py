"""Synthesized images and their labels, kept for training."""

import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class ImagePool:
    """Batches of synthesized images, in memory and optionally in files.

    Every batch is one safetensors file, written atomically when it is added. A pool on an existing folder loads its
    batches.

    Args:
        folder: Folder of the batches; by default they are kept in memory only.

    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._batches: list[tuple[Tensor, Tensor]] = []
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            while (path := self._path(len(self._batches))).is_file():
                self._batches.append(_read(path))

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"batch_{index:05d}.safetensors"

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Add a batch of images [B, C, H, W] and labels [B]."""
        images, labels = images.detach().cpu(), labels.detach().cpu()
        if self.folder is not None:
            _write(self._path(len(self._batches)), images, labels)
        self._batches.append((images, labels))

    @property
    def images(self) -> Tensor:
        """All images [N, C, H, W]."""
        return torch.cat([images for images, _ in self._batches])

    @property
    def labels(self) -> Tensor:
        """All labels [N]."""
        return torch.cat([labels for _, labels in self._batches])

    def loader(self, batch_size: int, *, labels: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        """Return a loader of shuffled images, with or without their labels."""
        tensors = (self.images, self.labels) if labels else (self.images,)
        return DataLoader(TensorDataset(*tensors), batch_size=batch_size, shuffle=True)


def _write(path: Path, images: Tensor, labels: Tensor) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            'an ImagePool in a folder needs safetensors, which is not installed; run `pip install "kdkernels[demo]"`'
        ) from error
    temporary = path.with_name(path.name + ".partial")
    save_file({"images": images.contiguous(), "labels": labels.contiguous()}, temporary)
    os.replace(temporary, path)


def _read(path: Path) -> tuple[Tensor, Tensor]:
    from safetensors.torch import load_file

    tensors = load_file(path)
    return tensors["images"], tensors["labels"]
