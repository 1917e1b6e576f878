"""The one derivative rule, written for every implementation as a walk over its blocks of scores.

Attention does not depend on m, which is any shift of the scores, so m counts as constant, and with e = exp(s - m)

    dl = Σ_s e ds        dout = (Σ_s (e ds) v + e dv - out dl) / l

is the derivative along ds and dv, a plain sum over the blocks of scores. It is linear in the directions: transposed it
is the backward pass, and differentiated again every higher order. Dao et al., 2022 (arXiv:2205.14135).

A score that has all the weight moves dl but not dout, where its two terms would cancel but for their rounding. So dout
has a sum of its own, without it.
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
    shift = jnp.where(answered, at.m, -softmax.least(at.m.dtype))
    residuals = [Lettered(x, problem.q.letters, letters.ROWS) for x in (shift, at.l)]
    forms = jax.tree.leaves(problem, is_leaf=letters.is_lettered)
    moving = [forms[i].replace(d) for i, d in zip(live, directions, strict=True)]
    start, step = functools.partial(_start, live), functools.partial(_step, live, plan.guard)
    dl, shared, do = implementation.walk(plan, start, step, (problem, moving, residuals))
    dout = (do - at.o * shared[..., None]) / jnp.where(answered, at.l, 1)[..., None]
    if plan.guard:  # whatever the cotangents of a row without keys hold, it sends none
        dout, dl = jnp.where(answered[..., None], dout, 0), jnp.where(answered, dl, 0)
    return [dout, dl]


def _start(live: tuple[int, ...], operands: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    block, directions, (shift, total) = operands
    dl = shared = jnp.zeros(block.rows, shift.dtype)
    if block.at.sink is not None:
        sink, dsink = _derivative(lambda block: block.sink_logits(), live, block, directions)
        e = jnp.exp(sink - shift)
        dl, shared = dl + e * dsink, shared + jnp.where(_is_all(e, total), 0, e * dsink)
    return dl, shared, jnp.zeros((*block.rows, block.at.v.shape[-1]), dl.dtype)


def _step(live: tuple[int, ...], guard: bool, state: Any, keep: Any, operands: Any) -> tuple[Any, Any, Any]:
    block, directions, (shift, total) = operands
    dl, shared, do = state
    guarded = keep if guard else None
    (s, v), (ds, dv) = _derivative(lambda block: block.logits(guarded), live, block, directions)
    e = softmax.exponentials(s, shift, keep)
    de = e * (ds if keep is None else jnp.where(keep, ds, 0))
    # What moves the output, dl being what moves the lse.
    moves = jnp.where(_is_all(e, total[..., None]), 0, de)
    factor = block.factor(guarded)
    weights, dweights = (e, moves) if factor is None else (e * factor, moves * factor)
    if block.at.v_scale is not None:  # dropout alone has no derivative
        dweights = dweights + e * _derivative(lambda block: block.factor(guarded), live, block, directions)[1]
    # Changes of weights meet wide values, unrounded: what is common to a row's scores cancels out in the end.
    change = block.weigh(dweights, v.astype(dweights.dtype)) + block.weigh(weights, dv)
    if block.at.sink is not None and keep is not None:  # else a row without keys is put to 0 in the end
        change = jnp.where((keep.sum(-1, dtype=jnp.int32) > 0)[..., None], change, 0)
    return dl + de.sum(-1), shared + moves.sum(-1), do + change


def _is_all(e: jax.Array, total: jax.Array) -> jax.Array:
    """Whether a score has all the weight of its row, or all but what rounds away beside 1.

    Its e is 1, as l is exactly; but for the last bits, where it is computed otherwise than l was.
    """
    return (total == 1) & (e > 1 - 2**-20)


def _derivative(f: Any, live: tuple[int, ...], block: Any, directions: list[jax.Array]) -> Any:
    """The value of f(block), and its derivative along the directions of the leaves `live`."""
    leaves = jax.tree.leaves(block.at)
    tree: Any = jax.tree.structure(block.at)

    def moved(*moving: jax.Array) -> Any:
        changed = {i: leaf.astype(leaves[i].dtype) for i, leaf in zip(live, moving, strict=True)}
        return f(block._replace(at=tree.unflatten([changed.get(i, leaf) for i, leaf in enumerate(leaves)])))

    return jax.jvp(moved, [leaves[i].astype(d.dtype) for i, d in zip(live, directions, strict=True)], directions)
