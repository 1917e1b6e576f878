"""The loops: going through the blocks of a problem, batch, heads, rows and keys, and visiting only those that count.

Every array of a problem has one form, so cutting it into blocks is one function for all axes. What is laid out how
inside the loops is decided by what XLA does with it: it is said where it is done.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn import masks
from jattn.problem import Problem, Range, move, take_slice

EMPTY, PARTIAL, FULL = 0, 1, 2
FEW = 4  # visits of a block of rows, or 1/8 of all: where none turns out to want more, more are not gone through
SCORES_AT_MOST = 2**20  # in a visit of a band, of decoding, and of any on a CPU, unless the caller gives greater blocks
SCORES_AT_ONCE = 2**18  # in visits at the same time, for one key/value head: they stay in a CPU's cache
SCORES_ON_DEVICE = 2**26  # in what is done at the same time, for all heads and examples, on anything but a CPU


class Plan(NamedTuple):
    """What is decided while tracing."""

    blocks: tuple[int, ...]  # the block size along each of [*B, K, G, T, S]
    q_range: Range | None  # the positions, where they are known while tracing
    kv_range: Range | None
    guard: bool  # whether some operands may take no part in the whole problem, so that they are to be put to 0


def plan(problem: Problem, blocks: tuple[int, ...], guard: bool = True) -> Plan:
    """Returns the plan of a problem cut into `blocks`."""
    q_range, kv_range = (p if isinstance(p, Range) else None for p in (problem.q_pos, problem.kv_pos))
    return Plan(blocks, q_range, kv_range, guard)


def sweep(plan: Plan, start: Callable, step: Callable, problem: Problem, directions: Any, *residuals: Any) -> Any:
    """Goes through the blocks of a problem: batch, then heads, then rows, and keys innermost.

    For each block of rows and heads: state = start(rows); state = step(state, keep, block) for each visit of keys: one
    block that is not empty, or all blocks of a band at once. Rows and blocks are the operands (problem, directions,
    *residuals), cut to size; states are linear in directions.

    Returns:
      the last states, each array `[*B, K, G, T, ...]`, as `start` makes them for the problem as a whole.
    """
    *batch_axes, K_axis, _, _, S_axis = range(len(plan.blocks))
    operands = _varying((problem, directions, *residuals), problem)
    visits = visits_of(plan, problem)
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
        pieces = _cut(move(leaf, moved, K_axis), axis, block, lambda piece: move(piece, K_axis, moved))
        return pieces if operands[1] else _by_index(pieces)

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
    return jax.tree.unflatten(jax.tree.structure(states), [o.leave(r) for o, r in zip(homes, results, strict=True)])


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
        moved = move(leaf, self.moved, self.K_axis)
        return moved.reshape([size for size in moved.shape if not _is_one(size)])

    def leave(self, kept: jax.Array) -> jax.Array:
        return move(kept.reshape(self.shape), self.K_axis, self.moved)

    def take(self, kept: jax.Array, start: jax.Array, block: int) -> jax.Array:
        if self.shape[self.axis] == 1:
            return self.leave(kept)
        shape = (*self.shape[: self.axis], block, *self.shape[self.axis + 1 :])
        part = take_slice(kept, start, block, self._bare_axis)
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


def _without_lead(run: Callable, blocks: tuple[int, ...], operands: Any) -> Any:
    """Runs on one example and head without the axes that say so: XLA would copy what it carries into loops for them."""
    *lead, G, T, S = blocks
    if any(size != 1 for size in lead):
        return run(blocks, operands)
    bare = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[len(lead) :]), operands)
    return jax.tree.map(lambda result: result.reshape((*lead, *result.shape)), run((G, T, S), bare))


def _by_rows(run: Callable, visits: "Visits", blocks: tuple[int, ...], operands: Any) -> Any:
    """Runs over the blocks of rows; where arrays decide what is visited, in few visits if that turns out to do."""
    operands = (operands[0].widened(), *operands[1:])  # of one head, where heads are looped over
    rows = functools.partial(_rows, run, blocks)
    if visits.kinds is not None or len(visits.present) == 1:
        return rows(visits, operands)
    kinds, order = _kinds_now(operands[0], blocks), None if visits.order is None else visits.order[:, :, 0]
    kinds = kinds if order is None else jnp.take_along_axis(kinds, order, axis=1)
    every = functools.partial(rows, visits._replace(kinds=kinds))
    if not all(isinstance(size, int) for size in kinds.shape) or kinds.shape[1] <= FEW:
        return every(operands)
    few = max(FEW, kinds.shape[1] // 8)
    first = jnp.argsort(kinds == EMPTY, axis=1, stable=True)[:, :few].astype(np.int32)
    chosen = first if order is None else jnp.take_along_axis(order, first, axis=1)
    fewer = visits._replace(order=chosen[:, :, None], kinds=jnp.take_along_axis(kinds, first, axis=1))
    will_do = ((kinds != EMPTY).sum(1) <= few).all()
    return lax.cond(will_do, _forget(functools.partial(rows, fewer)), _forget(every), operands)


def _kinds_now(problem: Problem, blocks: tuple[int, ...]) -> jax.Array:
    """EMPTY, PARTIAL or FULL for each block, int32 `[rows, columns]`, as arrays decide, one block of rows at a time."""
    operands = problem.mask, problem.q_pos
    cut = functools.partial(_cut_rows, len(blocks) - 2, blocks[-2])
    pieces, together = _split(operands, cut, _roles(blocks, (operands, ())))

    def look(x: Any) -> jax.Array:
        mask, q_pos = together(x[1])
        return jnp.asarray(_kinds(mask, q_pos, problem.kv_pos, blocks))[0]

    rows = -(-problem.sizes[-2] // blocks[-2])
    return _agreed(lax.map(look, (jnp.arange(rows, dtype=jnp.int32), pieces)))


def _rows(run: Callable, blocks: tuple[int, ...], visits: "Visits", operands: Any) -> Any:
    """Runs over the blocks of rows, with the keys that each visits: one after the other, bands a few at a time."""
    *_, axis, _ = range(len(blocks))
    size, block = operands[0].sizes[axis], blocks[axis]
    roles = _roles(blocks, operands)
    keys, run_row = _by_keys(run, visits, blocks, roles, operands)
    if isinstance(size, int) and size == block:
        keys, order, kinds = jax.tree.map(lambda of_rows: of_rows[0], (keys, visits.order, visits.kinds))
        return run_row(operands, keys, Row(order, kinds, None))
    outside = _outside_rows(axis)

    def rows(x: Any) -> Any:
        start, piece, keys, order, kinds = x
        live = size - start if _is_ragged(size, block) else None
        results = run_row(together(piece), keys, Row(order, kinds, live))
        return jax.tree.map(lambda result: move(result, axis, outside), results)

    starts = jnp.arange(-(-size // block), dtype=jnp.int32) * block
    pieces, together = _split(operands, functools.partial(_cut_rows, axis, block), roles)
    xs = (starts, pieces, keys, visits.order, visits.kinds)
    # Rows of something T x S are sliced, and slices at different places would be gathered.
    several = 1 if any(role.rows and role.keys for role in roles) else rows_at_once(visits, blocks)
    results = lax.map(_forget(rows), xs, batch_size=several if several > 1 else None)
    return jax.tree.map(lambda result: move(_join(result, outside, size), outside, axis), results)


def _outside_rows(axis: int) -> int:
    """Where rows come from the caller, before heads, so that nothing is transposed before it is cut."""
    return max(axis - 2, 0)


def _cut_rows(axis: int, block: int, leaf: jax.Array, role: "Role") -> "Cut | None":
    """Cuts rows into blocks; None if the leaf has none."""
    if role.rows and role.keys and not role.moving and isinstance(leaf.shape[axis], int) and leaf.size != 0:
        # It stays where it is, because cutting it might copy something T x S.
        starts = jnp.arange(-(-leaf.shape[axis] // block), dtype=jnp.int32) * block
        return Cut(starts, lambda start: _rows_at(leaf, axis, start, block))
    outside = _outside_rows(axis)
    return _cut(move(leaf, axis, outside), outside, block, lambda piece: move(piece, outside, axis))


class Role(NamedTuple):
    """What a leaf of the operands has."""

    rows: bool
    keys: bool
    moving: bool  # whether it is a direction


def _roles(blocks: tuple[int, ...], operands: Any) -> list[Role]:
    problem, directions, *residuals = operands
    moving = [False] * len(jax.tree.leaves(problem)) + [True] * len(directions) + [False] * len(residuals)
    shapes = [leaf.shape[len(blocks) - 2 :] for leaf in jax.tree.leaves(operands)]
    return [Role(not _is_one(T), not _is_one(S), m) for (T, S, *_), m in zip(shapes, moving, strict=True)]


def rows_at_once(visits: "Visits", blocks: tuple[int, ...]) -> int:
    """How many blocks of rows visit their bands at the same time, because XLA is slow at small products."""
    *lead, G, block_q, block_kv = blocks
    if visits.order is None or visits.width == 1 or not all(isinstance(size, int) for size in lead):
        return 1
    at_once = SCORES_AT_ONCE if jax.default_backend() == "cpu" else SCORES_ON_DEVICE // max(math.prod(lead), 1)
    return divisor(len(visits.order), at_once // (G * block_q * block_kv * visits.width))


def divisor(size: int, at_most: int) -> int:
    """The greatest divisor of a size that is at most `at_most`, or else 1."""
    return max(d for d in range(1, max(min(at_most, size), 1) + 1) if size % d == 0)


def _by_keys(
    run: Callable, visits: "Visits", blocks: tuple[int, ...], roles: list[Role], operands: Any
) -> tuple[Any, Callable]:
    """Cuts keys into blocks: what has no rows is cut here, once for all rows.

    Returns:
      the keys of each block of rows, `[rows, ...]`, if they are a band (else None, for all share them), and a function
      that runs over the blocks of keys that one block of rows visits.
    """
    S_axis, block, forward = len(blocks) - 1, blocks[-1], not operands[1]

    def cut(leaf: jax.Array, order: Any) -> Cut | None:
        # A loop copies each piece that it goes through, visited or not. An index copies nothing, but its transpose
        # would add to the whole gradient at every visit.
        if visits.width == 1 or _is_one(leaf.shape[S_axis]):
            pieces = _cut(leaf, S_axis, block)
            return _by_index(pieces) if forward else pieces
        band = functools.partial(_side_by_side, _in_blocks(leaf, S_axis, block), S_axis)
        order = order.reshape((-1, visits.width))
        return Cut(order, band) if forward else _cut(band(order.reshape(-1)), S_axis, block * visits.width)

    def cut_shared(leaf: jax.Array, role: Role) -> Cut | None:
        if role.rows or not role.keys:
            return None
        # A gradient of keys is a product that sums over rows. XLA is four times faster at it when the result comes
        # transposed, because then the narrow operand goes first; so that is how directions travel.
        payload = leaf.ndim > len(blocks)
        return _payload_first(cut(leaf, visits.order)) if role.moving and payload else cut(leaf, visits.order)

    shared, with_shared = _split(operands, cut_shared, roles)

    def run_row(operands: Any, band: Any, row: Row) -> Any:
        def cut_own(leaf: jax.Array, role: Role) -> Cut | None:
            return cut(leaf, row.order) if role.rows and role.keys else None

        own, with_own = _split(operands, cut_own, roles)
        keys = (shared if band is None else jax.tree.map(lambda piece: piece[None], band), own)
        if band is None and row.order is not None:
            keys = jax.tree.map(lambda pieces: pieces[row.order[:, 0]], keys)
        with_keys = lambda operands, keys: with_shared(keys[0], with_own(keys[1], operands))  # noqa: E731
        return run(blocks, operands, keys, with_keys, row)

    return shared if visits.width > 1 else None, run_row


def _rows_at(leaf: jax.Array, axis: int, start: jax.Array, block: int) -> jax.Array:
    """The block of rows at `start`; where the last one ends behind the array, it is filled up with 0."""
    rows = take_slice(leaf, start, block, axis)
    if not _is_ragged(leaf.shape[axis], block):
        return rows
    size = leaf.shape[axis]
    rows = jnp.roll(rows, jnp.minimum(size - block - start, 0), axis)  # the slice was held back to fit
    index = _along(axis, leaf.ndim, jnp.arange(block, dtype=jnp.int32))
    return jnp.where(index < size - start, rows, jnp.zeros((), rows.dtype))


def _in_blocks(leaf: jax.Array, axis: int, block: int) -> jax.Array:
    """Makes an axis two, `[..., blocks, block, ...]`.

    The last block is filled up: with 0, but positions and ids with the last, so that blocks stay narrow.
    """
    *lead, size = leaf.shape[: axis + 1]
    count = -(-size // block)
    if _is_ragged(size, block):
        widths = [(0, count * block - size if a == axis else 0) for a in range(leaf.ndim)]
        narrow = jnp.issubdtype(leaf.dtype, jnp.signedinteger) and size != 0
        leaf = jnp.pad(leaf, widths, mode="edge") if narrow else jnp.pad(leaf, widths)
    return leaf.reshape((*lead, count, block, *leaf.shape[axis + 1 :]))


def _side_by_side(blocks: jax.Array, axis: int, order: jax.Array) -> jax.Array:
    """The blocks `order`, `[width]`, as one: undoes `_in_blocks` for them."""
    return lax.collapse(jnp.take(blocks, order, axis=axis, mode="clip"), axis, axis + 2)


def _along(axis: int, ndim: int, index: jax.Array) -> jax.Array:
    """The one axis of `index` as the axis `axis` of `ndim`, the others being 1."""
    return jnp.expand_dims(index, [a for a in range(ndim) if a != axis])


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
        order = jnp.arange(-(-visits.S // block), dtype=jnp.int32)[:, None]

    def keep(problem: Problem, j: jax.Array) -> jax.Array:
        keep = problem.mask(problem.q_pos, problem.kv_pos)
        if _is_ragged(visits.S, block):
            index = j[:, None] * block + jnp.arange(block, dtype=jnp.int32)[None]
            keep = keep & (_along(axis, axis + 1, index.reshape(-1)) < visits.S)
        if live is not None:  # what fills up the last rows asks nothing, so that it cannot let a NaN in
            index = jnp.arange(blocks[-2], dtype=jnp.int32)
            keep = keep & (_along(axis - 1, axis + 1, index) < live)
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


@jax.custom_batching.custom_vmap
def _agreed(kinds: jax.Array) -> jax.Array:
    """Under `vmap`: PARTIAL where examples differ, so that they take one branch together.

    A `lax.switch` whose index differs between examples would run all branches, and has no gradient.
    """
    return kinds


@_agreed.def_vmap
def _agreed_by_all(size: int, batched: list[bool], kinds: jax.Array) -> tuple[jax.Array, bool]:
    return _agreed(jnp.where((kinds == kinds[:1]).all(0), kinds.max(0, initial=EMPTY), PARTIAL)), False


def _with_keys_axis(states: Any, S_axis: int) -> Any:
    """Gives states `[*B, K, G, T, ...]` the axis S that everything else has, of 1."""
    return jax.tree.map(lambda state: jnp.expand_dims(state, S_axis), states)


def _varying(values: Any, problem: Problem) -> Any:
    """Under `shard_map`: says that these differ between devices wherever the problem does, as a loop wants to know.

    Operands before all loops: their gradients are summed over devices, and not all devices take the same branches.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return values
    never = functools.reduce(jnp.logical_or, [(leaf != leaf).any() & False for leaf in jax.tree.leaves(problem)])
    return jax.tree.map(lambda value: jnp.where(never, jnp.zeros_like(value), value), values)


