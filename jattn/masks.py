"""Masks: which key positions a query position may attend to, as values with an algebra.

A mask is a predicate of positions, `(q_pos, kv_pos) -> bool`, True where attending is allowed. It is written once and
read twice: with arrays of positions it is a boolean array; with intervals of positions (`intervals.Interval`) it tells
whether a whole block is empty, full or partial, without looking inside.

    Causal() & Window(255, 0)      both must allow            picture of Causal(), T = S = 4, queries downwards:
    Prefix(64) | Causal()          either may allow               █···
    ~Causal()                      the opposite                   ██··
                                                                  ███·
                                                                  ████

Arrays that masks carry have the batch dims in front, aligned right. One more leading dim than the batch has is the
heads. Arrays are dynamic: new arrays do not recompile. Integers in them, but ids of segments, are taken as int32 and
must fit in it. Ints are static: they decide while tracing which blocks are empty. Arrays decide it while running, on a
CPU, where examples and heads are gone through one by one, those of `vmap` too. Where several devices would have to
agree on it, a block is masked and not skipped.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jattn import checks, values
from jattn.intervals import Interval
from jattn.letters import Axes, Order, fitted
from jattn.values import Value

_INT32 = np.iinfo(np.int32)
_UNKNOWN = Interval(np.False_, np.True_)


class Mask(Value):
    """A predicate of positions. A subclass declares its fields and `__call__`; `& | ~` come from here."""

    ordered: ClassVar[bool] = True  # whether it compares query positions with key positions

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        """Returns whether each query position may attend to each key position.

        Args:
          q_pos: int32 positions `[..., T, 1]`, or the `Interval` of each query block.
          kv_pos: int32 positions `[..., 1, S]`, or the `Interval` of each key block.
        """
        raise NotImplementedError

    @property
    def is_ordered(self) -> bool:
        """Whether it compares query positions with key positions, so that their offset must be known."""
        return self.ordered

    def __and__(self, other: Any) -> "Mask":
        return _join(And, Full, Empty, self, as_mask(other))

    def __or__(self, other: Any) -> "Mask":
        return _join(Or, Empty, Full, self, as_mask(other))

    def __rand__(self, other: Any) -> "Mask":
        return as_mask(other) & self

    def __ror__(self, other: Any) -> "Mask":
        return as_mask(other) | self

    def __invert__(self) -> "Mask":
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError("a mask is neither true nor false: join masks by & | ~, not by and, or, not")

    __array_ufunc__ = None  # so that a NumPy array & a mask is this algebra's business

    def by_block(self, interval: Callable[[Any], Interval]) -> Callable[[Any, Any], Any]:
        """Returns the mask as a predicate of intervals of positions; `interval` gives an array's, of each block.

        A mask of one's own may do with positions what intervals cannot: then nothing is known of a block.
        """
        read: Mask = jax.tree.map(interval, self)
        if type(self).__module__ == __name__:
            return read

        def known_or_not(q_pos: Any, kv_pos: Any) -> Interval:
            try:
                return Interval.of(read(q_pos, kv_pos))
            except Exception:  # whatever it is: read with positions, which decides, it is raised
                return _UNKNOWN

        return known_or_not

    def to_array(self, T: int, S: int, *, q_offset: int = 0) -> jax.Array:
        """Returns the mask as a boolean array `[..., T, S]`, `...` being the leading dims of the arrays it carries.

        Args:
          T: number of queries, at positions q_offset, q_offset + 1, ...
          S: number of keys, at positions 0, 1, ...
          q_offset: position of the first query.
        """
        lead, axes = _axes(self, T, S)
        allowed = _heads_first(self, axes)(*_positions(len(axes.sizes), T, S, q_offset))
        return jnp.broadcast_to(allowed, axes.sizes).reshape((*lead, T, S))

    def picture(self, T: int, S: int, *, q_offset: int = 0, width: int = 64) -> str:
        """Draws the mask, queries downwards and keys across: █ may attend, · may not, ▒ some of that block may.

        A large mask is drawn by blocks, from intervals, so nothing of T x S is ever built. A mask that differs
        between examples or heads shows the first.

        Args:
          T: number of queries, at positions q_offset, q_offset + 1, ...
          S: number of keys, at positions 0, 1, ...
          q_offset: position of the first query.
          width: most characters across; half as many lines.
        """
        _, axes = _axes(self, T, S)
        first = jax.tree.map(lambda a: a[(slice(0, 1),) * (a.ndim - 2)], _heads_first(self, axes))
        q_pos, kv_pos = _positions(len(axes.sizes), T, S, q_offset)
        block_q, block_kv = max(1, -(-T // max(width // 2, 1))), max(1, -(-S // width))
        if block_q == block_kv == 1:
            allowed = np.broadcast_to(np.asarray(first(q_pos, kv_pos)), (1,) * (len(axes.sizes) - 2) + (T, S))
            cells = np.where(allowed.reshape(T, S), "█", "·")
        else:
            empty, full = (np.asarray(x) for x in blocks(first, q_pos, kv_pos, block_q, block_kv))
            cells = np.where(full, "█", np.where(empty, "·", "▒"))
        return "\n".join("".join(row) for row in cells)


def blocks(mask: Mask, q_pos: Any, kv_pos: Any, block_q: int, block_kv: int) -> tuple[Any, Any]:
    """Tells of each block of a fitted mask whether it is surely empty, and whether it is surely full.

        empty_ij = not possible(mask on q block i, kv block j),   full_ij = certain(mask on q block i, kv block j)

    Args:
      mask: a mask whose arrays are `[..., T, S]`, each axis full or 1.
      q_pos: `[..., T, 1]` positions; NumPy positions and static masks give NumPy answers.
      kv_pos: `[..., 1, S]` positions.
      block_q: rows of a block. block_kv: its columns. What is left over makes a smaller last block.

    Returns:
      empty and full, each bool `[T / block_q, S / block_kv]`, over all leading axes together.
    """
    T, S = q_pos.shape[-2], kv_pos.shape[-1]
    shape = (-(-T // block_q), -(-S // block_kv))

    def interval(array: Any) -> Interval:
        xp = np if isinstance(array, np.ndarray) else jnp
        flat = array.reshape((math.prod(array.shape[:-2]), *array.shape[-2:]))
        return Interval(*(_by_block(xp, flat, block_q, block_kv, pick) for pick in ("min", "max")))

    verdict = Interval.of(by_block(mask, interval)(interval(q_pos), interval(kv_pos)))
    static = all(isinstance(x, np.ndarray | np.bool_ | int) for x in (verdict.lo, verdict.hi, *shape))
    xp = np if static else jnp
    return ~xp.broadcast_to(verdict.hi, shape), xp.broadcast_to(verdict.lo, shape)


def placed(mask: Mask) -> Mask:
    """Returns the mask where there is something: queries and keys at negative positions are none."""
    return mask & _Placed()


def by_block(mask: Mask, interval: Callable[[Any], Interval]) -> Callable[[Any, Any], Any]:
    """Returns the mask, and each that it is made of, as a predicate of intervals; see `Mask.by_block`."""
    parts: Callable[[Any, Any], Any] = _each(lambda part: part.by_block(interval), mask)
    return parts


def opened(mask: Mask) -> Mask:
    """Returns the mask with what its functions close over, of an enclosing trace, among its arrays."""
    parts: Mask = _each(lambda part: _Opened.of(part, (jnp.int32, jnp.int32)), mask)
    return parts


def known(mask: Mask) -> Mask:
    """Returns what is known of the mask while tracing: parts that carry arrays may allow, or may not."""
    nothing = Function(np.equal)  # is known of a function
    parts: Mask = _each(lambda part: nothing if jax.tree.leaves(part) else part, mask)
    return parts


def _each(change: Callable[[Mask], Any], mask: Mask) -> Any:
    """Changes each mask that it is made of."""
    return jax.tree.map(change, mask, is_leaf=_is_single)


def _by_block(xp: Any, array: Any, block_q: int, block_kv: int, pick: str) -> Any:
    """The least or greatest element of each block: [X, T, S] -> [nq, nk], an axis of 1 staying 1."""
    X, T, S = array.shape
    rows, keys = (1 if size == 1 else block for size, block in ((T, block_q), (S, block_kv)))
    nq, nk = -(-T // rows), -(-S // keys)
    if (nq * rows, nk * keys) != (T, S):
        array = xp.pad(array, [(0, 0), (0, nq * rows - T), (0, nk * keys - S)], mode="edge")
    return getattr(array.reshape(X, nq, rows, nk, keys), pick)(axis=(0, 2, 4))


class Full(Mask):
    """Every query may attend to every key: True."""

    ordered: ClassVar[bool] = False

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        return np.True_

    def __invert__(self) -> Mask:
        return Empty()


class Empty(Mask):
    """No query may attend to any key: False."""

    ordered: ClassVar[bool] = False

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        return np.False_

    def __invert__(self) -> Mask:
        return Full()


class Causal(Mask):
    """A query sees its own position and those before it: kv_pos <= q_pos.

    T = S = 4:           T = 2, S = 4, q_offset = 2 (decoding):
        █···                 ███·
        ██··                 ████
        ███·
        ████
    """

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        return kv_pos <= q_pos


class Window(Mask):
    """A query sees `left` positions before its own and `right` after it, both inclusive, and its own.

        q_pos - left <= kv_pos <= q_pos + right

    Window(1, 0):        Window(0, 0):        Window(None, 1):
        █···                 █···                 ██··
        ██··                 ·█··                 ███·
        ·██·                 ··█·                 ████
        ··██                 ···█                 ████

    Args:
      left: int, or an int array `[...]`, >= 0; None is open.
      right: likewise.
    """

    left: Any
    right: Any
    axes: ClassVar[dict[str, str]] = {"left": "", "right": ""}

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            value = getattr(self, name)
            checks.count(f"Window {name}", value, optional=True)
            known = isinstance(value, np.ndarray | np.integer | jax.Array) and not isinstance(value, jax.core.Tracer)
            if known and (np.asarray(value) < 0).any():
                raise ValueError(f"Window {name} must be at least 0, got {np.min(value)}")

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        allowed = np.True_ if self.left is None else kv_pos >= _earlier(q_pos, self.left)
        return allowed & (np.True_ if self.right is None else kv_pos <= _later(q_pos, self.right))


def SlidingWindow(n: int) -> Mask:
    """A query sees the last `n` positions, its own included: Causal() with Window(n - 1, 0).

    SlidingWindow(2), T = S = 4:
        █···
        ██··
        ·██·
        ··██

    Args:
      n: number of keys seen, at least 1.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"SlidingWindow n must be a positive int (n keys, the query's own included), got {n!r}")
    return Window(n - 1, 0)


