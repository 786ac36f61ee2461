"""Launchers of the softmax divergences."""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kdkernels.ops._numerics import compute_dtype
from kdkernels.ops._triton_launch import argument, bits_of, device_of, is_zero, known_to_host, power_of_two
from kdkernels.ops.softmax_divergence import reference
from kdkernels.ops.softmax_divergence import triton_kernels as kernels
from kdkernels.ops.softmax_divergence.saved import statistics_shape

Strides = tuple[int, int, int, int]  # strides of the classes, then of the positions from inner to outer

# Numbers in a tile if they have 32 bits; half as many with 64. A thread has at most 8 of them: more would spill.
WHOLE_ROW = 4096
LONG_ROW_TILE = 2048
MAP_TILE = 4096  # if positions are neighbours in memory
SMALL_TILE = 1024


@dataclass(frozen=True)
class _Options:
    """The arguments of a call besides the logits."""

    labels: Tensor | None
    temperature: Tensor
    divergence_weight: Tensor
    label_weight: Tensor
    beta: Tensor
    dim: int
    divergence: str
    reduction: str
    ignore_index: int

    @property
    def kind(self) -> str:
        """Return the kind of divergence, simplified by what the host knows of its weight and of beta."""
        if is_zero(self.divergence_weight):
            return "none"
        if self.divergence != "js":
            return self.divergence
        if not known_to_host(self.beta):
            return "any_js"
        return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(float(self.beta), "js")

    @property
    def cross_entropy(self) -> bool:
        return self.labels is not None and not is_zero(self.label_weight)

    def divisor(self, shape: torch.Size) -> float:
        """Return the divisor of a sum of losses, with positions that do not count included."""
        if self.reduction == "mean":
            return float(max(math.prod(shape[: self.dim] + shape[self.dim + 1 :]), 1))
        return float(max(shape[0], 1)) if self.reduction == "batchmean" else 1.0

    @property
    def divides_by_count(self) -> bool:
        return self.reduction == "mean" and self.labels is not None

    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """Return the arguments that both kernels take."""
        labels = None if self.labels is None else self.labels.contiguous()
        scalars = (self.temperature, self.divergence_weight, self.label_weight, self.beta)
        return (labels, *(argument(scalar) for scalar in scalars))


