"""The running softmax: attention over some of the keys as a triple (m, l, o), and how two of them make one.

    m = max_s s        l = Σ_s exp(s - m)        o = Σ_s exp(s - m) v_s

Triples over disjoint keys form a monoid, so keys can be taken in any grouping and order; `out = o / l` and
`lse = m + log l` come at the end. Milakov and Gimelshein, 2018 (arXiv:1805.02867).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jattn import checks


class Running(NamedTuple):
    """Attention over the keys seen so far."""

    m: jax.Array  # [..., T]     the greatest score, or the least finite number where there is none
    l: jax.Array  # [..., T]     the sum of the exponentials  # noqa: E741
    o: jax.Array  # [..., T, V]  the sum of the values, weighed by the exponentials


def least(dtype: Any) -> Any:
    """Returns the least finite number, which stands for -inf: -inf - -inf is nan, and it would trip jax_debug_infs."""
    return jnp.finfo(dtype).min


def start(shape: tuple[int, ...], V: int, dtype: Any, sink: jax.Array | None = None) -> Running:
    """The triple over no keys, for queries `shape`; or over a sink, a logit for each query, whose value is 0."""
    o = jnp.zeros((*shape, V), dtype)
    if sink is None:
        return Running(jnp.full(shape, least(dtype), dtype), jnp.zeros(shape, dtype), o)
    sink = jnp.broadcast_to(sink, shape)
    m = lax.stop_gradient(jnp.maximum(sink, least(dtype)))  # a sink of -inf is none
    return Running(m, jnp.exp(sink - m), o)


def update(
    state: Running,
    s: jax.Array,
    keep: jax.Array | None,
    weigh: Callable[[jax.Array], jax.Array],
) -> Running:
    """Takes in more keys.

        m' = max(m, max_s s)    l' = l e^(m-m') + Σ_s e^(s-m')    o' = o e^(m-m') + weigh(e^(s-m'))

    Args:
      state: for queries `[..., T]`.
      s: `[..., T, S]` logits.
      keep: bool, broadcastable to `s`: False keys do not count. None: all do.
      weigh: sums the values by weights, `[..., T, S]` to `[..., T, V]`.
    """
    lowest = least(s.dtype)
    highest = jnp.max(s if keep is None else jnp.where(keep, s, lowest), axis=-1, initial=lowest)
    m = lax.stop_gradient(jnp.maximum(state.m, highest))
    p = exponentials(s, m, keep)
    rescale = jnp.exp(state.m - m)
    return Running(m, state.l * rescale + p.sum(-1), state.o * rescale[..., None] + weigh(p))


def exponentials(s: jax.Array, m: jax.Array, keep: jax.Array | None = None) -> jax.Array:
    """Returns exp(s - m), `[..., T, S]`; 0 where `keep` is False."""
    # exp(-1e4) is 0; -inf would trip jax_debug_infs. Behind the subtraction: a row that keeps nothing has the least m.
    shifted = s - m[..., None]
    return jnp.exp(shifted if keep is None else jnp.where(keep, shifted, -1e4))


@jax.jit
def output(state: Running) -> jax.Array:
    """Returns out = o / l, `[..., T, V]`; 0 where no key was kept."""
    # (o / c)(c / l), c = l held constant: the derivative by l is then a product with out and not a sum over quotients,
    # for which XLA takes thirty times as long on a CPU.
    l = jnp.where(state.l == 0, 1, state.l)  # noqa: E741
    c = lax.stop_gradient(l)
    return jnp.einsum("...v,...->...v", state.o / c[..., None], c / l, precision=lax.Precision.HIGHEST)


@jax.jit
def log_sum_exp(state: Running) -> jax.Array:
    """Returns lse = m + log l, `[..., T]`; -inf where no key was kept."""
    live = state.l != 0  # and not > 0, which would take a nan for no key
    return jnp.where(live, state.m + jnp.log(jnp.where(live, state.l, 1)), -jnp.inf)


def merge(parts: Sequence[tuple[ArrayLike, ArrayLike]]) -> tuple[jax.Array, jax.Array]:
    """Joins the results of attention over disjoint keys into that over all of them.

        lse = log Σ_i exp(lse_i),   out = Σ_i exp(lse_i - lse) out_i

    Differentiable to any order, through `out` and `lse` of every part. A part with lse -inf holds nothing and sends
    no gradient; if all parts do, out is 0 and lse -inf. A `Sink` must be given to one of the parts only.

    Args:
      parts: pairs out `[..., T, N, V]`, lse `[..., T, N]` as `attention_with_lse` returns them (natural log), at least
        one.

    Returns:
      out and lse, as those of the first part.

    Raises:
      ValueError: no parts, or shapes that differ.
      TypeError: a dtype that is not real floating, or dtypes that differ.
    """
    if not isinstance(parts, Sequence) or not parts or any(len(part) != 2 for part in parts):
        raise ValueError(f"parts must be a sequence of at least one (out, lse) pair, got {parts!r}")
    outs = [checks.floating(f"parts[{i}] out", part[0]) for i, part in enumerate(parts)]
    lses = [checks.floating(f"parts[{i}] lse", part[1]) for i, part in enumerate(parts)]
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        checks.shape(f"parts[{i}] out", out, "..., T, N, V", outs[0].shape)
        checks.shape(f"parts[{i}] lse", lse, "..., T, N", outs[0].shape[:-1])
        if (out.dtype, lse.dtype) != (outs[0].dtype, lses[0].dtype):
            raise TypeError(
                f"parts must have one dtype for out and one for lse, got {[str(out.dtype) for out in outs]} "
                f"and {[str(lse.dtype) for lse in lses]}"
            )
    dtype = checks.wide(*outs, *lses)
    stacked = jnp.stack(lses).astype(dtype)
    holds = stacked != -jnp.inf
    # The double where: an lse of -inf must not reach the exponential, or its gradient is nan.
    finite = jnp.where(holds, stacked, 0)
    m = lax.stop_gradient(jnp.max(jnp.where(holds, stacked, least(dtype)), axis=0))
    weight = jnp.where(holds, jnp.exp(jnp.where(holds, finite - m[None], 0)), 0)
    held = jnp.where(holds[..., None], jnp.stack(outs).astype(dtype), 0)  # whatever is in a part that holds nothing
    total = Running(m, weight.sum(0), (weight[..., None] * held).sum(0))
    return output(total).astype(outs[0].dtype), log_sum_exp(total).astype(lses[0].dtype)
