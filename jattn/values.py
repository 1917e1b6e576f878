"""Values: what masks and score modifiers have in common.

A value is frozen, compared by content, and a pytree. Its arrays are leaves and its numbers belong to its structure, by
what they are when it is made: leaves of any other kind, such as the labels of an optimizer, change nothing of that. Key
paths have the names of its fields. `lettered` gives every array that it carries the letters of its axes, for a problem
of given axes, so that a block of the problem takes the same slice of everything.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Self, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from jattn import closures, letters
from jattn.letters import Axes


@dataclass_transform(frozen_default=True, eq_default=False)
class Value:
    """A frozen value that is compared by content and is a pytree.

    A subclass declares dataclass fields. Those named in `axes` carry arrays, with the axes that each has behind its
    leading dims: some of "NTS", then a small letter for each of its own; those named in `payload` carry pytrees that
    belong to no axis.
    """

    axes: ClassVar[dict[str, str]] = {}
    payload: ClassVar[tuple[str, ...]] = ()
    ids: ClassVar[bool] = False  # whether integers are names, compared in their own dtype, and no positions

    _fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        cls._fields = tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
        jax.tree_util.register_pytree_with_keys(cls, cls._flatten_with_keys, cls._unflatten, cls._flatten)

    def fields(self) -> dict[str, Any]:
        """Each field by its name."""
        return {name: getattr(self, name) for name in self._fields}

    def static(self) -> dict[str, Any]:
        """The fields that are no arrays: those that were none when the value was made, whatever its leaves are now."""
        dynamic = vars(self).get("_dynamic")
        if dynamic is not None:
            return {name: field for name, field in self.fields().items() if name not in dynamic}
        return {name: x for name, x in self.fields().items() if name not in self.payload and _is_static(x)}

    def _flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        static = self.static()
        dynamic = tuple(name for name in self._fields if name not in static)
        return tuple(getattr(self, name) for name in dynamic), (dynamic, tuple(static.items()))

    def _flatten_with_keys(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        children, aux = self._flatten()
        return tuple(zip(map(jax.tree_util.GetAttrKey, aux[0]), children, strict=True)), aux

    @classmethod
    def _unflatten(cls, aux: tuple[Any, ...], children: Any) -> Self:
        # JAX and others rebuild pytrees with all kinds of leaves (object(), None, labels), so nothing is checked here.
        value = object.__new__(cls)
        for name, field in (*aux[1], *zip(aux[0], children, strict=True), ("_dynamic", aux[0])):
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
        return f"{type(self).__name__}({', '.join(map(_show, self.fields().values()))})"

    def _set(self, **fields: Any) -> None:
        """Sets fields of a value that is being made."""
        for name, field in fields.items():
            object.__setattr__(self, name, field)

    def of_axes(self) -> list[tuple[Any, str]]:
        """The arrays that belong to axes, each with those that it has behind its leading dims."""
        return [(getattr(self, name), own) for name, own in self.axes.items()]

    def lettered(self, axes: Axes) -> Self:
        """Returns the value with letters on its arrays, for a problem with these axes; see `letters.lettered`."""
        static = self.static()
        changes = {name: self._lettered(name, x, axes) for name, x in self.fields().items() if name not in static}
        return self.replace(**changes) if changes else self

    def _lettered(self, name: str, field: Any, axes: Axes) -> Any:
        if name in self.payload:
            return jax.tree.map(lambda leaf: letters.whole(leaf, f"{type(self).__name__}.{name}"), field)
        if name in self.axes:
            return letters.lettered(field, self.axes[name], axes, f"{type(self).__name__}.{name}", self.ids)
        parts, tree = jax.tree.flatten(field, is_leaf=lambda leaf: isinstance(leaf, Value))
        if not all(isinstance(part, Value) for part in parts):
            raise TypeError(
                f"{type(self).__name__}.{name} holds an array, so its class must name it in `axes`, with the axes that "
                f"it has of N, T and S, or in `payload`, if it has none of them; got {_show(field)}"
            )
        return jax.tree.unflatten(tree, [part.lettered(axes) for part in parts])

    def replace(self, **changes: Any) -> Self:
        """Returns the value with some fields changed, unchecked."""
        value = object.__new__(type(self))
        value._set(**self.fields() | changes)
        return value


class Opened(Value):
    """A value whose functions close over arrays being traced, with these among its own arrays.

    Args:
      value: the value, its static fields with holes for the arrays.
      call: `__call__` of its class, with such holes.
      captured: the arrays.
    """

    value: Any
    call: Any
    captured: Any
    payload: ClassVar[tuple[str, ...]] = ("captured",)

    @classmethod
    def of(cls, value: Any, dtypes: Sequence[Any]) -> Any:
        """Opens a value; one that closes over nothing is returned as it is.

        Args:
          dtypes: of what it is called with.
        """
        if not calls_functions(value):
            return value
        parts, captured = closures.emptied((value.static(), type(value).__call__))
        if not value.of_axes():  # else its arrays have no shape yet in which it could be called
            leaves, tree = jax.tree.flatten(value)
            elements = [jax.ShapeDtypeStruct((1, 1), dtype) for dtype in dtypes]

            def call(parts: Any, leaves: Any, elements: Any) -> Any:
                return parts[1](jax.tree.unflatten(tree, leaves).replace(**parts[0]), *elements)

            parts, captured = closures.without_unused(parts, captured, call, leaves, elements)
        return cls(value.replace(**parts[0]), parts[1], captured) if captured else value

    def filled(self, *args: Any) -> Any:
        """Returns what the value gives, called with the arrays in their places."""
        fields, call = closures.filled((self.value.static(), self.call), self.captured)
        return call(self.value.replace(**fields), *args)


def calls_functions(value: Any) -> bool:
    """Whether a value, or any of several, calls what is not of this library."""
    if isinstance(value, tuple):
        return any(map(calls_functions, value))
    if not isinstance(value, Value):
        return callable(value)
    return is_foreign(value) or any(map(calls_functions, value.fields().values()))


def is_foreign(value: Value) -> bool:
    """Whether the class of a value is the caller's own."""
    return not type(value).__module__.startswith(f"{__package__}.")


def _is_static(field: Any) -> bool:
    if isinstance(field, tuple):
        return all(map(_is_static, field))
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
