"""One attention problem, checked, its arrays in the caller's order with letters; and a block of it, which is computed.

logits = modifiers(scale * q·k)     keep = mask(q_pos, kv_pos)     Σ_s weight_s v_s
"""

import functools
import math
from typing import Any, NamedTuple, TypedDict, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jattn import algebra, checks, letters, scores, softmax
from jattn.intervals import Interval
from jattn.letters import KEYS, ROWS, Axes, Lettered, Order, lettered
from jattn.scores import Dropout, Modifier, Sink, as_scores
from jattn.softmax import Running
from jattn.target import Target
from jattn.values import Value

_ValueT = TypeVar("_ValueT", bound=Value)


class Options(TypedDict, total=False):
    """What may be said of a problem beside query, key and value; see `jattn.attention`."""

    mask: algebra.Mask | ArrayLike | None
    scores: tuple[Value, ...]
    scale: ArrayLike | None
    key_scale: ArrayLike | None
    value_scale: ArrayLike | None
    q_offset: ArrayLike | None
    q_positions: ArrayLike | None
    kv_positions: ArrayLike | None
    dropout: Dropout | None


class Range(Value):
    """Positions start, start + 1, ...: known while tracing, so that blocks can be decided there."""

    start: int

    def array(self, size: Any) -> Any:
        """Returns the positions as int32 `[size]`, NumPy unless the size is symbolic."""
        return (np if isinstance(size, int) else jnp).arange(size, dtype=np.int32) + np.int32(self.start)


class Problem(NamedTuple):
    """Queries, keys and values, and what is to happen between them. Arrays have letters; `fitted`, they are bare."""

    q: Any  # [*batch, T, K, G, H]
    k: Any  # [*batch, S, K, H]
    v: Any  # [*batch, S, K, V]
    scale: Any  # [] or [*batch, K, G], in the dtype of sums
    k_scale: Any  # [*batch, S, K], in the dtype of sums, or None
    v_scale: Any
    mask: algebra.Mask
    modifiers: tuple[Modifier, ...]
    sink: Sink | None
    dropout: Dropout | None
    q_pos: Any  # [*batch, T] int32, or a Range; these come last, so that a Range that becomes an array moves no leaf
    kv_pos: Any  # [*batch, S] int32, or a Range
    axes: Axes

    def with_positions(self) -> "Problem":
        """Returns the problem with its positions as arrays."""
        q_pos, kv_pos = self.q_pos, self.kv_pos
        if isinstance(q_pos, Range):
            q_pos = Lettered(jnp.asarray(q_pos.array(self.axes["T"])), "T")
        if isinstance(kv_pos, Range):
            kv_pos = Lettered(jnp.asarray(kv_pos.array(self.axes["S"])), "S")
        return self._replace(q_pos=q_pos, kv_pos=kv_pos)

    @property
    def wide(self) -> Any:
        """The dtype of sums, in which the scale is given."""
        return self.scale.array.dtype

    def with_operands(self, dtype: Any) -> "Problem":
        """Returns the problem with q, k and v of another dtype."""
        q, k, v = (a.replace(a.array.astype(dtype)) for a in (self.q, self.k, self.v))
        return self._replace(q=q, k=k, v=v)

    def whole(self, target: Target) -> "Block":
        """Returns the whole problem as one block."""
        problem = self.with_positions()
        if target.is_cpu:
            problem = problem.with_operands(problem.wide)
        return problem.block(target)

    def block(self, target: Target) -> "Block":
        """Returns the problem, which is a block of another, in the order in which it is computed."""
        order = self.order()
        return Block(letters.fitted(self, order), len(order.lead), target)

    def order(self) -> Order:
        """The order of a block's axes: several heads, then the rows, T and G together, then the keys."""
        lead = self.q.letters.replace("T", "").replace("G", "")
        return Order(lead, lead + ("TG" if "G" in self.q.letters else "T"))

    def all_take_part(self) -> bool:
        """Whether it is known while tracing that every query attends to some key, and every key is attended to.

        It looks at the key at the query's own position or nearest to it, at the first and at the last. False means
        that it is not known.
        """
        T, S = self.axes.shape("TS")
        static = isinstance(T, int) and isinstance(S, int) and T > 0 and S > 0 and not jax.tree.leaves(self.mask)
        if not static or not (isinstance(self.q_pos, Range) and isinstance(self.kv_pos, Range)):
            return False
        q_pos, kv_pos = self.q_pos.array(T), self.kv_pos.array(S)

        read = algebra.by_block(self.mask, Interval.of)

        def surely(pairs: list[tuple[np.ndarray, np.ndarray]]) -> bool:
            verdicts = [Interval.of(read(*map(Interval.of, pair))).lo for pair in pairs]
            return bool(np.all(functools.reduce(np.logical_or, verdicts)))

        def three(pos: np.ndarray, of: np.ndarray) -> list[np.ndarray]:
            return [np.clip(pos, of[0], of[-1]), of[:1], of[-1:]]

        asks = surely([(q_pos, key) for key in three(q_pos, kv_pos)])
        return asks and surely([(query, kv_pos) for query in three(kv_pos, q_pos)])


