"""The kernels of the total variation, on tiles of rows times numbers.

A row holds the pixels of one channel, or of all channels side by side. The neighbour of a number is `step` numbers
further on.
"""

import triton
import triton.language as tl

from kdkernels.ops._triton_launch import scalar_of


@triton.jit
def sign(x):
    """Return -1, 0 or 1; NaN stays NaN."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))


@triton.jit
def inverse(x):
    """Return 1 / x, 0 at 0."""
    return tl.where(x == 0.0, 0.0, 1.0 / tl.where(x == 0.0, 1.0, x))


@triton.jit
def pairs(images, channels, rows, columns, direction: tl.constexpr):
    """Return the number of pairs of neighbours in all images in one direction: right, down or diagonal."""
    across = columns if direction == 1 else columns - 1
    down = rows if direction == 0 else rows - 1
    return tl.cast(images, tl.float64) * channels * across * down


@triton.jit
def tile_of(image, strides, plane, planes, block, across, ROWS: tl.constexpr, NUMBERS: tl.constexpr):
    """Return the pointer to a plane, and which of its rows and numbers a program takes."""
    start = image + (plane // planes) * strides[0] + (plane % planes) * strides[1]
    row = (block // across) * ROWS + tl.arange(0, ROWS)
    number = (block % across) * NUMBERS + tl.arange(0, NUMBERS)
    return start, row, number


@triton.jit
def neighbour(start, stride, row, number, rows, length, step, DOWN: tl.constexpr, RIGHT: tl.constexpr):
    """Load the neighbours some rows and pixels away, 0 outside the image, and tell which are inside."""
    r, n = row + DOWN, number + RIGHT * step
    there = (r >= 0) & (r < rows) & (row < rows)
    within = (n >= 0) & (n < length) & (number < length)
    mask = there[:, None] & within[None, :]
    x = tl.load(start + r[:, None] * stride + n[None, :], mask=mask, other=0.0)
    dtype: tl.constexpr = tl.float64 if x.dtype == tl.float64 else tl.float32
    return x.to(dtype), mask


@triton.jit
def isotropic_term(x, right, has_right, below, has_below, eps):
    """Return both differences, 0 if the neighbour is missing, and their length, 0 if both are missing."""
    dx = tl.where(has_right, x - right, 0.0)
    dy = tl.where(has_below, x - below, 0.0)
    return dx, dy, tl.where(has_right | has_below, tl.sqrt(dx * dx + dy * dy + eps), 0.0)


@triton.jit
def sum_of(tile):
    """Add up a tile."""
    return tl.sum(tl.sum(tile, 1), 0).to(tl.float64)


@triton.jit(do_not_specialize=["eps"])
def sums_kernel(
    partial, image, eps, images, channels, rows, columns, planes, step, across, strides, KIND: tl.constexpr,
    DIRECTIONS: tl.constexpr, MEAN_OF_PAIRS: tl.constexpr, ROWS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Compute all sums of a tile, or only the one that a total variation needs.

    The differences of a pixel are those to the right, down and to the lower right, and the one between its right and
    its lower neighbour.
    """
    plane, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start, row, number = tile_of(image, strides, plane, planes, block, across, ROWS, NUMBERS)
    stride, length = strides[2], columns * step
    x, _ = neighbour(start, stride, row, number, rows, length, step, 0, 0)
    right, has_right = neighbour(start, stride, row, number, rows, length, step, 0, 1)
    below, has_below = neighbour(start, stride, row, number, rows, length, step, 1, 0)
    diagonal, has_diagonal = neighbour(start, stride, row, number, rows, length, step, 1, 1)
    parts = planes * tl.num_programs(1).to(tl.int64)
    at = partial + (plane // planes) * parts + (plane % planes) * tl.num_programs(1) + block
    size = parts * images
    value = tl.zeros([1], tl.float64)
    if KIND == "isotropic":
        value += sum_of(isotropic_term(x, right, has_right, below, has_below, scalar_of(eps, x.dtype))[2])
    else:
        for k in tl.static_range(DIRECTIONS):
            if k == 0:
                difference = tl.where(has_right, x - right, 0.0)
            elif k == 1:
                difference = tl.where(has_below, x - below, 0.0)
            elif k == 2:
                difference = tl.where(has_diagonal, below - right, 0.0)
            else:
                difference = tl.where(has_diagonal, x - diagonal, 0.0)
            if KIND == "priors":
                tl.store(at + k * size, sum_of(tl.abs(difference)))
                tl.store(at + (4 + k) * size, sum_of(difference * difference))
            else:
                term = sum_of(tl.abs(difference) if KIND == "l1" else difference * difference)
                value += term * inverse(pairs(images, channels, rows, columns, k)) if MEAN_OF_PAIRS else term
    if KIND == "priors":
        tl.store(at + 8 * size, sum_of(x * x))
    else:
        tl.store(at + tl.arange(0, 1), value)


@triton.jit(do_not_specialize=["parts"])
def image_kernel(result, partial, parts, BLOCK: tl.constexpr):
    """Add up the parts of one sum of one image."""
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, parts, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial + program * parts + at, mask=at < parts, other=0.0)
    tl.store(result + program, tl.sum(total, 0))


