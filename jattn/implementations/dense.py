"""Attention with all scores at once: the equation, readable alone, and the fastest where there are few.

out_t = Σ_s p_ts v_s,   p_ts = exp(s_ts - m_t) / l_t,   m_t = max_s s_ts,   l_t = Σ_s exp(s_ts - m_t)
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jattn import letters, softmax
from jattn.implementations.base import Start, Step
from jattn.letters import Axes
from jattn.problem import Problem
from jattn.softmax import Running
from jattn.target import Target
from jattn.visits import Plan


@dataclasses.dataclass(frozen=True)
class Dense:
    """Attends with all scores in memory.

    Args:
      sparing: whether it refuses what a loop over blocks does better.
    """

    sparing: bool = False
    name: ClassVar[str] = "dense"
    skips: ClassVar[bool] = False
    backward: ClassVar[None] = None

    def refuses(self, problem: Problem, target: Target) -> str | None:
        """Returns why a loop over blocks does better; None if it does not."""
        if not self.sparing or _advantage(problem, target) is not None:
            return None
        if not problem.axes.are_known:
            return "sizes are symbolic, so that there may be any number of scores"
        if _is_cache(problem, target):
            return f"it would copy {4 * _keys_and_values(problem) / 2**20:.1f} MiB of keys and values for few queries"
        return f"it would hold {4 * math.prod(problem.axes.sizes) / 2**20:.1f} MiB of scores or more"

    def favours(self, problem: Problem, target: Target) -> str:
        """Returns what speaks for it."""
        return _advantage(problem, target) or "it was asked for"

    def plan(self, problem: Problem, target: Target) -> Plan:
        """Returns the plan of one block that is the whole problem."""
        sizes = (max(size, 1) if isinstance(size, int) else size for size in problem.axes.sizes)
        return Plan.of(problem, Axes(problem.axes.letters, tuple(sizes)), target)

    def forward(self, plan: Plan, problem: Problem) -> Running:
        """Attends: m and l `[*letters of q]`, o `[*letters of q, V]`."""
        block, order = problem.whole(plan.target), problem.order()
        state = block.consume(block.start(), block.keep(), plan.guard)
        back: Running = jax.tree.map(lambda x: letters.fit(x, order.rows, problem.q.letters), state)
        return back

    def walk(self, plan: Plan, start: Start, step: Step, operands: Any) -> Any:
        """Takes one step, over all scores."""
        problem, directions, residuals = operands
        block, order = problem.whole(plan.target), problem.order()
        whole = block, *letters.fitted((directions, residuals), order)
        state = step(start(whole), block.keep(), whole)
        return jax.tree.map(lambda x: letters.fit(x, order.rows, problem.q.letters), state)


@functools.partial(jax.jit, static_argnames="target")
def weights(problem: Problem, target: Target) -> jax.Array:
    """Returns the weights by which attention sums the values, `[*batch, N, T, S]`.

    p_ts = factor_ts * exp(s_ts - m_t) / l_t
    """
    block, axes, order = problem.whole(target), problem.axes, problem.order()
    keep = block.keep()
    s, v = block.logits(keep)
    state = softmax.update(block.start(), s, keep, lambda p: block.weigh(p, v))
    p = softmax.output(state._replace(o=softmax.exponentials(s, state.m, keep)))
    factor = block.factor()
    p = p if factor is None else p * factor
    heads_first = "".join(a for a in axes.batch + "KGT" if a in order.rows)
    p = letters.fit(p, order.rows, heads_first)
    return jnp.reshape(p, (*axes.shape(axes.batch), axes["K"] * axes["G"], axes["T"], axes["S"]))


def _advantage(problem: Problem, target: Target) -> str | None:
    """Why all scores at once are the better choice; None if they are not."""
    if not problem.axes.are_known:
        return None
    G, T, S = problem.axes.shape("GTS")
    count, H = math.prod(problem.axes.sizes), problem.q.array.shape[-1]
    few = 2**20 if G * T * S <= 2**12 else 2**16  # so many short heads gain nothing by a loop
    if count <= few and not _is_cache(problem, target):
        return f"{count} scores in all, at most {few}"
    # On a CPU XLA transposes all keys for that, which takes longer than taking the heads one by one.
    if G * T <= H and 16 * T <= S and not target.is_cpu:
        return f"few queries for many keys: the scores, G*T={G * T} for each key, take no more room than keys of H={H}"
    return None


def _is_cache(problem: Problem, target: Target) -> bool:
    """Whether keys and values are many, and far more than scores: on a CPU XLA transposes them all for a product."""
    held = _keys_and_values(problem)
    return target.is_cpu and isinstance(held, int) and held > 2**21 and held >= 16 * math.prod(problem.axes.sizes)


def _keys_and_values(problem: Problem) -> Any:
    """How many numbers keys and values hold."""
    axes, widths = problem.axes, (problem.k.array.shape[-1], problem.v.array.shape[-1])
    return math.prod(axes.shape(axes.batch + "KS")) * sum(widths)
