"""Attention with all scores at once: the plainest statement, and the fastest where there are few."""

import chex
import jax

from jattn import softmax
from jattn.problem import Problem
from jattn.softmax import Running


@jax.jit
def attend(problem: Problem) -> Running:
    """Attends with all scores `[*B, K, G, T, S]` in memory.

        m = max_s s        l = Σ_s exp(s - m)        o = Σ_s exp(s - m) v_s

    Args:
      problem: q `[*B, K, G, T, 1, H]`, k `[*B, K, 1, 1, S, H]`, v `[*B, K, 1, 1, S, V]` and the rest of `Problem`.

    Returns:
      m and l `[*B, K, G, T]`, o `[*B, K, G, T, V]`, in the dtype of the sums.
    """
    chex.assert_shape(problem.k, (*problem.v.shape[:-1], problem.q.shape[-1]))
    guard = not problem.all_take_part()  # which copies keys and values, all of them here
    problem = problem.with_positions().widened()
    return problem.take(problem.start(), problem.keep(), guard)


@jax.jit
def weights(problem: Problem) -> jax.Array:
    """Returns the weights by which attention sums the values, `[*B, K, G, T, S]`.

    p_ts = factor_ts * exp(s_ts - m_t) / l_t
    """
    problem = problem.with_positions().widened()
    keep = problem.keep()
    s, v = problem.scores(keep)
    state = softmax.update(problem.start(), s, v, keep)
    p = softmax.output(state._replace(o=softmax.exponentials(s, state.m, keep)))
    factor = problem.factor()
    return p if factor is None else p * factor