@triton.jit(do_not_specialize=["images"])
def priors_kernel(tv_l1, tv_l2, l2, norms, sums, images, channels, rows, columns, BLOCK: tl.constexpr):
    """Compute the three losses and the norms from the sums of each image."""
    dtype: tl.constexpr = norms.dtype.element_ty
    l1 = tl.zeros([1], tl.float64)
    all_norms = tl.zeros([1], tl.float64)
    for k in tl.static_range(4):
        absolute = tl.zeros([BLOCK], tl.float64)
        squares = tl.zeros([BLOCK], tl.float64)
        for start in range(0, images, BLOCK):
            at = start + tl.arange(0, BLOCK)
            absolute += tl.load(sums + k * images + at, mask=at < images, other=0.0)
            squares += tl.load(sums + (4 + k) * images + at, mask=at < images, other=0.0)
        norm = tl.sqrt(tl.sum(squares, 0))
        tl.store(norms + k, norm.to(dtype))
        l1 += tl.sum(absolute, 0) * inverse(pairs(images, channels, rows, columns, k))
        all_norms += norm
    mean = tl.zeros([BLOCK], tl.float64)
    for start in range(0, images, BLOCK):
        at = start + tl.arange(0, BLOCK)
        of_image = tl.sqrt(tl.load(sums + 8 * images + at, mask=at < images, other=0.0))
        tl.store(norms + 4 + at, of_image.to(dtype), mask=at < images)
        mean += of_image
    one = tl.arange(0, 1)
    tl.store(tv_l1 + one, l1.to(dtype))
    tl.store(tv_l2 + one, all_norms.to(dtype))
    tl.store(l2, (tl.sum(mean, 0) / images).to(dtype))


