"""Masks: which key positions a query position may attend to, as values with an algebra.

A mask is a predicate of positions, `(q_pos, kv_pos) -> bool`, True where attending is allowed.

    Causal() & Window(255, 0)      both must allow            picture of Causal(), T = S = 4, queries downwards:
    Prefix(64) | Causal()          either may allow               █···
    ~Causal()                      the opposite                   ██··
                                                                  ███·
                                                                  ████

Arrays that masks carry are aligned right with the shapes given here; what they lack or have as 1 broadcasts. Where the
shape has no N, one more leading dim than the batch has is the heads. Arrays are dynamic: new arrays do not recompile.
Integers in them, but ids of segments, are taken as int32 and must fit in it. Ints are static: they decide while tracing
which blocks are empty. Arrays decide it while running, on a CPU, where examples and heads are gone through one by one,
those of `vmap` too. Where several devices would have to agree on it, a block is masked and not skipped.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jattn import checks, letters
from jattn.algebra import UNKNOWN
from jattn.algebra import And as And
from jattn.algebra import Dense as Dense
from jattn.algebra import Empty as Empty
from jattn.algebra import Full as Full
from jattn.algebra import Mask as Mask
from jattn.algebra import Not as Not
from jattn.algebra import Or as Or
from jattn.intervals import Interval
from jattn.letters import Axes

_INT32 = np.iinfo(np.int32)


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
      left: int, or an int array `[...]` or `[..., N]`, >= 0; None is open.
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

    def lettered(self, axes: Axes) -> "Window":
        for name in ("left", "right"):
            letters.refuse_two_readings(f"Window {name}", np.shape(getattr(self, name)), "N", axes)
        return super().lettered(axes)

    def simplified(self) -> Mask:
        return Full() if self.left is None and self.right is None else self

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
    """Queries and keys at positions at or past a length are padding: q_pos < q and kv_pos < kv.

    Positions, and not slots: which slots of a cache are filled is said by `kv_positions`, which are -1 where none is.

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


