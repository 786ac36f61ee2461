"""Synthesized images and their labels, kept for training."""

import os
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from kdkernels._files import atomic_file, read_tensor_file, require_safetensors

REMEDY = "remove that file, and the run that made it makes it again"


class ImagePool:
    """Batches of synthesized images, in memory and optionally in files.

    Every batch is one safetensors file ``batch_*.safetensors`` with ``"images"`` and ``"labels"``, written atomically
    when it is added. A pool on an existing folder loads its batches.

    Args:
        folder: Folder of the batches; by default they are kept in memory only.

    Raises:
        ValueError: If a file in the folder is damaged; the message names it.
        ImportError: If there is a folder, but safetensors is not installed.

    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._batches: dict[int, tuple[Tensor, Tensor]] = {}
        if self.folder is not None:
            require_safetensors()
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(self.folder.glob("batch_*.safetensors")):
                if (number := re.fullmatch(r"batch_(\d+)\.safetensors", path.name)) is not None:
                    images, labels = _read(path)
                    if (fault := self._misfit(images)) is not None:
                        raise ValueError(f"{path}: {fault}; {REMEDY}")
                    self._batches[int(number[1])] = images, labels

    def path(self, index: int) -> Path | None:
        """Return the file of a batch, which need not exist; None for a pool in memory."""
        return None if self.folder is None else self.folder / f"batch_{index:05d}.safetensors"

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def __contains__(self, index: object) -> bool:
        """Tell whether the pool has the batch of that number."""
        return index in self._batches

    def add(self, images: Tensor, labels: Tensor, *, index: int | None = None) -> None:
        """Add a batch.

        Args:
            images: Shape [B, C, H, W]; [C, H, W] is that of the other batches.
            labels: Shape [B], int64.
            index: Number of the batch, by default the first after all others. A batch is never overwritten.

        Raises:
            ValueError: If the shapes are wrong, an image is not finite, or the pool has a batch of that number.
            OSError: If the file cannot be written.

        """
        index = max(self._batches, default=-1) + 1 if index is None else index
        images, labels = images.detach().cpu().contiguous(), labels.detach().cpu().contiguous()
        fault = _fault(images, labels) or self._misfit(images)
        if fault is not None:
            raise ValueError(f"{fault}; the batch was not added")
        path = self.path(index)
        if index in self._batches or (path is not None and path.exists()):
            raise ValueError(f"the pool has a batch {index} already; leave index out, or remove {path or 'that batch'}")
        if path is not None:
            from safetensors.torch import save

            with atomic_file(path) as file:
                file.write(save({"images": images, "labels": labels}))
        self._batches[index] = (images, labels)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the images and labels of a batch."""
        return self._batches[index]

    @property
    def images(self) -> Tensor:
        """All images [N, C, H, W], in the order of the batches' numbers."""
        return self._all(0)

    @property
    def labels(self) -> Tensor:
        """All labels [N], in the order of the batches' numbers."""
        return self._all(1)

    def _misfit(self, images: Tensor) -> str | None:
        for other, _ in self._batches.values():
            if other.shape[1:] != images.shape[1:]:
                return f"images are {list(images.shape)}, but the pool has images {list(other.shape[1:])}"
        return None

    def _all(self, part: int) -> Tensor:
        if not self._batches:
            raise ValueError("the pool is empty; add a batch first")
        return torch.cat([self._batches[index][part] for index in sorted(self._batches)])

    def loader(self, batch_size: int, *, labels: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        """Return a loader of shuffled images, with or without their labels."""
        tensors = (self.images, self.labels) if labels else (self.images,)
        return DataLoader(TensorDataset(*tensors), batch_size=batch_size, shuffle=True)


def _fault(images: Tensor, labels: Tensor) -> str | None:
    if images.dim() != 4 or len(images) == 0 or not images.is_floating_point():
        return f"images are {list(images.shape)} of {images.dtype}; expected floating-point [B, C, H, W]"
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        return f"labels are {list(labels.shape)} of {labels.dtype}; expected [{len(images)}] of int64"
    if not torch.isfinite(images).all():
        return "images hold values that are not finite"
    return None


def _read(path: Path) -> tuple[Tensor, Tensor]:
    try:
        tensors = read_tensor_file(path)
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from error
    if not isinstance(tensors, dict) or not {"images", "labels"} <= tensors.keys():
        raise ValueError(f"{path} holds no images and labels; {REMEDY}")
    images, labels = tensors["images"], tensors["labels"]
    fault = _fault(images, labels)
    if fault is not None:
        raise ValueError(f"{path}: {fault}; {REMEDY}")
    return images, labels
