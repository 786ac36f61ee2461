"""The roll and the flip of a batch, as one gather whose positions are computed on the device.

``torch.roll`` and ``Tensor.flip`` take numbers of the host, so that a step that draws them cannot be captured in a CUDA
graph, and tensors in their place would be read back.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.inversion.config import InversionConfig, Stage


class Positions(NamedTuple):
    """Where the pixels of a moved image come from, and those of the image itself from the moved one.

    Both are indices into the H * W pixels, shape [H * W].
    """

    forward: Tensor
    inverse: Tensor


class _Move(torch.autograd.Function):
    """A permutation of the pixels, whose backward is the gather by the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, forward: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(forward, inverse)
        batch, channels, height, width = images.shape
        # In this shape it is several times as fast on a CPU as indexing the height and the width.
        pixels = images.reshape(batch * channels, height * width)
        return pixels.index_select(1, forward).view(images.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        forward, inverse = ctx.saved_tensors
        return _Move.apply(grad, inverse, forward), None, None  # type: ignore[no-untyped-call]


def move(images: Tensor, positions: Positions) -> Tensor:
    """Return images [B, C, H, W] whose pixels are taken from other positions; contiguous, and differentiable."""
    return _Move.apply(images, *positions)  # type: ignore[no-any-return, no-untyped-call]


def positions_of(height: int, width: int, shift: tuple[int, int], flip: bool, device: torch.device) -> Positions:
    """Return the positions of a roll down and to the right, followed by a flip left to right if wanted."""
    down, right = shift
    rows = _rows(height, width, torch.tensor([down], device="cpu"))
    columns = _columns(width, *(torch.tensor([value], device="cpu") for value in (right, flip)))
    return _combined(rows.to(device), columns.to(device))


def _rows(height: int, width: int, down: Tensor) -> Tensor:
    """Return the first pixel of the row that each row comes from, and that it goes to; shape [rolls, 2, H]."""
    rows, down = torch.arange(height, device="cpu"), down[:, None]
    return torch.stack([(rows - down) % height, (rows + down) % height], 1) * width


def _columns(width: int, right: Tensor, flip: Tensor) -> Tensor:
    """Return the column that each column comes from, and that it goes to; shape [rolls, 2, W]."""
    columns, right, flip = torch.arange(width, device="cpu"), right[:, None], flip[:, None]
    flipped = columns.flip(0)
    source = (torch.where(flip, flipped, columns) - right) % width
    target = (columns + right) % width
    return torch.stack([source, torch.where(flip, width - 1 - target, target)], 1)


def _combined(rows: Tensor, columns: Tensor) -> Positions:
    both = rows[0, :, :, None] + columns[0, :, None, :]
    return Positions(*both.flatten(1).unbind())


class Augmentation:
    """The rolls and flips of a stage, drawn before its first iteration, as tensors on the device.

    Args:
        config: Settings, of which ``jitter`` and ``flip`` count.
        stage: Stage, whose pooling divides the jitter.
        size: Height and width of the pooled images.
        generator: Generator of the numbers: for each iteration two offsets and, if images are flipped at all, a number
            in [0, 1).
        device: Device of the images.

    """

    def __init__(
        self,
        config: InversionConfig,
        stage: Stage,
        size: tuple[int, int],
        generator: torch.Generator | None,
        device: torch.device,
    ) -> None:
        jitter = config.jitter // stage.pool
        offsets, flips = self._draw(jitter, config.flip, stage.iterations, generator)
        self.moves = jitter > 0 or config.flip > 0
        if not self.moves:
            return
        rolls = torch.arange(-jitter, jitter + 1, device="cpu")
        height, width = size
        self._row_of = (offsets[:, 0] + jitter).to(device)
        self._column_of = (offsets[:, 1] + jitter + len(rolls) * flips).to(device)
        self._rows = _rows(height, width, rolls).to(device)
        self._columns = torch.cat(
            [_columns(width, rolls, torch.tensor([flip], device="cpu")) for flip in (False, True)]
        ).to(device)

    @staticmethod
    def _draw(
        jitter: int, probability: float, iterations: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Draw the offsets [iterations, 2], and whether to flip [iterations]."""
        if probability == 0:
            offsets = torch.randint(-jitter, jitter + 1, (iterations, 2), generator=generator, device="cpu")
            return offsets, torch.zeros(iterations, dtype=torch.bool, device="cpu")
        draws = [
            (
                torch.randint(-jitter, jitter + 1, (2,), generator=generator, device="cpu"),
                torch.rand((), generator=generator, device="cpu"),
            )
            for _ in range(iterations)
        ]
        offsets, numbers = (torch.stack(side) for side in zip(*draws, strict=True))
        # In Python's precision, in which the probability was given
        return offsets, numbers.double() < probability

    def at(self, iteration: Tensor) -> Positions | None:
        """Return the positions of an iteration, a tensor [1] on the device; None if images are not moved at all."""
        if not self.moves:
            return None
        rows = self._rows.index_select(0, self._row_of.index_select(0, iteration))
        columns = self._columns.index_select(0, self._column_of.index_select(0, iteration))
        return _combined(rows, columns)
