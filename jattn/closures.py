"""Functions that close over arrays being traced: the arrays become arguments, so that nothing is hidden in a function.

Functions of one's own are static values. An array of an enclosing `jit`, `grad` or `vmap` that such a function closes
over is none, and outlives its trace in no other way than as an argument.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

Function = Callable[..., Any]


def opened(fn: Function, dtypes: Sequence[Any], *others: Any) -> tuple[Function, list[jax.Array]] | None:
    """Opens a function that closes over tracers; None where it closes over none.

    Args:
      fn: (*elements, *others) -> result, elementwise in the elements.
      dtypes: of the elements.
      others: the other arguments.

    Returns:
      a function (*elements, captured, *others) -> result, and what is captured.
    """
    if not _holds_tracers(fn, set()):
        return None
    closed = jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct((), dtype) for dtype in dtypes), *others)
    jaxpr = closed.jaxpr  # without its constants: the function stays in caches, and they must not

    def call(*arguments: Any) -> Any:
        elements, (captured, *others) = arguments[: len(dtypes)], arguments[len(dtypes) :]
        inner = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, captured))
        return jnp.vectorize(lambda *scalars: inner(*scalars, *jax.tree.leaves(others))[0])(*elements)

    return call, list(closed.consts)


def _holds_tracers(value: Any, seen: set[int]) -> bool:
    """Whether a function, or what it is made of, holds arrays being traced."""
    if isinstance(value, jax.core.Tracer):
        return True
    if id(value) in seen or inspect.ismodule(value) or inspect.isclass(value):
        return False
    seen.add(id(value))
    return any(_holds_tracers(part, seen) for part in _parts(value))


def _parts(value: Any) -> list[Any]:
    """What a function, a container or an object is made of."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
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
