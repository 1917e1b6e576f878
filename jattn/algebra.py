"""The algebra of masks: predicates of positions, joined by & | ~, read by position and by whole blocks.

A mask is a predicate of positions, `(q_pos, kv_pos) -> bool`, True where attending is allowed. It is written once and
read twice: with arrays of positions it is a boolean array; with intervals of positions (`intervals.Interval`) it tells
whether a whole block is empty, full or partial, without looking inside.
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
from jattn.letters import Axes, Order, fitted, is_lettered
from jattn.values import Value

UNKNOWN = Interval(np.False_, np.True_)


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

    def simplified(self) -> "Mask":
        """Returns the mask as a plainer one that says the same, if there is one."""
        return self

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
        apart = {*self.static(), *self.payload}  # what belongs to no axis bounds no block
        arrays = {name: field for name, field in self.fields().items() if name not in apart}
        read = self.replace(**{name: jax.tree.map(interval, field) for name, field in arrays.items()})
        if not values.is_foreign(self):
            return read

        def known_or_not(q_pos: Any, kv_pos: Any) -> Interval:
            try:
                return Interval.of(read(q_pos, kv_pos))
            except Exception:  # whatever it is: read with positions, which decides, it is raised
                return UNKNOWN

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
        first = _heads_first(self, axes, only_the_first=True)
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
    parts: Mask = _each(lambda part: _Unknown() if jax.tree.leaves(part) else part, mask)
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


class _Opened(values.Opened, Mask):
    """A mask whose functions close over arrays being traced, these being among its own."""

    def by_block(self, interval: Callable[[Any], Interval]) -> Callable[[Any, Any], Any]:
        return lambda q_pos, kv_pos: UNKNOWN

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        return self.filled(q_pos, kv_pos)


class _Placed(Mask):
    """Queries and keys at negative positions are none: q_pos >= 0 and kv_pos >= 0."""

    ordered: ClassVar[bool] = False

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        return (q_pos >= 0) & (kv_pos >= 0)


class _Unknown(Mask):
    """Nothing is known of it."""

    ordered: ClassVar[bool] = False

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        return UNKNOWN


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


def _join(kind: type[_Joined], neutral: type[Mask], absorbing: type[Mask], a: Mask, b: Mask) -> Mask:
    """Joins two masks, simplified where it is obvious."""
    a, b = a.simplified(), b.simplified()
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


def _is_not(a: Mask, b: Mask) -> bool:
    return isinstance(a, Not) and not jax.tree.leaves((a, b)) and a.mask == b


def _axes(mask: Mask, T: int, S: int) -> tuple[tuple[int, ...], Axes]:
    """The leading dims of the mask as an array, and the axes of a problem that it fits.

    Where an array has heads, as a `Dense` mask does that has a dim in front of T and S, one with a dim less has the
    batch alone; where none has, leading dims are taken for the batch.
    """
    parts = jax.tree.leaves(mask, is_leaf=_is_single)
    of_axes = [(part, np.shape(array), own) for part in parts for array, own in part.of_axes()]
    heads = [len(shape) - len(own) for _, shape, own in of_axes if "N" in own and len(shape) >= len(own)]
    lead: list[tuple[int, ...]] = []
    owners: list[Mask] = []
    for part, shape, own in of_axes:
        dims = shape[: max(len(shape) - len(own.replace("N", "")), 0)]
        lead.append((*dims, 1) if heads and "N" not in own and len(dims) <= max(heads) else dims)
        owners.append(part)
    try:
        whole = np.broadcast_shapes(*lead)
    except ValueError as error:
        dims = ", ".join(f"{type(part).__name__} {shape}" for part, shape in zip(owners, lead, strict=True) if shape)
        raise ValueError(f"the leading dims of the arrays of {mask!r} do not broadcast: {dims}") from error
    batch, K = (whole[:-1], whole[-1]) if heads else (whole, 1)
    return whole, Axes.of(batch, K, 1, T, S)


def _heads_first(mask: Mask, axes: Axes, *, only_the_first: bool = False) -> Any:
    """The mask with arrays `[*batch, K, G, T, S]`, each axis full or 1; or those of the first example and head."""
    lettered, lead = mask.lettered(axes), axes.letters[:-2]
    if only_the_first:
        one = axes.replace(**dict.fromkeys(lead, 1))
        lettered = jax.tree.map(lambda a: a.slice(dict.fromkeys(lead, 0), one), lettered, is_leaf=is_lettered)
    return fitted(lettered, Order("", axes.letters[:-1]))


def _is_single(mask: Any) -> bool:
    """Whether it is a mask that is not made of other masks."""
    return isinstance(mask, Mask) and not isinstance(mask, _Joined | Not)


def _positions(ndim: int, T: int, S: int, q_offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions `[..., T, 1]` and `[..., 1, S]` with `ndim` axes."""
    q_pos = np.arange(q_offset, q_offset + T, dtype=np.int32).reshape((1,) * (ndim - 2) + (T, 1))
    return q_pos, np.arange(S, dtype=np.int32).reshape((1,) * (ndim - 1) + (S,))