class Row(NamedTuple):
    """What one block of rows visits."""

    order: Any  # [visits, width]  the blocks of keys; None: all, one by one
    kinds: Any  # [visits]  what each visit is, as an index of `present`; None: there is but one
    live: jax.Array | None  # how many rows are no padding; None: all


class Visits(NamedTuple):
    """Which blocks of keys each block of rows visits, as far as is known while tracing."""

    order: Any  # [rows, visits, width]  the blocks; None: all, one by one
    kinds: Any  # [rows, visits]  what each visit is, as an index of `present`; None: arrays decide, or there is but one
    present: tuple[int, ...]  # the kinds there are
    width: int  # how many blocks a visit takes: if more than one, it is all that a block of rows visits
    S: int


def visits_of(plan: Plan, problem: Problem) -> Visits:
    """Returns what each block of rows visits."""
    S = problem.sizes[-1]
    kinds = _static_kinds(problem.mask, plan, problem.sizes)
    decided = kinds is not None
    if not decided:
        kinds = _static_kinds(masks.known(problem.mask), plan, problem.sizes)
        # To agree on a block, examples and heads on different devices would have to ask each other; none at all cannot.
        decided = any(block != 1 and (block == 0 or jax.device_count() > 1) for block in plan.blocks[:-3])
    if kinds is None:
        return Visits(None, None, (PARTIAL,) if decided else (EMPTY, PARTIAL, FULL), 1, S)
    order, width, most = None, 1, int((kinds != EMPTY).sum(1).max(initial=0))
    if most < kinds.shape[1]:
        order = np.argsort(kinds == EMPTY, axis=1, kind="stable")[:, :most, None].astype(np.int32)
        kinds = np.take_along_axis(kinds, order[:, :, 0], axis=1)
        if decided and _is_band(plan.blocks, kinds, S):
            order, width = np.swapaxes(order, 1, 2), most
            kinds = np.full((len(kinds), 1), FULL if (kinds == FULL).all() else PARTIAL)
    if not decided:
        return Visits(order, None, (EMPTY, PARTIAL, FULL), width, S)
    # Where there is no block at all the loop is traced still, so it wants a branch.
    present = tuple(kind for kind in (EMPTY, PARTIAL, FULL) if (kinds == kind).any()) or (EMPTY,)
    return Visits(order, np.searchsorted(present, kinds).astype(np.int32), present, width, S)


