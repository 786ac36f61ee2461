"""Divergences between the softmax distributions of a student, q, and a teacher, p, class by class.

Sums over the classes give a divergence and one number for each side, ``centre``, from which the gradient at a class
follows without any other class. Which kind has which derivation is told in ``csrc/math/softmax_divergence.h``.
"""

import triton
import triton.language as tl

from kdkernels.ops._triton_numerics import exp_differences, log1p_parts, log_quotient


@triton.jit
def weighted(weight, value):
    """Return weight * value; a class without probability adds nothing, even if the value is infinite."""
    return tl.where(weight > 0.0, weight * value, weight)


@triton.jit
def difference_error(a, b, difference):
    """Return the rounding error of a - b, 0 if the difference is infinite."""
    b_part = a - difference
    error = (a - (difference + b_part)) + (b_part - b)
    return tl.where(error == error, error, 0.0)


@triton.jit
def logit_ratio(student, teacher, student_max, teacher_max):
    """Return (z_t - max z_t) - (z_s - max z_s), with rounding errors compensated, which dominate near 0."""
    offset = teacher_max - student_max
    difference = teacher - student
    error = difference_error(teacher, student, difference) - difference_error(teacher_max, student_max, offset)
    return (difference - offset) + error


@triton.jit
def log_ratio_of_sums(a, b):
    """Return ln(a / b), which changes its sign and nothing else where a and b are exchanged."""
    less = a < b
    log = log_quotient(tl.where(less, b, a), tl.where(less, a, b))
    return tl.where(less, -log, log)


@triton.jit
def kullback_leibler(q, p, log_ratio):
    """Return the terms of KL(p || q), each with q - p added, which sums to 0; and q - p.

    With r = ln(p/q) a term is p (e^-r - 1 + r) >= 0, of second order in r: errors that all r share cancel.
    """
    _, expm1, rest, _, product_rest = exp_differences(-tl.abs(log_ratio))
    p_larger = log_ratio > 0.0
    larger = tl.where(p_larger, p, q)
    value = weighted(larger, tl.where(p_larger, rest, product_rest))
    return value, weighted(larger, tl.where(p_larger, expm1, -expm1))


@triton.jit
def jensen_shannon(q, p, log_ratio, beta):
    """Return the terms of beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; the derivatives with
    respect to q and p; and q and p if the two are far apart, when a term counts down from the divergence's bound.
    """
    rest = 1.0 - beta
    log_beta, log_rest = log_quotient(beta, 1.0), log1p_parts(-beta)[0]
    p_larger = log_ratio > 0.0
    larger = tl.where(p_larger, p, q)
    weight = tl.where(p_larger, rest, beta)
    odds = tl.where(p_larger, rest / beta, beta / rest)
    log_odds = tl.where(p_larger, log_rest - log_beta, log_beta - log_rest)
    exp, expm1, _, product, product_rest = exp_differences(-tl.abs(log_ratio))
    y = weight * expm1
    far = exp < 0.0625
    log1p, log1p_rest = log1p_parts(tl.where(far, odds * exp, y))
    close = weight * product_rest - (y * y + log1p_rest * (y + 1.0))
    middle = weight * product - (y + 1.0) * log1p
    distant = weight * (product - exp * (log1p - log_odds)) - (1.0 - weight) * log1p
    value = tl.where(far, distant, tl.where(y > -0.25, close, middle))
    log_mean = log1p + tl.where(far, tl.where(p_larger, log_beta, log_rest), 0.0)  # ln(m / larger)
    by_p = beta * (tl.where(log_ratio < 0.0, log_ratio, 0.0) - log_mean)
    by_q = rest * (-tl.where(p_larger, log_ratio, 0.0) - log_mean)
    return weighted(larger, value), by_q, by_p, tl.where(far, q, 0.0), tl.where(far, p, 0.0)


@triton.jit
def jensen_shannon_total(value, far_q, far_p, beta):
    """Return the divergence from the sums; far_q and far_p are shares of the whole, exact near 1."""
    log_beta, log_rest = log_quotient(beta, 1.0), log1p_parts(-beta)[0]
    # The second part is 0 at beta = 1/2, where the result is symmetric to the last bit.
    of_p, of_q = beta * log_beta, (1.0 - beta) * log_rest
    return value - ((far_p + far_q) * of_p + far_q * (of_q - of_p))


