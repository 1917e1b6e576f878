"""The nest of loops: batch, heads, rows and keys, each cut by its letter, visiting only the blocks that count.

One rule serves the loops over batch, heads and rows. A leaf travels through the loop as pieces if it is a direction,
because gradients are then gathered as pieces, or if the axis is its first, because that costs nothing. All other leaves
stay where they are, as the caller laid them out, and are cut by index.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn import checks, letters, visits
from jattn.implementations.base import Start, Step
from jattn.letters import Lettered, Order
from jattn.problem import Problem
from jattn.visits import EMPTY, FULL, PARTIAL, Plan, Visits, rows_at_once

Leaves = list[Lettered]


def walk(plan: Plan, start: Start, step: Step, operands: Any) -> Any:
    """Goes through the blocks of a problem: batch, then heads, then rows, and keys innermost.

    For each block of rows and heads: state = start(rows); state = step(state, keep, block) for each visit of keys: one
    block that is not empty, or all blocks of a band at once. See `Implementation.walk`.
    """
    leaves, tree = jax.tree.flatten(operands, is_leaf=letters.is_lettered)
    problem, directions, residuals = operands
    counts = [len(jax.tree.leaves(part, is_leaf=letters.is_lettered)) for part in (problem, directions, residuals)]
    moving = [False] * counts[0] + [True] * counts[1] + [False] * counts[2]
    nest = _Nest(plan, visits.visits_of(plan, problem), start, step, tree, moving)
    axes = plan.blocks.batch + "K"
    if not directions and problem.axes.are_known:
        return nest.together(axes, leaves)
    run: Callable[..., Any] = nest.head
    for axis in reversed(axes):
        run = functools.partial(nest.over, axis, run)
    return run(leaves)


def varying(values: Any, among: Any) -> Any:
    """Under `shard_map`: says of `values` that they differ between devices wherever something `among` others does.

    Loops want it of what they carry. Operands want it before all loops, because their gradients are summed over devices
    where it is said, and within the loops not all devices take the same branches.
    """
    every = frozenset().union(*(axes_varied(jax.typeof(leaf)) for leaf in jax.tree.leaves(among)))

    def cast(leaf: Any) -> Any:
        missing = tuple(sorted(every - axes_varied(jax.typeof(leaf))))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, values) if every else values


def axes_varied(aval: Any) -> frozenset[Any]:
    """The mesh axes along which an array of this type differs between devices."""
    kind = getattr(aval, "manual_axis_type", None)  # since jax 0.10
    return getattr(aval, "vma", frozenset()) if kind is None else kind.varying


def checkpointed(f: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a block be computed again where a derivative needs it, instead of keeping its scores.

    In the tangent this is what makes memory linear. In the forward it keeps an enclosing `lax.scan` from hoisting the
    masks of all blocks out of its loop. A loop needs no barrier against CSE.
    """
    again: Callable[..., Any] = jax.checkpoint(f, prevent_cse=False)
    return again


