"""Values: what masks and score modifiers have in common, and the interval arithmetic that tells of a block at once.

A value is frozen, compared by content, and a pytree whose arrays are dynamic and whose numbers are static, so that it
passes through jit, vmap and scan and closes over nothing. `lay_out` gives every array that it carries one form:

    [*B, K, G, T, S, ...]    each axis full or 1, whatever follows S belongs to the value alone

so that a block of an attention problem is the same slice of everything, and every implementation can take it.
"""

import dataclasses
from typing import Any, ClassVar, Self, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


@dataclass_transform(frozen_default=True, eq_default=False)
class Value:
    """A frozen value that is compared by content and is a pytree.

    A subclass declares dataclass fields. Those named in `axes` carry arrays, with the axes that each has behind its
    leading dims (a subset of "NTS"); those named in `payload` carry pytrees that belong to no axis.
    """

    axes: ClassVar[dict[str, str]] = {}
    payload: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        jax.tree_util.register_pytree_node(cls, cls._flatten, cls._unflatten)

    def _flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        dynamic = tuple(name for name, value in fields.items() if name in self.payload or not _is_static(value))
        static = tuple((name, value) for name, value in fields.items() if name not in dynamic)
        return tuple(fields[name] for name in dynamic), (dynamic, static)

    @classmethod
    def _unflatten(cls, aux: tuple[Any, ...], children: Any) -> Self:
        # JAX rebuilds pytrees with placeholders for leaves, so the checks of __post_init__ must not run here.
        value = object.__new__(cls)
        for name, field in (*aux[1], *zip(aux[0], children, strict=True)):
            object.__setattr__(value, name, field)
        return value

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return False
        my_tree: Any = jax.tree.structure(self)
        return my_tree == jax.tree.structure(other) and all(map(_same, jax.tree.leaves(self), jax.tree.leaves(other)))

    def __hash__(self) -> int:
        leaves, tree = jax.tree.flatten(self)
        return hash((tree, *(np.shape(leaf) for leaf in leaves)))

    def __repr__(self) -> str:
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(map(_show, fields))})"

    def lay_out(self, sizes: tuple[int, ...]) -> Self:
        """Returns the value with its arrays in the form `[*B, K, G, T, S, ...]`, where `sizes` is `(*B, K, G, T, S)`.

        The leading dims of an array are the batch dims, aligned right; one more than the batch has is a head axis.
        ValueError if an array does not fit.
        """
        changes: dict[str, Any] = {}
        for name in self.payload:
            ones = (1,) * len(sizes)
            changes[name] = jax.tree.map(lambda a: jnp.asarray(a).reshape(ones + np.shape(a)), getattr(self, name))  # noqa: B023
        for name, own_axes in self.axes.items():
            array = getattr(self, name)
            if not _is_static(array):
                changes[name] = _lay_out(array, own_axes, sizes, f"{type(self).__name__}.{name}")
        return self.replace(**changes) if changes else self

    def replace(self, **changes: Any) -> Self:
        """Returns the value with some fields changed, unchecked."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return self._unflatten(((), tuple((fields | changes).items())), ())


def _lay_out(array: Array, own_axes: str, sizes: tuple[int, ...], name: str) -> Array:
    *batch, K, G, T, S = sizes
    full = dict(N=K * G, T=T, S=S)
    split = max(np.ndim(array) - len(own_axes), 0)
    shape = (1,) * (len(own_axes) - np.ndim(array)) + np.shape(array)
    lead, own = shape[:split], dict(zip(own_axes, shape[split:], strict=True))
    if "N" not in own_axes and len(lead) == len(batch) + 1:
        lead, own["N"] = lead[:-1], lead[-1]
    lead = (1,) * (len(batch) - len(lead)) + lead
    fits = len(lead) == len(batch) and all(d in (1, b) for d, b in zip(lead, batch, strict=True))
    if not fits or any(size not in (1, full[letter]) for letter, size in own.items()):
        heads = "" if "N" in own_axes else f", or with one more leading dim for the N={K * G} heads"
        wanted = ", ".join(["..."] + [f"{letter}={full[letter]} or 1" for letter in own_axes])
        raise ValueError(
            f"{name} must be [{wanted}] with batch dims ...={tuple(batch)}{heads}; got shape {np.shape(array)}"
        )
    heads_first = (1, 1) if own.get("N", 1) == 1 else (K, G)
    if jnp.issubdtype(array.dtype, jnp.integer):
        array = array.astype(np.int32)  # as positions are
    return array.reshape((*lead, *heads_first, own.get("T", 1), own.get("S", 1)))


def _is_static(field: Any) -> bool:
    is_function = callable(field) and not isinstance(field, Value)
    return field is None or isinstance(field, bool | int | float | str) or is_function


def _same(mine: Any, other: Any) -> bool:
    if isinstance(mine, jax.core.Tracer) or isinstance(other, jax.core.Tracer):
        return mine is other
    keys = [jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key) for a in (mine, other)]
    mine, other = (np.asarray(jax.random.key_data(a) if key else a) for a, key in zip((mine, other), keys, strict=True))
    return keys[0] == keys[1] and mine.dtype == other.dtype and np.array_equal(mine, other)


def _show(field: Any) -> str:
    if callable(field) and not isinstance(field, Value):
        return getattr(field, "__name__", None) or repr(field)
    return repr(jax.tree.map(_Shown, field, is_leaf=lambda leaf: isinstance(leaf, Value)))


class _Shown:
    """Prints a field, and an array by its dtype and shape."""

    def __init__(self, field: Any) -> None:
        self.field = field

    def __repr__(self) -> str:
        array = hasattr(self.field, "shape") and hasattr(self.field, "dtype")
        return f"{self.field.dtype}{list(self.field.shape)}" if array else repr(self.field)


class Interval:
    """What is known of all the values in a block: each lies between `lo` and `hi`.

    Comparing intervals gives an interval of booleans: `lo` is whether the comparison holds for certain, everywhere in
    the block, and `hi` whether it is possible, somewhere. So a mask's predicate of positions, read with intervals for
    positions, tells whether a block is empty (`not hi`), full (`lo`) or partial.
    NumPy bounds stay NumPy: what is known while tracing is decided while tracing.
    """

    __slots__ = ("hi", "lo")
    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, lo: Any, hi: Any) -> None:
        self.lo, self.hi = lo, hi

    @staticmethod
    def of(value: Any) -> "Interval":
        """Returns `value` if it is an interval, else the interval that holds it alone."""
        return value if isinstance(value, Interval) else Interval(value, value)

    def __le__(self, other: Any) -> "Interval":
        other = Interval.of(other)
        return Interval(self.hi <= other.lo, self.lo <= other.hi)

    def __lt__(self, other: Any) -> "Interval":
        other = Interval.of(other)
        return Interval(self.hi < other.lo, self.lo < other.hi)

    def __ge__(self, other: Any) -> "Interval":
        return Interval.of(other) <= self

    def __gt__(self, other: Any) -> "Interval":
        return Interval.of(other) < self

    def __eq__(self, other: Any) -> "Interval":  # type: ignore[override]
        return (self <= other) & (self >= other)

    def __and__(self, other: Any) -> "Interval":
        other = Interval.of(other)
        return Interval(self.lo & other.lo, self.hi & other.hi)

    def __or__(self, other: Any) -> "Interval":
        other = Interval.of(other)
        return Interval(self.lo | other.lo, self.hi | other.hi)

    def __invert__(self) -> "Interval":
        return Interval(~self.hi, ~self.lo)

    __rand__ = __and__
    __ror__ = __or__
