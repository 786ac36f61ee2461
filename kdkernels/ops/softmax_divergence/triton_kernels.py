"""The kernels of the softmax divergences, on tiles of positions times classes.

If the classes of a position fit in a tile, they are read once; otherwise twice, for the sums and for the terms, the
second time usually from the cache. The backward has the statistics of each position and reads everything once.
"""

import triton
import triton.language as tl

from kdkernels.ops._triton_launch import scalar_of
from kdkernels.ops._triton_numerics import exp_nonpositive, log1p_parts, log_quotient
from kdkernels.ops.softmax_divergence.triton_classes import (
    centre_of_rows,
    centre_of_sums,
    class_terms,
    direct_sides,
    jensen_shannon_total,
    log_ratio_of_sums,
    logit_ratio,
    through_softmax,
    to_sum,
)

SCALARS = ("temperature", "divergence_weight", "label_weight", "beta", "ignore_index")


@triton.jit
def rows_at(tensor, strides, position, inner, middle):
    """Return pointers to class 0 of positions, which have three dimensions: [outer, middle, inner].

    The strides are those of the classes, then of the dimensions from inner to outer.
    """
    run = position // inner
    offset = (run // middle) * strides[3] + (run % middle) * strides[2] + (position % inner) * strides[1]
    return (tensor + offset)[:, None]


@triton.jit
def store_tile(gradient, strides, position, inner, middle, class_at, mask, tile):
    """Store a tile; fp64 becomes 16 bits via fp32, since Triton's interpreter has no direct conversion."""
    if gradient.dtype.element_ty != tl.float64:
        tile = tile.to(tl.float32)
    tl.store(rows_at(gradient, strides, position, inner, middle) + class_at[None, :] * strides[0], tile, mask=mask)


@triton.jit
def load_tile(rows, stride, class_at, wanted, classes, dtype: tl.constexpr):
    """Load logits; outside the classes they are -inf, which has no mass."""
    mask = wanted[:, None] & (class_at < classes)[None, :]
    return tl.load(rows + class_at[None, :] * stride, mask=mask, other=float("-inf")).to(dtype)


@triton.jit
def options_of(temperature, beta, dtype: tl.constexpr):
    """Return 1 / temperature and beta, NaN if out of range."""
    t, b = scalar_of(temperature, tl.float64), scalar_of(beta, tl.float64)
    inverse = tl.where((t > 0.0) & (t < float("inf")), 1.0 / t, float("nan"))
    return inverse.to(dtype), tl.where((b >= 0.0) & (b <= 1.0), b, float("nan")).to(dtype)


@triton.jit
def labels_at(labels, position, valid, classes, ignore_index):
    """Return labels, which positions count, and which of those have a label that is no class."""
    label = tl.load(labels + position, mask=valid, other=0)
    kept = valid & (label != ignore_index)
    return label, kept, kept & ((label < 0) | (label >= classes))


@triton.jit
def probabilities(z_s, z_t, max_s, max_t, sum_s, sum_t, inverse_temperature):
    """Return q, p and ln(p / q)."""
    q = exp_nonpositive((z_s - max_s[:, None]) * inverse_temperature) * (1.0 / sum_s)[:, None]
    p = exp_nonpositive((z_t - max_t[:, None]) * inverse_temperature) * (1.0 / sum_t)[:, None]
    ratio = logit_ratio(z_s, z_t, max_s[:, None], max_t[:, None]) * inverse_temperature
    return q, p, ratio - log_ratio_of_sums(sum_t, sum_s)[:, None]


@triton.jit
def tile_sums(z, class_at, label, inverse_temperature, CROSS_ENTROPY: tl.constexpr):
    """Return the maximum of whole rows, the sum of the numerators, and the sum at T = 1 without the label."""
    highest = tl.max(z, 1)
    shifted = z - highest[:, None]
    others = tl.zeros_like(shifted)
    if CROSS_ENTROPY:
        others = tl.where(class_at[None, :] == label[:, None], 0.0, exp_nonpositive(shifted))
    return highest, tl.sum(exp_nonpositive(shifted * inverse_temperature), 1), tl.sum(others, 1)


@triton.jit
def row_sums(
    rows, stride, wanted, label, classes, inverse_temperature, dtype: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
    POSITIONS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Return :func:`tile_sums` of rows of any length in one pass: the sums move along when the maximum rises."""
    highest = tl.full([POSITIONS], float("-inf"), dtype)
    total = tl.zeros([POSITIONS, CLASSES], dtype)
    others = tl.zeros([POSITIONS, CLASSES], dtype)
    for start in range(0, classes, CLASSES):
        class_at = start + tl.arange(0, CLASSES).to(tl.int64)
        z = load_tile(rows, stride, class_at, wanted, classes, dtype)
        before, highest = highest, tl.maximum(highest, tl.max(z, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)  # a row of -inf so far has no mass, but is not NaN
        rise, shifted = before - base, z - base[:, None]
        total = total * exp_nonpositive(rise * inverse_temperature)[:, None]
        total += exp_nonpositive(shifted * inverse_temperature)
        if CROSS_ENTROPY:
            numerator = tl.where(class_at[None, :] == label[:, None], 0.0, exp_nonpositive(shifted))
            others = others * exp_nonpositive(rise)[:, None] + numerator
    return highest, tl.sum(total, 1), tl.sum(others, 1)


@triton.jit
def cross_entropy_of(label_logit, others):
    """Return ln((e^z + others) / e^z), z the label's logit minus the maximum; accurate for a certain student."""
    numerator = exp_nonpositive(label_logit)
    bounded = tl.where(numerator < 1e-30, 1e-30, numerator)  # else the quotient could overflow; plain is as exact
    plain = log_quotient(others + numerator, 1.0) - label_logit
    return tl.where(numerator > 1e-30, log1p_parts(others / bounded)[0], plain)


@triton.jit(do_not_specialize=[*SCALARS, "middle"])
def forward_kernel(
    loss, saved, student, teacher, labels, temperature, divergence_weight, label_weight, beta, ignore_index, positions,
    classes, inner, middle, student_strides, teacher_strides, KIND: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr, LOSS: tl.constexpr, SAVE: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
    POSITIONS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Compute the losses of some positions, or their sum and count, and the statistics that a backward needs.

    The kind "none" leaves out the divergence and does not read the teacher.
    """
    dtype: tl.constexpr = loss.dtype.element_ty
    position = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    valid = position < positions
    label, kept, misplaced = position, valid, valid
    if labels is not None:
        label, kept, misplaced = labels_at(labels, position, valid, classes, ignore_index)
    wanted = kept if ROWS else valid  # if positions are neighbours, gaps would cost more than they save
    inverse_temperature, b = options_of(temperature, beta, dtype)
    student_rows = rows_at(student, student_strides, position, inner, middle)
    class_at = tl.arange(0, CLASSES).to(tl.int64)

    if WHOLE:
        z_s = load_tile(student_rows, student_strides[0], class_at, wanted, classes, dtype)
        max_s, sum_s, others = tile_sums(z_s, class_at, label, inverse_temperature, CROSS_ENTROPY)
    else:
        max_s, sum_s, others = row_sums(
            student_rows, student_strides[0], wanted, label, classes, inverse_temperature, dtype, CROSS_ENTROPY,
            POSITIONS, CLASSES,
        )  # fmt: skip
    result = tl.zeros([POSITIONS], dtype)
    max_t, sum_t, centre_q, centre_p = result, result, result, result
    if KIND != "none":
        teacher_rows = rows_at(teacher, teacher_strides, position, inner, middle)
        direct_q, direct_p = direct_sides(b, KIND)
        if WHOLE:
            z_t = load_tile(teacher_rows, teacher_strides[0], class_at, wanted, classes, dtype)
            max_t, sum_t, _ = tile_sums(z_t, class_at, label, inverse_temperature, False)
            q, p, ratio = probabilities(z_s, z_t, max_s, max_t, sum_s, sum_t, inverse_temperature)
            value, by_q, by_p, far_q, far_p = class_terms(q, p, ratio, b, KIND)
            centre_q, centre_p = centre_of_rows(q, by_q, direct_q), centre_of_rows(p, by_p, direct_p)
        else:
            max_t, sum_t, _ = row_sums(
                teacher_rows, teacher_strides[0], wanted, label, classes, inverse_temperature, dtype, False,
                POSITIONS, CLASSES,
            )  # fmt: skip
            value = tl.zeros([POSITIONS, CLASSES], dtype)
            far_q, far_p = value, value
            q = tl.zeros([POSITIONS, CLASSES], tl.float64)
            p, from_q, from_p = q, q, q
            for start in range(0, classes, CLASSES):
                here = start + class_at
                z_s = load_tile(student_rows, student_strides[0], here, wanted, classes, dtype)
                z_t = load_tile(teacher_rows, teacher_strides[0], here, wanted, classes, dtype)
                tile_q, tile_p, ratio = probabilities(z_s, z_t, max_s, max_t, sum_s, sum_t, inverse_temperature)
                term, by_q, by_p, tile_far_q, tile_far_p = class_terms(tile_q, tile_p, ratio, b, KIND)
                value, q, p = value + term, q + tile_q, p + tile_p
                from_q, from_p = from_q + to_sum(tile_q, by_q, direct_q), from_p + to_sum(tile_p, by_p, direct_p)
                far_q, far_p = far_q + tile_far_q, far_p + tile_far_p
            centre_q = centre_of_sums(tl.sum(from_q, 1), tl.sum(q, 1), direct_q).to(dtype)
            centre_p = centre_of_sums(tl.sum(from_p, 1), tl.sum(p, 1), direct_p).to(dtype)
        divergence = tl.sum(value, 1)
        if KIND == "js" or KIND == "any_js":
            share_q, share_p = tl.sum(far_q, 1) / tl.sum(q, 1), tl.sum(far_p, 1) / tl.sum(p, 1)
            divergence = jensen_shannon_total(divergence, share_q.to(dtype), share_p.to(dtype), b)
        weight = scalar_of(divergence_weight, dtype)
        result = tl.where(weight == 0.0, 0.0, weight * divergence)

    if CROSS_ENTROPY:
        has_class = kept & (misplaced == 0)
        label_logit = tl.load(student_rows + label[:, None] * student_strides[0], mask=has_class[:, None], other=0.0)
        label_logit = tl.reshape(label_logit, [POSITIONS]).to(dtype) - max_s
        weight = scalar_of(label_weight, dtype)
        result += tl.where(weight == 0.0, 0.0, weight * cross_entropy_of(label_logit, others))
    result = tl.where(kept, result, 0.0)
    if labels is not None:
        result = tl.where(misplaced, float("nan"), result)

    if LOSS == "positions":
        tl.store(loss + position, result, mask=valid)
    elif LOSS == "sum":
        program = tl.program_id(0).to(tl.int64)
        tl.store(loss + program, tl.sum(result, 0))
        tl.store(loss + tl.num_programs(0) + program, tl.sum(kept.to(dtype), 0))
    if SAVE:
        tl.store(saved + position, max_s, mask=valid)
        tl.store(saved + positions + position, max_t, mask=valid)
        tl.store(saved + positions * 2 + position, sum_s, mask=valid)
        tl.store(saved + positions * 3 + position, sum_t, mask=valid)
        tl.store(saved + positions * 4 + position, others, mask=valid)
        tl.store(saved + positions * 5 + position, centre_q, mask=valid)
        tl.store(saved + positions * 6 + position, centre_p, mask=valid)


@triton.jit(do_not_specialize=["programs", "divisor"])
def reduce_kernel(loss, partial, programs, divisor, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Add the sums of all programs, in a fixed order, and divide by a number or by the count of kept positions."""
    total = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        total += tl.load(partial + at, mask=at < programs, other=0.0).to(tl.float64)
        if BY_COUNT:
            count += tl.load(partial + programs + at, mask=at < programs, other=0.0).to(tl.float64)
    if BY_COUNT:
        number = tl.maximum(tl.sum(count, 0), 1.0)
    else:
        number = scalar_of(divisor, tl.float64)
    tl.store(loss, (tl.sum(total, 0) / number).to(loss.dtype.element_ty))


@triton.jit(do_not_specialize=[*SCALARS, "divisor", "middle"])
def backward_kernel(
    student_gradient, teacher_gradient, grad_output, saved, student, teacher, labels, temperature, divergence_weight,
    label_weight, beta, divisor, ignore_index, positions, classes, inner, middle, student_strides,
    teacher_strides, student_gradient_strides, teacher_gradient_strides, KIND: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr, GRAD_BY_POSITION: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr,
    CLASSES: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a tile; a side that is None is left out."""
    dtype: tl.constexpr = saved.dtype.element_ty
    position = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    class_at = tl.program_id(1).to(tl.int64) * CLASSES + tl.arange(0, CLASSES).to(tl.int64)
    valid = position < positions
    label, kept, misplaced = position, valid, valid
    if labels is not None:
        label, kept, misplaced = labels_at(labels, position, valid, classes, ignore_index)
    wanted = kept if ROWS else valid
    inverse_temperature, b = options_of(temperature, beta, dtype)
    scale = tl.load(grad_output + position * GRAD_BY_POSITION, mask=valid, other=0.0).to(tl.float64)
    scale /= tl.maximum(scalar_of(divisor, tl.float64), 1.0)
    if labels is not None:
        scale = tl.where(misplaced, float("nan"), scale)

    student_rows = rows_at(student, student_strides, position, inner, middle)
    z_s = load_tile(student_rows, student_strides[0], class_at, wanted, classes, dtype)
    max_s = tl.load(saved + position, mask=valid, other=0.0)
    by_student = tl.zeros([POSITIONS, CLASSES], dtype)
    by_teacher = tl.zeros([POSITIONS, CLASSES], dtype)
    if KIND != "none":
        max_t = tl.load(saved + positions + position, mask=valid, other=0.0)
        sum_s = tl.load(saved + positions * 2 + position, mask=valid, other=1.0)
        sum_t = tl.load(saved + positions * 3 + position, mask=valid, other=1.0)
        centre_q = tl.load(saved + positions * 5 + position, mask=valid, other=0.0)
        centre_p = tl.load(saved + positions * 6 + position, mask=valid, other=0.0)
        teacher_rows = rows_at(teacher, teacher_strides, position, inner, middle)
        z_t = load_tile(teacher_rows, teacher_strides[0], class_at, wanted, classes, dtype)
        q, p, ratio = probabilities(z_s, z_t, max_s, max_t, sum_s, sum_t, inverse_temperature)
        _, by_q, by_p, _, _ = class_terms(q, p, ratio, b, KIND)
        direct_q, direct_p = direct_sides(b, KIND)
        t, weight = scalar_of(temperature, tl.float64), scalar_of(divergence_weight, tl.float64)
        soft = (scale * weight / t).to(dtype)[:, None]
        by_student = tl.where(weight == 0.0, 0.0, soft * through_softmax(q, by_q, centre_q[:, None], direct_q))
        by_teacher = tl.where(weight == 0.0, 0.0, soft * through_softmax(p, by_p, centre_p[:, None], direct_p))
    if CROSS_ENTROPY:
        has_class = kept & (misplaced == 0)
        label_logit = tl.load(student_rows + label[:, None] * student_strides[0], mask=has_class[:, None], other=0.0)
        others = tl.load(saved + positions * 4 + position, mask=valid, other=1.0)[:, None]
        total = others + exp_nonpositive(label_logit.to(dtype) - max_s[:, None])
        hard = tl.where(class_at[None, :] == label[:, None], -others, exp_nonpositive(z_s - max_s[:, None]))
        by_student += (scale * scalar_of(label_weight, tl.float64)).to(dtype)[:, None] / total * hard
    if labels is not None:
        # A label out of range makes the scale NaN, which a weight of 0 must not hide.
        by_student = tl.where(misplaced[:, None], float("nan"), by_student)
        by_teacher = tl.where(misplaced[:, None], float("nan"), by_teacher)
    by_student = tl.where(kept[:, None], by_student, 0.0)
    by_teacher = tl.where(kept[:, None], by_teacher, 0.0)

    mask = valid[:, None] & (class_at < classes)[None, :]
    if student_gradient is not None:
        store_tile(
            student_gradient, student_gradient_strides, position, inner, middle, class_at, mask, by_student
        )  # fmt: skip
    if teacher_gradient is not None:
        store_tile(
            teacher_gradient, teacher_gradient_strides, position, inner, middle, class_at, mask, by_teacher
        )  # fmt: skip
