"""Attention block by block, in memory linear in the sequence length, with one rule for every derivative.

The forward gathers the running softmax (m, l, o) of `softmax` over blocks of keys. Its derivative, written once as a
forward-mode rule, is a plain sum over the same blocks, because with m known no block depends on another:

    e = exp(s - m)      dm = 0      dl = Σ_s e ds      do = Σ_s (e ds) v + e dv

(Attention does not depend on m, which is any shift of the scores, so m may count as constant.) The rule is linear in
the tangents, so JAX transposes it into the backward pass that others write by hand, and differentiates it again for
every higher order. Rabe and Staats, 2021 (arXiv:2112.05682); Dao et al., 2022 (arXiv:2205.14135).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn import checks, softmax, sweep
from jattn.problem import Problem
from jattn.softmax import Running


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """Block sizes, for `implementation=`; None chooses. Results do not depend on them beyond rounding.

    Args:
      block_q: queries in a block. A window's blocks may go together, up to 2**18 scores a head (2**26 in all off CPUs).
      block_kv: keys in a block. Where the mask is known while tracing and leaves each block of queries few keys, as a
        window does, they are taken at once: up to 2**20 scores for each key/value head.
    """

    block_q: int | None = None
    block_kv: int | None = None

    def __post_init__(self) -> None:
        for name in ("block_q", "block_kv"):
            size = getattr(self, name)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"Blockwise {name} must be a positive int or None, got {size!r}")


@functools.partial(jax.jit, static_argnames="blocks")
def attend(problem: Problem, blocks: tuple[int, ...]) -> Running:
    """Attends a block of scores at a time.

        m = max_s s        l = Σ_s exp(s - m)        o = Σ_s exp(s - m) v_s

    Args:
      problem: q `[*B, K, G, T, 1, H]`, k `[*B, K, 1, 1, S, H]`, v `[*B, K, 1, 1, S, V]` and the rest of `Problem`.
      blocks: the block size along each of `[*B, K, G, T, S]`, as `choose_blocks` gives them.

    Returns:
      m and l `[*B, K, G, T]`, o `[*B, K, G, T, V]`, in the dtype of the sums.
    """
    chex.assert_shape(problem.k, (*problem.v.shape[:-1], problem.q.shape[-1]))
    run = functools.partial(_attend, sweep.plan(problem, blocks, guard=not problem.all_take_part()))
    sharding = jax.typeof(problem.q).sharding
    if sharding.mesh.explicit_axes:
        # Loops over blocks are for XLA to partition: all that can be said of shardings is where the queries lie.
        rows: Any = jax.P(*sharding.spec[:-2])
        run = jax.sharding.auto_axes(run, out_sharding=Running(m=rows, l=rows, o=rows))
    return run(problem.with_positions())


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(plan: sweep.Plan, problem: Problem) -> Running:
    def step(state: Running, keep: jax.Array | None, problem: Problem, _: Any) -> Running:
        return problem.take(state, keep, plan.guard)

    # Right without the rule too: before 0.12 JAX drops the rules of what it hoists out of a differentiated `lax.scan`.
    return sweep.sweep(plan, lambda problem, _: problem.start(), step, problem, ())


@functools.partial(_attend.defjvp, symbolic_zeros=True)
def _attend_jvp(plan: sweep.Plan, primals: tuple[Problem], tangents: tuple[Problem]) -> tuple[Running, Running]:
    # Wide here, and not only in the loops, so that gradients of every order are summed wide.
    problem = primals[0].widened()
    state = _attend(plan, problem)  # itself, so that higher orders meet this rule again
    live = {i: d for i, d in enumerate(jax.tree.leaves(tangents)) if _is_direction(d)}
    directions = [d.astype(jnp.float32) if checks.is_narrow(d) else d for d in live.values()]
    return state, _tangent(plan, list(live), problem, directions, state)


def _is_direction(tangent: Any) -> bool:
    return not isinstance(tangent, jax.custom_derivatives.SymbolicZero) and tangent.dtype != jax.dtypes.float0


def _tangent(plan: sweep.Plan, live: list[int], problem: Problem, directions: list[jax.Array], at: Running) -> Running:
    """The derivative of the state along `directions`, which are those of the leaves `live` of the problem."""

    def along(f: Callable[[Problem], Any], problem: Problem, directions: list[jax.Array]) -> Any:
        leaves = jax.tree.leaves(problem)
        tree: Any = jax.tree.structure(problem)

        def moved(*moving: jax.Array) -> Any:
            replaced = {i: leaf.astype(leaves[i].dtype) for i, leaf in zip(live, moving, strict=True)}
            return f(tree.unflatten([replaced.get(i, leaf) for i, leaf in enumerate(leaves)]))

        return jax.jvp(moved, [leaves[i].astype(d.dtype) for i, d in zip(live, directions, strict=True)], directions)

    def shift(m: jax.Array, answered: jax.Array) -> jax.Array:
        # A row without keys (or one of padding) has no m to subtract; subtracting the greatest number gives it e = 0.
        return jnp.where(answered, m, jnp.finfo(m.dtype).max)[..., 0]

    def start(problem: Problem, directions: Any, m: jax.Array, answered: jax.Array) -> Any:
        dl = jnp.zeros_like(m[..., 0])
        if problem.sink is not None:
            sink, dsink = along(Problem.sink_logits, problem, directions)
            dl = dl + jnp.exp(sink - shift(m, answered)) * dsink
        return dl, jnp.zeros((*dl.shape, problem.v.shape[-1]), dl.dtype)

    def step(state: Any, keep: Any, problem: Problem, directions: Any, m: jax.Array, answered: jax.Array) -> Any:
        dl, do = state
        (s, v), (ds, dv) = along(lambda problem: problem.scores(keep if plan.guard else None), problem, directions)
        e = softmax.exponentials(s, shift(m, answered), keep)
        de, factor = e * (ds if keep is None else jnp.where(keep, ds, 0)), problem.factor()
        weights, dweights = (e, de) if factor is None else (e * factor, de * factor)
        # Changes of weights meet wide values, unrounded: what is common to a row's scores cancels out in the end.
        change = softmax.weigh(dweights, v.astype(dweights.dtype)) + softmax.weigh(weights, dv)
        return dl + de.sum(-1), do + change

    dl, do = sweep.sweep(plan, start, step, problem, directions, at.m[..., None], (at.l != 0)[..., None])
    return Running(jnp.zeros_like(at.m), dl, do)


def choose_blocks(problem: Problem, chosen: Blockwise) -> tuple[int, ...]:
    """Returns the block size along each of `[*B, K, G, T, S]`.

    Those of rows and keys are the candidate that does the least work under the mask, where that is known while tracing;
    of nearly equal ones the greatest, because the least changes from length to length, and memory would with it.
    """
    *lead, G, T, S = problem.sizes
    heads = math.prod(size for size in lead if isinstance(size, int))  # of keys and values, in all examples
    if jax.default_backend() == "cpu":
        longest = [(max(rows // G, 16), keys) for rows, keys in _CANDIDATES]
    else:
        room = max(sweep.SCORES_ON_DEVICE // max(G * heads, 1), _AT_LEAST)
        longest = [c for c in _ON_DEVICE if math.prod(c) <= room]
    if isinstance(T, int) and 0 < T <= 16:
        longest.append((T, max(sweep.SCORES_AT_MOST // (G * T), 1)))  # decoding: all keys at once
    candidates = [(_block(T, chosen.block_q, rows), _block(S, chosen.block_kv, keys)) for rows, keys in longest]
    works = [_work(problem, heads, *candidate) for candidate in candidates]
    near = [c for c, work in zip(candidates, works, strict=True) if work <= _NEARLY * min(works) < math.inf]
    block_q, block_kv = max(near, key=math.prod, default=candidates[0])
    whole = block_q == T and block_kv == S and sweep.static_kinds(problem, problem.sizes) is not None
    return (*_lead_blocks(problem, whole), G, block_q, block_kv)


# Rows and keys. The first is for where arrays decide what is visited, and must skip well enough without knowing.
_CANDIDATES = ((512, 512), (1024, 1024), (512, 1024), (512, 256), (256, 256), (128, 128))
_ON_DEVICE = ((1024, 1024), (4096, 4096), (2048, 2048), (512, 1024), (512, 512), (256, 512), (256, 256), (128, 128))
_AT_LEAST = 2**17  # scores in a visit, for one head, however many heads there are
_NEARLY = 1.02  # times the work: as much, for all that `_work` can tell
_IN_CACHE = 2**19  # scores, or numbers in keys and values, of whole problems taken together


def _lead_blocks(problem: Problem, whole: bool) -> list[int]:
    """The block sizes along `[*B, K]`; `whole` says that a head is one block, so that there may be room for others.

    On a CPU, as many examples and heads at once as stay in cache; elsewhere all of them, and also along an axis that
    may be sharded, because a loop over a sharded axis gathers it.
    """
    *lead, G, T, S = problem.sizes
    looping, devices = jax.default_backend() == "cpu", jax.device_count()
    room = 1
    if whole and looping:
        widths, mapped = (problem.q.shape[-1], problem.v.shape[-1]), _mapped(problem)
        if all(isinstance(size, int) for size in (*widths, mapped)):
            a_key = max(G * T, sum(widths))  # its scores, or the key and value themselves
            room = _IN_CACHE // max(mapped * a_key * S, 1)
    blocks: list[int] = []
    for size in reversed(lead):
        sharded = devices > 1 and isinstance(size, int) and math.gcd(size, devices) > 1
        if not looping or sharded:
            blocks.append(size)
        elif not isinstance(size, int):
            blocks.append(1)
            room = 1
        else:
            blocks.append(sweep.divisor(size, room))
            room = room // blocks[-1] if blocks[-1] == size else 1
    return blocks[::-1]


def _work(problem: Problem, heads: int, block_q: int, block_kv: int) -> float:
    """The time to go through all blocks of one head, as measured; inf where it is not known while tracing.

    The unit is one score. On a CPU it costs more in a visit of fewer than 2**20, for there the products are slower, and
    a visit costs as much as 2**12 scores in itself. On a GPU, where all heads go together, it costs more the fewer rows
    and keys share what is read and written with them, and a visit as much as 2**22 scores for each kind that it can be.
    Looking at the mask takes half as long again.
    """
    *_, G, T, S = problem.sizes
    widths = problem.q.shape[-1], problem.v.shape[-1]
    if not all(isinstance(size, int) for size in (T, S, *widths)) or -(-T // block_q) * -(-S // block_kv) > 2**20:
        return math.inf
    visits = sweep.visits_of(sweep.plan(problem, (G, block_q, block_kv)), problem)
    if visits.kinds is None:
        return math.inf
    keys = block_kv * visits.width
    scores = G * block_q * keys
    if jax.default_backend() == "cpu":
        visit = scores * (1 + 0.05 * max(math.log2(2**20 / max(scores, 1)), 0) ** 2) + 2**12
    else:
        together = heads * sweep.rows_at_once(visits, (heads, G, block_q, block_kv))
        shared = (1 / block_q + 1 / keys) / 1.5
        visit = scores * (1 + sum(widths) * shared) + len(visits.present) * 2**22 / max(together, 1)
    kinds = np.take(visits.present, visits.kinds)
    return visit * float(np.sum(kinds == sweep.FULL) + 1.5 * np.sum(kinds == sweep.PARTIAL))


def _mapped(problem: Problem) -> int:
    """How many examples `vmap` has laid over a problem: they go through the loops together.

    Those of a `vmap` around the nearest `jit` or `lax` loop cannot be seen from within, nor those of tangents.
    """
    sizes: list[int] = []

    @jax.custom_batching.custom_vmap
    def look(*arrays: jax.Array) -> None:
        pass

    @look.def_vmap
    def looked_at(size: int, _: Any, *arrays: jax.Array) -> tuple[None, None]:
        sizes.append(size)
        return look(*arrays), None

    leaves = jax.tree.leaves(problem)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        look(*(lax.stop_gradient(leaf)[..., :0] for leaf in leaves))  # empty, because nothing but sizes is looked at
    return math.prod(sizes)


def _block(size: int, chosen: int | None, longest: int) -> int:
    """The block size chosen by the caller, else that of blocks of about equal length, none longer than `longest`."""
    if not isinstance(size, int):
        return chosen or longest
    if chosen is not None:
        return max(min(chosen, size), 1)
    return -(-size // -(-size // longest)) if size else 1
