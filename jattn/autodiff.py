"""How attention and its derivatives pass through JAX: one primitive, which carries what it computes as a static value.

Its rules make new operations of the one it carries (see `operations`), and what they mean is written down only when JAX
lowers for a platform. So implementations are chosen for the platform that will run them, a policy of `jax.checkpoint`
sees one operation and none of its scores, and a kernel can take its place.

Policies can name what the backward pass needs: "jattn_out" and "jattn_lse".
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jattn.implementations import LOOPLESS
from jattn.implementations.base import Implementation
from jattn.implementations.loops import varying
from jattn.operations import Attend, Batched, Jvp, Operation, Tangent, Vmap, direction_dtype
from jattn.problem import Problem
from jattn.softmax import Running
from jattn.target import Target

VALUE = 2  # which leaf of a problem the values are
OUT, LSE = "jattn_out", "jattn_lse"  # names for policies of jax.checkpoint


def attend(problem: Problem, asked: Implementation | None, where: Target) -> Running:
    """Attends: m and l `[*letters of q]` and o `[*letters of q, V]`, wide, where o is the output, divided by l already.

    Args:
      asked: the implementation that the caller wants; None chooses when the platform is known.
      where: the target of what is called now.
    """
    leaves, tree = jax.tree.flatten(problem)
    out, total, m = _bind(*varying(leaves, leaves), operation=Attend(tree, asked, where))
    return Running(m, total, out)


@functools.partial(jax.jit, static_argnames=("operation", "where"))
def _compute(*args: jax.Array, operation: Operation, where: Target) -> list[jax.Array]:
    return operation(where, args)


def _lower(platform: str | None) -> Any:
    def rule(context: mlir.LoweringRuleContext, *args: Any, operation: Operation) -> Any:
        where = operation.where.on(platform, _devices(context.module_context.axis_context))

        def run(*args: jax.Array) -> list[jax.Array]:
            results: list[jax.Array] = _compute(*args, operation=operation, where=where)
            return results

        return mlir.lower_fun(run, multiple_results=True)(context, *args)

    return rule


def _devices(context: Any) -> int | None:
    """Among how many devices a program is to be parted, as JAX lowers it; None where it does not say so.

    That may be fewer than there are: those of its arguments or, in `shard_map`, those along other axes of the mesh.
    """
    mesh = getattr(context, "mesh", None)
    if mesh is None:
        devices: int | None = getattr(context, "num_devices", None)
        return devices
    return math.prod(int(size) for name, size in mesh.shape.items() if name not in context.manual_axes)


def _evaluate(*args: jax.Array, operation: Operation) -> list[jax.Array]:
    if jax.config.values["jax_disable_jit"]:
        return operation(operation.where, args)
    results: list[jax.Array] = _compiled(*args, operation=operation)
    return results


def _bind(*args: Any, operation: Operation) -> list[jax.Array]:
    results: list[jax.Array] = attention_p.bind(*args, operation=operation)
    return results


_compiled = jax.jit(_bind, static_argnames="operation")


def _abstract(*avals: Any, operation: Operation) -> list[Any]:
    like = avals[0]
    if like.sharding.mesh.empty:
        return [jax.core.ShapedArray(*each) for each in operation.outputs(avals)]

    # Under `shard_map` results differ between devices as the arguments do, all of which are alike (see `varying`).
    def result(shape: tuple[Any, ...], dtype: Any) -> Any:
        nowhere = jax.NamedSharding(like.sharding.mesh, jax.P(*[None] * len(shape)))
        return like.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=nowhere)

    return [result(*each) for each in operation.outputs(avals)]


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, operation: Operation) -> tuple[list[Any], list[Any]]:
    results = _bind(*primals, operation=operation)
    fixed = len(primals) if operation.fixed is None else operation.fixed
    moves = [type(t) is not ad.Zero and t.dtype != jax.dtypes.float0 for t in tangents]
    parts = []
    if any(moves[fixed:]):  # it is linear in these
        directions = [t for t, moving in zip(tangents[fixed:], moves[fixed:], strict=True) if moving]
        parts.append(_bind(*primals[:fixed], *directions, operation=operation.along(moves[fixed:])))
    live = tuple(i for i in range(fixed) if moves[i])
    if live:
        directions = [tangents[i].astype(direction_dtype(primals[i])) for i in live]
        tangent: Operation = Jvp(operation, len(primals), live)
        if _attends(operation):
            results = [checkpoint_name(result, name) for result, name in zip(results, (OUT, LSE, LSE), strict=True)]
            primals = (*primals, *results)
            directions = [_spread(operation, i, d) for i, d in zip(live, directions, strict=True)]
            tangent = _tangent(operation, live)
        parts.append(_bind(*primals, *directions, operation=tangent))
    if not parts:
        return results, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]
    changes = [functools.reduce(jnp.add, each) for each in zip(*parts, strict=True)]
    shift = [ad.Zero(jax.typeof(result).to_tangent_aval()) for result in results[len(changes) :]]  # m is constant
    return results, changes + shift


def _attends(operation: Operation) -> bool:
    """Whether it is attention, and no derivative of it."""
    return _attends(operation.of) if isinstance(operation, Vmap) else isinstance(operation, Attend)


def _tangent(operation: Operation, live: tuple[int, ...]) -> Operation:
    """The tangent of attention, under the same `vmap`s."""
    if not isinstance(operation, Vmap):
        assert isinstance(operation, Attend)
        return Tangent(operation, live)
    return operation.around(_tangent(operation.of, live), 3 + len(live))


def _spread(operation: Operation, leaf: int, direction: jax.Array) -> jax.Array:
    """Gives a direction all the axes of `vmap`, which the leaf that it belongs to may lack."""
    axis = 0
    while isinstance(operation, Vmap):
        if not operation.mapped[leaf]:
            shape = (*direction.shape[:axis], operation.size, *direction.shape[axis:])
            direction = jnp.broadcast_to(jnp.expand_dims(direction, axis), shape)
        operation, axis = operation.of, axis + 1
    return direction


def _transpose(cotangents: Sequence[Any], *args: Any, operation: Operation) -> list[Any]:
    fixed = operation.fixed
    if fixed is None:
        return _transpose_values(cotangents, args, operation)
    given = tuple(type(ct) is not ad.Zero for ct in cotangents)
    wanted = [ad.is_undefined_primal(arg) for arg in args[fixed:]]
    if not any(given):
        return [None] * len(args)
    back = operation.along(wanted).transposed(given)
    found = _bind(*args[:fixed], *[ct for ct, g in zip(cotangents, given, strict=True) if g], operation=back)
    takes = _takes(operation.along(wanted))
    rest = iter(found if takes is None else [x for x, taken in zip(found, takes, strict=True) if taken])
    return [None] * fixed + [next(rest) if w else None for w in wanted]


def _transpose_values(cotangents: Sequence[Any], args: Sequence[Any], operation: Operation) -> list[Any]:
    """The transpose of attention itself, which is linear in the values if all else is constant."""
    undefined = [i for i, arg in enumerate(args) if ad.is_undefined_primal(arg)]
    if undefined != [VALUE] or not isinstance(operation, Attend):
        raise NotImplementedError("attention is linear in the values alone: transpose it along these, without vmap")
    like = args[VALUE].aval
    args = [jnp.zeros(like.shape, like.dtype) if i == VALUE else arg for i, arg in enumerate(args)]
    state = _bind(*args, operation=operation)
    (back,) = _bind(*args, *state, cotangents[0], operation=Tangent(operation, (VALUE,)).transposed((True, False)))
    return [back.astype(like.dtype) if i == VALUE else None for i in range(len(args))]


def _takes(operation: Any) -> tuple[bool, ...] | None:
    """Of an operation of cotangents: which results of its transpose are its arguments."""
    return _takes(operation.of) if isinstance(operation, Vmap) else getattr(operation, "given", None)


def _batch(axis: Any, args: Sequence[Any], dims: Sequence[Any], *, operation: Operation) -> tuple[list[Any], list[Any]]:
    """One more batch axis of the problem.

    It stays a `vmap` where only directions differ between examples, or where a function may ask for its name.
    """
    size, name = axis.size, axis.name if isinstance(axis.name, str) and operation.calls_functions else None
    mapped = [dim is not None for dim in dims]
    if name is None and not any(mapped):
        results = _bind(*args, operation=operation)
        return results, [None] * len(results)
    fixed = len(args) if operation.fixed is None else operation.fixed
    found = operation.batched(size, mapped) if any(mapped[:fixed]) and name is None else None
    if found is None:
        has = [*mapped[:fixed], *[True] * (len(args) - fixed)]
        operation = Vmap(operation, size, tuple(has), name)
        found = Batched(operation, [0 if h else None for h in has], [0] * len(operation.outputs(args)))
    each = zip(args, dims, found.places, strict=True)
    moved = [arg if at is None else _with_axis(arg, dim, size, at) for arg, dim, at in each]
    return _bind(*moved, operation=found.operation), found.results


def _with_axis(array: Any, dim: int | None, size: Any, at: int) -> Any:
    """The array with its mapped axis at a place; one that is shared is repeated along it."""
    if dim is not None:
        return jnp.moveaxis(array, dim, at)
    return jnp.broadcast_to(jnp.expand_dims(array, at), (*array.shape[:at], size, *array.shape[at:]))


def _jet(primals: Sequence[Any], series: Sequence[Any], *, operation: Operation) -> Any:
    """Taylor series by `jet`, which cannot see into loops: those of dense attention."""
    if not isinstance(operation, Attend) or operation.asked not in (None, LOOPLESS):
        raise NotImplementedError(
            f"jax.experimental.jet sees into {LOOPLESS.name} attention only, and into none of its derivatives: take "
            f"implementation={LOOPLESS.name!r} or None, or jax.jvp of jax.jvp, which has no limit of order"
        )
    loopless = dataclasses.replace(operation, asked=LOOPLESS)
    return jet.jet(lambda *args: loopless(loopless.where, args), primals, series, factorial_scaled=False)


attention_p = Primitive("jattn_attention")
attention_p.multiple_results = True
attention_p.def_impl(_evaluate)
attention_p.def_abstract_eval(_abstract)
ad.primitive_jvps[attention_p] = _jvp
ad.primitive_transposes[attention_p] = _transpose
batching.fancy_primitive_batchers[attention_p] = _batch
jet.jet_rules[attention_p] = cast(Any, _jet)
for _platform in (None, "cpu", "cuda", "rocm", "tpu"):
    mlir.register_lowering(attention_p, _lower(_platform), platform=_platform)
