"""The loops: going through the blocks of a problem, batch, heads, rows and keys, and visiting only those that count.

Every array of a problem has one form, so cutting it into blocks is one function for all axes. What is laid out how
inside the loops is decided by what XLA does with it: it is said where it is done.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn import masks
from jattn.problem import Problem, Range, move

EMPTY, PARTIAL, FULL = 0, 1, 2


class Plan(NamedTuple):
    """What is decided while tracing."""

    blocks: tuple[int, ...]  # the block size along each of [*B, K, G, T, S]
    q_range: Range | None  # the positions, where they are known while tracing
    kv_range: Range | None


def plan(problem: Problem, blocks: tuple[int, ...]) -> Plan:
    """Returns the plan of a problem cut into `blocks`."""
    return Plan(blocks, *(p if isinstance(p, Range) else None for p in (problem.q_pos, problem.kv_pos)))


def sweep(plan: Plan, start: Callable, step: Callable, problem: Problem, directions: Any, *residuals: Any) -> Any:
    """Goes through the blocks of a problem: batch, then heads, then rows, and keys innermost.

    For each block of rows and heads: state = start(rows); state = step(state, keep, block) for each block of keys that
    is not empty. Rows and blocks are the operands (problem, directions, *residuals), cut to size; states are linear in
    directions.

    Returns:
      the last states, each array `[*B, K, G, T, ...]`, as `start` makes them for the problem as a whole.
    """
    *batch_axes, K_axis, _, _, S_axis = range(len(plan.blocks))
    operands = (problem, directions, *residuals)
    visits = _visits(plan, problem, band=bool(directions))
    tile = functools.partial(_tile, visits, start, step)
    run = functools.partial(_without_lead, functools.partial(_by_rows, tile, visits), plan.blocks)
    run = functools.partial(_by_heads, run, start, K_axis, plan.blocks[K_axis])
    for axis in reversed(batch_axes):
        run = functools.partial(_by_examples, run, axis, plan.blocks[axis])
    return jax.tree.map(lambda result: jnp.squeeze(result, S_axis), run(operands))


def _by_examples(run: Callable, axis: int, block: int, operands: Any) -> Any:
    """Runs over blocks of a batch axis, one after the other."""
    problem = operands[0]
    size, K_axis = problem.sizes[axis], len(problem.sizes) - 4
    if isinstance(size, int) and size == block:
        return run(operands)

    def cut(leaf: jax.Array) -> Cut | None:
        moved = _outside_axis(leaf, K_axis)
        return _cut(move(leaf, moved, K_axis), axis, block, lambda piece: move(piece, K_axis, moved))

    pieces, together = _split(operands, cut)
    rows_first = _forget(lambda piece: jax.tree.map(lambda r: move(r, K_axis + 2, K_axis), run(together(piece))))
    results = lax.map(rows_first, pieces)
    return jax.tree.map(lambda result: move(_join(result, axis, size), K_axis, K_axis + 2), results)


def _by_heads(run: Callable, start: Callable, axis: int, block: int, operands: Any) -> Any:
    """Runs over blocks of key/value heads, one after the other.

    Heads are sliced out of the caller's layout and results put back into it one at a time, so that nothing is
    transposed as a whole; except the directions: they are what gradients flow back to, best gathered by scan.
    """
    problem, directions, *residuals = operands
    size = problem.sizes[axis]
    if isinstance(size, int) and size == block:
        return run(operands)
    pieces, together = _split(directions, lambda leaf: _cut(leaf, axis, block))
    fixed = jax.tree.leaves((problem, residuals))
    fixed_tree: Any = jax.tree.structure((problem, residuals))
    outside = [_Outside(leaf, axis) for leaf in fixed]
    kept = [o.enter(leaf) for o, leaf in zip(outside, fixed, strict=True)]
    states = jax.tree.map(lambda state: jnp.zeros(state.shape, state.dtype), jax.eval_shape(start, *operands))
    none_yet = jax.tree.leaves(_varying(_with_keys_axis(states, len(problem.sizes) - 1), problem))
    homes = [_Outside(result, axis) for result in none_yet]

    def heads(results: Any, x: Any) -> Any:
        piece, kept, h = x[0], x[1], x[2]
        problem, residuals = fixed_tree.unflatten(
            [o.take(leaf, h * block, block) for o, leaf in zip(outside, kept, strict=True)]
        )
        parts = jax.tree.leaves(run((problem, together(piece), *residuals)))
        return [o.put(result, part, h * block) for o, result, part in zip(homes, results, parts, strict=True)], None

    starts = [o.enter(result) for o, result in zip(homes, none_yet, strict=True)]
    body = _forget(lambda results, x: heads(results, (x[0], kept, x[1])))
    results, _ = lax.scan(body, starts, (pieces, jnp.arange(size // block, dtype=jnp.int32)))
    whole: Any = jax.tree.structure(states)
    return whole.unflatten([o.leave(result) for o, result in zip(homes, results, strict=True)])


class _Outside:
    """A leaf as it came from the caller, rows or keys before heads, and without axes of 1.

    So nothing is transposed before a head is taken out of it, and XLA copies nothing that it carries into a loop.
    """

    def __init__(self, leaf: jax.Array, K_axis: int) -> None:
        self.K_axis, self.moved = K_axis, _outside_axis(leaf, K_axis)
        shape = list(leaf.shape)
        shape.insert(K_axis, shape.pop(self.moved))
        self.shape = tuple(shape)
        self.axis = K_axis + (self.moved != K_axis)  # of K, in self.shape

    def enter(self, leaf: jax.Array) -> jax.Array:
        return _bare(move(leaf, self.moved, self.K_axis))

    def leave(self, kept: jax.Array) -> jax.Array:
        return move(kept.reshape(self.shape), self.K_axis, self.moved)

    def take(self, kept: jax.Array, start: jax.Array, block: int) -> jax.Array:
        if self.shape[self.axis] == 1:
            return self.leave(kept)
        shape = (*self.shape[: self.axis], block, *self.shape[self.axis + 1 :])
        part = lax.dynamic_slice_in_dim(kept, start, block, self._bare_axis)
        return move(part.reshape(shape), self.K_axis, self.moved)

    def put(self, kept: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
        part = move(part, self.moved, self.K_axis)
        wanted = list(kept.shape)
        wanted[self._bare_axis] = part.shape[self.axis]
        return lax.dynamic_update_slice_in_dim(kept, part.reshape(wanted), start, self._bare_axis)

    @property
    def _bare_axis(self) -> int:
        return sum(not _is_one(size) for size in self.shape[: self.axis])


def _outside_axis(leaf: jax.Array, K_axis: int) -> int:
    """The axis, T or S, that came before the heads from the caller; K's own if none did."""
    rows, keys = (not _is_one(leaf.shape[K_axis + i]) for i in (2, 3))
    return K_axis if rows == keys else K_axis + (2 if rows else 3)


