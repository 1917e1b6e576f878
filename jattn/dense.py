"""Attention with all scores at once: the plainest statement, and the fastest where there are few."""

import chex
import jax
import jax.numpy as jnp

from jattn import softmax
from jattn.problem import Problem


@jax.jit
def attend(problem: Problem) -> tuple[jax.Array, jax.Array]:
    """Attends with all scores `[*B, K, G, T, S]` in memory.

        out = softmax(mask(modifiers(scale * q kᵀ))) v

    Args:
      problem: q `[*B, K, G, T, 1, H]`, k `[*B, K, 1, 1, S, H]`, v `[*B, K, 1, 1, S, V]` and the rest of `Problem`.

    Returns:
      out `[*B, K, G, T, 1, V]` and lse `[*B, K, G, T, 1]`, in the dtype of the sums.
    """
    state = _run(problem)[0]
    out, lse = softmax.finish(state)
    return out[..., None, :], lse[..., None]


@jax.jit
def weights(problem: Problem) -> jax.Array:
    """Returns the weights `[*B, K, G, T, S]` by which `attend` sums the values.

    p_ts = factor_ts * exp(s_ts - lse_t)
    """
    state, s, keep, factor = _run(problem)
    lse = softmax.finish(state)[1][..., None]
    live = jnp.isfinite(lse) if keep is None else jnp.isfinite(lse) & keep
    p = jnp.where(live, jnp.exp(jnp.where(live, s - jnp.where(live, lse, 0), 0)), 0)
    return p if factor is None else p * factor.astype(p.dtype)


def _run(problem: Problem) -> tuple[softmax.Running, jax.Array, jax.Array | None, jax.Array | None]:
    V = problem.v.shape[-1]
    chex.assert_shape(problem.k, (*problem.v.shape[:-1], problem.q.shape[-1]))
    problem = problem.with_positions()
    keep = problem.keep()
    s, v = problem.scores(keep)
    chex.assert_shape(s, problem.sizes)
    start = softmax.start(s.shape[:-1], V, s.dtype, problem.sink_logits())
    factor = problem.factor()
    return softmax.update(start, s, v, keep, factor), s, keep, factor