class Prefix(Mask):
    """Every query sees the first `length` positions: kv_pos < length. A prefix LM is `Prefix(length) | Causal()`.

    Prefix(2), T = S = 4:        Prefix(2) | Causal():
        ██··                         ██··
        ██··                         ██··
        ██··                         ███·
        ██··                         ████

    Args:
      length: int, or an int array `[...]`.
    """

    length: Any
    axes: ClassVar[dict[str, str]] = {"length": ""}
    ordered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.count("Prefix length", self.length)

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        return kv_pos < self.length


class Lengths(Mask):
    """Queries and keys at or past a length are padding: q_pos < q and kv_pos < kv.

    Lengths(q=3, kv=2), T = S = 4:
        ██··
        ██··
        ██··
        ····

    Args:
      q: number of live query positions: int, or an int array `[...]`; None is all.
      kv: number of live key positions, likewise.
    """

    q: Any = None
    kv: Any = None
    axes: ClassVar[dict[str, str]] = {"q": "", "kv": ""}
    ordered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("q", "kv"):
            checks.count(f"Lengths {name}", getattr(self, name), optional=True)

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        allowed = np.True_ if self.q is None else q_pos < self.q
        return allowed & (np.True_ if self.kv is None else kv_pos < self.kv)


class Segments(Mask):
    """A query sees the keys of its own segment: q == kv and q >= 0. Negative ids are padding.

    Segments([0, 0, 1, -1]), T = S = 4:
        ██··
        ██··
        ··█·
        ····

    Args:
      q: int array `[..., T]`, the segment of each query.
      kv: int array `[..., S]`, the segment of each key. None: `q`, which asks for T = S.
    """

    q: Any
    kv: Any = None
    axes: ClassVar[dict[str, str]] = {"q": "T", "kv": "S"}
    ids: ClassVar[bool] = True
    ordered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("q", "kv"):
            checks.carried(f"Segments {name}", getattr(self, name), jnp.integer, 1, optional=name == "kv")

    def lettered(self, axes: Axes) -> "Segments":
        q = checks.ids("Segments q", self.q)
        kv = q if self.kv is None else checks.ids("Segments kv", self.kv)
        wider = np.promote_types(q.dtype, kv.dtype)
        if q.dtype != kv.dtype and "u" in q.dtype.kind + kv.dtype.kind:
            raise TypeError(f"Segments q and kv must have one dtype to be compared, got {q.dtype} and {kv.dtype}")
        q, kv = q.astype(wider), kv.astype(wider)
        return super(Segments, self.replace(q=q, kv=kv)).lettered(axes)

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        return (self.q == self.kv) & (self.q >= 0)

    def by_block(self, interval: Callable[[Any], Interval]) -> Callable[[Any, Any], Any]:
        # Padding is left out of the intervals of ids: it would make them overlap others.
        ids = self.q, self.kv
        limits = jnp.iinfo(self.q.dtype)
        least, greatest = (
            [interval(jnp.where(a < 0, np.array(other, a.dtype), a)) for a in ids]
            for other in (limits.max, max(limits.min, -1))
        )
        q, kv = (Interval(lo.lo, hi.hi) for lo, hi in zip(least, greatest, strict=True))
        return lambda q_pos, kv_pos: (q == kv) & interval(self.q >= 0) & interval(self.kv >= 0)


