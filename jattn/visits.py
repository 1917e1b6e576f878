"""Visits: which blocks of keys each block of rows looks at, and how large blocks are; static facts in, a plan out."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jattn import algebra
from jattn.letters import Axes
from jattn.problem import Problem, Range
from jattn.target import Target

EMPTY, PARTIAL, FULL = 0, 1, 2
FEW = 4  # visits of a block of rows, or 1/8 of all, are gone through alone, if it turns out that none wants more
SCORES_AT_MOST = 2**20  # in a visit of a band, of decoding, and of any on a CPU, unless the caller gives greater blocks
SCORES_AT_ONCE = 2**18  # in visits at the same time, for one key/value head: they stay in a CPU's cache
SCORES_ON_DEVICE = 2**26  # in what is done at the same time, for all heads and examples, on anything but a CPU

# Rows and keys. The first is for where arrays decide what is visited, and must skip well enough without knowing.
_CANDIDATES = ((512, 512), (1024, 1024), (512, 1024), (512, 256), (256, 256), (128, 128))
_ON_DEVICE = ((1024, 1024), (4096, 4096), (2048, 2048), (512, 1024), (512, 512), (256, 512), (256, 256), (128, 128))
_AT_LEAST = 2**17  # scores in a visit, for one head, however many heads there are
_NEARLY = 1.02  # times the work: as much, for all that `_work` can tell
_IN_CACHE = 2**19  # scores, or numbers in keys and values, of whole problems taken together


class Plan(NamedTuple):
    """How a problem is cut into blocks, decided while tracing."""

    target: Target
    blocks: Axes  # the block size along each axis
    q_range: Range | None  # the positions, where they are known while tracing
    kv_range: Range | None
    guard: bool  # whether some operands may take no part in the whole problem, so that they are to be put to 0

    @classmethod
    def of(cls, problem: Problem, blocks: Axes, target: Target) -> "Plan":
        """Returns the plan of a problem cut into `blocks`."""
        return cls(target, blocks, *_ranges(problem), guard=not problem.all_take_part())


class Visits(NamedTuple):
    """Which blocks of keys each block of rows visits, as far as is known while tracing."""

    order: Any  # [rows, visits, width]  the blocks; None: all, one by one
    kinds: Any  # [rows, visits]  what each visit is, as an index of `present`; None: arrays decide, or there is but one
    present: tuple[int, ...]  # the kinds there are
    width: int  # how many blocks a visit takes: if more than one, it is all that a block of rows visits

    @property
    def are_decided(self) -> bool:
        """Whether it is known while tracing what each visit is."""
        return self.kinds is not None or len(self.present) == 1


def visits_of(plan: Plan, problem: Problem) -> Visits:
    """Returns what each block of rows visits."""
    kinds = static_kinds(plan, problem, problem.mask)
    decided = kinds is not None
    if not decided:
        kinds = static_kinds(plan, problem, algebra.known(problem.mask))
        # To agree on a block, examples and heads on different devices would have to ask each other; none at all cannot.
        several = plan.target.devices > 1
        decided = any(block != 1 and (block == 0 or several) for block in plan.blocks.shape(plan.blocks.batch + "K"))
    if kinds is None:
        return Visits(None, None, (PARTIAL,) if decided else (EMPTY, PARTIAL, FULL), 1)
    order, width, most = None, 1, int((kinds != EMPTY).sum(1).max(initial=0))
    if most < kinds.shape[1]:
        order = np.argsort(kinds == EMPTY, axis=1, kind="stable")[:, :most, None].astype(np.int32)
        kinds = np.take_along_axis(kinds, order[:, :, 0], axis=1)
        if decided and _is_band(plan.blocks, kinds, problem.axes["S"]):
            order, width = np.swapaxes(order, 1, 2), most
            kinds = np.full((len(kinds), 1), FULL if (kinds == FULL).all() else PARTIAL)
    if not decided:
        return Visits(order, None, (EMPTY, PARTIAL, FULL), width)
    # Where there is no block at all the loop is traced still, so it wants a branch.
    present = tuple(kind for kind in (EMPTY, PARTIAL, FULL) if (kinds == kind).any()) or (EMPTY,)
    return Visits(order, np.searchsorted(present, kinds).astype(np.int32), present, width)


def static_kinds(plan: Plan, problem: Problem, mask: algebra.Mask) -> np.ndarray | None:
    """EMPTY, PARTIAL or FULL for each block, int32 `[rows, columns]`, if that is known while tracing."""
    T, S = problem.axes.shape("TS")
    q_range, kv_range = (Range(0), Range(0)) if isinstance(mask, algebra.Full) else (plan.q_range, plan.kv_range)
    if q_range is None or kv_range is None or not (isinstance(T, int) and isinstance(S, int)) or jax.tree.leaves(mask):
        return None
    found: np.ndarray = kinds(mask, q_range.array(T)[:, None], kv_range.array(S)[None, :], plan.blocks, S)
    return found


def kinds(mask: algebra.Mask, q_pos: Any, kv_pos: Any, blocks: Axes, S: Any) -> Any:
    """EMPTY, PARTIAL or FULL for each block, int32 `[rows, columns]`: NumPy if positions and mask are known now.

    Args:
      mask: fitted. q_pos: `[..., T, 1]`. kv_pos: `[..., 1, S]`, maybe filled up.
      S: how many of the keys are there.
    """
    block_q, block_kv = blocks.shape("TS")
    empty, full = algebra.blocks(mask, q_pos, kv_pos, block_q, block_kv)
    xp = np if isinstance(empty, np.ndarray) and isinstance(full, np.ndarray) else jnp
    if not isinstance(S, int) or S % block_kv:  # the padding of the last block is not to be seen
        full = full & (xp.arange(full.shape[1])[None, :] < S // block_kv)
    return xp.where(empty, EMPTY, xp.where(full, FULL, PARTIAL)).astype(np.int32)


def rows_at_once(visits: Visits, plan: Plan) -> int:
    """How many blocks of rows visit their bands at the same time, because XLA is slow at small products."""
    lead = plan.blocks.shape(plan.blocks.batch + "K")
    if visits.order is None or visits.width == 1 or not all(isinstance(size, int) for size in lead):
        return 1
    at_once = SCORES_AT_ONCE if plan.target.is_cpu else SCORES_ON_DEVICE // max(math.prod(lead), 1)
    return _divisor(len(visits.order), at_once // (math.prod(plan.blocks.shape("GTS")) * visits.width))


def choose_blocks(problem: Problem, target: Target, block_q: int | None = None, block_kv: int | None = None) -> Axes:
    """Returns the block size along each axis.

    Those of rows and keys are the candidate that does the least work under the mask, where that is known while tracing;
    of nearly equal ones the greatest, because the least changes from length to length, and memory would with it.

    Args:
      block_q: rows in a block, as the caller wants it; None chooses. block_kv: keys, likewise.
    """
    T, S = problem.axes.shape("TS")
    candidates = list(dict.fromkeys(_candidates(problem, target, block_q, block_kv)))
    works = [_work(problem, target, *candidate) for candidate in candidates] if len(candidates) > 1 else [math.inf]
    near = [c for c, work in zip(candidates, works, strict=True) if work <= _NEARLY * min(works) < math.inf]
    rows, keys = max(near, key=math.prod, default=candidates[0])
    whole = rows == T and keys == S and _is_known(problem)
    return problem.axes.replace(T=rows, S=keys, **_lead_blocks(problem, target, whole))


def _ranges(problem: Problem) -> tuple[Range | None, Range | None]:
    """The positions of queries and keys, where they are known while tracing."""
    q_pos, kv_pos = problem.q_pos, problem.kv_pos
    return q_pos if isinstance(q_pos, Range) else None, kv_pos if isinstance(kv_pos, Range) else None


def _is_known(problem: Problem) -> bool:
    """Whether it is known while tracing which scores the mask allows."""
    positions = None not in _ranges(problem) or isinstance(problem.mask, algebra.Full)
    return positions and not jax.tree.leaves(problem.mask)


def _candidates(problem: Problem, target: Target, block_q: int | None, block_kv: int | None) -> list[tuple[Any, Any]]:
    G, T, S = problem.axes.shape("GTS")
    if target.is_cpu:
        longest = [(max(rows // G, 16), keys) for rows, keys in _CANDIDATES]
    else:
        room = max(SCORES_ON_DEVICE // max(G * _heads(problem), 1), _AT_LEAST)
        longest = [c for c in _ON_DEVICE if math.prod(c) <= room]
    if isinstance(T, int) and 0 < T <= 16:
        longest.append((T, max(SCORES_AT_MOST // (G * T), 1)))  # decoding: all keys at once
    return [(_block(T, block_q, rows), _block(S, block_kv, keys)) for rows, keys in longest]


def _heads(problem: Problem) -> int:
    """How many key/value heads there are in all examples, as far as is known."""
    lead = problem.axes.shape(problem.axes.batch + "K")
    return math.prod(size for size in lead if isinstance(size, int))


def _lead_blocks(problem: Problem, target: Target, whole: bool) -> dict[str, Any]:
    """The block sizes along the batch axes and K; `whole` says that a head is one block, so that others may have room.

    On a CPU, as many examples and heads at once as stay in cache; elsewhere all of them, and also along an axis that
    may be sharded, because a loop over a sharded axis gathers it.
    """
    G, T, S = problem.axes.shape("GTS")
    room = 1
    if whole and target.is_cpu:
        widths = problem.q.array.shape[-1], problem.v.array.shape[-1]
        if all(isinstance(size, int) for size in widths):
            a_key = max(G * T, sum(widths))  # its scores, or the key and value themselves
            room = _IN_CACHE // max(a_key * S, 1)
    blocks: dict[str, Any] = {}
    for letter in reversed(problem.axes.batch + "K"):
        size = problem.axes[letter]
        sharded = target.devices > 1 and isinstance(size, int) and math.gcd(size, target.devices) > 1
        if not target.is_cpu or sharded:
            blocks[letter] = size
        elif not isinstance(size, int):
            blocks[letter] = 1
            room = 1
        else:
            blocks[letter] = _divisor(size, room)
            room = room // blocks[letter] if blocks[letter] == size else 1
    return blocks


def _work(problem: Problem, target: Target, block_q: int, block_kv: int) -> Any:
    """The time to go through all blocks of one head, as measured; inf where it is not known while tracing.

    The unit is one score. On a CPU it costs more in a visit of fewer than 2**20, for there the products are slower, and
    a visit costs as much as 2**12 scores in itself. On a GPU, where all heads go together, it costs more the fewer rows
    and keys share what is read and written with them, and a visit as much as 2**22 scores for each kind that it can be.
    Looking at the mask takes half as long again.
    """
    G, T, S = problem.axes.shape("GTS")
    widths = problem.q.array.shape[-1], problem.v.array.shape[-1]
    if not all(isinstance(size, int) for size in (T, S, *widths)) or -(-T // block_q) * -(-S // block_kv) > 2**20:
        return math.inf
    plan = Plan(target, Axes.of((), 1, G, block_q, block_kv), *_ranges(problem), guard=True)
    visits = visits_of(plan, problem)
    if visits.kinds is None:
        return math.inf
    keys = block_kv * visits.width
    scores = G * block_q * keys
    if target.is_cpu:
        visit = scores * (1 + 0.05 * max(math.log2(2**20 / max(scores, 1)), 0) ** 2) + 2**12
    else:
        heads = _heads(problem)
        together = heads * rows_at_once(visits, plan._replace(blocks=plan.blocks.replace(K=heads)))
        shared = (1 / block_q + 1 / keys) / 1.5
        visit = scores * (1 + sum(widths) * shared) + len(visits.present) * 2**22 / max(together, 1)
    present = np.take(visits.present, visits.kinds)
    return visit * float(np.sum(present == FULL) + 1.5 * np.sum(present == PARTIAL))


def _is_band(blocks: Axes, kinds: np.ndarray, S: int) -> bool:
    """Whether each block of rows visits several, so few that gathering them costs little, and that they make one block.

    And nearly as many as the others: what the `kinds` of its visits, `[rows, width]`, call EMPTY is computed too.
    """
    G, block_q, block_kv = blocks.shape("GTS")
    rows, keys = len(kinds), kinds.shape[1] * block_kv
    few = block_kv < keys <= S // 2 and rows * keys <= 4 * S and G * block_q * keys <= SCORES_AT_MOST
    return few and float(np.mean(kinds != EMPTY)) >= 0.75


def _block(size: Any, chosen: int | None, longest: int) -> Any:
    """The block size chosen by the caller, else that of blocks of about equal length, none longer than `longest`."""
    if not isinstance(size, int):
        return chosen or longest
    if chosen is not None:
        return max(min(chosen, size), 1)
    return -(-size // -(-size // longest)) if size else 1


def _divisor(size: int, at_most: int) -> int:
    """The greatest divisor of a size that is at most `at_most`, or else 1."""
    return max(d for d in range(1, max(min(at_most, size), 1) + 1) if size % d == 0)
