"""Attention, its derivatives and its batches as operations: static values that say what is to be computed of arrays.

`Attend` is attention, `Tangent` its derivative (see `rule`), `Cotangent` the transpose of that; `Jvp`, `Vjp` and `Vmap`
are the derivatives and batches of any. An axis of `vmap` becomes one more batch axis of the problem wherever that can
be.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jattn import checks, letters, values
from jattn.implementations import choose
from jattn.implementations.base import Backward, Implementation
from jattn.implementations.loops import varying
from jattn.letters import Lettered
from jattn.problem import Problem
from jattn.rule import tangent
from jattn.softmax import Running
from jattn.target import Target


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of arrays as a static value. Arguments from `fixed` on are directions, in which it is linear."""

    @property
    def where(self) -> Target:
        """The target of the call that it comes from."""
        of: Operation = getattr(self, "of")  # noqa: B009
        return of.where

    @property
    def calls_functions(self) -> bool:
        """Whether functions of the caller's own take part, which may ask for the names of axes."""
        of: Operation = getattr(self, "of")  # noqa: B009
        return of.calls_functions

    @property
    def fixed(self) -> int | None:
        """How many arguments are no directions; None if it is not linear in any."""
        raise NotImplementedError

    def outputs(self, avals: Sequence[Any]) -> list[tuple[tuple[Any, ...], Any]]:
        """The shape and dtype of each result."""
        raise NotImplementedError

    def __call__(self, where: Target, args: Sequence[jax.Array]) -> list[jax.Array]:
        """Computes it for a target."""
        raise NotImplementedError

    def along(self, which: Sequence[bool]) -> "Operation":
        """Returns it as an operation of some of its directions, the others being 0."""
        raise NotImplementedError

    def transposed(self, given: tuple[bool, ...]) -> "Operation":
        """Returns its transpose, of the cotangents of those results that are `given`."""
        raise NotImplementedError

    def batched(self, size: Any, mapped: Sequence[bool]) -> "Batched | None":
        """Returns it for a problem with one more batch axis.

        None where that cannot be, because an argument that is `mapped` goes whole to a function of the caller's own.
        """
        raise NotImplementedError


class Batched(NamedTuple):
    """An operation of arguments with one more axis."""

    operation: Operation
    places: list[int | None]  # where each argument has the new axis; None: it has it not
    results: list[int]  # where each result has it


@dataclasses.dataclass(frozen=True)
class Attend(Operation):
    """The leaves of a problem -> out, l, m; lse = m + log l, and l is 0 where no key was kept."""

    tree: Any
    asked: Implementation | None
    called: Target

    @property
    def where(self) -> Target:
        return self.called

    @property
    def calls_functions(self) -> bool:
        problem: Problem = self.tree.unflatten(range(self.tree.num_leaves))
        return values.calls_functions((problem.mask, *problem.modifiers))

    @property
    def fixed(self) -> None:
        return None

    def outputs(self, avals: Sequence[Any]) -> list[tuple[tuple[Any, ...], Any]]:
        problem: Problem = self.tree.unflatten(avals)
        rows, wide = problem.q.array.shape[:-1], problem.wide
        return [((*rows, problem.v.array.shape[-1]), wide), (rows, wide), (rows, wide)]

    def __call__(self, where: Target, args: Sequence[jax.Array]) -> list[jax.Array]:
        problem: Problem = self.tree.unflatten(args)
        chex.assert_axis_dimension(problem.k.array, -1, problem.q.array.shape[-1])
        chex.assert_axis_dimension(problem.v.array, problem.v.letters.index("S"), problem.k.size("S"))
        implementation, _ = choose(problem, where, self.asked)
        state = implementation.forward(implementation.plan(problem, where), problem)
        # `softmax.output` is written for its derivative, which never passes here.
        return [state.o / jnp.where(state.l == 0, 1, state.l)[..., None], state.l, state.m]

    def batched(self, size: Any, mapped: Sequence[bool]) -> Batched | None:
        problem: Problem = self.tree.unflatten(range(self.tree.num_leaves))
        axes, has = problem.axes.batched(size), [True, *mapped[1:]]  # queries are laid out as the results are
        forms = jax.tree.leaves(problem, is_leaf=letters.is_lettered)
        if any(has[form.array] and form.fits == letters.WHOLE for form in forms):
            return None

        def lettered(form: Lettered) -> Lettered:
            return form.replace(form.array, axes.letters[0] + form.letters) if has[form.array] else form

        problem = jax.tree.map(lettered, problem._replace(axes=axes), is_leaf=letters.is_lettered)
        operation = dataclasses.replace(self, tree=jax.tree.structure(problem))
        return Batched(operation, [0 if h else None for h in has], [0, 0, 0])