@triton.jit
def clamped(x):
    """Return x clamped to [0.01, 0.99]; NaN stays NaN."""
    return tl.where(x < 0.01, 0.01, tl.where(x > 0.99, 0.99, x))


@triton.jit
def inside(x):
    """Return 1 where the clamp passes a gradient, including at its bounds, else 0."""
    return tl.where(clamped(x) == x, 1.0, 0.0).to(x.dtype)


@triton.jit
def clamped_jensen_shannon(q, p):
    """Return the terms of the published competition term, of clamped probabilities, and their derivatives."""
    m = (p + q) * 0.5
    clamped_q, clamped_p, clamped_m = clamped(q), clamped(p), clamped(m)
    gap = (log_quotient(clamped_m, clamped_p) + log_quotient(clamped_m, clamped_q)) * 0.5
    through_mean = inside(m) * (gap + 1.0) * 0.5
    by_q = through_mean - inside(q) * clamped_m / clamped_q * 0.5
    by_p = through_mean - inside(p) * clamped_m / clamped_p * 0.5
    return clamped_m * gap, by_q, by_p


@triton.jit
def terms_of(q, p, log_ratio, beta, KIND: tl.constexpr):
    """Return the term of each class, what the gradients of both sides are computed from, and the far q and p."""
    far_q, far_p = tl.zeros_like(q), tl.zeros_like(p)
    if KIND == "forward_kl":
        value, by_q = kullback_leibler(q, p, log_ratio)
        by_p = log_ratio
    elif KIND == "reverse_kl":
        value, by_p = kullback_leibler(p, q, -log_ratio)
        by_q = -log_ratio
    elif KIND == "js":
        value, by_q, by_p, far_q, far_p = jensen_shannon(q, p, log_ratio, beta)
    else:
        value, by_q, by_p = clamped_jensen_shannon(q, p)
    return value, by_q, by_p, far_q, far_p


@triton.jit
def class_terms(q, p, log_ratio, beta, KIND: tl.constexpr):
    """Return :func:`terms_of`; for "any_js", tell here whether beta is 0 or 1, which have separate formulas."""
    if KIND == "any_js":
        if beta == 0.0:
            value, by_q, by_p, far_q, far_p = terms_of(q, p, log_ratio, beta, "forward_kl")
        elif beta == 1.0:
            value, by_q, by_p, far_q, far_p = terms_of(q, p, log_ratio, beta, "reverse_kl")
        else:
            value, by_q, by_p, far_q, far_p = terms_of(q, p, log_ratio, beta, "js")
    else:
        value, by_q, by_p, far_q, far_p = terms_of(q, p, log_ratio, beta, KIND)
    return value, by_q, by_p, far_q, far_p


@triton.jit
def direct_sides(beta, KIND: tl.constexpr):
    """Tell for the sides q and p whether they sum differences of probabilities instead of derivatives."""
    if KIND == "any_js":
        of_q, of_p = beta == 0.0, beta == 1.0
    else:
        of_q, of_p = tl.full([1], KIND == "forward_kl", tl.int1), tl.full([1], KIND == "reverse_kl", tl.int1)
    return of_q, of_p


@triton.jit
def to_sum(probability, term, direct):
    """Return the summands of one side's centre in fp64, in which a product of two fp32 numbers is exact."""
    wide = term.to(tl.float64)
    return tl.where(direct, wide, weighted(probability.to(tl.float64), wide))


@triton.jit
def centre_of_sums(total, mass, direct):
    """Return the centre of one side: the sum of the differences, or the mean derivative."""
    return tl.where(direct, total, total / mass)


@triton.jit
def centre_of_rows(probability, term, direct):
    """Return the same for whole rows; the rounding error of the mean is found from the differences to it.

    If one class has nearly all the probability, its gradient is what remains of its derivative minus the mean.
    """
    mean = tl.sum(weighted(probability, term), 1)
    rest = tl.sum(weighted(probability, term - mean[:, None]), 1)
    exact = tl.where(mean == float("inf"), mean, mean + rest)
    return tl.where(direct, tl.sum(term, 1), exact)


@triton.jit
def through_softmax(probability, term, centre, direct):
    """Return T times the gradient of a logit.

    The terms of a direct side sum to 0 except for an error that all log-ratios share, which is removed. If the mean is
    infinite, the gradient is 0.
    """
    centred = tl.where(centre == float("inf"), 0.0, weighted(probability, term - centre))
    return tl.where(direct, term - probability * centre, centred)
