"""What labels mean to projects that ask for token ids and use them as a mask."""

from torch import Tensor


def kept(name: str, labels: Tensor | None, positions: tuple[int, ...], ignore_index: int) -> Tensor | None:
    """Return a mask of the positions whose label is not ignored, None without labels."""
    if labels is None:
        return None
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(labels).__name__}")
    if labels.shape != positions:
        raise ValueError(
            f"{name} has shape {tuple(labels.shape)}; expected {tuple(positions)}, the shape of the logits without the "
            "classes"
        )
    return labels != ignore_index