@triton.jit(do_not_specialize=["images", "divisor"])
def variation_kernel(
    loss, norms, sums, images, divisor, ROOT: tl.constexpr, BY_IMAGE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute a total variation from the sum of each image."""
    dtype: tl.constexpr = loss.dtype.element_ty
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, images, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(sums + at, mask=at < images, other=0.0)
        if ROOT:
            value = tl.sqrt(value)
            tl.store(norms + at, value.to(dtype), mask=at < images)
        if BY_IMAGE:
            tl.store(loss + at, value.to(dtype), mask=at < images)
        total += value
    if BY_IMAGE == 0:
        tl.store(loss, (tl.sum(total, 0) / divisor).to(dtype))


@triton.jit
def slopes(
    x, start, stride, row, number, rows, length, step, linear, absolute, DOWN: tl.constexpr, RIGHT: tl.constexpr,
    LINEAR: tl.constexpr, ABSOLUTE: tl.constexpr,
):  # fmt: skip
    """Return the derivatives of linear / 2 * d^2 + absolute * |d|, where d is the difference to one neighbour."""
    other, there = neighbour(start, stride, row, number, rows, length, step, DOWN, RIGHT)
    difference = x - other
    slope = tl.zeros_like(x)
    if LINEAR:
        slope += difference * linear
    if ABSOLUTE:
        slope += sign(difference) * absolute
    return tl.where(there, slope, 0.0)


@triton.jit(do_not_specialize=["eps"])
def gradient_kernel(
    output, image, grad_l1, grad_l2, grad_norm, norms, eps, images, channels, rows, columns, planes, step, across,
    output_strides, strides, KIND: tl.constexpr, DIRECTIONS: tl.constexpr, REDUCTION: tl.constexpr,
    ROWS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a tile. A total variation's incoming gradient is the first of three."""
    plane, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start, row, number = tile_of(image, strides, plane, planes, block, across, ROWS, NUMBERS)
    stride, length = strides[2], columns * step
    x, inside = neighbour(start, stride, row, number, rows, length, step, 0, 0)
    dtype: tl.constexpr = x.dtype
    LINEAR: tl.constexpr = (grad_l2 is not None) if KIND == "priors" else (KIND != "l1")
    ABSOLUTE: tl.constexpr = (grad_l1 is not None) if KIND == "priors" else (KIND == "l1")
    here = plane // planes
    scale = tl.full([], 1.0, tl.float64)
    if KIND != "priors":
        scale = tl.load(grad_l1 + here * (REDUCTION == "none")).to(tl.float64)
        if REDUCTION == "mean" and (KIND == "l2" or KIND == "isotropic"):
            scale /= images
        if KIND == "l2":
            scale *= inverse(tl.load(norms + here).to(tl.float64))
    gradient = tl.zeros_like(x)
    if KIND == "isotropic":
        # A pixel contributes to its own term and to those of its left and its upper neighbour.
        smooth = scalar_of(eps, dtype)
        right, has_right = neighbour(start, stride, row, number, rows, length, step, 0, 1)
        below, has_below = neighbour(start, stride, row, number, rows, length, step, 1, 0)
        left, has_left = neighbour(start, stride, row, number, rows, length, step, 0, -1)
        left_below, has_left_below = neighbour(start, stride, row, number, rows, length, step, 1, -1)
        above, has_above = neighbour(start, stride, row, number, rows, length, step, -1, 0)
        above_right, has_above_right = neighbour(start, stride, row, number, rows, length, step, -1, 1)
        dx, dy, extent = isotropic_term(x, right, has_right, below, has_below, smooth)
        gradient += (dx + dy) * inverse(extent)
        dx, _, extent = isotropic_term(left, x, has_left, left_below, has_left_below, smooth)
        gradient -= dx * inverse(extent)
        _, dy, extent = isotropic_term(above, above_right, has_above_right, x, has_above, smooth)
        gradient = (gradient - dy * inverse(extent)) * scale.to(dtype)
    else:
        for k in tl.static_range(DIRECTIONS):
            linear, absolute = scale, scale
            if KIND == "priors":
                if grad_l1 is not None:
                    weight = inverse(pairs(images, channels, rows, columns, k))
                    absolute = tl.load(grad_l1).to(tl.float64) * weight
                if grad_l2 is not None:
                    linear = tl.load(grad_l2).to(tl.float64) * inverse(tl.load(norms + k).to(tl.float64))
            elif KIND != "l2":
                linear = scale * 2.0
                if REDUCTION == "mean":
                    weight = inverse(pairs(images, channels, rows, columns, k))
                    linear, absolute = linear * weight, absolute * weight
            by, at = linear.to(dtype), absolute.to(dtype)
            gradient += slopes(
                x, start, stride, row, number, rows, length, step, by, at, 0 if k == 0 else (-1 if k == 2 else 1),
                0 if k == 1 else 1, LINEAR, ABSOLUTE,
            )  # fmt: skip
            gradient += slopes(
                x, start, stride, row, number, rows, length, step, by, at, 0 if k == 0 else (1 if k == 2 else -1),
                0 if k == 1 else -1, LINEAR, ABSOLUTE,
            )  # fmt: skip
    if KIND == "priors" and grad_norm is not None:
        by_norm = tl.load(grad_norm).to(tl.float64) * inverse(tl.load(norms + 4 + here).to(tl.float64)) / images
        gradient += x * by_norm.to(dtype)
    start, row, number = tile_of(output, output_strides, plane, planes, block, across, ROWS, NUMBERS)
    tl.store(start + row[:, None] * output_strides[2] + number[None, :], gradient, mask=inside)