class Dense(Mask):
    """An explicit mask, for what no predicate says.

    Args:
      array: bool, broadcastable to `[..., N, T, S]`.
    """

    array: Any
    axes: ClassVar[dict[str, str]] = {"array": "NTS"}
    ordered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.carried("Dense array", self.array, jnp.bool_, 0)

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        return self.array


class Function(Mask):
    """A predicate of one's own: fn(q_pos, kv_pos, *args) -> bool.

    Nothing is known of a block in advance, so every block is computed.

    Args:
      fn: elementwise in int32 positions that broadcast against one another. Equal functions do not recompile; a fresh
        lambda does.
      args: arrays or pytrees of arrays, handed to `fn` whole. No gradient flows into them.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    payload: ClassVar[tuple[str, ...]] = ("args",)

    def __init__(self, fn: Callable[..., Any], *args: Any) -> None:
        if not callable(fn):
            raise TypeError(f"Function fn must be callable, fn(q_pos, kv_pos, *args), got {fn!r}")
        object.__setattr__(self, "fn", fn)
        object.__setattr__(self, "args", args)

    def by_block(self, interval: Callable[[Any], Interval]) -> Callable[[Any, Any], Any]:
        return self  # whatever the arguments are

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        if isinstance(q_pos, Interval):
            return _UNKNOWN
        allowed = self.fn(q_pos, kv_pos, *self.args)
        if jnp.result_type(allowed) != jnp.bool_:
            raise TypeError(f"Function mask {self.fn!r} must return booleans, got {jnp.result_type(allowed)}")
        return jnp.asarray(allowed)


class _Opened(values.Opened, Mask):
    """A mask whose functions close over arrays being traced, these being among its own."""

    def by_block(self, interval: Callable[[Any], Interval]) -> Callable[[Any, Any], Any]:
        return lambda q_pos, kv_pos: _UNKNOWN

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        return self.filled(q_pos, kv_pos)


class _Placed(Mask):
    """Queries and keys at negative positions are none: q_pos >= 0 and kv_pos >= 0."""

    ordered: ClassVar[bool] = False

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        return (q_pos >= 0) & (kv_pos >= 0)


class _Joined(Mask):
    """Several masks joined by an operator; what `And` and `Or` have in common."""

    masks: tuple[Mask, ...]
    operator: ClassVar[Any]

    @property
    def is_ordered(self) -> bool:
        return any(mask.is_ordered for mask in self.masks)

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        return functools.reduce(self.operator, (mask(q_pos, kv_pos) for mask in self.masks))


class And(_Joined):
    """All of the masks must allow."""

    operator = operator.and_

    def __repr__(self) -> str:
        return " & ".join(f"({m!r})" if isinstance(m, Or) else repr(m) for m in self.masks)


class Or(_Joined):
    """Any of the masks may allow."""

    operator = operator.or_

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.masks))


class Not(Mask):
    """What the mask does not allow."""

    mask: Mask

    @property
    def is_ordered(self) -> bool:
        return self.mask.is_ordered

    def __invert__(self) -> Mask:
        return self.mask

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        return ~self.mask(q_pos, kv_pos)

    def __repr__(self) -> str:
        return f"~({self.mask!r})" if isinstance(self.mask, _Joined) else f"~{self.mask!r}"


def as_mask(mask: Any) -> Mask:
    """Returns `mask` as a Mask: None is Full(), a boolean array is Dense; TypeError for anything else."""
    if mask is None:
        return Full()
    if isinstance(mask, Mask):
        return mask
    if not (hasattr(mask, "dtype") or isinstance(mask, bool | list)):
        raise TypeError(f"mask must be a boolean array or a mask of jattn.masks, got {type(mask).__name__}")
    array = checks.as_array("mask", mask)
    if array.dtype == jnp.bool_:
        return Dense(array)
    raise TypeError(
        f"mask must be boolean, True where attending is allowed, got dtype {array.dtype}; "
        f"what is added to the scores is jattn.scores.Bias"
    )


def _earlier(pos: Any, count: Any) -> Any:
    """pos - count, for count >= 0, not below the least int32: `_later` in a mirror, ~x being -1 - x."""
    return ~_later(~pos, count)


def _later(pos: Any, count: Any) -> Any:
    """pos + count, for count >= 0, not above the greatest int32."""
    if isinstance(pos, Interval):
        count = Interval.of(count)
        return Interval(_later(pos.lo, count.lo), _later(pos.hi, count.hi))
    xp = jnp if isinstance(pos, jax.Array) or isinstance(count, jax.Array) else np
    return xp.minimum(pos, _INT32.max - count) + count


def _join(kind: type[_Joined], neutral: type[Mask], absorbing: type[Mask], a: Mask, b: Mask) -> Mask:
    """Joins two masks, simplified where it is obvious."""
    a, b = _plain(a), _plain(b)
    if _is_not(a, b) or _is_not(b, a):
        return absorbing()
    if isinstance(a, absorbing) or isinstance(b, neutral):
        return a
    if isinstance(b, absorbing) or isinstance(a, neutral):
        return b
    different: list[Mask] = []
    for mask in (a, b):
        parts = mask.masks if isinstance(mask, kind) else (mask,)
        different += [part for part in parts if part not in different]
    return different[0] if len(different) == 1 else kind(tuple(different))


def _plain(mask: Mask) -> Mask:
    """A mask that allows everything is Full."""
    return Full() if isinstance(mask, Window) and mask.left is None and mask.right is None else mask


def _is_not(a: Mask, b: Mask) -> bool:
    return isinstance(a, Not) and not jax.tree.leaves((a, b)) and a.mask == b


def _axes(mask: Mask, T: int, S: int) -> tuple[tuple[int, ...], Axes]:
    """The leading dims of the mask as an array, and the axes of a problem that it fits.

    Dims in front of a `Dense` mask's T and S are the batch and the heads, so a mask with one dim less has batch alone;
    without a `Dense` that has heads, leading dims are taken for the batch.
    """
    parts = jax.tree.leaves(mask, is_leaf=_is_single)
    heads = [np.ndim(part.array) - 3 for part in parts if isinstance(part, Dense) and np.ndim(part.array) >= 3]
    lead: list[tuple[int, ...]] = []
    owners: list[Mask] = []
    for part in parts:
        for name, axes in part.axes.items():
            shape, own = np.shape(getattr(part, name)), len(axes.replace("N", ""))
            dims = shape[: max(len(shape) - own, 0)]
            lead.append((*dims, 1) if heads and len(dims) <= max(heads) else dims)
            owners.append(part)
    try:
        whole = np.broadcast_shapes(*lead)
    except ValueError as error:
        dims = ", ".join(f"{type(part).__name__} {shape}" for part, shape in zip(owners, lead, strict=True) if shape)
        raise ValueError(f"the leading dims of the arrays of {mask!r} do not broadcast: {dims}") from error
    batch, K = (whole[:-1], whole[-1]) if heads else (whole, 1)
    return whole, Axes.of(batch, K, 1, T, S)


def _heads_first(mask: Mask, axes: Axes) -> Any:
    """The mask with arrays `[*batch, K, G, T, S]`, each axis full or 1."""
    return fitted(mask.lettered(axes), Order("", axes.letters[:-1]))


def _is_single(mask: Any) -> bool:
    """Whether it is a mask that is not made of other masks."""
    return isinstance(mask, Mask) and not isinstance(mask, _Joined | Not)


def _positions(ndim: int, T: int, S: int, q_offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions `[..., T, 1]` and `[..., 1, S]` with `ndim` axes."""
    q_pos = np.arange(q_offset, q_offset + T, dtype=np.int32).reshape((1,) * (ndim - 2) + (T, 1))
    return q_pos, np.arange(S, dtype=np.int32).reshape((1,) * (ndim - 1) + (S,))