@dataclasses.dataclass(frozen=True)
class Tangent(Operation):
    """The leaves of a problem, out, l, m, and directions of some leaves -> dout, dl."""

    of: Attend
    live: tuple[int, ...]  # the leaves that have directions

    @property
    def fixed(self) -> int:
        return int(self.of.tree.num_leaves) + 3

    def outputs(self, avals: Sequence[Any]) -> list[tuple[tuple[Any, ...], Any]]:
        return [(a.shape, a.dtype) for a in avals[self.fixed - 3 : self.fixed - 1]]

    def along(self, which: Sequence[bool]) -> "Tangent":
        return Tangent(self.of, _some(self.live, which))

    def transposed(self, given: tuple[bool, ...]) -> "Cotangent":
        return Cotangent(self, given)

    def batched(self, size: Any, mapped: Sequence[bool]) -> Batched | None:
        found = self.of.batched(size, [m or i in self.live for i, m in enumerate(mapped[: self.fixed - 3])])
        if found is None:
            return None
        places = [*found.places, *found.results, *[found.places[i] for i in self.live]]
        of: Any = found.operation
        return Batched(Tangent(of, self.live), places, found.results[:2])

    def __call__(self, where: Target, args: Sequence[jax.Array]) -> list[jax.Array]:
        *leaves, out, total, m = args[: self.fixed]
        problem: Problem = self.of.tree.unflatten(leaves)
        implementation, _ = choose(problem, where, self.of.asked)
        plan = implementation.plan(problem, where)
        return tangent(implementation, plan, problem, Running(m, total, out), self.live, args[self.fixed :])


@dataclasses.dataclass(frozen=True)
class Transposed(Operation):
    """The transpose of an operation: cotangents of some of its results -> those of its directions."""

    of: Any  # a Tangent or a Jvp
    given: tuple[bool, ...]  # which of its results have cotangents that are not 0

    @property
    def fixed(self) -> int:
        return int(self.of.fixed)

    def outputs(self, avals: Sequence[Any]) -> list[tuple[tuple[Any, ...], Any]]:
        return [(avals[i].shape, direction_dtype(avals[i])) for i in self.of.live]

    def along(self, which: Sequence[bool]) -> Operation:
        rest = iter(which)
        return dataclasses.replace(self, given=tuple(g and next(rest) for g in self.given))

    def transposed(self, given: tuple[bool, ...]) -> Operation:
        along: Operation = self.of.along(given)
        return along

    def batched(self, size: Any, mapped: Sequence[bool]) -> Batched | None:
        # Cotangents are laid out as results, and results as directions.
        found = self.of.batched(size, [*mapped[: self.fixed], *[True] * len(self.of.live)])
        if found is None:
            return None
        given = [place for place, g in zip(found.results, self.given, strict=True) if g]
        places, results = found.places[: self.fixed], found.places[self.fixed :]
        return Batched(dataclasses.replace(self, of=found.operation), [*places, *given], results)


@dataclasses.dataclass(frozen=True)
class Cotangent(Transposed):
    """The leaves of a problem, out, l, m, and cotangents of out and l -> the cotangents of some leaves."""

    def __call__(self, where: Target, args: Sequence[jax.Array]) -> list[jax.Array]:
        residuals, rest = args[: self.fixed], iter(args[self.fixed :])
        out, total, m = residuals[-3:]
        dout, dl = (next(rest) if given else None for given in self.given)
        problem: Problem = self.of.of.tree.unflatten(residuals[:-3])
        implementation, _ = choose(problem, where, self.of.of.asked)
        if implementation.backward is not None and set(self.of.live) <= {0, 1, 2}:
            plan = implementation.plan(problem, where)
            each = implementation.backward(plan, problem, Backward(Running(m, total, out), dout, dl))
            return [each[i] for i in self.of.live]
        zeros = [jnp.zeros(shape, dtype) for shape, dtype in self.outputs(args)]
        transpose = jax.linear_transpose(lambda *d: self.of(where, (*residuals, *d)), *varying(zeros, residuals))
        given = [jnp.zeros_like(like) if ct is None else ct for ct, like in ((dout, out), (dl, total))]
        return list(transpose(varying(given, residuals)))


