"""Attention in jax.numpy, the obvious way: the measure of rounding, and in float64 the source of exact derivatives.

It is itself checked against the NumPy oracle in test_reference.py, and imports nothing of jattn.
"""

import jax
import jax.numpy as jnp


def attention(q, k, v, *, keep=True, scores=(), scale=None, sink=None, dropout=None):
    """As `reference.attention`, for operands without NaN; a score function is called once, with the index `...`."""
    dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    narrow = q.dtype if q.dtype == k.dtype == v.dtype else dtype
    N, H = q.shape[-2:]
    K = k.shape[-2]
    scale = H**-0.5 if scale is None else scale
    k, v = (jnp.repeat(a, N // K, axis=-2).astype(dtype) for a in (k, v))

    score = scale * jnp.einsum("...tnh,...snh->...nts", q.astype(dtype), k)
    keep = jnp.broadcast_to(keep, score.shape)
    sink = jnp.full(N, -jnp.inf, dtype) if sink is None else jnp.asarray(sink, dtype)
    sink = jnp.broadcast_to(sink[:, None], score.shape[:-1])
    for function in scores:
        score = function(score, ...)

    top = jnp.maximum(jnp.max(jnp.where(keep, score, -jnp.inf), axis=-1, initial=-jnp.inf), sink)
    shift = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0.0, top))
    # The gradient of the branch not taken is multiplied by 0, and exp could make it inf there, hence two wheres.
    weight = jnp.where(keep, jnp.exp(jnp.where(keep, score - shift[..., None], 0.0)), 0.0)
    total = jnp.sum(weight, axis=-1) + jnp.exp(sink - shift)
    some = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, shift + jnp.log(some), -jnp.inf)
    weight = weight / some[..., None]
    if dropout is not None:
        weight = weight * jnp.asarray(dropout, dtype)
    if jax.default_backend() != "cpu":  # elsewhere products take both of their operands narrow
        weight = weight.astype(narrow).astype(dtype)
    return jnp.einsum("...nts,...snv->...tnv", weight, v).astype(q.dtype), jnp.swapaxes(lse, -1, -2)
