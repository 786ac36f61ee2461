"""The formulas in NumPy's 80-bit numbers, without torch: the truth for float64 results.

Each function takes the float64 inputs of a sample and the cotangents of the outputs, and returns the outputs and the
gradients of the differentiable inputs. Written from the textbook forms, independently of the reference.
"""

import numpy as np

L = np.longdouble
assert np.finfo(L).nmant >= 63, "these tests need a machine whose long double has 64 bits of mantissa"


def softmax_divergence(kind, arrays, cotangent, *, temperature=1.0, dim=-1, beta=0.5, reduction="mean", weights=(1, 0)):
    """Return the loss and the gradients of the student's and the teacher's logits; label -100 is ignored."""
    s, t, *labels = arrays
    dim = dim % s.ndim
    s, t = np.moveaxis(s, dim, -1), np.moveaxis(t, dim, -1)
    log_q, log_p = _log_softmax(s / L(temperature)), _log_softmax(t / L(temperature))
    value, dq, dp = _divergence(kind, log_q, log_p, L(beta))
    loss = L(weights[0]) * value
    grad_s, grad_t = L(weights[0]) / L(temperature) * dq, L(weights[0]) / L(temperature) * dp
    kept = np.ones(value.shape, dtype=bool)
    if labels:
        kept = labels[0] != -100
        index = np.where(kept, labels[0], 0)[..., None]
        log_softmax = _log_softmax(s)
        loss = loss - L(weights[1]) * np.take_along_axis(log_softmax, index, -1)[..., 0]
        hard = np.exp(log_softmax)
        np.put_along_axis(hard, index, _minus_others(hard, index), -1)
        grad_s = grad_s + L(weights[1]) * hard
    loss = np.where(kept, loss, 0)
    scale = np.where(kept, L(1), 0)
    if reduction != "none":
        batch = s.shape[0]
        divisor = {"mean": max(kept.sum(), 1), "sum": 1, "batchmean": batch}[reduction]
        loss, scale = loss.sum() / L(divisor), scale / L(divisor)
    scale = (scale * cotangent)[..., None]
    return [loss] + [np.moveaxis(g * scale, -1, dim) for g in (grad_s, grad_t)]


def _log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def _minus_others(probability, index):
    others = probability.copy()
    np.put_along_axis(others, index, 0, -1)
    return -others.sum(-1, keepdims=True)


def _through_softmax(probability, slope):
    slope = np.where(probability > 0, slope, 0)
    gradient = probability * (slope - (probability * slope).sum(-1, keepdims=True))
    return gradient - probability * gradient.sum(-1, keepdims=True)


def _kl(log_w, log_v):
    w = np.exp(log_w)
    return np.where(w > 0, w * (log_w - log_v) + (np.exp(log_v) - w), np.exp(log_v)).sum(-1)


def _divergence(kind, log_q, log_p, beta):
    q, p = np.exp(log_q), np.exp(log_p)
    if kind == "js" and beta in (0, 1):
        kind = "reverse_kl" if beta == 1 else "forward_kl"
    if kind == "forward_kl":
        dq = q - p
        return _kl(log_p, log_q), dq - q * dq.sum(-1, keepdims=True), _through_softmax(p, log_p - log_q)
    if kind == "reverse_kl":
        dp = p - q
        return _kl(log_q, log_p), _through_softmax(q, log_q - log_p), dp - p * dp.sum(-1, keepdims=True)
    if kind == "js":
        log_m = np.logaddexp(log_p + np.log(beta), log_q + np.log1p(-beta))
        value = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
        return value, (1 - beta) * _through_softmax(q, log_q - log_m), beta * _through_softmax(p, log_p - log_m)
    m = (p + q) / 2
    inside = [(x >= 0.01) & (x <= 0.99) for x in (q, p, m)]
    # The bounds are the float64 numbers nearest to 0.01 and 0.99, as in the published code.
    cq, cp, cm = (np.clip(x, L(0.01), L(0.99)) for x in (q, p, m))
    value = (cm * (np.log(cm) - (np.log(cp) + np.log(cq)) / 2)).sum(-1)
    through_m = inside[2] * (np.log(cm) + 1 - (np.log(cp) + np.log(cq)) / 2) / 2
    slopes = [through_m - i * cm / c / 2 for i, c in ((inside[0], cq), (inside[1], cp))]
    return value, _through_softmax(q, slopes[0]), _through_softmax(p, slopes[1])