@dataclasses.dataclass(frozen=True)
class Jvp(Operation):
    """The arguments of an operation and directions of some -> the derivative of its results."""

    of: Operation
    number: int  # of the arguments
    live: tuple[int, ...]

    @property
    def fixed(self) -> int:
        return self.number

    def outputs(self, avals: Sequence[Any]) -> list[tuple[tuple[Any, ...], Any]]:
        return self.of.outputs(avals[: self.number])

    def along(self, which: Sequence[bool]) -> "Jvp":
        return Jvp(self.of, self.number, _some(self.live, which))

    def transposed(self, given: tuple[bool, ...]) -> "Vjp":
        return Vjp(self, given)

    def batched(self, size: Any, mapped: Sequence[bool]) -> Batched | None:
        found = self.of.batched(size, [m or i in self.live for i, m in enumerate(mapped[: self.number])])
        if found is None:
            return None
        places = [*found.places, *[found.places[i] for i in self.live]]
        return Batched(dataclasses.replace(self, of=found.operation), places, found.results)

    def at(self, where: Target, args: Sequence[jax.Array]) -> tuple[Any, list[jax.Array]]:
        """The function of those arguments that have directions, and their values, as wide as directions are."""

        def moved(*moving: jax.Array) -> list[jax.Array]:
            changed = dict(zip(self.live, moving, strict=True))
            return self.of(where, [changed.get(i, arg) for i, arg in enumerate(args[: self.number])])

        return moved, [args[i].astype(direction_dtype(args[i])) for i in self.live]

    def __call__(self, where: Target, args: Sequence[jax.Array]) -> list[jax.Array]:
        moved, values = self.at(where, args)
        changes: list[jax.Array] = jax.jvp(moved, values, list(args[self.number :]))[1]
        return changes


@dataclasses.dataclass(frozen=True)
class Vjp(Transposed):
    """The arguments of an operation and cotangents of some results -> the cotangents of some arguments."""

    def __call__(self, where: Target, args: Sequence[jax.Array]) -> list[jax.Array]:
        moved, values = self.of.at(where, args)
        results, pull = jax.vjp(moved, *values)
        rest = iter(args[self.fixed :])
        return list(pull([next(rest) if g else jnp.zeros_like(r) for r, g in zip(results, self.given, strict=True)]))


@dataclasses.dataclass(frozen=True)
class Vmap(Operation):
    """An operation over one more leading axis of some arguments, and of all results."""

    of: Operation
    size: Any
    mapped: tuple[bool, ...]  # which arguments have the axis: all directions do
    name: Any = None

    @property
    def fixed(self) -> int | None:
        return self.of.fixed

    def batched(self, size: Any, mapped: Sequence[bool]) -> Batched | None:
        found = self.of.batched(size, mapped)
        if found is None:
            return None
        each = zip(found.places, self.mapped, strict=True)
        places = [None if place is None else place + m for place, m in each]
        return Batched(dataclasses.replace(self, of=found.operation), places, [place + 1 for place in found.results])

    def _inner(self, avals: Sequence[Any]) -> list[Any]:
        each = zip(avals, self.mapped, strict=True)
        return [jax.ShapeDtypeStruct(a.shape[1:], a.dtype) if m else a for a, m in each]

    def outputs(self, avals: Sequence[Any]) -> list[tuple[tuple[Any, ...], Any]]:
        return [((self.size, *shape), dtype) for shape, dtype in self.of.outputs(self._inner(avals))]

    def along(self, which: Sequence[bool]) -> "Vmap":
        return self.around(self.of.along(which), sum(which))

    def transposed(self, given: tuple[bool, ...]) -> "Vmap":
        return self.around(self.of.transposed(given), sum(given))

    def around(self, of: Operation, directions: int) -> "Vmap":
        """Returns the same `vmap` of another operation, of the same arguments and so many directions."""
        return dataclasses.replace(self, of=of, mapped=(*self.mapped[: self.fixed], *[True] * directions))

    def __call__(self, where: Target, args: Sequence[jax.Array]) -> list[jax.Array]:
        in_axes = [0 if m else None for m in self.mapped]
        return jax.vmap(lambda *args: self.of(where, args), in_axes, axis_name=self.name, axis_size=self.size)(*args)


def direction_dtype(array: Any) -> Any:
    """The dtype of a direction of `array`: float32 at least, so that changes are summed wide."""
    return jnp.dtype(jnp.float32) if checks.is_narrow(array) else array.dtype


def _some(live: tuple[int, ...], which: Sequence[bool]) -> tuple[int, ...]:
    return tuple(i for i, w in zip(live, which, strict=True) if w)
