"""One attention problem, checked and laid out: what every implementation takes.

Everything in it has one form, `[*B, K, G, T, S, ...]` with each axis full or 1, so that a block of the problem is the
same slice of everything and is again a problem.
"""

import functools
import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn import checks, masks, softmax
from jattn.scores import Dropout, Modifier, Sink, as_scores
from jattn.softmax import Running
from jattn.values import Interval, Value

_ValueT = TypeVar("_ValueT", bound=Value)


class Range(Value):
    """Positions start, start + 1, ...: known while tracing, so that blocks can be decided there."""

    start: int

    def array(self, size: int) -> Any:
        """The positions as int32 `[size]`, NumPy unless the size is symbolic."""
        return (np if isinstance(size, int) else jnp).arange(size, dtype=np.int32) + np.int32(self.start)


class Problem(NamedTuple):
    """Queries, keys and values in heads-first form, and what is to happen between them."""

    q: jax.Array  # [*B, K, G, T, 1, H]
    k: jax.Array  # [*B, K, 1, 1, S, H]
    v: jax.Array  # [*B, K, 1, 1, S, V]
    scale: jax.Array  # [*1, 1, 1, 1, 1]
    q_pos: jax.Array | Range  # [*B, 1, 1, T, 1]  int32
    kv_pos: jax.Array | Range  # [*B, 1, 1, 1, S]  int32
    mask: masks.Mask
    modifiers: tuple[Modifier, ...] = ()
    sink: Sink | None = None
    dropout: Dropout | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """(*B, K, G, T, S)"""
        return (*self.q.shape[:-2], self.k.shape[-2])

    def with_positions(self) -> "Problem":
        """Returns the problem with its positions as arrays."""
        T, S = self.sizes[-2:]
        ones = (1,) * (self.q.ndim - 3)
        q_pos = self.q_pos.array(T).reshape((*ones, T, 1)) if isinstance(self.q_pos, Range) else self.q_pos
        kv_pos = self.kv_pos.array(S).reshape((*ones, 1, S)) if isinstance(self.kv_pos, Range) else self.kv_pos
        return self._replace(q_pos=jnp.asarray(q_pos), kv_pos=jnp.asarray(kv_pos))

    def widened(self) -> "Problem":
        """Returns the problem with operands as wide as its sums, on a CPU, which multiplies nothing narrower faster."""
        if jax.default_backend() != "cpu":
            return self
        wide = checks.wide(self.q)
        return self._replace(q=self.q.astype(wide), k=self.k.astype(wide), v=self.v.astype(wide))

    def start(self) -> Running:
        """The running softmax before any key, for queries `[*B, K, G, T]`."""
        return softmax.start(self.sizes[:-1], self.v.shape[-1], checks.wide(self.q), self.sink_logits())

    def all_take_part(self) -> bool:
        """Whether it is known while tracing that every query attends to some key, and every key is attended to.

        What is looked at is the one at its own position or nearest to it, the first and the last: False is "not known".
        """
        T, S = self.sizes[-2:]
        static = isinstance(T, int) and isinstance(S, int) and T > 0 and S > 0 and not jax.tree.leaves(self.mask)
        if not static or not (isinstance(self.q_pos, Range) and isinstance(self.kv_pos, Range)):
            return False
        q_pos, kv_pos = self.q_pos.array(T), self.kv_pos.array(S)

        def surely(pairs: list[tuple[np.ndarray, np.ndarray]]) -> bool:
            verdicts = [Interval.of(self.mask(*map(Interval.of, pair))).lo for pair in pairs]
            return bool(np.all(functools.reduce(np.logical_or, verdicts)))

        def three(pos: np.ndarray, of: np.ndarray) -> list[np.ndarray]:
            return [np.clip(pos, of[0], of[-1]), of[:1], of[-1:]]

        asks = surely([(q_pos, key) for key in three(q_pos, kv_pos)])
        return asks and surely([(query, kv_pos) for query in three(kv_pos, q_pos)])

    def take(self, state: Running, keep: jax.Array | None, guard: bool) -> Running:
        """Takes the keys that `keep` allows (None: all) into the running softmax.

        Without `guard` all must take part, for then what takes none is not put to 0.
        """
        s, v = self.scores(keep if guard else None)
        return softmax.update(state, s, v, keep, self.factor())

    def keep(self) -> jax.Array | None:
        """Which scores count, `[*B, K, G, T, S]`; None for all."""
        if isinstance(self.mask, masks.Full):
            return None
        return jnp.broadcast_to(self.mask(self.q_pos, self.kv_pos), self.sizes)

    def scores(self, keep: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Returns the scores before the mask, `[*B, K, G, T, S]`, and the values, `[*B, K, S, V]`.

            s_gts = modifiers(scale * q_gt·k_s)

        float32 or wider. With `keep`, operands that take no part are 0, whatever they held.
        """
        q, k, v = self.q[..., 0, :], self.k[..., 0, 0, :, :], self.v[..., 0, 0, :, :]
        if keep is not None:
            q, k, v = masks.guard(keep, q, k, v)
        wide, scale = checks.wide(q), self.scale.astype(checks.wide(q))
        # Scaling narrow queries would round them once more. One axis of rows, G and T together: with two, XLA copies
        # the scores to sum over them.
        rows = (q * scale if q.dtype == wide else q).reshape((*q.shape[:-3], q.shape[-3] * q.shape[-2], q.shape[-1]))
        if softmax.are_few(rows.shape[-2]):  # XLA reads the keys faster when they come first
            s = jnp.swapaxes(jnp.einsum("...rh,...sh->...sr", rows, k, preferred_element_type=wide), -1, -2)
        else:
            s = jnp.einsum("...rh,...sh->...rs", rows, k, preferred_element_type=wide)
        s = s.reshape(self.sizes)
        s = s if q.dtype == wide else s * scale
        for modifier in self.modifiers:
            s = modifier(s, self.q_pos, self.kv_pos)
        return s, v

    def factor(self) -> jax.Array | None:
        """What dropout multiplies the weights by, `[*B, K, G, T, S]` or 1 for T; None for 1."""
        if self.dropout is None:
            return None
        kept = self.dropout(self.q_pos, self.kv_pos)
        return kept.astype(checks.wide(self.q)) / (1 - self.dropout.rate)

    def sink_logits(self) -> jax.Array | None:
        """The logits of the sink, `[*B, K, G, 1]`; None without."""
        return None if self.sink is None else self.sink.logits[..., 0].astype(checks.wide(self.q))


def lay_out(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    scores: Any = (),
    scale: Any = None,
    q_offset: Any = None,
    q_positions: Any = None,
    kv_positions: Any = None,
    dropout: Any = None,
) -> Problem:
    """Checks the arguments of `attention` and lays them out; see there for what they mean and what is refused."""
    query, key, value = checks.floating("query", query), checks.floating("key", key), checks.floating("value", value)
    checks.rank("query", query, "..., T, N, H")
    checks.rank("key", key, "..., S, K, H")
    checks.rank("value", value, "..., S, K, V")
    *batch, T, N, H = query.shape
    S, K = key.shape[-3:-1]
    V = value.shape[-1]
    _check_shape("key", key, "..., S, K, H", (*batch, S, K, H))
    _check_shape("value", value, "..., S, K, V", (*batch, S, K, V))
    checks.divides(K, N)
    G = N // K
    sizes = (*batch, K, G, T, S)
    mask, modifiers = masks.as_mask(mask), as_scores(scores)
    if dropout is not None and not isinstance(dropout, Dropout):
        raise TypeError(f"dropout must be a jattn.Dropout(rate, key) or None, got {dropout!r}")
    q_pos, kv_pos = _lay_out_positions(q_offset, q_positions, kv_positions, sizes)
    if T != S and q_offset is None and q_positions is None:
        _refuse_to_guess(mask, modifiers, T, S)
    if H == 0 and scale is None:
        raise ValueError("scale=None is 1/sqrt(H), and query has H=0: give scale=")
    scale = checks.as_array("scale", 1 / math.sqrt(H) if scale is None else scale)
    if scale.ndim or not (jnp.issubdtype(scale.dtype, jnp.floating) or jnp.issubdtype(scale.dtype, jnp.integer)):
        raise ValueError(f"scale must be one real number, got {scale.dtype}{list(scale.shape)}")
    wide = checks.wide(query, key, value)
    dtype = query.dtype if query.dtype == key.dtype == value.dtype else wide  # one for the operands of the products
    q = move(query.astype(dtype).reshape((*batch, T, K, G, 1, H)), -5, -3)
    k = move(key.astype(dtype).reshape((*batch, S, K, 1, 1, H)), -5, -2)
    v = move(value.astype(dtype).reshape((*batch, S, K, 1, 1, V)), -5, -2)
    sink = next((score for score in modifiers if isinstance(score, Sink)), None)
    return Problem(
        q=q,
        k=k,
        v=v,
        scale=scale.astype(wide).reshape((1,) * len(sizes)),
        q_pos=q_pos,
        kv_pos=kv_pos,
        mask=_fit("mask", mask, sizes),
        modifiers=tuple(_fit("scores", score, sizes) for score in modifiers if isinstance(score, Modifier)),
        sink=None if sink is None else _fit("scores", sink, sizes),
        dropout=None if dropout is None or dropout.rate == 0 else dropout.lay_out(sizes),
    )


def move(array: jax.Array, source: int, destination: int) -> jax.Array:
    """`jnp.moveaxis` with the axes of 1 left out of the transpose, except those in front of it (the batch).

    XLA drops a transpose that undoes the one before it, the caller's too, but not across axes of 1 that come between.
    """
    source, destination = source % array.ndim, destination % array.ndim
    order = list(range(array.ndim))
    order.insert(destination, order.pop(source))
    front = min(source, destination)
    bare = [a for a, size in enumerate(array.shape) if a < front or not (isinstance(size, int) and size == 1)]
    permutation = [bare.index(axis) for axis in order if axis in bare]
    array_bare = array.reshape([array.shape[axis] for axis in bare])
    if permutation != sorted(permutation):
        array_bare = array_bare.transpose(permutation)
    return array_bare.reshape([array.shape[axis] for axis in order])


def take_slice(array: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    """`lax.dynamic_slice_in_dim` within a loop, whose slices alone are widened when they are wanted wider.

    XLA has no narrow floats on a CPU. It widens what is sliced, and because that is the same array each time, it would
    do so before the loop; the barrier says that it is not.
    """
    if checks.is_narrow(array) and jax.default_backend() == "cpu":
        array, start = lax.optimization_barrier((array, start))
    return lax.dynamic_slice_in_dim(array, start, size, axis)


def _fit(name: str, value: _ValueT, sizes: tuple[Any, ...]) -> _ValueT:
    try:
        return value.lay_out(sizes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_shape(name: str, array: jax.Array, letters: str, sizes: tuple[Any, ...]) -> None:
    # Not left to chex: leading dims of 1 would broadcast, and the numbers be wrong.
    if array.shape != sizes:
        wanted = f"[{letters}] = {list(sizes)} to fit query [..., T, N, H] and its fellow"
        raise ValueError(f"{name} must be {wanted}, got shape {list(array.shape)}")


def _lay_out_positions(
    q_offset: Any, q_positions: Any, kv_positions: Any, sizes: tuple[int, ...]
) -> tuple[jax.Array | Range, jax.Array | Range]:
    *batch, _, _, T, S = sizes
    if q_offset is not None and q_positions is not None:
        raise ValueError("q_offset and q_positions say the same thing twice: give one of them")

    def spread(name: str, array: Any, own: tuple[int, ...], letters: str, tail: tuple[int, ...]) -> jax.Array:
        array = checks.integer(name, array)
        lead = array.shape[: array.ndim - len(own)]
        fits = array.shape[array.ndim - len(own) :] == own and len(lead) <= len(batch)
        if not fits or any(d not in (1, b) for d, b in zip(lead[::-1], batch[::-1], strict=False)):
            size = f" and {letters[-1]} = {own[0]}" if own else ""
            raise ValueError(f"{name} must be [{letters}] with ...={tuple(batch)}{size}, got shape {array.shape}")
        return array.reshape((1,) * (len(batch) - len(lead)) + lead + (1, 1, *tail))

    kv_pos = Range(0) if kv_positions is None else spread("kv_positions", kv_positions, (S,), "..., S", (1, S))
    if q_positions is not None:
        return spread("q_positions", q_positions, (T,), "..., T", (T, 1)), kv_pos
    if q_offset is None or (isinstance(q_offset, int | np.integer) and not isinstance(q_offset, bool)):
        return Range(int(q_offset or 0)), kv_pos
    offset = spread("q_offset", q_offset, (), "...", (1, 1))
    return offset + jnp.arange(T, dtype=jnp.int32).reshape((1,) * (len(sizes) - 2) + (T, 1)), kv_pos


def _refuse_to_guess(mask: masks.Mask, modifiers: tuple[Value, ...], T: int, S: int) -> None:
    ordered = [m for m in modifiers if getattr(m, "ordered", False)]
    if mask.is_ordered or ordered:
        culprit = f"mask={mask!r}" if mask.is_ordered else f"scores={ordered[0]!r}"
        raise ValueError(
            f"{culprit} compares query positions with key positions, and T={T} differs from S={S}: say where the "
            f"queries stand, with q_offset= (S - T, here {S - T}, when they are the last of the keys, as in decoding; "
            f"0 when both begin together) or q_positions="
        )
