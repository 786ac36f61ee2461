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


def softmax_loss(
    arrays, cotangent, *, kd_weight=1.0, ce_weight=0.0, temperature=1.0, divergence="forward_kl", beta=0.5, dim=-1,
    target_type="logits", label_smoothing=0.0, class_weight=None, position_weight=None, ignore_index_in="both",
    reduction="mean",
):  # fmt: skip
    """Return the loss with every option, and the gradients of student, teacher, and labels that are probabilities."""
    dim = dim % arrays[0].ndim
    s, t, *labels = (np.moveaxis(a, dim, -1) if a.ndim == arrays[0].ndim else a for a in arrays)
    classes, T = s.shape[-1], L(temperature)
    log_q, log_q1 = _log_softmax(s / T), _log_softmax(s)
    own = T if target_type == "logits" else L(1)
    with np.errstate(divide="ignore"):
        log_p = t / own if target_type != "probs" else np.log(t)
    if target_type == "logits" or divergence != "forward_kl":
        value, dq, dp = _divergence(divergence, log_q, _log_softmax(log_p), L(beta))
    else:
        p, ratio = np.exp(log_p), log_p - log_q
        value, dq, dp = (p * ratio).sum(-1), p.sum(-1, keepdims=True) * np.exp(log_q) - p, p * (ratio + 1)
    dp = dp / (t if target_type == "probs" else own)
    weight = np.ones(value.shape, dtype=L) if position_weight is None else np.asarray(position_weight, dtype=L)
    weights = np.ones(classes, dtype=L) if class_weight is None else np.asarray(class_weight, dtype=L)
    kept, by_label, soft = np.ones(value.shape, dtype=L), L(1), False
    target = np.zeros_like(s)
    if labels:
        soft = labels[0].dtype.kind == "f"
        if soft:
            target = labels[0]
        else:
            kept = (labels[0] != -100).astype(L)
            index = np.where(kept != 0, labels[0], 0)
            np.put_along_axis(target, index[..., None], 1, -1)
            by_label = weights[index]
    smoothed = weights * ((1 - L(label_smoothing)) * target + L(label_smoothing) / classes)
    ce = -(smoothed * log_q1).sum(-1)
    kd_counts = weight * kept if ignore_index_in == "both" else weight
    ce_counts = weight * kept
    divisors = {"none": (1, 1), "sum": (1, 1), "batchmean": (arrays[0].shape[0],) * 2,
                "mean": (kd_counts.sum(), (ce_counts * by_label).sum())}[reduction]  # fmt: skip
    kd_scale, ce_scale = L(kd_weight) * kd_counts / divisors[0], L(ce_weight) * ce_counts / divisors[1]
    loss = kd_scale * value + ce_scale * ce
    loss = loss if reduction == "none" else loss.sum()
    kd_scale, ce_scale = (kd_scale * cotangent)[..., None], (ce_scale * cotangent)[..., None]
    hard = smoothed.sum(-1, keepdims=True) * np.exp(log_q1) - smoothed
    gradients = [kd_scale * dq / T + ce_scale * hard, kd_scale * dp]
    if soft:
        gradients.append(-ce_scale * (1 - L(label_smoothing)) * weights * log_q1)
    return [loss] + [np.moveaxis(g, -1, dim) for g in gradients]


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


def topk_divergence(
    z, v, indices, cotangent, *, temperature=1.0, values_type="log_probs", target_logsumexp=None, tail="bucket",
    reverse=False, position_weight=None, reduction="mean",
):  # fmt: skip
    """Return loss and gradients of input, values and target_logsumexp in extended precision, outcome by outcome.

    The outcomes are the listed classes and one for the rest, whose logit is the log-sum-exp of its classes.
    """
    temperature, positions = L(temperature), z.shape[:-1]
    shape = z.shape[-1:], v.shape[-1:]
    z, v, indices = z.reshape(-1, *shape[0]), v.reshape(-1, *shape[1]), indices.reshape(-1, *shape[1])
    sums = np.zeros(len(z), L) if target_logsumexp is None else target_logsumexp.reshape(-1)
    weight = np.ones(len(z), L) if position_weight is None else position_weight.reshape(-1)
    divisor = {"mean": weight.sum(), "batchmean": L((*positions, 1)[0] if positions else shape[0][0])}.get(
        reduction, L(1)
    )
    scale = weight / divisor * (cotangent.reshape(-1) if reduction == "none" else cotangent)
    losses, by_z, by_v = np.zeros(len(z), L), np.zeros_like(z), np.zeros_like(v)
    for i in range(len(z)):
        kept = np.flatnonzero(v[i] != -np.inf)
        at = indices[i, kept]
        others = np.setdiff1d(np.arange(z.shape[1]), at)
        s = z[i] / temperature
        log_p = v[i, kept] / temperature - sums[i] if values_type == "logits" else v[i, kept]
        value, dz, dv = _of_outcomes(s, log_p, at, others, tail, reverse)
        losses[i] = weight[i] * value
        by_z[i] = scale[i] * dz / temperature
        by_v[i, kept] = scale[i] * dv
    loss = losses.reshape(positions) if reduction == "none" else losses.sum() / divisor
    by_sums = -by_v.sum(-1)
    if values_type == "logits":
        by_v = by_v / temperature
    return loss, by_z.reshape(*positions, *shape[0]), by_v.reshape(*positions, *shape[1]), by_sums.reshape(positions)


def _of_outcomes(s, log_p, at, others, tail, reverse):
    """Return the divergence of a row, T times its gradient by the logits, and that by log_p."""
    of = np.concatenate((at, others)) if tail != "renormalize" else at
    largest = s[of].max()
    log_total = largest + np.log(np.exp(s[of] - largest).sum())
    p, log_q = np.exp(log_p), s[at] - log_total
    if tail == "renormalize":
        log_p = log_p - np.log(p.sum())
        p = np.exp(log_p)
    q = np.exp(log_q)
    q_others = np.exp(s[others] - log_total) if tail != "renormalize" else np.zeros(len(others), L)
    q_rest, p_rest = q_others.sum(), max(L(0), 1 - p.sum())
    rest = tail == "bucket" and len(others) > 0
    dz = np.zeros_like(s)
    if not reverse:
        value = (p * (log_p - log_q)).sum()
        dv = p * (log_p - log_q + 1)
        mass = p.sum()
        if rest and p_rest > 0:
            ratio = np.log(p_rest / q_rest)
            value, dv, mass = value + p_rest * ratio, dv - p * (ratio + 1), L(1)
        dz[at] = mass * q - p
        dz[others] = q_others * (mass - (p_rest / q_rest if rest else 0))
    else:
        slope = log_q - log_p + 1
        value, dv = (q * (log_q - log_p)).sum(), -q
        rest_slope = L(0)
        if rest:
            value, rest_slope = value + q_rest * np.log(q_rest / p_rest), np.log(q_rest / p_rest) + 1
            dv = dv + p * q_rest / p_rest
        mean = (q * slope).sum() + q_rest * rest_slope
        dz[at], dz[others] = q * (slope - mean), q_others * (rest_slope - mean)
    if tail == "renormalize":
        dv = dv - p * dv.sum()
    return max(value, L(0)) if tail != "ignore" else value, dz, dv