@dataclass(frozen=True)
class _Layout:
    """Positions in three dimensions, and the strides of some operands over them."""

    classes: int
    positions: int
    middle: int
    inner: int
    strides: tuple[Strides, ...]

    @property
    def by_rows(self) -> bool:
        """Whether classes are neighbours in memory, or neither classes nor positions are."""
        return self.strides[0][0] == 1 or self.strides[0][1] != 1

    def tile(self, numbers: int, longest_row: int) -> tuple[int, int]:
        """Return how many positions and classes a program takes at once."""
        if self.by_rows:
            classes = power_of_two(self.classes, 1, longest_row)
            return power_of_two(min(self.positions, max(numbers // classes, 1))), classes
        positions = power_of_two(self.positions, 1, 32)
        return positions, power_of_two(self.classes, 1, longest_row // positions)


def _layout(dim: int, *operands: Tensor) -> _Layout | None:
    """Join adjacent dimensions that are evenly spaced in every operand; None if too many are left."""
    shape = operands[0].shape
    sizes: list[int] = []
    steps: list[list[int]] = []  # strides of the operands for each remaining dimension
    for d, size in enumerate(shape):
        if d == dim or size == 1:
            continue
        strides = [o.stride(d) for o in operands]
        if sizes and all(outer == inner * size for outer, inner in zip(steps[-1], strides, strict=True)):
            sizes[-1], steps[-1] = sizes[-1] * size, strides
        else:
            sizes.append(size)
            steps.append(strides)
    if len(sizes) > 3:
        return None
    missing = 3 - len(sizes)
    sizes, steps = [1] * missing + sizes, [[0] * len(operands)] * missing + steps
    strides_of = tuple((o.stride(dim), steps[2][i], steps[1][i], steps[0][i]) for i, o in enumerate(operands))
    return _Layout(shape[dim], math.prod(sizes), sizes[1], sizes[2], strides_of)


def _contiguous_layout(dim: int, *operands: Tensor) -> _Layout:
    layout = _layout(dim, *operands)
    assert layout is not None, "contiguous dimensions join to two"
    return layout


def _warps(tile: tuple[int, int], dtype: torch.dtype) -> int:
    return power_of_two(tile[0] * tile[1] * dtype.itemsize // 1024, 1, 16)


def _launch_forward(
    loss: Tensor, loss_of: str, saved: Tensor | None, input: Tensor, target: Tensor, layout: _Layout, options: _Options
) -> None:
    """Launch the forward kernel for the losses of "positions", for the "sum" of each program, or for neither."""
    half = loss.dtype == torch.float64
    longest = (WHOLE_ROW if layout.by_rows else MAP_TILE) >> half
    if layout.by_rows and layout.classes > longest:
        longest = LONG_ROW_TILE >> half
    tile = positions, classes = layout.tile(SMALL_TILE >> half, longest)
    programs = triton.cdiv(layout.positions, positions)
    partial = loss.new_empty(2, programs) if loss_of == "sum" else loss
    with device_of(input):
        kernels.forward_kernel[(programs,)](
            partial, saved, input, target, *options.arguments(), options.ignore_index, layout.positions,
            layout.classes, layout.inner, layout.middle, *layout.strides[:2], KIND=options.kind,
            CROSS_ENTROPY=options.cross_entropy, LOSS=loss_of, SAVE=saved is not None, ROWS=layout.by_rows,
            WHOLE=classes >= layout.classes, POSITIONS=positions, CLASSES=classes,
            num_warps=_warps(tile, loss.dtype),
        )  # fmt: skip
        if loss_of == "sum":
            kernels.reduce_kernel[(1,)](
                loss, partial, programs, bits_of(options.divisor(input.shape)), BY_COUNT=options.divides_by_count,
                BLOCK=1024,
            )  # fmt: skip


def softmax_divergence(
    input: Tensor,
    target: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    divergence_weight: Tensor,
    label_weight: Tensor,
    beta: Tensor,
    dim: int,
    divergence: str,
    reduction: str,
    ignore_index: int,
    save: str,
) -> tuple[Tensor, Tensor]:
    """Return the loss, and the statistics of each position if they are to be saved."""
    if save == "gradient":
        raise ValueError("save is 'gradient'; the Triton kernels accept 'nothing' and 'statistics'")
    reference.check_values(labels, temperature, beta, input.shape[dim], ignore_index)
    options = _Options(
        labels, temperature, divergence_weight, label_weight, beta, dim, divergence, reduction, ignore_index
    )
    shape = input.shape[:dim] + input.shape[dim + 1 :]
    dtype = compute_dtype(input, target)
    loss = input.new_empty(shape if reduction == "none" else (), dtype=dtype)
    positions = math.prod(shape)
    saved = loss.new_empty(statistics_shape(positions) if save == "statistics" else 0)
    if positions == 0:
        return loss.zero_(), saved
    layout = _layout(dim, input, target)
    if layout is None:
        input, target = input.contiguous(), target.contiguous()
        layout = _contiguous_layout(dim, input, target)
    loss_of = "positions" if reduction == "none" else "sum"
    _launch_forward(loss, loss_of, saved if save == "statistics" else None, input, target, layout, options)
    return loss, saved


def softmax_divergence_backward(
    grad_output: Tensor,
    statistics: Tensor | None,
    input: Tensor,
    target: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    divergence_weight: Tensor,
    label_weight: Tensor,
    beta: Tensor,
    dim: int,
    divergence: str,
    reduction: str,
    ignore_index: int,
    input_gradient: bool,
    target_gradient: bool,
    scalar_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``input`` and ``target``, empty tensors if not requested, and an empty tensor."""
    if scalar_gradients:
        raise ValueError("scalar_gradients is True; the Triton kernels compute no gradients of scalars")
    options = _Options(
        labels, temperature, divergence_weight, label_weight, beta, dim, divergence, reduction, ignore_index
    )
    results = (
        torch.empty_like(input) if input_gradient else input.new_empty(0),
        torch.empty_like(target) if target_gradient else target.new_empty(0),
        input.new_empty(0, dtype=compute_dtype(input, target)),
    )
    if input.numel() == 0 or not (input_gradient or target_gradient):
        return results
    # A side without a gradient has the strides of its logits.
    outputs = (results[0] if input_gradient else input, results[1] if target_gradient else target)
    layout = _layout(dim, input, target, *outputs)
    if layout is None:
        input, target = input.contiguous(), target.contiguous()
        outputs = (torch.empty_like(input), torch.empty_like(target))
        layout = _contiguous_layout(dim, input, target, *outputs)
    if statistics is None:
        dtype = compute_dtype(input, target)
        statistics = input.new_empty(statistics_shape(layout.positions), dtype=dtype)
        _launch_forward(statistics, "none", statistics, input, target, layout, options)
    numbers = SMALL_TILE >> (statistics.dtype == torch.float64)
    tile = positions, classes = layout.tile(numbers, numbers)
    grid = (triton.cdiv(layout.positions, positions), triton.cdiv(layout.classes, classes))
    divisor: Tensor | int = bits_of(options.divisor(input.shape))
    if labels is not None and options.divides_by_count:
        divisor = (labels != ignore_index).sum()
    with device_of(input):
        kernels.backward_kernel[grid](
            outputs[0] if input_gradient else None, outputs[1] if target_gradient else None, grad_output.contiguous(),
            statistics, input, target, *options.arguments(), divisor, ignore_index, layout.positions, layout.classes,
            layout.inner, layout.middle, *layout.strides, KIND=options.kind,
            CROSS_ENTROPY=options.cross_entropy, GRAD_BY_POSITION=reduction == "none", ROWS=layout.by_rows,
            POSITIONS=positions, CLASSES=classes, num_warps=_warps(tile, statistics.dtype),
        )  # fmt: skip
    for result, output, wanted in zip(results[:2], outputs, (input_gradient, target_gradient), strict=True):
        if wanted and output is not result:
            result.copy_(output)
    return results
