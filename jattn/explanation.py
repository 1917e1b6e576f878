"""Explain: what `attention` would run, and why, without running it."""

import math
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jattn import target
from jattn.dispatch import arrays_apart, attention_with_lse
from jattn.implementations import choose, named
from jattn.implementations.base import Implementation
from jattn.problem import Options, Problem, lay_out, operands
from jattn.visits import EMPTY, FULL, PARTIAL, Plan, static_kinds


class Explanation(NamedTuple):
    """What `attention` would run, and why; `print` it."""

    implementation: str
    sizes: dict[str, Any]  # what was taken for the batch, T, S, N, K, H and V
    block_sizes: tuple[int, ...]  # along [*B, K, G, T, S]
    empty: float | None  # share of the blocks; None where arrays decide that are not given
    partial: float | None
    full: float | None
    flops: float  # of the two products over the blocks that are not empty
    temp_bytes: int  # peak, beyond arguments and results
    reasons: dict[str, str]  # for each implementation why it was or was not taken

    def __str__(self) -> str:
        shares = "decided by arrays, while running"
        if self.empty is not None:
            shares = f"{self.empty:.1%} empty, {self.partial:.1%} partial, {self.full:.1%} full"
        lines = [
            f"implementation  {self.implementation}",
            f"sizes           {', '.join(f'{name}={size}' for name, size in self.sizes.items())}",
            f"block sizes     {list(self.block_sizes)} along [*B, K, G, T, S]",
            f"blocks          {shares}",
            f"flops           {self.flops:.4g}",
            f"temp memory     {self.temp_bytes / 2**20:.2f} MiB",
        ]
        return "\n".join(lines + [f"{name:15} {reason}" for name, reason in self.reasons.items()])


def explain(query: Any, key: Any, value: Any, *, implementation: Any = None, **options: Unpack[Options]) -> Explanation:
    """Tells what `attention` would run for the same arguments, without running it: where arrays decide, it counts.

        flops ≈ 2 B N (H + V) T S (share of blocks that are not empty)

    Args:
      query, key, value and all others: as in `attention`, each array an array or a `jax.ShapeDtypeStruct`.

    Returns:
      an `Explanation`; print it.

    Raises:
      ValueError, TypeError: as in `attention`.
    """
    arrays, rebuild = arrays_apart((query, key, value, options))

    def run(*arrays: Any) -> Any:
        query, key, value, options = rebuild(arrays)
        return attention_with_lse(query, key, value, implementation=implementation, **options)

    found: list[_Found] = []
    compiled: Any = jax.jit(run).lower(*arrays).compile()
    lie = jax.tree.leaves(compiled.input_shardings)
    where = target.now().on(None, max((sharding.num_devices for sharding in lie), default=None))

    def look(*arrays: Any) -> list[jax.Array] | None:
        query, key, value, options = rebuild(arrays)
        problem = lay_out(*operands(query, key, value), options)
        taken, reasons = choose(problem, where, named(implementation))
        plan = taken.plan(problem, where)
        known = static_kinds(plan, problem, problem.mask)
        found.append(_Found(taken, problem.axes.sizes, plan.blocks.sizes, known, reasons))
        return _count(taken, plan, problem) if known is None else None

    jax.eval_shape(look, *arrays)
    told = found[0]
    counts: Any = None if told.kinds is None else [np.sum(told.kinds == kind) for kind in (EMPTY, PARTIAL, FULL)]
    if counts is None and not any(isinstance(array, jax.ShapeDtypeStruct | jax.core.Tracer) for array in arrays[3:]):
        counts = jax.jit(lambda *given: look(*map(jnp.zeros_like, arrays[:3]), *given))(*arrays[3:])
    empty, partial, full = 3 * [None] if counts is None else (np.array(counts) / max(np.sum(counts), 1)).tolist()
    skipped = (empty or 0.0) if told.taken.skips else 0.0
    return Explanation(
        implementation=told.taken.name,
        sizes=_named(told.sizes, arrays[0].shape[-1], arrays[2].shape[-1]),
        block_sizes=tuple(max(size, 1) for size in told.blocks),
        empty=empty,
        partial=partial,
        full=full,
        flops=2.0 * (arrays[0].shape[-1] + arrays[2].shape[-1]) * math.prod(map(float, told.sizes)) * (1 - skipped),
        temp_bytes=int(compiled.memory_analysis().temp_size_in_bytes),
        reasons=told.reasons,
    )


def _named(sizes: tuple[Any, ...], H: Any, V: Any) -> dict[str, Any]:
    *batch, K, G, T, S = sizes
    return {"batch": (*batch,), "T": T, "S": S, "N": K * G, "K": K, "H": H, "V": V}


class _Found(NamedTuple):
    """What is known of a call while tracing."""

    taken: Implementation
    sizes: tuple[int, ...]
    blocks: tuple[int, ...]
    kinds: np.ndarray | None
    reasons: dict[str, str]


def _count(implementation: Implementation, plan: Plan, problem: Problem) -> list[jax.Array]:
    """How many blocks, of all heads and examples, are left out and are visited as PARTIAL and as FULL, by doing so."""

    def start(operands: Any) -> list[jax.Array]:
        return [jnp.zeros(operands[0].rows, jnp.int32)] * 2

    def step(counts: list[jax.Array], keep: jax.Array | None, operands: Any) -> list[jax.Array]:
        partial, full = counts
        visited = operands[0].at.k.shape[-2] // plan.blocks["S"]
        return [partial, full + visited] if keep is None else [partial + visited, full]

    counts = implementation.walk(plan, start, step, (problem, [], []))
    one = {"T": slice(None, None, plan.blocks["T"]), "G": slice(1)}  # row of each block
    partial, full = (count[tuple(one.get(a, slice(None)) for a in problem.q.letters)] for count in counts)
    every = partial.size * -(-problem.axes["S"] // plan.blocks["S"])
    return [every - partial.sum() - full.sum(), partial.sum(), full.sum()]