class _Nest(NamedTuple):
    """One walk: what is static in it. Its methods go inwards, each with the leaves of the operands cut further."""

    plan: Plan
    visits: Visits
    start: Start
    step: Step
    tree: Any  # of the operands
    moving: list[bool]  # of each leaf, whether it is a direction

    def over(self, axis: str, run: Callable[..., Any], leaves: Leaves, extra: Any = (), several: int = 1) -> Any:
        """Runs over the blocks of an axis, one after the other, and joins the results, laid out as the queries are.

        Args:
          extra: arrays `[blocks, ...]` that travel too; `run` gets its piece of them as it is.
          several: how many blocks go at the same time.
        """
        block, rows = self.plan.blocks[axis], leaves[0].letters
        size = leaves[0].array.shape[rows.index(axis)] if axis in rows else block
        if isinstance(size, int) and size == block:
            return run(leaves, *jax.tree.map(lambda x: x[0], extra))
        travels = [self._travels(axis, *each) for each in zip(leaves, self.moving, strict=True)]
        pieces = [leaf.pieces(axis, block) if t else None for leaf, t in zip(leaves, travels, strict=True)]

        def body(x: Any) -> Any:
            i, pieces, extra = x
            start = i if block == 1 else i * np.int32(block)
            here = [
                self._cut(leaf, axis, start)
                if piece is None
                else leaf.replace(piece, letters.within(leaf.letters, axis, block))
                for leaf, piece in zip(leaves, pieces, strict=True)
            ]
            return run(here, *extra)

        xs = (jnp.arange(-(-size // block), dtype=jnp.int32), pieces, extra)
        results = lax.map(checkpointed(body), xs, batch_size=several if several > 1 else None)
        return jax.tree.map(functools.partial(_joined, rows, axis, block), results)

    def together(self, axes: str, leaves: Leaves) -> Any:
        """Runs over the blocks of batch and heads, where nothing is differentiated: in one loop, cutting all at once.

        Loops within one another would copy each example for the loop over its heads.
        """
        blocks, rows = self.plan.blocks, leaves[0].letters
        looped = [axis for axis in axes if axis in rows and leaves[0].size(axis) != blocks[axis]]
        counts = [-(-leaves[0].size(axis) // blocks[axis]) for axis in looped]
        if not looped:
            return self.head(leaves)

        def body(i: Any) -> Any:
            starts = {}
            for axis, count in zip(reversed(looped), reversed(counts), strict=True):
                starts[axis] = i % count * blocks[axis]
                i = i // count
            return self.head([leaf.slice(starts, blocks, barrier=self.plan.target.is_cpu) for leaf in leaves])

        results = lax.map(checkpointed(body), jnp.arange(math.prod(counts), dtype=jnp.int32))
        results = jax.tree.map(lambda result: result.reshape((*counts, *result.shape[1:])), results)
        within = [rows]  # the letters that the rows have inside of each loop
        for axis in looped:
            within.append(letters.within(within[-1], axis, blocks[axis]))
        for depth, axis in reversed(list(enumerate(looped))):
            join = functools.partial(_joined, within[depth], axis, blocks[axis])
            for _ in range(depth):  # the axes of outer loops are still in front
                join = jax.vmap(join)
            results = jax.tree.map(join, results)
        return results

    def _travels(self, axis: str, leaf: Lettered, moving: bool) -> bool:
        if moving or axis not in leaf.letters:
            return axis in leaf.letters
        # An array of T x S stays, because filling up its last rows would copy it; a narrow one, because of the barrier.
        stays = (axis == "T" and _is_pairs(leaf)) or (self.plan.target.is_cpu and checks.is_narrow(leaf.array))
        return leaf.letters[0] == axis and not stays

    def _cut(self, leaf: Lettered, axis: str, start: Any) -> Lettered:
        barrier = self.plan.target.is_cpu
        if axis == "T" and "T" in leaf.letters:
            return leaf.rows(start, self.plan.blocks, barrier=barrier)
        return leaf.slice({axis: start}, self.plan.blocks, barrier=barrier)

    def head(self, leaves: Leaves) -> Any:
        """Runs one head, or the few that go together; where arrays decide, in few visits if that turns out to do."""
        leaves = self._filled_up(self._widened(leaves))
        if self.visits.are_decided:
            return self.rows(leaves, self.visits)
        kinds, order = self._kinds_now(leaves), None if self.visits.order is None else self.visits.order[:, :, 0]
        kinds = kinds if order is None else jnp.take_along_axis(kinds, order, axis=1)
        every = functools.partial(self.rows, visits=self.visits._replace(kinds=kinds))
        if not all(isinstance(size, int) for size in kinds.shape) or kinds.shape[1] <= visits.FEW:
            return every(leaves)
        few = max(visits.FEW, kinds.shape[1] // 8)
        first = jnp.argsort(kinds == EMPTY, axis=1, stable=True)[:, :few].astype(np.int32)
        chosen = first if order is None else jnp.take_along_axis(order, first, axis=1)
        fewer = self.visits._replace(order=chosen[:, :, None], kinds=jnp.take_along_axis(kinds, first, axis=1))
        will_do = ((kinds != EMPTY).sum(1) <= few).all()
        return lax.cond(will_do, checkpointed(functools.partial(self.rows, visits=fewer)), checkpointed(every), leaves)

    def _widened(self, leaves: Leaves) -> Leaves:
        """Operands of products as wide as their sums, on a CPU, which multiplies nothing narrower faster."""
        if not self.plan.target.is_cpu:
            return leaves
        problem, *others = self.tree.unflatten(leaves)
        return jax.tree.leaves((problem.with_operands(problem.wide), *others), is_leaf=letters.is_lettered)

    def _filled_up(self, leaves: Leaves) -> Leaves:
        """Rows and keys as long as their blocks; arrays of T x S are filled up later, a block of rows at a time."""
        block_q, block_kv = self.plan.blocks.shape("TS")
        filled = []
        for leaf, moving in zip(leaves, self.moving, strict=True):
            if moving or not _is_pairs(leaf):
                leaf = leaf.padded("T", block_q, zero=moving).padded("S", block_kv, zero=moving)
            filled.append(leaf)
        return filled

    def _kinds_now(self, leaves: Leaves) -> jax.Array:
        """EMPTY, PARTIAL or FULL for each block, `[rows, columns]`, as arrays decide, one row of blocks at a time."""
        problem: Problem = self.tree.unflatten(leaves)[0]
        lead, rows = problem.order()
        order = Order(lead, rows.replace("T", "") + "T")

        def look(i: jax.Array) -> jax.Array:
            start, whole = i * np.int32(self.plan.blocks["T"]), (problem.mask, problem.q_pos)
            here = jax.tree.map(lambda leaf: self._cut(leaf, "T", start), whole, is_leaf=letters.is_lettered)
            mask, q_pos, columns = letters.fitted((*here, problem.kv_pos), order)
            return jnp.asarray(visits.kinds(mask, q_pos, columns, self.plan.blocks, problem.axes["S"]))[0]

        every = jnp.arange(problem.q.size("T") // self.plan.blocks["T"], dtype=jnp.int32)
        agreed: jax.Array = _agreed(lax.map(look, every))
        return agreed

    def rows(self, leaves: Leaves, visits: Visits) -> Any:
        """Runs over the blocks of rows: one after the other, bands a few at a time."""
        each = list(zip(leaves, self.moving, strict=True))
        if visits.width > 1:
            order = visits.order[:, 0]
            run: Callable[..., Any] = functools.partial(self._band, visits)
            extra = order, [None if _is_pairs(leaf) else self._bands(order, leaf, moves) for leaf, moves in each]
        else:
            keys = [None if _is_pairs(leaf) else self._pieces(leaf, moves) for leaf, moves in each]
            run = functools.partial(self._visits, visits, keys)
            extra = None if visits.order is None else visits.order[:, :, 0], visits.kinds
        # Rows of something T x S are sliced, and slices at different places would be gathered.
        several = 1 if any(map(_is_pairs, leaves)) else rows_at_once(visits, self.plan)
        results = self.over("T", run, leaves, extra, several)
        at, T = leaves[0].letters.index("T"), self.tree.unflatten(leaves)[0].axes["T"]
        return jax.tree.map(lambda result: lax.slice_in_dim(result, 0, T, axis=at), results)

    def _visits(self, visits: Visits, shared: list[Any], leaves: Leaves, order: Any, kinds: Any) -> Any:
        """One block of rows, over the blocks of keys that it visits, one after the other."""
        leaves = self._pairs_filled_up(leaves)
        each = zip(leaves, self.moving, shared, strict=True)
        keys = [self._pieces(leaf, moves) if _is_pairs(leaf) else pieces for leaf, moves, pieces in each]
        # A leaf that goes by pieces does not go whole beside them: its transpose would be zeros as long as S.
        whole = [leaf if pieces is None else leaf.replace(None) for leaf, pieces in zip(leaves, keys, strict=True)]
        if order is None:
            order = jnp.arange(leaves[1].size("S") // self.plan.blocks["S"], dtype=jnp.int32)
        else:
            keys = [None if pieces is None else pieces[order] for pieces in keys]
        every = {EMPTY: lambda state, *_: state, PARTIAL: checkpointed(self._partial), FULL: checkpointed(self._full)}
        branches = [every[kind] for kind in visits.present]

        def visit(state: Any, x: Any) -> Any:
            j, kind, pieces = x
            if len(branches) == 1:
                return branches[0](state, j, pieces, whole), None
            return lax.switch(kind, branches, state, j, pieces, whole), None

        return self._ended(lax.scan(checkpointed(visit), self._begun(leaves), (order, kinds, keys))[0], leaves)

    def _partial(self, state: Any, j: Any, pieces: Any, leaves: Leaves) -> Any:
        operands = self._operands(self._placed(j, pieces, leaves))
        return self.step(state, self._keep(operands[0], j[None]), operands)

    def _full(self, state: Any, j: Any, pieces: Any, leaves: Leaves) -> Any:
        return self.step(state, None, self._operands(self._placed(j, pieces, leaves)))

    def _placed(self, j: Any, pieces: Any, leaves: Leaves) -> Leaves:
        """The leaves of one block of keys; called within the branches, so that the way directions travel gets there."""
        start = j * np.int32(self.plan.blocks["S"])
        return [
            self._cut(leaf, "S", start) if piece is None else leaf.replace(self._unturned(leaf, moves, piece))
            for leaf, moves, piece in zip(leaves, self.moving, pieces, strict=True)
        ]

    def _band(self, visits: Visits, leaves: Leaves, order: Any, bands: Any) -> Any:
        """One block of rows and all the blocks of keys that it visits at once."""
        leaves = self._pairs_filled_up(leaves)
        whole = [leaf if band is None else leaf.replace(None) for leaf, band in zip(leaves, bands, strict=True)]

        def visit(state: Any, leaves: Leaves, bands: Any) -> Any:
            here = [
                leaf.taken("S", self.plan.blocks["S"], order)
                if band is None
                else leaf.replace(self._unturned(leaf, moves, band))
                for leaf, moves, band in zip(leaves, self.moving, bands, strict=True)
            ]
            operands = self._operands(here)
            return self.step(state, None if visits.present == (FULL,) else self._keep(operands[0], order), operands)

        return self._ended(checkpointed(visit)(self._begun(leaves), whole, bands), leaves)

    def _pairs_filled_up(self, leaves: Leaves) -> Leaves:
        return [leaf.padded("S", self.plan.blocks["S"], zero=False) if _is_pairs(leaf) else leaf for leaf in leaves]

    def _pieces(self, leaf: Lettered, moves: bool) -> Any:
        """The blocks of keys as they travel, `[blocks, ...]`; None for a leaf that has none, or is cut by index.

        A loop copies each piece that it goes through, visited or not. An index copies nothing, but its transpose adds
        to the whole gradient at every visit: so only the forward goes by index.
        """
        if not self._by_piece(leaf, moves):
            return None
        return self._turned(leaf, moves, leaf.pieces("S", self.plan.blocks["S"]))

    def _bands(self, order: Any, leaf: Lettered, moves: bool) -> Any:
        """What each block of rows visits, `[rows, ..., width * block, ...]`: gathered once, if there are directions."""
        if not self._by_piece(leaf, moves):
            return None
        taken = leaf.taken("S", self.plan.blocks["S"], order.reshape(-1))
        return self._turned(leaf, moves, taken.pieces("S", self.plan.blocks["S"] * order.shape[1]))

    def _by_piece(self, leaf: Lettered, moves: bool) -> bool:
        return any(self.moving) and "S" in leaf.letters and (moves or leaf.letters[0] == "S")

    def _turned(self, leaf: Lettered, moves: bool, pieces: Any) -> Any:
        # A gradient of keys is a product that sums over rows. XLA is four times faster at it when the result comes as
        # [H, block], because then the narrow operand goes first; so that is how directions of keys travel.
        turns = moves and leaf.has_own_axes() and not _is_pairs(leaf)
        return jnp.moveaxis(pieces, 1 + leaf.letters.index("S"), -1) if turns else pieces

    def _unturned(self, leaf: Lettered, moves: bool, piece: Any) -> Any:
        turned = moves and piece.ndim > len(leaf.letters) and not _is_pairs(leaf)
        return jnp.moveaxis(piece, -1, leaf.letters.index("S")) if turned else piece

    def _operands(self, leaves: Leaves) -> Any:
        problem, directions, residuals = self.tree.unflatten(leaves)
        order = problem.order()
        return problem.block(self.plan.target), *letters.fitted((directions, residuals), order)

    def _keep(self, block: Any, order: Any) -> Any:
        """Which scores of the blocks of keys `order` count; what fills up the last block does not."""
        keep, size, S = block.keep(), self.plan.blocks["S"], block.at.axes["S"]
        if isinstance(S, int) and S % size == 0:
            return keep
        index = order[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None]
        index = index.reshape((1,) * len(block.rows) + (index.size,))
        return index < S if keep is None else keep & (index < S)

    def _begun(self, leaves: Leaves) -> Any:
        return varying(self.start(self._operands(leaves)), leaves)

    def _ended(self, state: Any, leaves: Leaves) -> Any:
        """The state with its axes in the order in which the queries have theirs."""
        order = self.tree.unflatten(leaves)[0].order()
        return jax.tree.map(lambda x: letters.fit(x, order.rows, leaves[0].letters), state)


def _is_pairs(leaf: Lettered) -> bool:
    return "T" in leaf.letters and "S" in leaf.letters


def _joined(rows: str, axis: str, block: int, result: jax.Array) -> jax.Array:
    """Undoes the cutting of an axis: `[blocks, ..., block, ...]`, or without `block`, to the axes `rows`."""
    at = rows.index(axis)
    result = jnp.moveaxis(result, 0, at) if at else result
    return result if letters.within(rows, axis, block) != rows else lax.collapse(result, at, at + 2)


@jax.custom_batching.custom_vmap
def _agreed(kinds: jax.Array) -> jax.Array:
    """Under `vmap`: PARTIAL where examples differ, so that they take one branch together.

    A `lax.switch` whose index differs between examples would run all branches, and has no gradient.
    """
    return kinds


@_agreed.def_vmap
def _agreed_by_all(size: int, batched: list[bool], kinds: jax.Array) -> tuple[jax.Array, bool]:
    return _agreed(jnp.where((kinds == kinds[:1]).all(0), kinds.max(0, initial=EMPTY), PARTIAL)), False