def _is_band(blocks: tuple[int, ...], kinds: np.ndarray, S: int) -> bool:
    """Whether each block of rows visits several, so few that gathering them costs little, and that they make one block.

    And nearly as many as the others: what the `kinds` of its visits, `[rows, width]`, call EMPTY is computed too.
    """
    *_, G, block_q, block_kv = blocks
    rows, keys = len(kinds), kinds.shape[1] * block_kv
    few = block_kv < keys <= S // 2 and rows * keys <= 4 * S and G * block_q * keys <= SCORES_AT_MOST
    return few and float(np.mean(kinds != EMPTY)) >= 0.75


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
    return _static_kinds(problem.mask, plan(problem, blocks), problem.sizes)


def count_visits(problem: Problem, blocks: tuple[int, ...]) -> list[jax.Array]:
    """How many blocks, of all heads and examples, are left out and are visited as PARTIAL and as FULL, by doing so."""

    def start(problem: Problem, _: Any) -> list[jax.Array]:
        return [jnp.zeros(problem.sizes[:-1], jnp.int32)] * 2

    def step(counts: list[jax.Array], keep: jax.Array | None, problem: Problem, _: Any) -> list[jax.Array]:
        partial, full = counts
        visited = problem.sizes[-1] // blocks[-1]
        return [partial, full + visited] if keep is None else [partial + visited, full]

    counts = sweep(plan(problem, blocks), start, step, problem.with_positions(), ())
    partial, full = (count[..., 0, :: blocks[-2]] for count in counts)  # of one row of each block
    every = partial.size * -(-problem.sizes[-1] // blocks[-1])
    return [every - partial.sum() - full.sum(), partial.sum(), full.sum()]


def _forget(f: Callable) -> Callable:
    """Lets a block be computed again where a derivative needs it, instead of keeping its scores.

    In the tangent this is what makes memory linear. In the forward it keeps an enclosing
    `lax.scan` from hoisting the masks of all blocks out of its loop. A loop needs no barrier against CSE.
    """
    return jax.checkpoint(f, prevent_cse=False)


def _split(operands: Any, cut: Callable[..., Any], *more: Sequence[Any]) -> tuple[list[Any], Callable]:
    """Cuts the leaves that `cut` cuts; the others (for which it gives None) belong to every piece.

    Args:
      cut: gives the `Cut` of a leaf, or None. It is called with the leaf and with its part of each of `more`.

    Returns:
      the pieces, each `[pieces, ...]` or None, and a function from one piece of each to the operands of that piece,
      the others being those of its second argument, or the uncut ones.
    """
    leaves = jax.tree.leaves(operands)
    tree: Any = jax.tree.structure(operands)
    cuts = list(map(cut, leaves, *more))

    def together(pieces: list[Any], others: Any = operands) -> Any:
        each = zip(jax.tree.leaves(others), cuts, pieces, strict=True)
        return tree.unflatten([leaf if c is None else c.restore(piece) for leaf, c, piece in each])

    return [None if c is None else c.pieces for c in cuts], together


class Cut(NamedTuple):
    """A leaf cut into pieces, in the form in which loops go through them."""

    pieces: jax.Array  # [pieces, ...]
    restore: Callable[[jax.Array], jax.Array]  # from a piece to what it is a piece of


def _cut(leaf: jax.Array, axis: int, block: int, restore: Callable = lambda piece: piece) -> Cut | None:
    """Cuts an axis into blocks, `[pieces, ..., block, ...]`, as `_in_blocks` does; None if the axis is 1."""
    if _is_one(leaf.shape[axis]):
        return None
    pieces = move(_in_blocks(leaf, axis, block), axis, 0)
    # Axes of 1 stay at home: they make XLA copy what it carries into a loop.
    whole = pieces.shape[1:]
    pieces = pieces.reshape((pieces.shape[0], *(n for n in whole if not _is_one(n))))
    return Cut(pieces, lambda piece: restore(piece.reshape(whole)))


def _by_index(cut: Cut | None) -> Cut | None:
    """Leaves the pieces where they are until they are wanted: loops go through their indices."""
    if cut is None or cut.pieces.size == 0:
        return cut
    count = cut.pieces.shape[0]
    return Cut(jnp.arange(count, dtype=jnp.int32), lambda i: cut.restore(take_slice(cut.pieces, i, 1, 0).squeeze(0)))


def _payload_first(cut: Cut | None) -> Cut | None:
    """Exchanges the last two axes of the pieces, `[pieces, ..., block, H]` to `[pieces, ..., H, block]`."""
    if cut is None or cut.pieces.ndim < 3:
        return cut
    return Cut(jnp.swapaxes(cut.pieces, -1, -2), lambda piece: cut.restore(jnp.swapaxes(piece, -1, -2)))


def _join(pieces: jax.Array, axis: int, size: int) -> jax.Array:
    """Undoes `_cut`: `[pieces, ..., block, ...]` to `[..., size, ...]`."""
    return lax.slice_in_dim(lax.collapse(move(pieces, 0, axis), axis, axis + 2), 0, size, axis=axis)
