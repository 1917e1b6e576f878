"""Score modifiers: what is done to the logits between `scale * q·k` and the mask, as values in the order given.

    logits = modifier_n(... modifier_1(scale * q·k) ...)          then the mask, then the softmax

A modifier is elementwise in (score, query position, key position) and in the arrays that it carries, which are sliced
with the block and never expanded; gradients land in them as they are. `Sink` is the one that adds a logit instead of
changing one, and `Dropout` acts on the weights behind the softmax.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

from jattn import checks, letters, values
from jattn.letters import Axes, Lettered
from jattn.values import Value


class Modifier(Value):
    """A map of scores. A subclass declares its fields and `__call__`."""

    ordered: ClassVar[bool] = True  # whether it compares query positions with key positions

    def __call__(self, score: jax.Array, q_pos: Any, kv_pos: Any) -> jax.Array:
        """Returns the changed scores.

        Args:
          score: `[..., T, ..., S]`, float32 or wider; the heads may stand on either side of T.
          q_pos: int32 `[..., T, ..., 1]`.
          kv_pos: int32 `[..., 1, ..., S]`.
        """
        raise NotImplementedError


class Bias(Modifier):
    """Adds an array: s + bias.

    Args:
      array: real floating, broadcastable to `[..., N, T, S]`; -inf masks. It is never expanded, and its gradient is
        summed over the axes along which it broadcasts.
    """

    array: Any
    axes: ClassVar[dict[str, str]] = {"array": "NTS"}
    ordered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _floating("Bias array", self.array)

    def __call__(self, score: jax.Array, q_pos: Any, kv_pos: Any) -> jax.Array:
        added: jax.Array = self.array.astype(score.dtype)
        return score + added


class SoftCap(Modifier):
    """Bounds the scores smoothly: cap * tanh(s / cap). Gemma 2, 2024 (arXiv:2408.00118).

    Args:
      cap: a positive float, or a floating array `[...]` or `[..., N]` that can be learned.
    """

    cap: Any
    axes: ClassVar[dict[str, str]] = {"cap": ""}
    ordered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.cap, int | float) and not isinstance(self.cap, bool):
            if not self.cap > 0 or math.isinf(self.cap):
                raise ValueError(f"SoftCap cap must be positive and finite, got {self.cap}")
        else:
            _floating("SoftCap cap", self.cap)

    def lettered(self, axes: Axes) -> "SoftCap":
        letters.refuse_two_readings("SoftCap cap", np.shape(self.cap), "N", axes)
        return super().lettered(axes)

    def __call__(self, score: jax.Array, q_pos: Any, kv_pos: Any) -> jax.Array:
        cap = jnp.asarray(self.cap, score.dtype)
        return cap * jnp.tanh(score / cap)


class ALiBi(Modifier):
    """Subtracts a slope times the distance: s - slope_n * |q_pos - kv_pos|. Press et al., 2022 (arXiv:2108.12409).

    Args:
      slopes: real floating `[..., N]`; `alibi_slopes(N)` are the published ones.
    """

    slopes: Any
    axes: ClassVar[dict[str, str]] = {"slopes": "N"}

    def __post_init__(self) -> None:
        _check_per_head("ALiBi slopes", self.slopes)

    def __call__(self, score: jax.Array, q_pos: Any, kv_pos: Any) -> jax.Array:
        slopes: jax.Array = self.slopes.astype(score.dtype)
        return score - slopes * jnp.abs(q_pos - kv_pos).astype(score.dtype)


def alibi_slopes(num_heads: int) -> jax.Array:
    """Returns the slopes published with ALiBi.

        slope_n = 2^(-8 n / N), n = 1 ... N

    for N a power of two; else those of the power of two below N, then every other one of twice that.
    Press et al., 2022 (arXiv:2108.12409).

    Args:
      num_heads: N, at least 1.

    Returns:
      `[N]` float32.
    """
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads must be a positive int, got {num_heads!r}")

    def geometric(n: int) -> list[float]:
        return [2 ** (-8 * i / n) for i in range(1, n + 1)]

    below = 2 ** int(math.log2(num_heads))
    return jnp.array(geometric(below) + geometric(2 * below)[::2][: num_heads - below], jnp.float32)


class RelativePosition(Modifier):
    """Adds a learned number for each bucket of distance: s + table[bucket(kv_pos - q_pos), n].

    Half of the buckets (of each direction, if bidirectional) are one distance each; the others widen
    logarithmically up to `max_distance`, behind which all distances share the last. Raffel et al., 2020, T5
    (arXiv:1910.10683).

    Args:
      table: real floating `[buckets, N]`.
      bidirectional: whether keys behind and before the query have buckets of their own. If not, keys after the query
        share the bucket of distance 0, as in T5's decoder.
      max_distance: the distance from which on all share a bucket.
    """

    table: Any
    bidirectional: bool = True
    max_distance: int = 128

    def __post_init__(self) -> None:
        checks.rank("RelativePosition table", _floating("RelativePosition table", self.table), "buckets, N")
        if not isinstance(self.bidirectional, bool):
            raise TypeError(f"RelativePosition bidirectional must be a bool, got {self.bidirectional!r}")
        one_way = self.table.shape[0] // 2 if self.bidirectional else self.table.shape[0]
        if one_way < 2 or (self.bidirectional and self.table.shape[0] % 2):
            raise ValueError(
                f"RelativePosition table must have at least 2 buckets for each direction and as many for both, "
                f"got [buckets, N] = {list(self.table.shape)} with bidirectional={self.bidirectional}"
            )
        if isinstance(self.max_distance, bool) or not isinstance(self.max_distance, int):
            raise TypeError(f"RelativePosition max_distance must be an int, got {self.max_distance!r}")
        if self.max_distance <= one_way // 2:
            raise ValueError(
                f"RelativePosition max_distance must be above {one_way // 2}, the distances that have "
                f"a bucket of their own, got {self.max_distance}"
            )

    def lettered(self, axes: Axes) -> "RelativePosition":
        buckets, N = self.table.shape
        heads = axes.shape("KG")
        if N not in (1, heads[0] * heads[1]):
            wanted = f"[buckets, N={heads[0] * heads[1]} or 1]"
            raise ValueError(f"RelativePosition table must be {wanted}, got shape {self.table.shape}")
        table = self.table.T.reshape((1, 1, buckets) if N == 1 else (*heads, buckets))
        return self.replace(table=Lettered.bare(table, "KG"))

    def bucket(self, distance: jax.Array, buckets: int) -> jax.Array:
        """Returns the bucket of each distance kv_pos - q_pos."""
        if self.bidirectional:
            buckets //= 2
            base = jnp.where(distance > 0, buckets, 0)
            distance = jnp.abs(distance)
        else:
            base = jnp.zeros_like(distance)
            distance = jnp.maximum(-distance, 0)
        exact = buckets // 2
        far = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(self.max_distance / exact)
        far = exact + (far * (buckets - exact)).astype(distance.dtype)
        return base + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))

    def __call__(self, score: jax.Array, q_pos: Any, kv_pos: Any) -> jax.Array:
        buckets = self.table.shape[-1]
        table = self.table.reshape((*self.table.shape[:-2], buckets))  # what it has for keys is an axis of 1
        bucket = self.bucket(kv_pos - q_pos, buckets)
        return score + jnp.take_along_axis(table.astype(score.dtype), bucket, axis=-1, mode="promise_in_bounds")


class Function(Modifier):
    """A map of one's own: fn(score, q_pos, kv_pos, params) -> score.

    Args:
      fn: elementwise in a float32 (or wider) score and int32 positions that broadcast against it, differentiable
        and finite, where the mask allows nothing too: 0 times a derivative of NaN is NaN. Equal functions do not
        recompile; a fresh lambda does.
      params: a pytree of arrays, which are differentiated.
      axes: which axes each array has behind its leading dims, which are the batch: some of "NTS", such as "N" for one
        number for each head, "" for one for each example; then a small letter for each axis of its own, such as "NTr".
        Blocks are cut from it, and come to `fn` as they broadcast against the score, their own axes last. One string
        for all, or a tree of them, as that of `params` or a part of it. None: it belongs to no axis and comes whole.
    """

    fn: Callable[..., Any]
    params: Any
    leaf_axes: tuple[str | None, ...]
    payload: ClassVar[tuple[str, ...]] = ("params",)

    def __init__(self, fn: Callable[..., Any], params: Any = (), *, axes: Any = None) -> None:
        if not callable(fn):
            raise TypeError(f"Function fn must be callable, fn(score, q_pos, kv_pos, params), got {fn!r}")
        self._set(fn=fn, params=params, leaf_axes=letters.letters_of_leaves(params, axes, "Function"))

    def of_axes(self) -> list[tuple[Any, str]]:
        return letters.leaves_of_axes(self.params, self.leaf_axes)

    def lettered(self, axes: Axes) -> "Function":
        return self.replace(params=letters.lettered_leaves(self.params, self.leaf_axes, axes, "Function params"))

    def __call__(self, score: jax.Array, q_pos: Any, kv_pos: Any) -> jax.Array:
        changed: jax.Array = self.fn(score, q_pos, kv_pos, self.params)
        if jnp.shape(changed) != score.shape or jnp.result_type(changed) != score.dtype:
            raise ValueError(
                f"Function scores must return {score.dtype}{list(score.shape)} as they came, "
                f"got {jnp.result_type(changed)}{list(jnp.shape(changed))}"
            )
        return changed


class _Opened(values.Opened, Modifier):
    """A modifier whose functions close over arrays being traced, these being among its own."""

    def __call__(self, score: jax.Array, q_pos: Any, kv_pos: Any) -> jax.Array:
        changed: jax.Array = self.filled(score, q_pos, kv_pos)
        return changed


class Sink(Value):
    """Adds one logit for each head to the denominator, a place for weight to go that holds no value.

        p_ts = exp(s_ts) / (exp(sink_n) + Σ_s' exp(s_ts')),   lse_t = log(exp(sink_n) + Σ_s exp(s_ts))

    A query that may attend to nothing gets output 0 and its lse is the sink. Xiao et al., 2023 (arXiv:2309.17453).

    Args:
      logits: real floating `[..., N]`.
    """

    logits: Any
    axes: ClassVar[dict[str, str]] = {"logits": "N"}

    def __post_init__(self) -> None:
        _check_per_head("Sink logits", self.logits)


class Dropout(Value):
    """Drops attention weights at random and rescales the others: p * keep / (1 - rate).

    `keep` is a pure function of (key, batch, head, query position, key position): the same in every implementation,
    at every block size, in the derivatives and under remat. It does not change the lse. Under `vmap` each example is
    a batch of its own: map the key too if they shall differ. So is each shard under `shard_map`: fold its index into
    the key.

    Args:
      rate: a float, 0 <= rate < 1.
      key: a JAX random key.
      shared: whether all examples and heads drop the same weights.
    """

    rate: float
    key: Any
    shared: bool = False
    axes: ClassVar[dict[str, str]] = {}
    payload: ClassVar[tuple[str, ...]] = ("key",)

    def __post_init__(self) -> None:
        if isinstance(self.rate, bool) or not isinstance(self.rate, int | float):
            raise TypeError(f"Dropout rate must be a Python float, got {self.rate!r}")
        if not 0 <= self.rate <= 1 - 2**-32:
            raise ValueError(f"Dropout rate must be 0 <= rate < 1, in steps of 2**-32, got {self.rate}")
        if not isinstance(self.shared, bool):
            raise TypeError(f"Dropout shared must be a bool, got {self.shared!r}")
        try:
            jax.eval_shape(jax.random.bits, self.key)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"Dropout key must be one JAX random key (jax.random.key(seed)), got {self.key!r}"
            ) from error

    def lettered(self, axes: Axes) -> "Dropout":
        """Returns the value with, for its key, two words for each batch element and head, `[*batch, K, G]` each.

        Or two for all of them, where these are shared.
        """
        *batch, K, G, _, _ = axes.sizes
        words = jax.random.bits(self.key, (2,), jnp.uint32)
        if self.shared:
            return self.replace(key=tuple(Lettered(word, "") for word in words))
        element = jnp.arange(math.prod(batch), dtype=jnp.uint32).reshape((*batch, 1, 1))
        head = jnp.arange(K * G, dtype=jnp.uint32).reshape((1,) * len(batch) + (K, G))
        both = _threefry(words[0], words[1], element, head)
        return self.replace(key=tuple(Lettered.bare(word, axes.letters[:-2]) for word in both))

    def __call__(self, q_pos: Any, kv_pos: Any) -> jax.Array:
        """Returns whether each weight stays, bool, in the shape of the scores."""
        bits, _ = _threefry(self.key[0], self.key[1], q_pos.astype(jnp.uint32), kv_pos.astype(jnp.uint32))
        stays: jax.Array = bits >= jnp.uint32(round(self.rate * 2**32))
        return stays


def as_scores(scores: Any) -> tuple[Value, ...]:
    """Returns `scores` as a tuple of modifiers and at most one Sink; TypeError or ValueError for anything else."""
    scores = (scores,) if isinstance(scores, Value) else scores
    if not isinstance(scores, tuple | list):
        raise TypeError(f"scores must be a tuple of modifiers of jattn.scores, got {type(scores).__name__}")
    for score in scores:
        if not isinstance(score, Modifier | Sink):
            raise TypeError(f"scores must hold modifiers of jattn.scores only, got {score!r}")
    if sum(isinstance(score, Sink) for score in scores) > 1:
        raise ValueError("scores may hold one Sink, got more: add their exponentials instead")
    return tuple(scores)


def opened(scores: tuple[Value, ...], dtype: Any) -> tuple[Value, ...]:
    """Returns the scores, with what their functions close over, of an enclosing trace, among their arrays.

    Args:
      dtype: of the scores.
    """
    dtypes = dtype, jnp.int32, jnp.int32
    return tuple(_Opened.of(score, dtypes) if isinstance(score, Modifier) else score for score in scores)


def _threefry(
    key_0: jax.Array, key_1: jax.Array, count_0: jax.Array, count_1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32, elementwise in broadcasting words. Salmon et al., 2011."""
    shape = jnp.broadcast_shapes(key_0.shape, key_1.shape, count_0.shape, count_1.shape)
    words = [jnp.broadcast_to(word, shape) for word in (key_0, key_1, count_0, count_1)]
    first, second = threefry2x32_p.bind(*words)
    return first, second


def _check_per_head(name: str, array: Any) -> None:
    checks.rank(name, _floating(name, array), "..., N")


def _floating(name: str, array: Any) -> Any:
    """`checks.floating`, but what only describes an array passes, for `explain`."""
    return array if isinstance(array, jax.ShapeDtypeStruct) else checks.floating(name, array)
