"""The linear maps round attention: rows to queries, keys and values, and heads back to rows."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jattn import checks
from jattn.params import Params


def project(params: Params, x: ArrayLike, context: ArrayLike | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Projects rows to queries, keys and values.

        q = x wq + bq,   k = c wk + bk,   v = c wv + bv,   c = x if context is None else context

    Sums are taken in float32 or wider; the results have the dtype of `x`.

    Args:
      params: `Params`, all of the dtype of `x`.
      x: `[..., T, D]` rows that ask.
      context: `[..., S, C]` rows that are asked (cross-attention), with the leading dims of `x`. None: `x`.

    Returns:
      query `[..., T, N, H]`, key `[..., S, K, H]`, value `[..., S, K, V]`.

    Raises:
      ValueError: shapes that do not agree, or K that does not divide N.
      TypeError: a dtype that is not real floating, or one that differs from that of `x`.
    """
    params, x, context = _checked(params, x, context)
    query = _affine("...td,dnh->...tnh", x, params.wq, params.bq)
    key = _affine("...sc,ckh->...skh", context, params.wk, params.bk)
    value = _affine("...sc,ckv->...skv", context, params.wv, params.bv)
    return query, key, value


def project_out(params: Params, heads: jax.Array, out_sharding: Any = None) -> jax.Array:
    """Joins the heads to rows, through the output projection where there is one.

        y = Σ_n heads_n wo_n + bo,   or the heads side by side when wo is None

    Args:
      params: `Params`.
      heads: `[..., T, N, V]`.
      out_sharding: how the result is to lie, in a mesh with explicit axes. None: its rows as those of `heads`, its
        width as that of `wo`.

    Returns:
      `[..., T, E]`, or `[..., T, N*V]` without an output projection.
    """
    if params.wo is None:
        return heads.reshape((*heads.shape[:-2], heads.shape[-2] * heads.shape[-1]), out_sharding=out_sharding)
    wo = jnp.asarray(params.wo)
    if out_sharding is None and jax.typeof(heads).sharding.mesh.explicit_axes:
        # Where heads are sharded their sum is taken over devices, and JAX asks where it shall lie.
        *rows, _, _ = jax.typeof(heads).sharding.spec
        width = jax.typeof(wo).sharding.spec[-1]
        out_sharding = jax.P(*rows, None if width in rows else width)
    return _affine("...tnv,nve->...te", heads, wo, params.bo, out_sharding)


def _affine(equation: str, x: jax.Array, w: jax.Array, b: jax.Array | None, out_sharding: Any = None) -> jax.Array:
    wide = checks.wide(x)
    y = jnp.einsum(equation, x, jnp.asarray(w), preferred_element_type=wide, out_sharding=out_sharding)
    if b is not None:
        b, sharding = jnp.asarray(b).astype(wide), jax.typeof(y).sharding
        if sharding.mesh.explicit_axes:
            b = jax.sharding.reshard(b, jax.P(*sharding.spec[y.ndim - b.ndim :]))
        y = y + jnp.expand_dims(b, range(y.ndim - b.ndim))
    return y.astype(x.dtype)


def _checked(params: Params, x: ArrayLike, context: ArrayLike | None) -> tuple[Params, jax.Array, jax.Array]:
    if not isinstance(params, Params):
        raise TypeError(f"params must be a jattn.Params (see jattn.init), got {type(params).__name__}")
    given = {f"params.{name}": array for name, array in params._asdict().items() if array is not None}
    given |= {"x": x} if context is None else {"x": x, "context": context}
    arrays = {name: checks.floating(name, array) for name, array in given.items()}
    for name, array in arrays.items():
        if array.dtype != arrays["x"].dtype:
            raise TypeError(
                f"{name} has dtype {array.dtype} but x has {arrays['x'].dtype}: cast one of them, "
                f"for instance jax.tree.map(lambda p: p.astype(x.dtype), params)"
            )
    params = params._replace(**{name.removeprefix("params."): a for name, a in arrays.items() if "." in name})
    x, context = arrays["x"], arrays.get("context", arrays["x"])
    for name, letters in (("wq", "D, N, H"), ("wk", "C, K, H"), ("wv", "C, K, V")):
        checks.rank(f"params.{name}", arrays[f"params.{name}"], letters)
    (D, N, H), (C, K, _), V = params.wq.shape, params.wk.shape, params.wv.shape[-1]
    checks.divides(K, N)
    size = dict(C=C, K=K, H=H, V=V, N=N, E=0 if params.wo is None else params.wo.shape[-1])
    for name, letters in dict(wk="CKH", wv="CKV", wo="NVE", bq="NH", bk="KH", bv="KV", bo="E").items():
        if f"params.{name}" in arrays:
            wanted = tuple(size[letter] for letter in letters)
            checks.shape(f"params.{name}", arrays[f"params.{name}"], ", ".join(letters), wanted)
    checks.rank("x", x, "..., T, D")
    checks.shape("x", x, "..., T, D", (*x.shape[:-1], D))
    checks.rank("context", context, "..., S, C")
    if "context" not in arrays and C != D:
        raise ValueError(f"params take a context of width C={C} but x has width D={D}: give context=")
    if context.shape != (*x.shape[:-2], context.shape[-2], C):
        raise ValueError(
            f"context must be [..., S, C={C}] with the leading dims of x, {x.shape[:-2]}, got shape {context.shape}"
        )
    return params, x, context
