"""Values: what masks and score modifiers have in common.

A value is frozen, compared by content, and a pytree whose arrays are dynamic and whose numbers are static. So it passes
through jit, vmap and scan. `lettered` gives every array that it carries the letters of its axes, for a problem of given
axes, so that a block of the problem takes the same slice of everything.
"""

import dataclasses
from typing import Any, ClassVar, Self, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from jattn.letters import WHOLE, Axes, Lettered

Array = jax.Array | np.ndarray


@dataclass_transform(frozen_default=True, eq_default=False)
class Value:
    """A frozen value that is compared by content and is a pytree.

    A subclass declares dataclass fields. Those named in `axes` carry arrays, with the axes that each has behind its
    leading dims (a subset of "NTS"); those named in `payload` carry pytrees that belong to no axis.
    """

    axes: ClassVar[dict[str, str]] = {}
    payload: ClassVar[tuple[str, ...]] = ()

    _fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        cls._fields = tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
        jax.tree_util.register_pytree_node(cls, cls._flatten, cls._unflatten)

    def _flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        children, dynamic, static = [], [], []
        for name in self._fields:
            value = getattr(self, name)
            if name in self.payload or not _is_static(value):
                children.append(value)
                dynamic.append(name)
            else:
                static.append((name, value))
        return tuple(children), (tuple(dynamic), tuple(static))

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
        fields = (getattr(self, name) for name in self._fields)
        return f"{type(self).__name__}({', '.join(map(_show, fields))})"

    def lettered(self, axes: Axes) -> Self:
        """Returns the value with letters on its arrays, for a problem with these axes.

        The leading dims of an array are the batch dims, aligned right; one more than the batch has is a head axis.
        ValueError if an array does not fit.
        """
        changes: dict[str, Any] = {}
        for name in self.payload:
            changes[name] = jax.tree.map(lambda leaf: Lettered(jnp.asarray(leaf), "", WHOLE), getattr(self, name))
        for name, own_axes in self.axes.items():
            array = getattr(self, name)
            if not _is_static(array):
                changes[name] = _lettered(array, own_axes, axes, f"{type(self).__name__}.{name}")
        return self.replace(**changes) if changes else self

    def replace(self, **changes: Any) -> Self:
        """Returns the value with some fields changed, unchecked."""
        fields = {name: getattr(self, name) for name in self._fields}
        return self._unflatten(((), tuple((fields | changes).items())), ())


def _lettered(array: Array, own_axes: str, axes: Axes, name: str) -> Lettered:
    """Names the axes of an array `[*lead, *own_axes]`, whose own axes may be fewer: they broadcast."""
    N = axes["K"] * axes["G"]
    shape = np.shape(array)
    split = max(len(shape) - len(own_axes), 0)
    lead, own = axes.batch[len(axes.batch) - split :], own_axes[len(own_axes) - (len(shape) - split) :]
    if split == len(axes.batch) + 1 and "N" not in own_axes:
        lead, own = axes.batch, "N" + own
    letters = lead + own
    full = [N if letter == "N" else axes[letter] for letter in letters]
    if len(letters) != len(shape) or any(size not in (1, n) for size, n in zip(shape, full, strict=True)):
        heads = "" if "N" in own_axes else f", or with one more leading dim for the N={N} heads"
        wanted = ", ".join(["..."] + [f"{a}={N if a == 'N' else axes[a]} or 1" for a in own_axes])
        raise ValueError(
            f"{name} must be [{wanted}] with batch dims ...={axes.shape(axes.batch)}{heads}; got shape {shape}"
        )
    if jnp.issubdtype(array.dtype, jnp.integer):
        array = array.astype(np.int32)  # as positions are
    sizes: list[Any] = []
    for letter, size in zip(letters, shape, strict=True):
        parted = axes.shape("KG") if size == N else (1, 1)
        sizes += parted if letter == "N" else [size]
    return Lettered.bare(array.reshape(sizes), letters.replace("N", "KG"))


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
