"""exp, expm1, log and log1p within about one unit in the last place, for fp32 and fp64, and their remainders.

The hardware's exp2 and log2 are off by several units, and lose all of them if a divergence cancels. The polynomials
are Chebyshev interpolants in higher precision.
"""

import triton
import triton.language as tl


@triton.jit
def exp_parts(x):
    """Return power, r and tail for x not below the lowest: e^x = power * (1 + r + tail), tail = e^r - 1 - r.

    power = 2^n, and r = x - n ln(2) is in [-ln(2)/2, ln(2)/2]. Adding 1.5 * 2^52 (2^23) rounds to an integer and
    leaves its bits in the low ones. The first part of ln(2) has few enough bits that its product with n is exact.
    """
    if x.dtype == tl.float64:
        shifted = x * 1.4426950408889634 + 6755399441055744.0
        n = shifted - 6755399441055744.0
        r = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10
        power = ((shifted.to(tl.int64, bitcast=True) << 52) + (1023 << 52)).to(tl.float64, bitcast=True)
        series = 2.0915442297780116e-09 * r + 2.5106274733573296e-08
        series = (series * r + 2.75572718102198e-07) * r + 2.755725283351691e-06
        series = (series * r + 2.4801587327007187e-05) * r + 0.00019841269876864356
        series = (series * r + 0.0013888888888883327) * r + 0.008333333333325544
        series = (series * r + 0.04166666666666667) * r + 0.1666666666666667
    else:
        shifted = x * 1.44269504 + 12582912.0
        n = shifted - 12582912.0
        r = (x - n * 0.693359375) - n * -2.12194440e-4
        power = ((shifted.to(tl.int32, bitcast=True) << 23) + (127 << 23)).to(tl.float32, bitcast=True)
        series = 0.0001989198063 * r + 0.001393454149
        series = (series * r + 0.008333310485) * r + 0.04166645556
        series = series * r + 0.1666666716
    return power, r, (series * r + 0.5) * (r * r)


@triton.jit
def bounded_below(x):
    """Raise x to the lowest value, where the bits of 2^n become 0; NaN stays NaN."""
    lowest: tl.constexpr = -709.0895657128241 if x.dtype == tl.float64 else -88.0296919
    return tl.where(x < lowest, lowest, x)


@triton.jit
def exp_nonpositive(x):
    """Return e^x for x <= 0; results below half the smallest normal number are 0."""
    power, r, tail = exp_parts(bounded_below(x))
    return power * (tail + r) + power


@triton.jit
def exp_differences(x):
    """Return, for x <= 0, e^x, e^x - 1, e^x - 1 - x, x e^x and x e^x - (e^x - 1), each accurate near 0.

    The third and the last are of second order: what remains of a divergence when its first-order terms cancel.
    """
    bounded = bounded_below(x)
    power, r, tail = exp_parts(bounded)
    excess = power * (tail + r)
    exp = excess + power
    expm1 = excess + (power - 1.0)
    near = power == 1.0
    rest = tl.where(near, tail, expm1 - x)
    product = bounded * exp
    product_rest = tl.where(near, x * x - tail * (1.0 - x), product - expm1)
    return exp, expm1, rest, product, product_rest


@triton.jit
def log_tail(f):
    """Return ln(1 + f) - f for sqrt(1/2) <= 1 + f < sqrt(2)."""
    s = f / (f + 2.0)
    z = s * s
    if f.dtype == tl.float64:
        series = (0.14644067424413199 * z + 0.15329464536713094) * z + 0.18182957719593876
        series = (series * z + 0.22222210183700977) * z + 0.28571428631861595
        series = (series * z + 0.39999999999886393) * z + 0.666666666666667
    else:
        series = (0.2960102558 * z + 0.3998831213) * z + 0.6666668653
    half_square = f * f * 0.5
    return s * (half_square + series * z) - half_square


@triton.jit
def exponent_of(x):
    """Return the integer k with sqrt(1/2) <= x / 2^k < sqrt(2), for positive, normal, finite x."""
    if x.dtype == tl.float64:
        k = (x.to(tl.int64, bitcast=True) - 0x3FE6A09E667F3BCD) >> 52
    else:
        k = (x.to(tl.int32, bitcast=True) - 0x3F3504F3) >> 23
    return k


@triton.jit
def power_of(k):
    """Return 2^k for an integer k, in the floating-point type of the same width."""
    if k.dtype == tl.int64:
        power = ((1023 + k) << 52).to(tl.float64, bitcast=True)
    else:
        power = ((127 + k) << 23).to(tl.float32, bitcast=True)
    return power


@triton.jit
def log_from(exponent, f):
    """Return k ln(2) + ln(1 + f), and the same minus f."""
    tail = log_tail(f)
    k = exponent.to(f.dtype)
    if f.dtype == tl.float64:
        high, low = k * 0.6931471803691238, k * 1.9082149292705877e-10
    else:
        high, low = k * 0.693359375, k * -2.12194440e-4
    return high + (f + (tail + low)), high + (tail + low)


@triton.jit
def log_quotient(a, b):
    """Return ln(a / b), accurate if a is near b; NaN if either is NaN."""
    quotient = a / b
    k = exponent_of(quotient)
    f = tl.where(k == 0, (a - b) / b, quotient * power_of(-k) - 1.0)
    return log_from(k, f)[0] + (quotient - quotient)


@triton.jit
def log1p_parts(x):
    """Return ln(1 + x) and ln(1 + x) - x for -1 < x < 2^126, each accurate near 0."""
    k = exponent_of(x + 1.0)
    inverse_power = power_of(-k)
    f = x * inverse_power + (inverse_power - 1.0)  # rounded once, and x itself near 0
    value, rest = log_from(k, f)
    return value, rest + (f - x)
