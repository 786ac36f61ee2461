"""How the rows of a call are divided so that it stays within its budget: by sizes alone."""

import math
from dataclasses import dataclass

from kdkernels.ops.linear_distillation.arguments import Arguments

# Tensors of logits that the op of the logits makes for a block of rows, its gradients included
_COPIES = {"native": 2, "triton": 2, "reference": 30}
_BLOCK_BYTES = 4 << 20  # logits of a block: they stay in a cache of the CPU
_BYTES_OF_ROW = 48  # for its label, weight and loss


@dataclass(frozen=True)
class Plan:
    """Sizes of the pieces.

    Attributes:
        chunk: Rows whose logits exist at the same time.
        block: Rows of a chunk whose loss is computed at once.
        classes: Rows of a weight that are converted at once, if it has another dtype than the logits.

    """

    chunk: int
    block: int
    classes: int


def converted(given: Arguments) -> bool:
    """Tell whether a weight has another dtype than the logits."""
    return any(w is not None and w.dtype != given.dtype for w in (given.linear_weight, given.target_linear_weight))


def _bytes(given: Arguments, backend: str) -> tuple[int, int, int, int]:
    """Return the bytes of a row of a chunk, of a block, of a converted weight, and of the rest."""
    size = given.dtype.itemsize
    layers = [layer for layer in (given.linear_weight, given.target_linear_weight) if layer is not None]
    hidden = [layer.shape[1] for layer in layers]
    of_chunk = size * (given.classes * len(layers) + 3 * sum(hidden))
    copies = _COPIES[backend] + (given.target_linear_weight is None) + (given.target_indices is not None)
    of_block = size * given.classes * copies
    of_class = size * max(hidden) if converted(given) else 0
    return of_chunk, of_block, of_class, _BYTES_OF_ROW * given.rows + 2 * size * given.classes * len(layers)


def check_budget(given: Arguments, backend: str) -> None:
    """Raise unless the budget has room for a single row."""
    if (needed := sum(_bytes(given, backend))) > given.memory_budget:
        raise ValueError(
            f"memory_budget is {given.memory_budget} bytes; this call needs at least {needed}, for the logits of one "
            f"row of {given.classes} classes"
        )


def plan(given: Arguments, backend: str) -> Plan:
    """Divide the rows; the chunks are as large as the budget allows, and about equal."""
    check_budget(given, backend)
    of_chunk, of_block, of_class, rest = _bytes(given, backend)
    budget = given.memory_budget - rest
    rows = max(given.rows, 1)
    share = budget // (2 if backend == "reference" else 8)
    block = max(1, min(rows, share // of_block))
    if backend == "native":
        block = min(block, max(1, _BLOCK_BYTES // (given.dtype.itemsize * given.classes)))
    classes = max(1, min(given.classes, budget // 8 // of_class)) if of_class else given.classes
    left = budget - block * of_block - classes * of_class
    if left < of_chunk:
        block = classes = 1
        left = budget - of_block - of_class
    chunk = math.ceil(rows / math.ceil(rows / min(rows, left // of_chunk)))
    return Plan(chunk, min(block, chunk), classes)


def parts(size: int, most: int) -> list[tuple[int, int]]:
    """Return where the parts of a range begin and end."""
    return [(begin, min(size, begin + most)) for begin in range(0, size, most)]
