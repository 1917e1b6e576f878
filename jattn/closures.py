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

    def call(*arguments: Any) -> Any:
        elements, (captured, *others) = arguments[: len(dtypes)], arguments[len(dtypes) :]
        inner = core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, captured))
        return jnp.vectorize(lambda *scalars: inner(*scalars, *jax.tree.leaves(others))[0])(*elements)

    return call, list(closed.consts)


def _holds_tracers(value: Any, seen: set[int]) -> bool:
    """Whether a function, or what it is made of, holds arrays being traced."""
    if isinstance(value, jax.core.Tracer):
        return True
    if id(value) in seen or inspect.ismodule(value) or inspect.isclass(value):
        return False
    seen.add(id(value))
    parts: list[Any] = [leaf for leaf in jax.tree.leaves(value) if leaf is not value]
    if isinstance(value, functools.partial):
        parts += [value.func, *value.args, *value.keywords.values()]
    if inspect.ismethod(value):
        parts += [value.__self__, value.__func__]
    if inspect.isfunction(value):
        parts += [*inspect.getclosurevars(value).nonlocals.values(), value.__defaults__, value.__kwdefaults__]
    elif callable(value):
        parts += [getattr(value, "__wrapped__", None), *getattr(value, "__dict__", {}).values()]
    return any(_holds_tracers(part, seen) for part in parts)
