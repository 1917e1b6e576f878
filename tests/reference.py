"""The oracle: attention in NumPy, float64, one head at a time. It shares no code with what it judges.

Letters as everywhere: T queries, S keys, N query heads, K key/value heads, H query/key width, V value width.
"""

import ml_dtypes
import numpy as np


def attention(q, k, v, *, keep=True, scores=(), scale=None, sink=None, dropout=1.0):
    """Returns out `[..., T, N, V]`, lse `[..., T, N]` and weights `[..., N, T, S]`.

    Args:
      q, k, v: `[..., T, N, H]`, `[..., S, K, H]`, `[..., S, K, V]`.
      keep: True where attending is allowed, broadcastable to `[..., N, T, S]`. A query without keys gets out 0 and lse
        -inf; queries and keys that take part in no pair may be NaN.
      scores: functions of (one head's score `[T, S]`, its index `(..., n)`), applied in order before the mask.
      sink: `[N]`, a logit per head that joins the denominator and the lse.
      dropout: multiplies the weights, broadcastable to `[..., N, T, S]`.
    """
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    *batch, T, N, H = q.shape
    S, K, V = v.shape[-3:]
    scale = 1 / np.sqrt(H) if scale is None else scale
    keep, dropout = (np.broadcast_to(a, (*batch, N, T, S)) for a in (keep, dropout))
    sink = np.full(N, -np.inf) if sink is None else np.asarray(sink, np.float64)
    out, lse, weights = np.zeros((*batch, T, N, V)), np.zeros((*batch, T, N)), np.zeros(keep.shape)

    for *b, n in np.ndindex(*batch, N):
        head, allowed = (*b, n), keep[*b, n]
        queries = np.where(allowed.any(1)[:, None], q[*b, :, n], 0.0)
        keys = np.where(allowed.any(0)[:, None], k[*b, :, n // (N // K)], 0.0)
        values = np.where(allowed.any(0)[:, None], v[*b, :, n // (N // K)], 0.0)

        score = scale * queries @ keys.T
        for function in scores:
            score = function(score, head)
        score = np.where(allowed, score, -np.inf)

        top = np.max(score, axis=1, initial=sink[n])
        shift = np.where(np.isneginf(top), 0.0, top)
        weight = np.exp(score - shift[:, None])
        total = weight.sum(1) + np.exp(sink[n] - shift)
        weights[head] = dropout[head] * weight / np.where(total == 0, 1.0, total)[:, None]
        out[*b, :, n] = weights[head] @ values
        with np.errstate(divide="ignore"):
            lse[*b, :, n] = shift + np.log(total)
    return out, lse, weights


def assert_within_budget(actual, exact, plain, again=None, slack=3.0):
    """Asserts that `actual` errs at most `slack` times as much as `plain` code at its precision, plus a rounding.

    The error of a scalar is one draw and not the largest of many, so plain code may be lucky with it: `again` is what
    the same code gives when it is compiled otherwise, and the worse of the two measures a scalar.
    """
    actual, exact, plain = (np.asarray(a) for a in (actual, exact, plain))
    if exact.ndim == 0 and again is not None:
        plain = max(plain, np.asarray(again), key=lambda drawn: abs(drawn.astype(np.float64) - exact))
    assert actual.shape == exact.shape == plain.shape, f"{actual.shape=} {exact.shape=} {plain.shape=}"
    assert actual.dtype == plain.dtype, f"{actual.dtype=} {plain.dtype=}"
    eps = float(ml_dtypes.finfo(plain.dtype).eps)
    actual, exact, plain = (a.astype(np.float64) for a in (actual, exact, plain))
    infinite = np.isinf(exact)
    np.testing.assert_array_equal(actual[infinite], exact[infinite])
    actual, exact, plain = (np.where(infinite, 0.0, a) for a in (actual, exact, plain))
    unit = eps * np.max(np.abs(exact), initial=0.0)
    budget = slack * (np.max(np.abs(plain - exact), initial=0.0) + unit)
    error = np.max(np.abs(actual - exact), initial=0.0)
    assert error <= budget, f"{error=:.2e} exceeds {budget=:.2e}"
