"""The one derivative rule, written for every implementation as a walk over its blocks of scores.

Attention does not depend on m, which is any shift of the scores, so m counts as constant, and with e = exp(s - m)

    dl = Σ_s e ds        dout = (Σ_s (e ds) v + e dv - out dl) / l

is the derivative along ds and dv, a plain sum over the blocks of scores. It is linear in the directions: transposed it
is the backward pass, and differentiated again every higher order. Dao et al., 2022 (arXiv:2205.14135).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jattn import letters, softmax
from jattn.implementations.base import Implementation
from jattn.letters import Lettered
from jattn.problem import Problem
from jattn.softmax import Running
from jattn.visits import Plan


def tangent(
    implementation: Implementation,
    plan: Plan,
    problem: Problem,
    at: Running,
    live: tuple[int, ...],
    directions: Sequence[jax.Array],
) -> list[jax.Array]:
    """Returns dout `[*letters of q, V]` and dl `[*letters of q]`, along directions of some leaves of the problem.

    Args:
      at: what the forward gave, o divided by l.
      live: the leaves that have directions.
    """
    # Wide here, and not only in the loops, so that gradients of every order are summed wide.
    problem = problem.with_operands(problem.wide) if plan.target.is_cpu else problem
    answered = at.l != 0  # and not > 0, which would take a nan for no key
    # A row without keys has nothing to subtract; subtracting the greatest number gives it e = 0.
    shift = Lettered(jnp.where(answered, at.m, -softmax.least(at.m.dtype)), problem.q.letters, letters.ROWS)
    forms = jax.tree.leaves(problem, is_leaf=letters.is_lettered)
    moving = [forms[i].replace(d) for i, d in zip(live, directions, strict=True)]
    start, step = functools.partial(_start, live), functools.partial(_step, live, plan.guard)
    dl, do = implementation.walk(plan, start, step, (problem, moving, [shift]))
    dout = (do - at.o * _of_keys(problem, at, dl)[..., None]) / jnp.where(answered, at.l, 1)[..., None]
    if plan.guard:  # whatever the cotangents of a row without keys hold, it sends none
        dout, dl = jnp.where(answered[..., None], dout, 0), jnp.where(answered, dl, 0)
    return [dout, dl]


def _of_keys(problem: Problem, at: Running, dl: jax.Array) -> jax.Array:
    """dl, but 0 in rows that have nothing but a sink: their output is 0, whatever their cotangents hold."""
    if problem.sink is None:
        return dl
    sink = problem.sink.logits
    logits = letters.fit(sink.array, sink.letters, problem.q.letters).astype(at.m.dtype)
    return jnp.where((at.l == 1) & (at.m == logits), 0, dl)


def _start(live: tuple[int, ...], operands: Any) -> tuple[jax.Array, jax.Array]:
    block, directions, (shift,) = operands
    dl = jnp.zeros(block.rows, shift.dtype)
    if block.at.sink is not None:
        sink, dsink = _derivative(lambda block: block.sink_logits(), live, block, directions)
        dl = dl + jnp.exp(sink - shift) * dsink
    return dl, jnp.zeros((*block.rows, block.at.v.shape[-1]), dl.dtype)


def _step(live: tuple[int, ...], guard: bool, state: Any, keep: Any, operands: Any) -> tuple[jax.Array, jax.Array]:
    block, directions, (shift,) = operands
    dl, do = state
    (s, v), (ds, dv) = _derivative(lambda block: block.logits(keep if guard else None), live, block, directions)
    e = softmax.exponentials(s, shift, keep)
    de, factor = e * (ds if keep is None else jnp.where(keep, ds, 0)), block.factor()
    weights, dweights = (e, de) if factor is None else (e * factor, de * factor)
    # Changes of weights meet wide values, unrounded: what is common to a row's scores cancels out in the end.
    change = block.weigh(dweights, v.astype(dweights.dtype)) + block.weigh(weights, dv)
    if block.at.sink is not None and keep is not None:  # else a row without keys is put to 0 in the end
        change = jnp.where((keep.sum(-1, dtype=jnp.int32) > 0)[..., None], change, 0)
    return dl + de.sum(-1), do + change


def _derivative(f: Any, live: tuple[int, ...], block: Any, directions: list[jax.Array]) -> Any:
    """The value of f(block), and its derivative along the directions of the leaves `live`."""
    leaves = jax.tree.leaves(block.at)
    tree: Any = jax.tree.structure(block.at)

    def moved(*moving: jax.Array) -> Any:
        changed = {i: leaf.astype(leaves[i].dtype) for i, leaf in zip(live, moving, strict=True)}
        return f(block._replace(at=tree.unflatten([changed.get(i, leaf) for i, leaf in enumerate(leaves)])))

    return jax.jvp(moved, [leaves[i].astype(d.dtype) for i, d in zip(live, directions, strict=True)], directions)