class Block(NamedTuple):
    """A block of a problem, or the whole, in the order in which it is computed.

    Rows are `[*lead, T, G]`, `lead` being the examples and key/value heads that are taken together and G going with the
    rows; axes of 1 may be missing, but not T. Scores are `[*rows, S]`.
    """

    at: Problem  # q [*rows, H], k [*lead, S, H], v [*lead, S, V]; all else broadcasts against [*rows, S]
    lead: int  # how many axes
    target: Target

    @property
    def wide(self) -> Any:
        """The dtype of sums."""
        return self.at.scale.dtype

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape of the rows."""
        return tuple(self.at.q.shape[:-1])

    def start(self) -> Running:
        """The running softmax before any key."""
        return softmax.start(self.rows, self.at.v.shape[-1], self.wide, self.sink_logits())

    def consume(self, state: Running, keep: jax.Array | None, guard: bool) -> Running:
        """Takes the keys that `keep` allows (None: all) into the running softmax.

        Args:
          guard: puts queries and keys that take no part to 0. Without it all must take part.
        """
        s, v = self.logits(keep if guard else None)
        factor = self.factor(keep if guard else None)
        return softmax.update(state, s, keep, lambda p: self.weigh(p if factor is None else p * factor, v))

    def keep(self) -> jax.Array | None:
        """Which scores count, bool, broadcastable to the scores; None for all."""
        if isinstance(self.at.mask, algebra.Full):
            return None
        keep: jax.Array = jnp.asarray(self.at.mask(self.at.q_pos, self.at.kv_pos))
        return keep if keep.ndim else jnp.broadcast_to(keep, (1,) * len(self.rows) + self.at.k.shape[-2:-1])

    def logits(self, keep: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Returns the logits before the mask, `[*rows, S]`, and the values, `[*lead, S, V]`.

            s_ts = modifiers(scale * k_scale_s * q_t·k_s)

        float32 or wider. With `keep`, operands that take no part are 0, whatever they held.
        """
        q, k, v = self.at.q, self.at.k, self.at.v
        if keep is not None:
            q, k, v = self._guarded(keep)
        common = checks.common(q, k, v)  # widened within the block: a narrow cache under wide queries stays narrow
        q, k, v = (x if x.dtype == common else x.astype(common) for x in (q, k, v))
        wide, scale = self.wide, self.at.scale
        # Scaling narrow queries would round them once more.
        s = self._product(q * scale if q.dtype == wide else q, k, wide)
        s = s if q.dtype == wide else s * scale
        if self.at.k_scale is not None:
            s = s * self._of_keys(self.at.k_scale, keep)
        for modifier in self.at.modifiers:
            s = modifier(s, self.at.q_pos, self.at.kv_pos)
        return s, v

    def weigh(self, p: jax.Array, v: jax.Array) -> jax.Array:
        """Sums values by weights: `[*rows, S]`, `[*lead, S, V]` -> `[*rows, V]`, in the dtype of the weights."""
        rows, S = self._as_one_axis(p.astype(v.dtype)), v.shape[-2]
        if self._are_few(rows) and isinstance(S, int) and S % 512 == 0:
            # Products of 512 keys each, because the sum of one product stays on one core.
            rows = rows.reshape((*rows.shape[:-1], S // 512, 512))
            parts = v.reshape((*v.shape[:-2], S // 512, 512, v.shape[-1]))
            sums = jnp.einsum("...rcs,...csv->...crv", rows, parts, preferred_element_type=p.dtype).sum(-3)
        else:
            sums = _dot(rows, v, -2, p.dtype)
        return sums.reshape((*self.rows, v.shape[-1]))

    def factor(self, keep: jax.Array | None = None) -> jax.Array | None:
        """What the weights are multiplied by before they meet the values, broadcastable to the scores; None for 1.

        That is dropout, and the scale of the values; with `keep`, 0 for those that take no part.
        """
        factor = None if self.at.v_scale is None else self._of_keys(self.at.v_scale, keep)
        if self.at.dropout is None:
            return factor
        kept = self.at.dropout(self.at.q_pos, self.at.kv_pos).astype(self.wide) / (1 - self.at.dropout.rate)
        return kept if factor is None else kept * factor

    def sink_logits(self) -> jax.Array | None:
        """The logits of the sink, broadcastable to the rows; None without."""
        if self.at.sink is None:
            return None
        logits: jax.Array = self.at.sink.logits.astype(self.wide)
        return logits[..., 0]

    def _guarded(self, keep: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Puts 0 for queries that may attend to nothing and for keys and values that nobody may attend to.

        They may hold NaN or Inf, and masking the scores is not enough: a weight of 0 times NaN is NaN, in the output
        and, through the other operand, in every gradient.
        """
        asks = keep.sum(-1, dtype=jnp.int32) > 0  # `any` along the last axis takes XLA twice as long on a CPU
        answers = self._answers(keep)

        def answering(x: jax.Array) -> jax.Array:
            # Turned round, as directions of keys travel (see `loops`): between a product and its transpose it costs.
            return jnp.swapaxes(jnp.where(answers[..., None, :], jnp.swapaxes(x, -1, -2), 0), -1, -2)

        return jnp.where(asks[..., None], self.at.q, 0), answering(self.at.k), answering(self.at.v)

    def _answers(self, keep: jax.Array, *, keepdims: bool = False) -> jax.Array:
        """Which keys some query of the block may attend to."""
        return keep.any(tuple(range(self.lead, keep.ndim - 1)), keepdims=keepdims)

    def _of_keys(self, scale: jax.Array, keep: jax.Array | None) -> jax.Array:
        """A scale of keys or values; with `keep`, 0 for those that nobody may attend to, whatever it held."""
        return scale if keep is None else jnp.where(self._answers(keep, keepdims=True), scale, 0)

    def _product(self, q: jax.Array, k: jax.Array, wide: Any) -> jax.Array:
        # One axis of rows, T and G together: with two, XLA copies the scores to sum over them.
        rows = self._as_one_axis(q)
        # Where rows are few, XLA reads the keys faster when they come first.
        s = jnp.swapaxes(_dot(k, rows, -1, wide), -1, -2) if self._are_few(rows) else _dot(rows, k, -1, wide)
        return s.reshape((*self.rows, k.shape[-2]))

    def _as_one_axis(self, x: jax.Array) -> jax.Array:
        """[*lead, T, G, ...] -> [*lead, T * G, ...]"""
        inner = self.rows[self.lead :]
        return x if len(inner) == 1 else x.reshape((*self.rows[: self.lead], inner[0] * inner[1], x.shape[-1]))

    def _are_few(self, rows: jax.Array) -> bool:
        """Whether a product has so few rows that what counts is how a CPU reads the other factor."""
        return self.target.is_cpu and isinstance(rows.shape[-2], int) and rows.shape[-2] <= 16


def _dot(a: jax.Array, b: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """Sums products over the last axis of `a` and an `axis` of `b`, the last or last but one, in `dtype`.

    The leading axes are in common; axes of 1 broadcast. An einsum would say it too, and take longer to trace.
    """
    lead = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (jnp.broadcast_to(x, (*lead, *x.shape[-2:])) if x.shape[:-2] != lead else x for x in (a, b))
    batch = tuple(range(len(lead)))
    over = (a.ndim - 1,), (axis % b.ndim,)
    return lax.dot_general(a, b, (over, (batch, batch)), preferred_element_type=dtype)


def operands(query: Any, key: Any, value: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns query, key and value as arrays; TypeError for one that is not real floating, keys and values of int8."""
    return checks.floating("query", query), checks.stored("key", key), checks.stored("value", value)


def lay_out(query: jax.Array, key: jax.Array, value: jax.Array, options: Options) -> Problem:
    """Checks the arguments of `attention` and gives them letters; see there for what they mean and what is refused."""
    checks.rank("query", query, "..., T, N, H")
    checks.rank("key", key, "..., S, K, H")
    checks.rank("value", value, "..., S, K, V")
    *batch, T, N, H = query.shape
    S, K = key.shape[-3:-1]
    V = value.shape[-1]
    _check_shape("key", key, "..., S, K, H", (*batch, S, K, H))
    _check_shape("value", value, "..., S, K, V", (*batch, S, K, V))
    checks.divides(K, N)
    axes = Axes.of(batch, K, N // K, T, S)
    mask, modifiers = algebra.as_mask(options.get("mask")), as_scores(options.get("scores", ()))
    dropout = options.get("dropout")
    if dropout is not None and not isinstance(dropout, Dropout):
        raise TypeError(f"dropout must be a jattn.Dropout(rate, key) or None, got {dropout!r}")
    q_pos, kv_pos = _positions(options, axes)
    if T != S and options.get("q_offset") is None and options.get("q_positions") is None:
        _refuse_to_guess(mask, modifiers, T, S)
    if any(options.get(name) is not None for name in ("q_positions", "kv_positions")):
        mask = algebra.placed(mask)
    scale = _scale(options.get("scale"), H)
    wide = checks.wide(query, key, value)
    k_scale, v_scale = (_stored_scale(name, x, options, axes, wide) for name, x in (("key", key), ("value", value)))
    sink = next((score for score in modifiers if isinstance(score, Sink)), None)
    q = query.reshape((*batch, T, K, N // K, H))
    return Problem(
        q=Lettered.bare(q, axes.batch + "TKG", ROWS, "T"),
        k=Lettered.bare(key, axes.batch + "SK", KEYS, "S"),
        v=Lettered.bare(value, axes.batch + "SK", KEYS, "S"),
        scale=lettered(scale.astype(wide), "N", axes, "scale"),
        k_scale=k_scale,
        v_scale=v_scale,
        mask=_lettered("mask", mask, axes),
        modifiers=tuple(_lettered("scores", m, axes) for m in modifiers if isinstance(m, Modifier)),
        sink=None if sink is None else _lettered("scores", sink, axes),
        dropout=None if dropout is None or dropout.rate == 0 else dropout.lettered(axes),
        q_pos=q_pos,
        kv_pos=kv_pos,
        axes=axes,
    )


def opened(options: Options, dtype: Any) -> Options:
    """Returns the options, with what their functions close over, of an enclosing trace, among their arrays.

    Args:
      dtype: of the scores.
    """
    mask = algebra.opened(algebra.as_mask(options.get("mask")))
    return {**options, "mask": mask, "scores": scores.opened(as_scores(options.get("scores", ())), dtype)}


def _lettered(name: str, value: _ValueT, axes: Axes) -> _ValueT:
    try:
        return value.lettered(axes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _scale(scale: Any, H: int) -> jax.Array:
    if H == 0 and scale is None:
        raise ValueError("scale=None is 1/sqrt(H), and query has H=0: give scale=")
    number = checks.as_array("scale", 1 / math.sqrt(H) if scale is None else scale)
    if not (jnp.issubdtype(number.dtype, jnp.floating) or jnp.issubdtype(number.dtype, jnp.integer)):
        raise TypeError(f"scale must be a real number or real numbers [..., N], got {number.dtype}{list(number.shape)}")
    return number


def _stored_scale(name: str, operand: jax.Array, options: Options, axes: Axes, wide: Any) -> Lettered | None:
    """What one of a key or value stands for, `[..., S, K]`; None if for itself."""
    given: Any = options.get(f"{name}_scale")
    if given is None:
        if not jnp.issubdtype(operand.dtype, jnp.floating):
            raise TypeError(f"{name} of {operand.dtype} needs {name}_scale=, what one of it stands for")
        return None
    array = checks.floating(f"{name}_scale", given)
    if array.ndim > len(axes.batch) + 2:
        raise ValueError(
            f"{name}_scale must be [..., S, K] with batch dims ...={axes.shape(axes.batch)}, got {array.shape}"
        )
    return lettered(array.astype(wide), "SK", axes, f"{name}_scale")


def _check_shape(name: str, array: jax.Array, spelled: str, sizes: tuple[Any, ...]) -> None:
    # Not left to chex: leading dims of 1 would broadcast, and the numbers be wrong.
    if array.shape != sizes:
        wanted = f"[{spelled}] = {list(sizes)} to fit query [..., T, N, H] and its fellow"
        raise ValueError(f"{name} must be {wanted}, got shape {list(array.shape)}")


def _positions(options: Options, axes: Axes) -> tuple[Lettered | Range, Lettered | Range]:
    q_offset, q_positions = options.get("q_offset"), options.get("q_positions")
    if q_offset is not None and q_positions is not None:
        raise ValueError("q_offset and q_positions say the same thing twice: give one of them")
    given = options.get("kv_positions")
    kv_pos = Range(0) if given is None else _given_positions("kv_positions", given, axes, "S")
    if q_positions is not None:
        return _given_positions("q_positions", q_positions, axes, "T"), kv_pos
    if q_offset is None or (isinstance(q_offset, int | np.integer) and not isinstance(q_offset, bool)):
        return Range(_held(int(q_offset or 0), axes["T"])), kv_pos
    offset = _given_positions("q_offset", q_offset, axes, "")
    if not isinstance(offset.array, jax.core.Tracer) and offset.array.size:
        _held(int(offset.array.max()), axes["T"])
    steps = jnp.arange(axes["T"], dtype=jnp.int32)
    lead = len(offset.letters)
    steps = jnp.expand_dims(steps, range(lead))
    last = np.iinfo(np.int32).max - steps  # stops there, and does not begin again below
    return Lettered(jnp.minimum(jnp.expand_dims(offset.array, lead), last) + steps, offset.letters + "T"), kv_pos


def _held(start: int, size: Any) -> int:
    """The first of several positions; ValueError where int32 does not hold them."""
    limits = np.iinfo(np.int32)
    if start < limits.min or start + (size if isinstance(size, int) else 1) - 1 > limits.max:
        raise ValueError(f"q_offset must leave the positions of T={size} queries within int32, got {start}")
    return start


def _given_positions(name: str, array: Any, axes: Axes, own: str) -> Lettered:
    """Positions `[*lead, *own]`, the lead aligned right with the batch."""
    array = checks.integer(name, array)
    batch, split = axes.shape(axes.batch), array.ndim - len(own)
    lead = array.shape[: max(split, 0)]
    fits = array.shape[max(split, 0) :] == axes.shape(own) and len(lead) <= len(batch)
    if not fits or any(d not in (1, b) for d, b in zip(lead[::-1], batch[::-1], strict=False)):
        spelled = "..., " + own if own else "..."
        size = f" and {own} = {axes[own]}" if own else ""
        raise ValueError(f"{name} must be [{spelled}] with ...={batch}{size}, got shape {array.shape}")
    return Lettered.bare(array, axes.batch[len(batch) - split :] + own, kept=own)


def _refuse_to_guess(mask: algebra.Mask, modifiers: tuple[Value, ...], T: int, S: int) -> None:
    ordered = [m for m in modifiers if getattr(m, "ordered", False)]
    if mask.is_ordered or ordered:
        culprit = f"mask={mask!r}" if mask.is_ordered else f"scores={ordered[0]!r}"
        raise ValueError(
            f"{culprit} compares query positions with key positions, and T={T} differs from S={S}: say where the "
            f"queries stand, with q_offset= (S - T, here {S - T}, when they are the last of the keys, as in decoding; "
            f"0 when both begin together) or q_positions="
        )
