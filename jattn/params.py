"""The parameters of an attention layer: a NamedTuple of arrays, and the two ways to make one."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jattn import checks


class Params(NamedTuple):
    """The projections of attention; an absent one is None, so `jax.tree` sees only arrays.

    C is the width of the context, which is D in self-attention.
    """

    wq: jax.Array  # [D, N, H]
    wk: jax.Array  # [C, K, H]
    wv: jax.Array  # [C, K, V]
    wo: jax.Array | None = None  # [N, V, E]
    bq: jax.Array | None = None  # [N, H]
    bk: jax.Array | None = None  # [K, H]
    bv: jax.Array | None = None  # [K, V]
    bo: jax.Array | None = None  # [E]


def init(
    key: jax.Array,
    embed_dim: int,
    *,
    num_heads: int = 1,
    num_kv_heads: int | None = None,
    qk_dim: int | None = None,
    v_dim: int | None = None,
    out_dim: int | None = None,
    context_dim: int | None = None,
    use_bias: bool = False,
    dtype: Any = jnp.float32,
) -> Params:
    """Draws the parameters of an attention layer.

        w ~ Uniform(-a, a),   a = sqrt(6 / (fan_in + fan_out)),   b = 0

    with each projection seen as one matrix over all its heads, so that fan_out of `wq` is N*H.
    Glorot and Bengio, 2010.

    Args:
      key: a JAX random key; it is consumed.
      embed_dim: D, the width of `x`.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads; K divides N (1 is multi-query, N multi-head). None: N.
      qk_dim: H, the width of one query or key head. None: D // N, which must be exact.
      v_dim: V, the width of one value head. None: D // N, which must be exact.
      out_dim: E, the width of an output projection. None: no output projection.
      context_dim: C, the width of the context that keys and values are made from. None: D.
      use_bias: whether each projection adds a bias.
      dtype: a real floating dtype.

    Raises:
      ValueError: a size below 1, K that does not divide N, or N that does not divide D where D // N is asked for.
      TypeError: a dtype that is not real floating.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    context_dim = embed_dim if context_dim is None else context_dim
    sizes = dict(embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, context_dim=context_dim)
    _check_sizes(sizes | {n: s for n, s in dict(qk_dim=qk_dim, v_dim=v_dim, out_dim=out_dim).items() if s is not None})
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a real floating dtype, got {jnp.dtype(dtype)}")
    checks.divides(num_kv_heads, num_heads)
    if (qk_dim is None or v_dim is None) and embed_dim % num_heads:
        raise ValueError(
            f"embed_dim D={embed_dim} is not a multiple of num_heads N={num_heads}: give qk_dim and v_dim per head"
        )
    D, N, K, C = embed_dim, num_heads, num_kv_heads, context_dim
    H = D // N if qk_dim is None else qk_dim
    V = D // N if v_dim is None else v_dim
    key_q, key_k, key_v, key_o = jax.random.split(key, 4)
    glorot = functools.partial(_glorot, dtype)
    return Params(
        wq=glorot(key_q, D, N * H, (D, N, H)),
        wk=glorot(key_k, C, K * H, (C, K, H)),
        wv=glorot(key_v, C, K * V, (C, K, V)),
        wo=None if out_dim is None else glorot(key_o, N * V, out_dim, (N, V, out_dim)),
        bq=jnp.zeros((N, H), dtype) if use_bias else None,
        bk=jnp.zeros((K, H), dtype) if use_bias else None,
        bv=jnp.zeros((K, V), dtype) if use_bias else None,
        bo=jnp.zeros((out_dim,), dtype) if use_bias and out_dim is not None else None,
    )


def from_matrices(
    wq: ArrayLike,
    wk: ArrayLike,
    wv: ArrayLike,
    wo: ArrayLike | None = None,
    *,
    num_heads: int = 1,
    num_kv_heads: int | None = None,
    bq: ArrayLike | None = None,
    bk: ArrayLike | None = None,
    bv: ArrayLike | None = None,
    bo: ArrayLike | None = None,
) -> Params:
    """Makes parameters from matrices that multiply from the left, as a NumPy notebook and PyTorch write them.

        q = (wq xᵀ)ᵀ = x wqᵀ,   heads in order along the rows of wq

    Args:
      wq: `[N*H, D]` query projection.
      wk: `[K*H, C]` key projection.
      wv: `[K*V, C]` value projection.
      wo: `[E, N*V]` output projection, or None.
      num_heads: N.
      num_kv_heads: K, which divides N. None: N.
      bq: `[N*H]`, bk: `[K*H]`, bv: `[K*V]`, bo: `[E]` biases, each or None.

    Raises:
      ValueError: shapes that do not agree, rows that do not divide into heads, or `bo` without `wo`.
      TypeError: a dtype that is not real floating, or dtypes that differ.
    """
    N = num_heads
    K = N if num_kv_heads is None else num_kv_heads
    checks.divides(K, N)
    given = dict(wq=wq, wk=wk, wv=wv, wo=wo, bq=bq, bk=bk, bv=bv, bo=bo)
    arrays = {name: checks.floating(name, array) for name, array in given.items() if array is not None}
    for name, array in arrays.items():
        checks.rank(name, array, "out, in" if name.startswith("w") else "out")
        if array.dtype != arrays["wq"].dtype:
            raise TypeError(f"all arrays must have one dtype: wq is {arrays['wq'].dtype}, {name} is {array.dtype}")
    for name, heads in (("wq", N), ("wk", K), ("wv", K)):
        if arrays[name].shape[0] % heads:
            raise ValueError(f"{name} of shape {arrays[name].shape} has rows that do not divide into {heads} heads")
    (NH, D), C, KV = arrays["wq"].shape, arrays["wk"].shape[1], arrays["wv"].shape[0]
    H, V = NH // N, KV // K
    if bo is not None and wo is None:
        raise ValueError("bo was given without wo: a bias of the output projection needs the projection")
    E = arrays["wo"].shape[0] if wo is not None else 0
    size = {"D": D, "C": C, "E": E, "N*H": N * H, "K*H": K * H, "K*V": K * V, "N*V": N * V}
    letters = dict(wq="N*H, D", wk="K*H, C", wv="K*V, C", wo="E, N*V", bq="N*H", bk="K*H", bv="K*V", bo="E")
    for name, array in arrays.items():
        checks.shape(name, array, letters[name], tuple(size[product] for product in letters[name].split(", ")))
    by_head = dict(wq=(D, N, H), wk=(C, K, H), wv=(C, K, V), wo=(N, V, E), bq=(N, H), bk=(K, H), bv=(K, V), bo=(E,))
    return Params(**{name: array.T.reshape(by_head[name]) for name, array in arrays.items()})


def _check_sizes(sizes: dict[str, Any]) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive int, got {size!r}")


def _glorot(dtype: Any, key: jax.Array, fan_in: int, fan_out: int, shape: tuple[int, ...]) -> jax.Array:
    bound = math.sqrt(6 / (fan_in + fan_out))
    return jax.random.uniform(key, shape, dtype, -bound, bound)
