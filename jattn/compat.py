"""Attention in the spelling of other libraries."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jattn import algebra, checks, masks
from jattn.dispatch import attention, attention_weights, attention_with_lse
from jattn.implementations import Blockwise
from jattn.problem import operands
from jattn.scores import Bias, Dropout


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | Blockwise | None = None,
    return_residual: bool = False,
) -> Any:
    """Attends, called as `jax.nn.dot_product_attention` is: replacing the import is the whole migration.

        out = softmax(scale * q kᵀ + bias, masked) v

    It is `attention` in another spelling, and differs from jax.nn only in these:
      - a query that may attend to nothing gets 0 and no gradient (jax.nn: the mean of all values);
      - NaN or Inf in masked keys and values, and a bias of -inf, stay where they are (jax.nn: NaN everywhere);
      - the residual is float32 or wider and differentiable (jax.nn: the input dtype, no gradient);
      - float64 stays float64 (jax.nn: float32 sums);
      - memory is linear; any number of leading dims; V may differ from H;
      - nothing is cast: a bias that is not floating, negative windows and numbers for `is_causal` are refused.
    As in jax.nn, and unlike in `attention`, position t of the queries is position t of the keys also when T != S, so
    that `is_causal` is aligned at the top left: for decoding use `attention` with `q_offset`.

    Args:
      query: `[..., T, N, H]`. key: `[..., S, K, H]`. value: `[..., S, K, V]`.
      bias: broadcastable to `[..., N, T, S]`, added to the scaled logits.
      mask: bool, broadcastable to `[..., N, T, S]`, True where attending is allowed.
      scale: a number. None: 1/sqrt(H).
      is_causal: whether key position s is seen only from query positions t >= s.
      query_seq_lengths: `[B]` int, the rows at and past which are 0.
      key_value_seq_lengths: `[B]` int, the keys at and past which are not seen.
      local_window_size: (left, right), both inclusive; an int is both.
      implementation: None or "xla" choose; "dense", "blockwise" or a `jattn.Blockwise`.
      return_residual: whether to return the lse too.

    Returns:
      out `[..., T, N, V]`, or (out, lse `[..., T, N]`).

    Raises:
      ValueError, TypeError: as in `attention`.
    """
    allowed = algebra.as_mask(None if mask is None else checks.boolean("mask", mask))
    if not isinstance(is_causal, bool | np.bool_):
        raise TypeError(f"is_causal must be a bool, got {is_causal!r}")
    if is_causal:
        allowed = allowed & masks.Causal()
    if local_window_size is not None:
        allowed = allowed & _window(local_window_size)
    batch = jnp.shape(query)[:-3]
    lengths = dict(query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths)
    given = {name: checks.integer(name, length) for name, length in lengths.items() if length is not None}
    for name, length in given.items():
        if length.shape not in (batch, batch or (1,)):
            raise ValueError(f"{name} must be [B] = {list(batch) or [1]}, got shape {list(length.shape)}")
    if given:
        q, kv = (given[name].reshape(batch or (1,)) if name in given else None for name in lengths)
        allowed = allowed & masks.Lengths(q, kv)
    # Three axes are a batch of one, as in jax.nn: a bias or a mask may have an axis for it.
    batched = [jnp.expand_dims(a, 0) if getattr(a, "ndim", 0) == 3 else a for a in (query, key, value)]
    scores = () if bias is None else (Bias(checks.floating("bias", bias)),)
    chosen = None if implementation == "xla" else implementation
    out, lse = attention_with_lse(*batched, mask=allowed, scores=scores, scale=scale, q_offset=0, implementation=chosen)
    out, lse = (out, lse) if batch else (out[0], lse[0])
    return (out, lse) if return_residual else out


def _window(size: Any) -> masks.Mask:
    window = size if isinstance(size, tuple | list) else (size,) * 2
    if len(window) != 2:
        raise ValueError(f"local_window_size must be an int or (left, right), got {size!r}")
    for side in window:
        checks.count("local_window_size", side, optional=True)
    return masks.Window(*window)


def flax_attention_fn(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    promote_dtype: Any = None,
    is_causal: bool = False,
) -> jax.Array:
    """Attends, called as flax calls the `attention_fn` of its layers, linen and nnx.

        out = dropout(softmax(q kᵀ / sqrt(H) + bias, masked)) v

    It is `attention` in the words of flax's `dot_product_attention`, for training with dropout and for `decode=True`.
    The softmax is always taken in float32 or wider. A query that may attend to nothing gets 0 (flax: the mean).

    Args:
      query: `[..., T, N, H]`. key: `[..., S, K, H]`. value: `[..., S, K, V]`.
      bias: broadcastable to `[..., N, T, S]`, added to the scaled logits.
      mask: broadcastable to `[..., N, T, S]`, of any dtype, as flax makes them: attending is allowed where it is not 0.
      broadcast_dropout: whether all examples and heads drop the same weights.
      dropout_rng: a JAX random key; wanted where there is dropout.
      dropout_rate: 0 <= rate < 1.
      deterministic: whether nothing is dropped.
      dtype: of query, key and value, and so of the result. None: what theirs promote to.
      precision: None or the default of JAX.
      module: a module that is to keep the weights `[..., N, T, S]`, before dropout, as "attention_weights" among its
        intermediates. None: they are never formed.
      force_fp32_for_softmax: taken, and without effect.
      einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: None.
      promote_dtype: what promotes (query, key, value), as in nnx. None: as `dtype` says.
      is_causal: whether key position s is seen only from query positions t >= s.

    Returns:
      `[..., T, N, V]`.

    Raises:
      NotImplementedError: another precision, or products of the caller's own.
      ValueError, TypeError: as in `attention`; ValueError for dropout without a key.
    """
    _refuse(
        precision,
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )
    arrays = (promote_dtype or _promoted)(operands(query, key, value), dtype=dtype)
    allowed = algebra.as_mask(None if mask is None else checks.as_array("mask", mask) != 0)
    options: Any = dict(
        mask=allowed & masks.Causal() if is_causal else allowed,
        scores=() if bias is None else (Bias(checks.floating("bias", bias)),),
        q_offset=0,
    )
    if module is not None:
        _sow(module, attention_weights(*arrays[:2], **options).astype(arrays[0].dtype))
    if dropout_rate and not deterministic:
        options["dropout"] = _dropout(dropout_rate, dropout_rng, broadcast_dropout)
    return attention(*arrays, **options)


def _refuse(precision: Any, **products: Any) -> None:
    if precision not in (None, "default", "fastest", jax.lax.Precision.DEFAULT):
        raise NotImplementedError(
            f"precision must be None: say jax.default_matmul_precision({str(precision).lower()!r}) round the call"
        )
    for name, given in products.items():
        if given is not None:
            raise NotImplementedError(f"{name} must be None: attention takes its products itself, got {given!r}")


def _promoted(arrays: tuple[jax.Array, ...], dtype: Any) -> tuple[jax.Array, ...]:
    dtype = functools.reduce(jnp.promote_types, [a.dtype for a in arrays]) if dtype is None else dtype
    return tuple(a.astype(dtype) for a in arrays)


def _dropout(rate: float, key: jax.Array | None, shared: bool) -> Dropout:
    if key is None:
        raise ValueError(f"dropout_rate={rate} wants a dropout_rng, or deterministic=True")
    return Dropout(rate, key, shared=shared)


def _sow(module: Any, weights: jax.Array) -> None:
    """Keeps weights among the intermediates of a module of linen, which has a scope, or of nnx."""
    kind = "intermediates" if hasattr(module, "scope") else importlib.import_module("flax.nnx").Intermediate
    module.sow(kind, "attention_weights", weights)
