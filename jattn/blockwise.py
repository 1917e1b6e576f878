"""Attention block by block, in memory linear in the sequence length, with one rule for every derivative.

The forward runs the softmax over blocks of keys. Its derivative, written once as a forward-mode rule, is a plain sum
over the same blocks, because with the log-sum-exp known no block depends on another:

    p = exp(s - lse)      dlse = Σ_s p ds      dout = Σ_s ((p ds) v + p dv) - dlse out

It is linear in the tangents, so JAX transposes it into the backward pass that others write by hand, and differentiates
it again for every higher order. Rabe and Staats, 2021 (arXiv:2112.05682); Dao et al., 2022 (arXiv:2205.14135).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn import checks, masks, softmax
from jattn.problem import Problem, Range

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """Block sizes, for `implementation=`; None chooses. Results do not depend on them beyond rounding.

    Args:
      block_q: queries in a block. block_kv: keys in a block.
    """

    block_q: int | None = None
    block_kv: int | None = None

    def __post_init__(self) -> None:
        for name in ("block_q", "block_kv"):
            size = getattr(self, name)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"Blockwise {name} must be a positive int or None, got {size!r}")


class Plan(NamedTuple):
    """What is decided while tracing."""

    blocks: tuple[int, ...]  # the block size along each of [*B, K, G, T, S]
    q_range: Range | None  # the positions, where they are known while tracing
    kv_range: Range | None


@functools.partial(jax.jit, static_argnames="blocks")
def attend(problem: Problem, blocks: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Attends a block of scores at a time.

        out = softmax(mask(modifiers(scale * q kᵀ))) v

    Args:
      problem: q `[*B, K, G, T, 1, H]`, k `[*B, K, 1, 1, S, H]`, v `[*B, K, 1, 1, S, V]` and the rest of `Problem`.
      blocks: the block size along each of `[*B, K, G, T, S]`, as `choose_blocks` gives them.

    Returns:
      out `[*B, K, G, T, V]` and lse `[*B, K, G, T]`, in the dtype of the sums.
    """
    chex.assert_shape(problem.k, (*problem.v.shape[:-1], problem.q.shape[-1]))
    out, lse = _attend(_plan(problem, blocks), problem.with_positions())
    return out[..., 0, :], lse[..., 0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(plan: Plan, problem: Problem) -> tuple[jax.Array, jax.Array]:
    """out `[*B, K, G, T, 1, V]` and lse `[*B, K, G, T, 1]`."""

    def start(problem: Problem) -> softmax.Running:
        wide = checks.wide(problem.q)
        return softmax.start(problem.q.shape[:-2], problem.v.shape[-1], wide, problem.sink_logits())

    def step(state: softmax.Running, keep: jax.Array | None, problem: Problem) -> softmax.Running:
        s, v = problem.scores(keep)
        return softmax.update(state, s, v, keep, problem.factor())

    def finish(state: softmax.Running, problem: Problem) -> tuple[jax.Array, jax.Array]:
        out, lse = softmax.finish(state)
        return out[..., None, :], lse[..., None]

    return _sweep(plan, start, step, finish, problem)


@functools.partial(_attend.defjvp, symbolic_zeros=True)
def _attend_jvp(plan: Plan, primals: tuple[Problem], tangents: tuple[Problem]) -> Any:
    (problem,), (dproblem,) = primals, tangents
    results = _attend(plan, problem)  # itself, so that higher orders meet this rule again
    directions = jax.tree.leaves(dproblem)
    live = [i for i, d in enumerate(directions) if _is_direction(d)]
    return results, _tangent(plan, live, problem, [directions[i] for i in live], *results)


def _is_direction(tangent: Any) -> bool:
    return not isinstance(tangent, jax.custom_derivatives.SymbolicZero) and tangent.dtype != jax.dtypes.float0


def _tangent(
    plan: Plan, live: list[int], problem: Problem, directions: list[jax.Array], out: jax.Array, lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """dout and dlse along `directions`, which are those of the leaves `live` of the problem."""

    def along(f: Callable[[Problem], Any], problem: Problem, directions: list[jax.Array]) -> Any:
        leaves = jax.tree.leaves(problem)
        tree: Any = jax.tree.structure(problem)

        def moved(*moving: jax.Array) -> Any:
            replaced = dict(zip(live, moving, strict=True))
            return f(tree.unflatten([replaced.get(i, leaf) for i, leaf in enumerate(leaves)]))

        return jax.jvp(moved, [leaves[i] for i in live], directions)

    def exp(s: jax.Array, lse: jax.Array, answered: jax.Array) -> jax.Array:
        # A row without keys (or one of padding) has no lse to subtract; subtracting the greatest number gives it 0.
        return jnp.exp(s - jnp.where(answered, lse, jnp.finfo(s.dtype).max))

    def start(problem: Problem, directions: Any, out: jax.Array, lse: jax.Array, answered: jax.Array) -> Any:
        dout, dlse = jnp.zeros_like(out[..., 0, :]), jnp.zeros_like(lse)
        if problem.sink is not None:
            sink, dsink = along(Problem.sink_logits, problem, directions)
            dlse = dlse + exp(sink[..., None], lse, answered) * dsink[..., None]
        return dout, dlse

    def step(
        state: Any, keep: Any, problem: Problem, directions: Any, out: jax.Array, lse: jax.Array, answered: jax.Array
    ) -> Any:
        def masked(problem: Problem) -> tuple[jax.Array, jax.Array]:
            s, v = problem.scores(keep)
            return (s if keep is None else jnp.where(keep, s, jnp.finfo(s.dtype).min)), v

        dout, dlse = state
        (s, v), (ds, dv) = along(masked, problem, directions)
        p = exp(s, lse, answered)
        p = p if keep is None else jnp.where(keep, p, 0)
        pds, factor = p * ds, problem.factor()
        weights, dweights = (p, pds) if factor is None else (p * factor.astype(p.dtype), pds * factor.astype(p.dtype))
        sum_values = functools.partial(jnp.einsum, "...gts,...sv->...gtv", preferred_element_type=s.dtype)
        dout = dout + sum_values(dweights.astype(v.dtype), v) + sum_values(weights.astype(v.dtype), dv)
        return dout, dlse + pds.sum(-1, keepdims=True)

    def finish(
        state: Any, problem: Problem, directions: Any, out: jax.Array, lse: jax.Array, answered: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        dout, dlse = state
        return dout[..., None, :] - dlse[..., None] * out, dlse

    return _sweep(plan, start, step, finish, problem, directions, out, lse, lse > -jnp.inf)


def _sweep(plan: Plan, start: Callable, step: Callable, finish: Callable, problem: Problem, *others: Any) -> Any:
    """Goes through the blocks of a problem, keys innermost.

    For each block of rows: state = start(rows); state = step(state, keep, block) for each block of keys that is not
    empty; results = finish(state, rows). Rows and blocks are the operands, `problem` and `others`, cut to size.

    Returns:
      the results of `finish`, each `[*B, K, G, T, ...]`.
    """
    run = functools.partial(_rows, plan, start, step, finish)
    for axis in reversed(range(len(plan.blocks) - 3)):
        run = functools.partial(_mapped, run, axis, plan.blocks[axis])
    return run((problem, *others))


def _mapped(run: Callable, axis: int, block: int, operands: Any) -> Any:
    """Runs over blocks along `axis`, one after the other."""
    size = operands[0].sizes[axis]
    if isinstance(size, int) and size == block:
        return run(operands)
    pieces, together = _split(operands, lambda leaf: _cut(leaf, axis, block))
    return _join(lax.map(lambda piece: run(together(piece)), pieces), axis, size)


def _rows(plan: Plan, start: Callable, step: Callable, finish: Callable, operands: Any) -> Any:
    """Runs over the blocks of rows of one tile, and for each over its blocks of keys."""
    *_, T, S = operands[0].sizes
    T_axis, S_axis = len(plan.blocks) - 2, len(plan.blocks) - 1
    block_q, block_kv = plan.blocks[-2:]
    order, kinds = _schedule(plan, operands[0])
    present = sorted({int(kind) for kind in kinds.flat}) if isinstance(kinds, np.ndarray) else [EMPTY, PARTIAL, FULL]
    width = order.shape[1]
    ragged = not isinstance(S, int) or S % block_kv != 0

    def keep(problem: Problem, j: jax.Array) -> jax.Array:
        keep = problem.mask(problem.q_pos, problem.kv_pos)
        if ragged:
            index = (j * block_kv + jnp.arange(block_kv, dtype=jnp.int32)).reshape((1,) * S_axis + (block_kv,))
            keep = keep & (index < S)
        return jnp.broadcast_to(keep, problem.sizes)

    visits = {
        EMPTY: lambda state, j, block: state,
        PARTIAL: _forget(lambda state, j, block: step(state, keep(block[0], j), *block)),
        FULL: _forget(lambda state, j, block: step(state, None, *block)),
    }
    visits_present = [visits[kind] for kind in present or [EMPTY]]  # with no block at all, the loop is traced still

    def row(x: Any) -> Any:
        pieces, order, kinds = x
        operands = rows_together(pieces)
        pieces, together = _split(operands, lambda leaf: _cut(leaf, S_axis, block_kv))
        pieces = jax.tree.map(lambda piece: piece if piece.shape[0] == width else piece[order], pieces)

        def visit(state: Any, x: Any) -> Any:
            piece, j, kind = x
            if len(visits_present) == 1:
                return visits_present[0](state, j, together(piece)), None
            return lax.switch(kind, visits_present, state, j, together(piece)), None

        state, _ = lax.scan(_forget(visit), start(*operands), (pieces, order, kinds))
        return finish(state, *operands)

    def cut(leaf: jax.Array) -> jax.Array | None:
        if leaf.shape[T_axis] == 1 and leaf.shape[S_axis] != 1 and banded:
            return _band(leaf, S_axis, block_kv, order)
        return _cut(leaf, T_axis, block_q)

    nk = -(-S // block_kv)
    banded = isinstance(nk, int) and width < nk and order.size <= 4 * nk
    kinds = np.searchsorted(present, kinds).astype(np.int32) if isinstance(kinds, np.ndarray) else kinds
    rows, rows_together = _split(operands, cut)
    return _join(lax.map(row, (rows, jnp.asarray(order), jnp.asarray(kinds))), T_axis, T)


def _schedule(plan: Plan, problem: Problem) -> tuple[Any, Any]:
    """Which blocks of keys each block of rows visits: order and kinds, int32 `[rows, width]`, NumPy where known now."""
    kinds = _kinds(plan, problem)
    nq, nk = kinds.shape
    if isinstance(kinds, np.ndarray):
        width = int((kinds != EMPTY).sum(1).max(initial=0))
        if width < nk:
            order = np.argsort(kinds == EMPTY, axis=1, kind="stable")[:, :width].astype(np.int32)
            return order, np.take_along_axis(kinds, order, axis=1)
    return jnp.broadcast_to(jnp.arange(nk, dtype=jnp.int32), (nq, nk)), kinds


def _kinds(plan: Plan, problem: Problem) -> Any:
    """EMPTY, PARTIAL or FULL for each block, int32 `[rows, columns]`: NumPy if positions and mask are known now."""
    *_, T, S = problem.sizes
    block_q, block_kv = plan.blocks[-2:]
    q_pos = problem.q_pos if plan.q_range is None else plan.q_range.array(T)[:, None]
    kv_pos = problem.kv_pos if plan.kv_range is None else plan.kv_range.array(S)[None, :]
    empty, full = masks.blocks(problem.mask, q_pos, kv_pos, block_q, block_kv)
    xp = np if isinstance(empty, np.ndarray) and isinstance(full, np.ndarray) else jnp
    if not isinstance(S, int) or S % block_kv:  # the padding of the last block is not to be seen
        full = full & (xp.arange(full.shape[1])[None, :] < S // block_kv)
    return xp.where(empty, EMPTY, xp.where(full, FULL, PARTIAL)).astype(np.int32)


def static_kinds(problem: Problem, blocks: tuple[int, ...]) -> np.ndarray | None:
    """EMPTY, PARTIAL or FULL for each block, if that is known while tracing."""
    kinds = _kinds(_plan(problem, blocks), problem)
    return kinds if isinstance(kinds, np.ndarray) else None


def _plan(problem: Problem, blocks: tuple[int, ...]) -> Plan:
    return Plan(blocks, *(p if isinstance(p, Range) else None for p in (problem.q_pos, problem.kv_pos)))


def choose_blocks(problem: Problem, chosen: Blockwise) -> tuple[int, ...]:
    """Returns the block size along each of `[*B, K, G, T, S]`."""
    *lead, G, T, S = problem.sizes
    block_q = chosen.block_q or _even(T, max(512 // G, 1))
    block_kv = chosen.block_kv or _even(S, 512)
    return (*(1 for _ in lead), G, block_q, block_kv)


def _even(size: int, longest: int) -> int:
    """The size of blocks of about equal length, none longer than `longest`."""
    if not isinstance(size, int):
        return longest
    return max(-(-size // -(-size // longest)), 1) if size else 1


def _forget(f: Callable) -> Callable:
    """Lets a block be computed again where a derivative needs it, instead of keeping its scores.

    In the tangent this is what makes memory linear. In the forward, where nothing is ever differentiated, it keeps an
    enclosing `lax.scan` from hoisting the masks of all blocks out of its loop. A loop needs no barrier against CSE.
    """
    return jax.checkpoint(f, prevent_cse=False)


def _split(operands: Any, cut: Callable[[jax.Array], jax.Array | None]) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Cuts the leaves that `cut` cuts; the others (for which it gives None) belong to every piece.

    Returns:
      the pieces, each `[pieces, ...]` or None, and a function from one piece of each to the operands of that piece.
    """
    leaves = jax.tree.leaves(operands)
    tree: Any = jax.tree.structure(operands)
    return [cut(leaf) for leaf in leaves], lambda pieces: tree.unflatten(
        [leaf if piece is None else piece for leaf, piece in zip(leaves, pieces, strict=True)]
    )


def _cut(leaf: jax.Array, axis: int, block: int) -> jax.Array | None:
    """Cuts an axis into blocks, `[pieces, ..., block, ...]`, the last padded with 0; None if the axis is 1."""
    size = leaf.shape[axis]
    if isinstance(size, int) and size == 1:
        return None
    pieces = -(-size // block)
    if not isinstance(size, int) or pieces * block != size:
        leaf = jnp.pad(leaf, [(0, pieces * block - size if a == axis else 0) for a in range(leaf.ndim)])
    shape = leaf.shape
    return jnp.moveaxis(leaf.reshape((*shape[:axis], pieces, block, *shape[axis + 1 :])), axis, 0)


def _band(leaf: jax.Array, axis: int, block: int, order: np.ndarray) -> jax.Array:
    """Gathers for each block of rows the blocks of keys it visits: `[rows, ..., width * block, ...]`."""
    pieces = _cut(leaf, axis, block)
    assert pieces is not None
    pieces = jnp.moveaxis(pieces[order], 1, axis + 1)
    shape = pieces.shape
    return pieces.reshape((*shape[: axis + 1], shape[axis + 1] * shape[axis + 2], *shape[axis + 3 :]))


def _join(results: Any, axis: int, size: int) -> Any:
    """Undoes `_cut` on each result."""

    def join(result: jax.Array) -> jax.Array:
        result = jnp.moveaxis(result, 0, axis)
        shape = result.shape
        result = result.reshape((*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]))
        return lax.slice_in_dim(result, 0, size, axis=axis)

    return jax.tree.map(join, results)