def _is_one(size: int) -> bool:
    return isinstance(size, int) and size == 1


def _bare(array: jax.Array) -> jax.Array:
    """Without axes of 1."""
    return array.reshape([size for size in array.shape if not _is_one(size)])


def _without_lead(run: Callable, blocks: tuple[int, ...], operands: Any) -> Any:
    """Runs on one example and head without the axes that say so: XLA would copy what it carries into loops for them."""
    *lead, G, T, S = blocks
    if any(size != 1 for size in lead):
        return run(blocks, operands)
    bare = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[len(lead) :]), operands)
    return jax.tree.map(lambda result: result.reshape((*lead, *result.shape)), run((G, T, S), bare))


def _by_rows(run: Callable, visits: "Visits", blocks: tuple[int, ...], operands: Any) -> Any:
    """Runs over the blocks of rows, one after the other, with the blocks of keys that each visits."""
    *_, axis, S_axis = range(len(blocks))
    size, block = operands[0].sizes[axis], blocks[axis]

    def cut_keys(leaf: jax.Array) -> Cut | None:
        return _cut(leaf, S_axis, blocks[S_axis]) if _is_one(leaf.shape[axis]) else None

    # A gradient of keys is a product that sums over rows. XLA is four times faster at it when the result comes
    # transposed, because then the narrow operand goes first; so that is how directions travel.
    problem, directions, *residuals = operands
    fixed_keys, with_fixed = _split((problem, residuals), cut_keys)
    moving_keys, with_moving = _split(directions, lambda leaf: _payload_first(cut_keys(leaf), leaf.ndim > len(blocks)))
    keys = (fixed_keys, moving_keys)

    def with_keys(operands: Any, keys: Any) -> Any:
        problem, directions, *residuals = operands
        problem, residuals = with_fixed(keys[0], (problem, residuals))
        return (problem, with_moving(keys[1], directions), *residuals)

    def has_both(leaf: jax.Array) -> bool:
        return not _is_one(leaf.shape[axis]) and not _is_one(leaf.shape[S_axis])

    both = [has_both(leaf) for leaf in jax.tree.leaves(operands)]

    def row(operands: Any, keys: Any, order: Any, kinds: Any, live: jax.Array | None = None) -> Any:
        # What has rows and keys is cut here, row by row; what has keys alone was cut before, once for all rows.
        also = iter(both)
        own_keys, with_own = _split(operands, lambda leaf: _cut(leaf, S_axis, blocks[S_axis]) if next(also) else None)
        if order is not None:
            own_keys = jax.tree.map(lambda pieces: pieces[order], own_keys)
        if order is not None and not visits.banded:
            keys = jax.tree.map(lambda pieces: pieces[order], keys)
        together = lambda operands, keys: with_keys(with_own(keys[0], operands), keys[1])  # noqa: E731
        return run(blocks, operands, (own_keys, keys), together, Row(order, kinds, live))

    if isinstance(size, int) and size == block:
        first = [None if x is None else x[0] for x in (visits.order, visits.kinds)]
        return row(operands, jax.tree.map(lambda k: k[first[0]], keys) if visits.banded else keys, *first)
    band = jax.tree.map(lambda pieces: pieces[visits.order], keys) if visits.banded else None

    def stays(leaf: jax.Array) -> bool:
        return has_both(leaf) and leaf.size != 0

    # Rows before heads, as they came from the caller, so that nothing is transposed before it is cut.
    outside = max(axis - 2, 0)

    def cut(leaf: jax.Array) -> Cut | None:
        return _cut(move(leaf, axis, outside), outside, block, lambda piece: move(piece, outside, axis))

    # What has rows and keys stays where it is and is sliced: cutting it might copy something T x S.
    fixed, with_fixed_rows = _split((problem, residuals), lambda leaf: None if stays(leaf) else cut(leaf))
    moving, with_moving_rows = _split(directions, cut)

    def rows(x: Any) -> Any:
        i, fixed, moving, band, order, kinds = x
        problem, residuals = jax.tree.map(
            lambda leaf: _rows_at(leaf, axis, i * block, block) if stays(leaf) else leaf, with_fixed_rows(fixed)
        )
        live = size - i * block if _is_ragged(size, block) else None
        operands = (problem, with_moving_rows(moving), *residuals)
        results = row(operands, band if visits.banded else keys, order, kinds, live)
        return jax.tree.map(lambda result: move(result, axis, outside), results)

    index = jnp.arange(-(-size // block), dtype=jnp.int32)
    results = lax.map(_forget(rows), (index, fixed, moving, band, visits.order, visits.kinds))
    return jax.tree.map(lambda result: move(_join(result, outside, size), outside, axis), results)


def _rows_at(leaf: jax.Array, axis: int, start: jax.Array, block: int) -> jax.Array:
    """The block of rows at `start`; where the last one ends behind the array, it is filled up with anything."""
    rows = lax.dynamic_slice_in_dim(leaf, start, block, axis)
    if not _is_ragged(leaf.shape[axis], block):
        return rows
    return jnp.roll(rows, jnp.minimum(leaf.shape[axis] - block - start, 0), axis)  # the slice was held back to fit


def _pad(leaf: jax.Array, axis: int, block: int) -> jax.Array:
    """Fills up the last block along `axis`: with 0, but positions and ids with the last, so that blocks stay narrow."""
    if not _is_ragged(leaf.shape[axis], block):
        return leaf
    short = -(-leaf.shape[axis] // block) * block - leaf.shape[axis]
    widths = [(0, short if a == axis else 0) for a in range(leaf.ndim)]
    narrow = jnp.issubdtype(leaf.dtype, jnp.signedinteger) and leaf.shape[axis] != 0
    return jnp.pad(leaf, widths, mode="edge") if narrow else jnp.pad(leaf, widths)


def _tile(
    visits: "Visits",
    start: Callable,
    step: Callable,
    blocks: tuple[int, ...],
    operands: Any,
    keys: Any,
    with_keys: Callable,
    row: "Row",
) -> Any:
    """Runs over the blocks of keys that one block of rows and heads visits."""
    axis, block, (order, kinds, live) = len(blocks) - 1, blocks[-1], row
    if order is None:
        order = jnp.arange(-(-visits.S // block), dtype=jnp.int32)
    if kinds is None and len(visits.present) > 1:
        kinds = jnp.asarray(_kinds(operands[0].mask, operands[0].q_pos, operands[0].kv_pos, blocks)[0])[order]

    def keep(problem: Problem, j: jax.Array) -> jax.Array:
        keep = problem.mask(problem.q_pos, problem.kv_pos)
        if _is_ragged(visits.S, block):
            index = (j * block + jnp.arange(block, dtype=jnp.int32)).reshape((1,) * axis + (block,))
            keep = keep & (index < visits.S)
        if live is not None:  # what fills up the last rows asks nothing, so that it cannot let a NaN in
            index = jnp.arange(blocks[-2], dtype=jnp.int32).reshape((1,) * (axis - 1) + (blocks[-2], 1))
            keep = keep & (index < live)
        return jnp.broadcast_to(keep, problem.sizes)

    def partial(state: Any, j: jax.Array, operands: Any, keys: Any) -> Any:
        here = with_keys(operands, keys)
        return step(state, keep(here[0], j), *here)

    def full(state: Any, j: jax.Array, operands: Any, keys: Any) -> Any:
        return step(state, None, *with_keys(operands, keys))

    # Keys are put in place within the branches, so that how directions travel reaches the products.
    every = {EMPTY: lambda state, *_: state, PARTIAL: _forget(partial), FULL: _forget(full)}
    branches = [every[kind] for kind in visits.present]

    def visit(state: Any, x: Any) -> Any:
        keys, j, kind = x
        if len(branches) == 1:
            return branches[0](state, j, operands, keys), None
        return lax.switch(kind, branches, state, j, operands, keys), None

    state, _ = lax.scan(_forget(visit), _varying(start(*operands), operands[0]), (keys, order, kinds))
    return _with_keys_axis(state, axis)


def _with_keys_axis(states: Any, S_axis: int) -> Any:
    """Gives states `[*B, K, G, T, ...]` the axis S that everything else has, of 1."""
    return jax.tree.map(lambda state: jnp.expand_dims(state, S_axis), states)


def _varying(states: Any, problem: Problem) -> Any:
    """Under `shard_map`: says that states differ between devices wherever the problem does, as a loop wants to know."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return states
    never = functools.reduce(jnp.logical_or, [(leaf != leaf).any() & False for leaf in jax.tree.leaves(problem)])
    return jax.tree.map(lambda state: jnp.where(never, jnp.zeros_like(state), state), states)


class Row(NamedTuple):
    """What one block of rows visits."""

    order: Any  # [width]  the blocks of keys; None: all, in their order
    kinds: Any  # [width]  what each is, as an index of `present`; None: arrays decide
    live: jax.Array | None  # how many rows are no padding; None: all


class Visits(NamedTuple):
    """Which blocks of keys each block of rows visits, as far as is known while tracing."""

    order: np.ndarray | None  # [rows, width]  the blocks; None: all, in their order
    kinds: np.ndarray | None  # [rows, width]  what each is, as an index of `present`; None: arrays decide
    present: tuple[int, ...]  # the kinds there are
    banded: bool  # whether rows visit so few that gathering them beforehand costs little
    S: int


def _visits(plan: Plan, problem: Problem, *, band: bool) -> Visits:
    S = problem.sizes[-1]
    kinds = _static_kinds(problem.mask, plan, problem.sizes)
    decided = kinds is not None
    if not decided:
        kinds = _static_kinds(masks.known(problem.mask), plan, problem.sizes)
        # To agree on a block, examples and heads on different devices would have to ask each other.
        decided = jax.device_count() > 1 and any(block != 1 for block in plan.blocks[:-3])
    if kinds is None:
        return Visits(None, None, (PARTIAL,) if decided else (EMPTY, PARTIAL, FULL), False, S)
    (nq, nk), order, banded = kinds.shape, None, False
    width = int((kinds != EMPTY).sum(1).max(initial=0))
    if width < nk:
        order = np.argsort(kinds == EMPTY, axis=1, kind="stable")[:, :width].astype(np.int32)
        kinds = np.take_along_axis(kinds, order, axis=1)
        banded = band and nq * width <= 4 * nk
    if not decided:
        return Visits(order, None, (EMPTY, PARTIAL, FULL), banded, S)
    # Where there is no block at all the loop is traced still, so it wants a branch.
    present = tuple(sorted({int(kind) for kind in kinds.flat})) or (EMPTY,)
    return Visits(order, np.searchsorted(present, kinds).astype(np.int32), present, banded, S)


def _static_kinds(mask: masks.Mask, plan: Plan, sizes: tuple[int, ...]) -> np.ndarray | None:
    T, S = sizes[-2:]
    q_range, kv_range = (Range(0), Range(0)) if isinstance(mask, masks.Full) else (plan.q_range, plan.kv_range)
    if q_range is None or kv_range is None or not (isinstance(T, int) and isinstance(S, int)) or jax.tree.leaves(mask):
        return None
    return _kinds(mask, q_range.array(T)[:, None], kv_range.array(S)[None, :], plan.blocks)


def _kinds(mask: masks.Mask, q_pos: Any, kv_pos: Any, blocks: tuple[int, ...]) -> Any:
    """EMPTY, PARTIAL or FULL for each block, int32 `[rows, columns]`: NumPy if positions and mask are known now."""
    empty, full = masks.blocks(mask, q_pos, kv_pos, *blocks[-2:])
    xp = np if isinstance(empty, np.ndarray) and isinstance(full, np.ndarray) else jnp
    if _is_ragged(S := kv_pos.shape[-1], blocks[-1]):  # the padding of the last block is not to be seen
        full = full & (xp.arange(full.shape[1])[None, :] < S // blocks[-1])
    return xp.where(empty, EMPTY, xp.where(full, FULL, PARTIAL)).astype(np.int32)


def _is_ragged(size: int, block: int) -> bool:
    return not isinstance(size, int) or size % block != 0


def static_kinds(problem: Problem, blocks: tuple[int, ...]) -> np.ndarray | None:
    """EMPTY, PARTIAL or FULL for each block, int32 `[rows, columns]`, if that is known while tracing."""
    at_least_one = tuple(max(block, 1) if isinstance(block, int) else block for block in blocks)
    return _static_kinds(problem.mask, plan(problem, at_least_one), problem.sizes)


def _forget(f: Callable) -> Callable:
    """Lets a block be computed again where a derivative needs it, instead of keeping its scores.

    In the tangent this is what makes memory linear. In the forward, where nothing is ever differentiated, it keeps an
    enclosing `lax.scan` from hoisting the masks of all blocks out of its loop. A loop needs no barrier against CSE.
    """
    return jax.checkpoint(f, prevent_cse=False)


def _split(operands: Any, cut: Callable[[jax.Array], Any]) -> tuple[list[Any], Callable]:
    """Cuts the leaves that `cut` cuts; the others (for which it gives None) belong to every piece.

    Returns:
      the pieces, each `[pieces, ...]` or None, and a function from one piece of each to the operands of that piece,
      the others being those of its second argument, or the uncut ones.
    """
    leaves = jax.tree.leaves(operands)
    tree: Any = jax.tree.structure(operands)
    cuts = [cut(leaf) for leaf in leaves]

    def together(pieces: list[Any], others: Any = operands) -> Any:
        each = zip(jax.tree.leaves(others), cuts, pieces, strict=True)
        return tree.unflatten([leaf if c is None else c.restore(piece) for leaf, c, piece in each])

    return [None if c is None else c.pieces for c in cuts], together


class Cut(NamedTuple):
    pieces: jax.Array  # [pieces, ...]
    restore: Callable[[jax.Array], jax.Array]  # from a piece to what it is a piece of


def _cut(leaf: jax.Array, axis: int, block: int, restore: Callable = lambda piece: piece) -> Cut | None:
    """Cuts an axis into blocks, `[pieces, ..., block, ...]`, the last padded with 0; None if the axis is 1."""
    size = leaf.shape[axis]
    if _is_one(size):
        return None
    leaf = _pad(leaf, axis, block)
    shape = leaf.shape
    pieces = move(leaf.reshape((*shape[:axis], -(-size // block), block, *shape[axis + 1 :])), axis, 0)
    # Axes of 1 stay at home: they make XLA copy what it carries into a loop.
    whole = pieces.shape[1:]
    pieces = pieces.reshape((pieces.shape[0], *(n for n in whole if not _is_one(n))))
    return Cut(pieces, lambda piece: restore(piece.reshape(whole)))


def _payload_first(cut: Cut | None, has_payload: bool) -> Cut | None:
    """Exchanges the last two axes of the pieces, `[..., block, H]` to `[..., H, block]`, where there are such."""
    if cut is None or not has_payload or cut.pieces.ndim < 3:
        return cut
    return Cut(jnp.swapaxes(cut.pieces, -1, -2), lambda piece: cut.restore(jnp.swapaxes(piece, -1, -2)))


def _join(pieces: jax.Array, axis: int, size: int) -> jax.Array:
    """Undoes `_cut`: `[pieces, ..., block, ...]` to `[..., size, ...]`."""
    joined = move(pieces, 0, axis)
    shape = joined.shape
    joined = joined.reshape((*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]))
    return lax.slice_in_dim(joined, 0, size, axis=axis)
