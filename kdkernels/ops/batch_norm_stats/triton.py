"""Batch-norm statistics, the backward of their tap, and the distance from the running statistics."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kdkernels.ops._numerics import compute_dtype
from kdkernels.ops._triton_launch import bits_of, device_of, power_of_two
from kdkernels.ops.batch_norm_stats import reference
from kdkernels.ops.batch_norm_stats import triton_kernels as kernels

TILE = 4096  # numbers that a program holds at once
SPLIT = 8192  # approximate number of values of a channel that a program reduces
SPLITS = 1024  # largest number of programs per channel
ROW_TILE = 2048
LAYERS = 32  # layers per launch


@dataclass(frozen=True)
class _Values:
    """The values of a channel as [samples, positions], and each tensor's strides of samples, positions, channels."""

    samples: int
    positions: int
    channels: int
    strides: tuple[tuple[int, int, int], ...]

    @property
    def channels_are_neighbours(self) -> bool:
        return self.strides[0][2] == 1 and self.channels > 1

    def tile(self, numbers: int) -> tuple[int, int, int]:
        """Return how many samples, positions and channels a program takes at once."""
        if self.channels_are_neighbours:
            channels = power_of_two(self.channels, 1, 64)
            positions = power_of_two(self.positions, 1, numbers // channels)
            return power_of_two(self.samples, 1, numbers // channels // positions), positions, channels
        positions = power_of_two(self.positions, 1, numbers)
        return power_of_two(self.samples, 1, numbers // positions), positions, 1


def _even_stride(tensor: Tensor, dims: range) -> int | None:
    """Return the common stride of some dimensions; None if they are not evenly spaced in memory."""
    stride, expected = None, 0
    for d in reversed(dims):
        if tensor.shape[d] == 1:
            continue
        if stride is None:
            stride = tensor.stride(d)
        elif tensor.stride(d) != expected:
            return None
        expected = tensor.stride(d) * tensor.shape[d]
    return 0 if stride is None else stride


def _values_of(*tensors: Tensor) -> _Values | None:
    """Describe tensors of one shape as values by channel; None if their memory layout does not allow it."""
    steps = [_even_stride(tensor, range(2, tensor.dim())) for tensor in tensors]
    if any(step is None for step in steps):
        return None
    strides = tuple((t.stride(0), step or 0, t.stride(1)) for t, step in zip(tensors, steps, strict=True))
    shape = tensors[0].shape
    samples, positions = shape[0], shape[2:].numel()
    # Consecutive rows of channels, as in channels_last or [N, C], count as positions of one sample.
    if all(a == b * positions or samples == 1 or positions == 1 for a, b, _ in strides):
        strides = tuple((0, b if positions > 1 else a, c) for a, b, c in strides)
        samples, positions = 1, samples * positions
    return _Values(samples, positions, shape[1], strides)


def _contiguous_values(*tensors: Tensor) -> _Values:
    values = _values_of(*tensors)
    assert values is not None, "contiguous tensors are evenly spaced"
    return values


def _warps(tile: int, dtype: torch.dtype) -> int:
    return power_of_two(tile // (256 if dtype == torch.float64 else 512), 1, 8)


def batch_norm_stats(input: Tensor, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean and the variance of each channel, and the rounding error of the mean."""
    values = _values_of(input)
    if values is None:
        input = input.contiguous()
        values = _contiguous_values(input)
    dtype = compute_dtype(input)
    mean, var, mean_error = (input.new_empty(values.channels, dtype=dtype) for _ in range(3))
    if values.channels == 0:
        return mean, var, mean_error
    samples, positions, channels = values.tile(TILE)
    # A split consists of samples if the positions of a sample fit in one tile, else of positions.
    by_samples = values.positions <= positions
    tiles = triton.cdiv(values.samples, samples) if by_samples else triton.cdiv(values.positions, positions)
    in_split = samples * positions if by_samples else values.samples * positions
    tiles_in_split = min(max(SPLIT // in_split, triton.cdiv(tiles, SPLITS), 1), max(tiles, 1))
    splits = max(triton.cdiv(tiles, tiles_in_split), 1)
    partial = input.new_empty(3, splits, values.channels, dtype=torch.float64)
    with device_of(input):
        kernels.moments_kernel[(triton.cdiv(values.channels, channels), splits)](
            partial, input, values.samples, values.positions, values.channels, values.strides[0], tiles_in_split,
            BY_SAMPLES=by_samples, SAMPLES=samples, POSITIONS=positions, CHANNELS=channels,
            num_warps=_warps(samples * positions * channels, dtype),
        )  # fmt: skip
        block = 16
        kernels.merge_kernel[(triton.cdiv(values.channels, block),)](
            mean, var, mean_error, partial, splits, values.channels, UNBIASED=unbiased,
            SPLITS=power_of_two(splits), CHANNELS=block, num_warps=4,
        )  # fmt: skip
    return mean, var, mean_error


def batch_norm_tap_backward(
    grad_output: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    input: Tensor,
    mean: Tensor,
    mean_error: Tensor,
    unbiased: bool,
) -> Tensor:
    """Return grad_output + grad_mean / n + 2 grad_var (x - mean) / n in the memory layout of the input."""
    result = torch.empty_like(input)
    if input.numel() == 0:
        return result
    given = [] if grad_output is None else [grad_output]
    values, output = _values_of(input, result, *given), result
    if values is None or values.strides[0][2] != values.strides[1][2]:
        input = input.contiguous()
        output = torch.empty_like(input)
        given = [g.contiguous() for g in given]
        values = _contiguous_values(input, output, *given)
    samples, positions, channels = values.tile(ROW_TILE)
    tiles = triton.cdiv(values.samples, samples) * triton.cdiv(values.positions, positions)
    count = reference.values_per_channel(input)
    dense = [None if t is None else t.contiguous() for t in (grad_mean, grad_var, mean, mean_error)]
    with device_of(input):
        kernels.gradient_kernel[(tiles, triton.cdiv(values.channels, channels))](
            output, given[0] if given else None, input, *dense, count, count - int(unbiased), values.samples,
            values.positions, values.channels, values.strides[1], values.strides[-1], values.strides[0],
            SAMPLES=samples, POSITIONS=positions, CHANNELS=channels,
            num_warps=_warps(samples * positions * channels, mean.dtype),
        )  # fmt: skip
    return result if output is result else result.copy_(output)


def _layers(channels: list[int]) -> list[tuple[int, int, tuple[int, ...]]]:
    """Return, for each launch, its first layer, its first channel, and its layers' channel counts padded with zeros."""
    launches = []
    for first in range(0, len(channels), LAYERS):
        here = channels[first : first + LAYERS]
        launches.append((first, sum(channels[:first]), (*here, *[0] * (LAYERS - len(here)))))
    return launches


def batch_norm_stat_distances(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, channels: list[int], mode: str, moment: str,
    reduction: str, mean_weight: float, var_weight: float,
) -> Tensor:  # fmt: skip
    """Return the distance of each layer; the tensors hold the channels of one layer after another."""
    losses = mean.new_empty(len(channels))
    statistics = [s.contiguous() for s in (mean, var, running_mean, running_var)]
    with device_of(mean):
        for first, start, sizes in _layers(channels):
            kernels.distance_kernel[(min(LAYERS, len(channels) - first),)](
                losses, *statistics, first, start, sizes, bits_of(mean_weight), bits_of(var_weight), MODE=mode,
                ROOT=moment == "std", SUM=reduction == "sum", BLOCK=256, num_warps=4,
            )  # fmt: skip
    return losses


def batch_norm_stat_distances_backward(
    grad_losses: Tensor, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, channels: list[int],
    mode: str, moment: str, reduction: str, mean_weight: float, var_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of the four tensors."""
    statistics = [s.contiguous() for s in (mean, var, running_mean, running_var)]
    by_mean, by_var, by_running_mean, by_running_var = (mean.new_empty(mean.shape) for _ in range(4))
    grad = grad_losses.contiguous()
    with device_of(mean):
        for first, start, sizes in _layers(channels):
            kernels.distance_gradient_kernel[(min(LAYERS, len(channels) - first),)](
                by_mean, by_var, by_running_mean, by_running_var, grad, *statistics, first, start, sizes,
                bits_of(mean_weight), bits_of(var_weight), MODE=mode, ROOT=moment == "std", SUM=reduction == "sum",
                BLOCK=256, num_warps=4,
            )  # fmt: skip
    return by_mean, by_var, by_running_mean, by_running_var