class Chunks(Mask):
    """A query sees the keys of its own chunk; with `shape` those of its own tile of a grid.

        q_pos // size == kv_pos // size, in each coordinate

    `Chunks(n) & Causal()` is the chunked attention of Llama 4, `Chunks((7, 7), (56, 56))` the windows of Swin (Liu et
    al., 2021, arXiv:2103.14030).

    Chunks(2), T = S = 4:
        ██··
        ██··
        ··██
        ··██

    Args:
      size: an int, or the tile `(*axes)`, at least 1.
      shape: the grid, one int for each axis, positions being counted row by row. What stands outside of it sees nothing
        and is not seen. None: a line without end.
    """

    size: tuple[int, ...]
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.shape is not None:
            self._set(shape=_grid("Chunks shape", self.shape))
        self._set(size=_ints("Chunks size", self.size, 1, 1 if self.shape is None else len(self.shape)))

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        if self.shape is None:
            return q_pos // self.size[0] == kv_pos // self.size[0]
        allowed = _inside(q_pos, self.shape) & _inside(kv_pos, self.shape)
        coordinates = (_coordinates(pos, self.shape) for pos in (q_pos, kv_pos))
        for q, kv, size in zip(*coordinates, self.size, strict=True):
            allowed = allowed & (q // size == kv // size)
        return allowed


class Neighborhood(Mask):
    """A query sees the keys within `radius` of it along every axis of a grid, its own included.

        |q_i - kv_i| <= radius_i dilation_i   and   q_i = kv_i mod dilation_i,   for every coordinate i

    What is near a border has fewer neighbours. Positions are counted row by row; blocks that are far apart are skipped.
    Hassani et al., 2023 (arXiv:2204.07143), 2022 (arXiv:2209.15001).

    Neighborhood((2, 3), 1), T = S = 6:
        ██·██·
        ██████
        ·██·██
        ██·██·
        ██████
        ·██·██

    Args:
      shape: the grid `(*axes)`, at least 1 each, such as (height, width). What stands outside of it, as other tokens
        may do, sees nothing and is not seen: join them by `|`.
      radius: an int, or one for each axis, at least 0; None is the whole axis.
      dilation: an int, or one for each axis, at least 1: every so many-th is a neighbour.
    """

    shape: tuple[int, ...]
    radius: Any
    dilation: Any = 1

    def __post_init__(self) -> None:
        self._set(shape=_grid("Neighborhood shape", self.shape))
        self._set(radius=_ints("Neighborhood radius", self.radius, 0, len(self.shape), optional=True))
        self._set(dilation=_ints("Neighborhood dilation", self.dilation, 1, len(self.shape)))

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        allowed = _inside(q_pos, self.shape) & _inside(kv_pos, self.shape)
        coordinates = (_coordinates(pos, self.shape) for pos in (q_pos, kv_pos))
        for q, kv, radius, dilation in zip(*coordinates, self.radius, self.dilation, strict=True):
            if radius is not None:
                far = min(radius * dilation, _INT32.max)
                allowed = allowed & (kv >= _earlier(q, far)) & (kv <= _later(q, far))
            if dilation > 1:
                allowed = allowed & (q % dilation == kv % dilation)
        return allowed


class Function(Mask):
    """A predicate of one's own: fn(q_pos, kv_pos, *args) -> bool.

    Nothing is known of a block in advance, so every block is computed.

    Args:
      fn: elementwise in int32 positions that broadcast against one another. Equal functions do not recompile; a fresh
        lambda does.
      args: arrays or pytrees of arrays. No gradient flows into them.
      axes: which axes arrays have, for all or, as a tuple, for each of `args`; see `scores.Function`.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    leaf_axes: tuple[str | None, ...]
    payload: ClassVar[tuple[str, ...]] = ("args",)

    def __init__(self, fn: Callable[..., Any], *args: Any, axes: Any = None) -> None:
        if not callable(fn):
            raise TypeError(f"Function fn must be callable, fn(q_pos, kv_pos, *args), got {fn!r}")
        self._set(fn=fn, args=args, leaf_axes=letters.letters_of_leaves(args, axes, "Function"))

    def of_axes(self) -> list[tuple[Any, str]]:
        return letters.leaves_of_axes(self.args, self.leaf_axes)

    def lettered(self, axes: Axes) -> "Function":
        return self.replace(args=letters.lettered_leaves(self.args, self.leaf_axes, axes, "Function args"))

    def by_block(self, interval: Callable[[Any], Interval]) -> Callable[[Any, Any], Any]:
        return self  # whatever the arguments are

    def __call__(self, q_pos: Any, kv_pos: Any) -> Any:
        if isinstance(q_pos, Interval):
            return UNKNOWN
        allowed = self.fn(q_pos, kv_pos, *self.args)
        if jnp.result_type(allowed) != jnp.bool_:
            raise TypeError(f"Function mask {self.fn!r} must return booleans, got {jnp.result_type(allowed)}")
        return jnp.asarray(allowed)


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


def _inside(pos: Any, shape: tuple[int, ...]) -> Any:
    """Whether positions lie on a grid."""
    return (pos >= 0) & (pos < math.prod(shape))


def _coordinates(pos: Any, shape: tuple[int, ...]) -> list[Any]:
    """The coordinates of positions on a grid."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    first, *others = (pos // stride for stride in strides)
    return [first, *(c % size for c, size in zip(others, shape[1:], strict=True))]


def _grid(name: str, given: Any) -> tuple[int, ...]:
    """The sizes of a grid; as `_ints`, and ValueError if it has more positions than int32 can count."""
    shape = _ints(name, given, 1)
    if math.prod(shape) > _INT32.max:
        raise ValueError(f"{name} must have at most {_INT32.max} positions in all, got {given!r}")
    return shape


def _ints(name: str, given: Any, least: int, axes: int | None = None, *, optional: bool = False) -> tuple[Any, ...]:
    """One int for each axis; TypeError or ValueError if there are others, or too many, or one below the least."""
    each = tuple(given) if isinstance(given, tuple | list) else (given,) * (axes or 1)
    for one in each:
        if isinstance(one, bool) or not (isinstance(one, int | np.integer) or (one is None and optional)):
            raise TypeError(f"{name} must be an int{', None' if optional else ''} or one for each axis, got {given!r}")
    if len(each) != (axes or len(each)) or not each:
        raise ValueError(f"{name} must have one int for each of {axes or 'the'} axes, got {given!r}")
    if not all(one is None or least <= one <= _INT32.max for one in each):
        raise ValueError(f"{name} must be from {least} to {_INT32.max}, got {given!r}")
    return tuple(None if one is None else int(one) for one in each)
