"""The kernels of the batch-norm statistics.

A tile of values is summed twice in registers, in fp64: for its mean, then around it. Tiles and programs are merged in
fp64. So the mean is exact even if it is small, and the variance even if the mean is large.
"""

import triton
import triton.language as tl

from kdkernels.ops._triton_launch import scalar_of
from kdkernels.ops.batch_norm_stats import reference

EPS = tl.constexpr(reference.EPS)


@triton.jit
def tile_at(strides, sample, position, channel):
    """Return the offsets of a tile [samples, positions, channels]."""
    of_values = sample[:, None] * strides[0] + position[None, :] * strides[1]
    return of_values[:, :, None] + channel[None, None, :] * strides[2]


@triton.jit
def merged(count, mean, squares, other_count, other_mean, other_squares):
    """Return the count, the mean and the sum of squared distances of two sets of values together."""
    total = count + other_count
    share = tl.where(total > 0.0, other_count / tl.where(total > 0.0, total, 1.0), 0.0)
    distance = other_mean - mean
    return total, mean + distance * share, squares + (other_squares + distance * distance * count * share)


@triton.jit(do_not_specialize=["tiles_in_split"])
def moments_kernel(
    partial, input, samples, positions, channels, strides, tiles_in_split, BY_SAMPLES: tl.constexpr,
    SAMPLES: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the moments of some channels over the samples or positions of one split."""
    dtype: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.program_id(1).to(tl.int64)
    count = tl.zeros([CHANNELS], tl.float64)
    mean, squares = count, count
    first = split * tiles_in_split
    steps = tiles_in_split if BY_SAMPLES else tl.cdiv(samples, SAMPLES) * tiles_in_split
    for step in range(steps):
        if BY_SAMPLES:
            sample = (first + step) * SAMPLES + tl.arange(0, SAMPLES)
            position = tl.arange(0, POSITIONS).to(tl.int64)
        else:
            sample = (step // tiles_in_split).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
            position = (first + step % tiles_in_split) * POSITIONS + tl.arange(0, POSITIONS)
        there = (sample < samples)[:, None] & (position < positions)[None, :]
        mask = there[:, :, None] & (channel < channels)[None, None, :]
        x = tl.load(input + tile_at(strides, sample, position, channel), mask=mask, other=0.0).to(dtype)
        here = tl.sum(tl.sum(there.to(tl.int32), 1), 0).to(tl.float64)
        number = tl.maximum(here, 1.0)
        of_tile = tl.sum(tl.sum(x.to(tl.float64), 1), 0) / number
        centre = of_tile.to(dtype)
        distance = tl.where(mask, x - centre[None, None, :], 0.0)
        if dtype == tl.float64:
            of_tile += tl.sum(tl.sum(distance, 1), 0) / number
        missed = of_tile - centre.to(tl.float64)
        around = tl.sum(tl.sum((distance * distance).to(tl.float64), 1), 0) - number * missed * missed
        count, mean, squares = merged(count, mean, squares, here, of_tile, around)
    at = partial + split * channels + channel
    size = tl.num_programs(1).to(tl.int64) * channels
    tl.store(at, count, mask=channel < channels)
    tl.store(at + size, mean, mask=channel < channels)
    tl.store(at + size * 2, squares, mask=channel < channels)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    mean, var, mean_error, partial, splits, channels, UNBIASED: tl.constexpr, SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Merge all splits of some channels at once."""
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.arange(0, SPLITS).to(tl.int64)
    at = partial + split[:, None] * channels + channel[None, :]
    size = tl.cast(splits, tl.int64) * channels
    mask = (split < splits)[:, None] & (channel < channels)[None, :]
    count = tl.load(at, mask=mask, other=0.0)
    means = tl.load(at + size, mask=mask, other=0.0)
    squares = tl.load(at + size * 2, mask=mask, other=0.0)
    number = tl.sum(count, 0)
    divisor = tl.where(number > 0.0, number, 1.0)
    shift = tl.sum(count * means, 0) / divisor
    distance = tl.where(mask, means - shift[None, :], 0.0)
    exact = shift + tl.sum(count * distance, 0) / divisor
    total = tl.sum(squares + count * distance * distance, 0)
    if UNBIASED:
        number -= 1.0
    rounded = exact.to(mean.dtype.element_ty)
    tl.store(mean + channel, rounded, mask=channel < channels)
    tl.store(mean_error + channel, (exact - rounded.to(tl.float64)).to(rounded.dtype), mask=channel < channels)
    tl.store(var + channel, (total / number).to(rounded.dtype), mask=channel < channels)


@triton.jit(do_not_specialize=["count", "divisor"])
def gradient_kernel(
    output, grad_output, input, grad_mean, grad_var, mean, mean_error, count, divisor, samples, positions, channels,
    output_strides, grad_strides, input_strides, SAMPLES: tl.constexpr, POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute grad_output + grad_mean / count + 2 grad_var (x - mean) / divisor; a gradient that is None is 0."""
    dtype: tl.constexpr = mean.dtype.element_ty
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    tile = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(positions, POSITIONS)
    sample = tile // tiles * SAMPLES + tl.arange(0, SAMPLES)
    position = tile % tiles * POSITIONS + tl.arange(0, POSITIONS)
    there = channel < channels
    # The distance is x - mean - mean_error; the error, equal for all values of a channel, is added to this term.
    through_mean = tl.zeros([CHANNELS], tl.float64)
    if grad_mean is not None:
        through_mean = tl.load(grad_mean + channel, mask=there, other=0.0).to(tl.float64) / count
    through_var = tl.zeros([CHANNELS], tl.float64)
    if grad_var is not None:
        through_var = tl.load(grad_var + channel, mask=there, other=0.0).to(tl.float64) * 2.0 / divisor
        through_mean -= through_var * tl.load(mean_error + channel, mask=there, other=0.0).to(tl.float64)
    centre = tl.load(mean + channel, mask=there, other=0.0)[None, None, :]
    mask = ((sample < samples)[:, None] & (position < positions)[None, :])[:, :, None] & there[None, None, :]
    x = tl.load(input + tile_at(input_strides, sample, position, channel), mask=mask, other=0.0).to(dtype)
    gradient = (x - centre) * through_var.to(dtype)[None, None, :] + through_mean.to(dtype)[None, None, :]
    if grad_output is not None:
        at = grad_output + tile_at(grad_strides, sample, position, channel)
        gradient += tl.load(at, mask=mask, other=0.0).to(dtype)
    tl.store(output + tile_at(output_strides, sample, position, channel), gradient, mask=mask)


@triton.jit
def layer_at(sizes, layer, start):
    """Return the first channel of a layer and its number of channels."""
    first, size = start, start * 0
    for i in tl.static_range(len(sizes)):
        first += tl.where(i < layer, sizes[i], 0)
        size += tl.where(i == layer, sizes[i], 0)
    return first, size


@triton.jit
def load_channel(tensor, at, mask):
    """Load a statistic of some channels, 1 outside the mask."""
    return tl.load(tensor + at, mask=mask, other=1.0).to(tl.float64)


@triton.jit
def spread_of(variance, ROOT: tl.constexpr):
    """Return what all modes but gaussian_kl compare: the variance or its root."""
    return tl.sqrt(variance) if ROOT else variance


@triton.jit
def slope_of(spread, ROOT: tl.constexpr):
    """Return d spread / d variance, 0 for the root at 0."""
    return tl.where(spread == 0.0, 0.0, 0.5 / tl.where(spread == 0.0, 1.0, spread)) if ROOT else spread * 0.0 + 1.0


@triton.jit
def layer_sums(
    mean, var, running_mean, running_var, first, size, MODE: tl.constexpr, ROOT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Return the two sums over the channels of a layer that make up its distance: for the means and the spreads."""
    means = tl.zeros([BLOCK], tl.float64)
    spreads = tl.zeros([BLOCK], tl.float64)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < size
        m, v = load_channel(mean, first + at, mask), load_channel(var, first + at, mask)
        running_m, r = load_channel(running_mean, first + at, mask), load_channel(running_var, first + at, mask)
        distance = (m - running_m) * (m - running_m)
        if MODE == "gaussian_kl":
            v, r = v + EPS, r + EPS
            means += tl.where(mask, 0.5 * (tl.log(v / r) + ((r - v) + distance) / v), 0.0)
        else:
            spread = spread_of(v, ROOT) - spread_of(r, ROOT)
            means += tl.abs(m - running_m) if MODE == "l1" else distance
            spreads += tl.abs(spread) if MODE == "l1" else spread * spread
    return tl.sum(means, 0), tl.sum(spreads, 0)


@triton.jit
def divisor_of(size, SUM: tl.constexpr):
    """Return what a sum over the channels of a layer is divided by."""
    number = tl.maximum(size, 1).to(tl.float64)
    return number * 0.0 + 1.0 if SUM else number


@triton.jit
def slope_of_sum(difference, total, divisor, MODE: tl.constexpr):
    """Return the derivative of l2, l1 or squared by the difference of one channel; 0 at a norm or difference of 0."""
    if MODE == "squared":
        slope = 2.0 * difference / divisor
    elif MODE == "l1":
        slope = ((difference > 0.0).to(tl.float64) - (difference < 0.0).to(tl.float64)) / divisor
    else:
        slope = tl.where(total == 0.0, 0.0, difference / tl.sqrt(tl.where(total == 0.0, 1.0, total)))
    return slope


@triton.jit(do_not_specialize=["first_layer", "start", "sizes", "mean_weight", "spread_weight"])
def distance_kernel(
    losses, mean, var, running_mean, running_var, first_layer, start, sizes, mean_weight, spread_weight,
    MODE: tl.constexpr, ROOT: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the distance of one layer."""
    layer = tl.program_id(0)
    first, size = layer_at(sizes, layer, start)
    means, spreads = layer_sums(mean, var, running_mean, running_var, first, size, MODE, ROOT, BLOCK)
    of_means, of_spreads = scalar_of(mean_weight, tl.float64), scalar_of(spread_weight, tl.float64)
    if MODE == "l2":
        loss = of_means * tl.sqrt(means) + of_spreads * tl.sqrt(spreads)
    else:
        loss = (of_means * means + of_spreads * spreads) / divisor_of(size, SUM)
    tl.store(losses + first_layer + layer, loss.to(losses.dtype.element_ty))


@triton.jit(do_not_specialize=["first_layer", "start", "sizes", "mean_weight", "spread_weight"])
def distance_gradient_kernel(
    by_mean, by_var, by_running_mean, by_running_var, grad_losses, mean, var, running_mean, running_var, first_layer,
    start, sizes, mean_weight, spread_weight, MODE: tl.constexpr, ROOT: tl.constexpr, SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one layer's distance for its statistics."""
    dtype: tl.constexpr = by_mean.dtype.element_ty
    layer = tl.program_id(0)
    first, size = layer_at(sizes, layer, start)
    grad = tl.load(grad_losses + first_layer + layer).to(tl.float64)
    divisor = divisor_of(size, SUM)
    of_means = grad * scalar_of(mean_weight, tl.float64)
    of_spreads = grad * scalar_of(spread_weight, tl.float64)
    means, spreads = 0.0, 0.0
    if MODE == "l2":
        means, spreads = layer_sums(mean, var, running_mean, running_var, first, size, MODE, ROOT, BLOCK)
    for offset in range(0, size, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        mask = at < size
        m, v = load_channel(mean, first + at, mask), load_channel(var, first + at, mask)
        running_m, r = load_channel(running_mean, first + at, mask), load_channel(running_var, first + at, mask)
        distance = m - running_m
        if MODE == "gaussian_kl":
            v, r = v + EPS, r + EPS
            through_mean = grad * distance / (v * divisor)
            through_var = grad * 0.5 * ((v - r) - distance * distance) / (v * v * divisor)
            through_running_var = grad * 0.5 * (r - v) / (v * r * divisor)
        else:
            s, running_s = spread_of(v, ROOT), spread_of(r, ROOT)
            through_mean = of_means * slope_of_sum(distance, means, divisor, MODE)
            through_spread = of_spreads * slope_of_sum(s - running_s, spreads, divisor, MODE)
            through_var = through_spread * slope_of(s, ROOT)
            through_running_var = -through_spread * slope_of(running_s, ROOT)
        tl.store(by_mean + first + at, through_mean.to(dtype), mask=mask)
        tl.store(by_var + first + at, through_var.to(dtype), mask=mask)
        tl.store(by_running_mean + first + at, (-through_mean).to(dtype), mask=mask)
        tl.store(by_running_var + first + at, through_running_var.to(dtype), mask=mask)
