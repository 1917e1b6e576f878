"""The layer: projections round attention."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jattn import checks
from jattn.dispatch import Choices, attention
from jattn.params import Params
from jattn.projection import project, project_out
from jattn.rotary import Rotary


def attend(
    params: Params,
    x: ArrayLike,
    context: ArrayLike | None = None,
    *,
    rotary: Rotary | None = None,
    out_sharding: Any = None,
    **options: Unpack[Choices],
) -> jax.Array:
    """Attends from rows to rows: the whole layer.

        y = heads(attention(x wq + bq, c wk + bk, c wv + bv)) wo + bo,   c = x if context is None else context

    Args:
      params: `Params`, from `init` or `from_matrices`.
      x: `[..., T, D]` rows that ask.
      context: `[..., S, C]` rows that are asked (cross-attention). None: `x`.
      **options: mask, scores, scale, key_scale, value_scale, q_offset, q_positions, kv_positions, dropout and
        implementation, as in `attention`.
      rotary: a `jattn.Rotary`, by which queries and keys are turned where `q_offset`, `q_positions` and `kv_positions`
        say that they stand. None: they are not.
      out_sharding: a `jax.P` or sharding, how the result is to lie in a mesh with explicit axes. None: its rows as
        those of `x`, its width as that of `wo`.

    Returns:
      `[..., T, E]`, or without an output projection the heads side by side, `[..., T, N*V]`.

    Raises:
      ValueError, TypeError: as in `project` and `attention`.
    """
    query, key, value = project(params, x, context)
    if rotary is not None:
        query, key = _turned(rotary, query, key, options)
    return project_out(params, attention(query, key, value, **options), out_sharding)


def _turned(rotary: Rotary, query: jax.Array, key: jax.Array, options: Choices) -> tuple[jax.Array, jax.Array]:
    """Queries and keys turned where they stand."""
    if not isinstance(rotary, Rotary):
        raise TypeError(f"rotary must be a jattn.Rotary or None, got {rotary!r}")
    q_positions, offset = options.get("q_positions"), options.get("q_offset")
    if q_positions is None and offset is not None:
        start = checks.integer("q_offset", offset)
        q_positions = start[..., None] + jnp.arange(query.shape[-3], dtype=jnp.int32)
    return rotary(query, q_positions), rotary(key, options.get("kv_positions"))


def context_vector(
    params: Params,
    x: ArrayLike,
    context: ArrayLike | None = None,
    *,
    rotary: Rotary | None = None,
    **options: Unpack[Choices],
) -> jax.Array:
    """Sums the attended rows into one vector.

        c = Σ_t attend(params, x)_t

    Sums are taken in float32 or wider.

    Args:
      params: `Params`. x: `[..., T, D]`. context: `[..., S, C]` or None. rotary, **options: as in `attend`.

    Returns:
      `[..., E]`, or `[..., N*V]` without an output projection.

    Raises:
      ValueError, TypeError: as in `attend`.
    """
    rows = attend(params, x, context, rotary=rotary, **options)
    return jnp.sum(rows, axis=-2, dtype=checks.wide(rows)).astype(rows.dtype)
