"""Functions that close over arrays being traced: the arrays become arguments, so that nothing is hidden in a function.

Functions of one's own are static values. An array of an enclosing `jit`, `grad` or `vmap` that such a function closes
over is none, and outlives its trace in no other way than as an argument. So a function is taken apart: into a copy with
holes where such arrays were, which is static, and the arrays.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax

Which = Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class _Hole:
    index: int


def emptied(value: Any) -> tuple[Any, list[jax.Array]]:
    """Takes the arrays being traced out of a function, or out of an object or container of functions.

    Returns:
      a copy with holes, or the value itself if there are none, and the arrays.
    """
    arrays: list[Any] = []

    def take(tracer: Any) -> _Hole:
        at = next((i for i, array in enumerate(arrays) if array is tracer), len(arrays))
        arrays[at:] = arrays[at:] or [tracer]
        return _Hole(at)

    return _changed(value, _is_bound, take, {}), arrays


def filled(value: Any, arrays: Sequence[Any]) -> Any:
    """Puts arrays into the holes."""
    return _changed(value, lambda part: isinstance(part, _Hole), lambda hole: arrays[hole.index], {})


def _is_bound(value: Any) -> bool:
    """Whether it is an array of a trace, or of a mesh with explicit axes: attention is computed outside of these."""
    if isinstance(value, jax.core.Tracer):
        return True
    return isinstance(value, jax.Array) and bool(jax.typeof(value).sharding.mesh.explicit_axes)


def without_unused(
    value: Any, arrays: Sequence[Any], call: Callable[..., Any], *args: Any
) -> tuple[Any, list[jax.Array]]:
    """Leaves of an array that is never computed with the shape only. Of a model whose method is a mask, most are.

    Args:
      call: (value, *args), makes use of the value; what it raises is raised.
    """
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
    jaxpr = jax.make_jaxpr(lambda arrays, *args: call(filled(value, arrays), *args))(shapes, *args).jaxpr
    used = {id(v) for equation in jaxpr.eqns for v in equation.invars} | {id(v) for v in jaxpr.outvars}
    is_used = [id(v) in used for v in jaxpr.invars[: len(arrays)]]
    places = [_Hole(sum(is_used[:i])) if u else shape for i, (u, shape) in enumerate(zip(is_used, shapes, strict=True))]
    return filled(value, places), [array for array, u in zip(arrays, is_used, strict=True) if u]


def _changed(value: Any, which: Which, change: Callable[[Any], Any], copies: dict[int, Any]) -> Any:
    """A copy of a function and of what it is made of, where that holds anything that is to be changed."""
    if which(value):
        return change(value)
    if id(value) in copies:
        return copies[id(value)]
    if not _holds(value, which, set()):
        return value
    again = functools.partial(_changed, which=which, change=change, copies=copies)
    if isinstance(value, dict):
        return type(value)({key: again(part) for key, part in value.items()})
    if isinstance(value, list | tuple):
        parts = map(again, value)
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, functools.partial):
        return functools.partial(again(value.func), *again(value.args), **again(value.keywords))
    if inspect.ismethod(value):
        return types.MethodType(again(value.__func__), again(value.__self__))
    if inspect.isfunction(value):
        cells = value.__closure__ or ()
        empty = tuple(types.CellType() for _ in cells)
        function = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, empty)
        copies[id(value)] = function  # before its cells, in one of which it may be itself
        for new, old in zip(empty, cells, strict=True):
            with contextlib.suppress(ValueError):  # of one that is filled later
                new.cell_contents = again(old.cell_contents)
        function.__defaults__, function.__kwdefaults__ = again(value.__defaults__), again(value.__kwdefaults__)
        function.__dict__.update(again(value.__dict__))
        return function
    if hasattr(value, "__wrapped__") and not inspect.isfunction(type(value).__call__):
        return again(value.__wrapped__)  # a function under `jit` cannot be copied, and what it is made of does the same
    other = copies[id(value)] = copy.copy(value)
    other.__dict__.update(again(value.__dict__))
    return other


def _holds(value: Any, which: Which, seen: set[int]) -> bool:
    """Whether a function, or what it is made of, holds any such thing."""
    if which(value):
        return True
    if id(value) in seen or inspect.ismodule(value) or inspect.isclass(value):
        return False
    seen.add(id(value))
    return any(_holds(part, which, seen) for part in _parts(value))


def _parts(value: Any) -> list[Any]:
    """What a function, a container or an object is made of."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if inspect.ismethod(value):
        return [value.__self__, value.__func__]
    parts: list[Any] = [getattr(value, "__dict__", None), getattr(value, "__wrapped__", None)]
    if inspect.isfunction(value):
        parts += [*map(_contents, value.__closure__ or ()), value.__defaults__, value.__kwdefaults__]
    return parts


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is filled later
        return None
