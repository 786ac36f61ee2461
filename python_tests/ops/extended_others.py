"""The formulas of the other losses of softmax distributions in NumPy's 80-bit numbers; see extended.py."""

import numpy as np
from extended import _kl, _log_softmax, _through_softmax

L = np.longdouble


def results(case, arrays, cotangent):
    """Return the loss and the gradients of a case, given its eager function."""
    eager = case.eager.func.__name__
    formula = {"eager_decoupled": decoupled, "eager_normalized": normalized}.get(eager, pair)
    options = {"loss": "entropy"} if eager == "eager_entropy" else {}
    loss, *gradients = formula(arrays, cotangent, **options, **case.eager.keywords)
    return [loss] + [gradients[i] for i in case.differentiable]


def pair(
    arrays, cotangent, *, loss, temperature=1.0, alpha=0.1, dim=-1, target_type="logits", position_weight=None,
    reduction="mean",
):  # fmt: skip
    """Return a loss of both sides, and the gradients of both."""
    s, t = (np.moveaxis(a, dim, -1) for a in (arrays * 2)[:2])
    log_q = _log_softmax(s / L(temperature))
    given = {"logits": t / L(temperature), "log_probs": t, "probs": None}[target_type]
    given = np.log(t) if given is None else given
    own = {"logits": L(temperature), "log_probs": L(1), "probs": t}[target_type]
    log_p = given if loss == "soft_cross_entropy" and target_type != "logits" else _log_softmax(given)
    q, p = np.exp(log_q), np.exp(log_p)
    if loss == "soft_cross_entropy":
        value, by_s = -(p * log_q).sum(-1), p.sum(-1, keepdims=True) * q - p
        by_t = _through_softmax(p, -log_q) if target_type == "logits" else -p * log_q
    elif loss == "entropy":
        value = -(q * log_q).sum(-1)
        by_s, by_t = -q * (log_q + value[..., None]), np.zeros_like(p)
    elif loss == "total_variation_distance":
        value, sign = np.abs(p - q).sum(-1) / 2, np.sign(p - q) / 2
        by_s, by_t = _through_softmax(q, -sign), _through_softmax(p, sign)
    elif loss == "skew_kl":
        value, by_t, by_s = _skew(log_p, log_q, L(alpha))
    else:
        value, by_s, by_t = _skew(log_q, log_p, L(alpha))
    gradients = by_s / L(temperature), by_t / own
    return _reduced(value, gradients, cotangent, position_weight, reduction, dim)


def _skew(log_w, log_v, alpha):
    w, v = np.exp(log_w), np.exp(log_v)
    log_m = np.log(alpha * w + (1 - alpha) * v)
    by_w = log_w - log_m - alpha * np.exp(log_w - log_m)
    by_v = -(1 - alpha) * np.exp(log_w - log_m)
    return _kl(log_w, log_m), _through_softmax(w, by_w), _through_softmax(v, by_v)


def decoupled(
    arrays, cotangent, *, alpha=1.0, beta=8.0, temperature=4.0, dim=-1, position_weight=None, reduction="mean"
):
    """Return decoupled distillation, and the gradients of both sides."""
    T = L(temperature)
    s, t, at, kept = _with_labels(arrays, dim)
    (log_q, others_q), (log_p, others_p) = (_split(z / T, at) for z in (s, t))
    value = T**2 * (L(alpha) * _kl(log_p, log_q) + L(beta) * _kl(others_p, others_q))
    by_s = T * L(alpha) * _through_odds(np.exp(log_q) - np.exp(log_p), others_q, at)
    by_s = by_s + T * L(beta) * _over_others(np.exp(others_q) - np.exp(others_p), at)
    by_t = T * L(alpha) * _through_odds(_through_softmax(np.exp(log_p), log_p - log_q), others_p, at)
    by_t = by_t + T * L(beta) * _over_others(_through_softmax(np.exp(others_p), others_p - others_q), at)
    weight = kept if position_weight is None else kept * np.asarray(position_weight, dtype=L)
    return _reduced(value, (by_s, by_t), cotangent, weight, reduction, dim)


def normalized(arrays, cotangent, *, gamma=1.5, temperature=1.0, dim=-1, position_weight=None, reduction="mean"):
    """Return normalized distillation, and the gradients of both sides."""
    T = L(temperature)
    s, t, at, kept = _with_labels(arrays, dim)
    (log_q, plain_q), (log_p, plain_p) = (_split(z, at) for z in (s, t))
    others_q, others_p = (_split(z / T, at)[1] for z in (s, t))
    p, q = np.exp(log_p), np.exp(log_q)
    value = -p[..., 0] * log_q[..., 0] - L(gamma) * T**2 * (np.exp(others_p) * others_q).sum(-1)
    of_s, of_t = p[..., 0] * q[..., 1], p[..., 0] * p[..., 1] * log_q[..., 0]
    by_s = _through_odds(np.stack((-of_s, of_s), -1), plain_q, at)
    by_s = by_s + L(gamma) * T * _over_others(np.exp(others_q) - np.exp(others_p), at)
    by_t = _through_odds(np.stack((-of_t, of_t), -1), plain_p, at)
    by_t = by_t + L(gamma) * T * _over_others(_through_softmax(np.exp(others_p), -others_q), at)
    weight = kept if position_weight is None else kept * np.asarray(position_weight, dtype=L)
    return _reduced(value, (by_s, by_t), cotangent, weight, reduction, dim)


def _with_labels(arrays, dim):
    s, t = (np.moveaxis(a, dim, -1) for a in arrays[:2])
    kept = (arrays[2] != -100).astype(L)
    return s, t, np.where(kept != 0, arrays[2], 0)[..., None], kept


def _split(z, at):
    """Return the log-probabilities of the label and of the rest, and those of the others among themselves."""
    others = _without(z, at)
    largest = others.max(-1, keepdims=True)
    total = np.log(np.exp(others - largest).sum(-1, keepdims=True)) + largest
    return _log_softmax(np.concatenate((np.take_along_axis(z, at, -1), total), -1)), _log_softmax(others)


def _without(z, at):
    is_label = np.zeros(z.shape, dtype=bool)
    np.put_along_axis(is_label, at, True, -1)
    return z[~is_label].reshape(*z.shape[:-1], z.shape[-1] - 1)


def _over_others(gradient, at):
    """Put the gradients of the other classes where they belong, and 0 at the label."""
    result = np.zeros((*gradient.shape[:-1], gradient.shape[-1] + 1), dtype=L)
    is_label = np.zeros(result.shape, dtype=bool)
    np.put_along_axis(is_label, at, True, -1)
    result[~is_label] = gradient.reshape(-1)
    return result


def _through_odds(by_both, others, at):
    """Spread derivatives by the logits of the label and of the rest, which sum to 0, over all classes."""
    result = _over_others(np.exp(others) * by_both[..., 1:], at)
    np.put_along_axis(result, at, by_both[..., :1], -1)
    return result


def _reduced(value, gradients, cotangent, weight, reduction, dim):
    weight = np.ones(value.shape, dtype=L) if weight is None else np.asarray(weight, dtype=L)
    divisor = {"none": 1, "sum": 1, "batchmean": value.shape[0], "mean": weight.sum()}[reduction]
    scale = weight / divisor
    loss = scale * value if reduction == "none" else (scale * value).sum()
    scale = (scale * cotangent)[..., None]
    return [loss] + [np.moveaxis(np.where(scale == 0, 0, scale * g), -1, dim) for g in gradients]
