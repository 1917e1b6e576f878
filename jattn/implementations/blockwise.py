"""Attention block by block, in memory linear in the sequence length: the running softmax, gathered over blocks of keys.

Rabe and Staats, 2021 (arXiv:2112.05682); Dao et al., 2022 (arXiv:2205.14135).
"""

import dataclasses
from typing import Any, ClassVar

from jattn import visits
from jattn.implementations import loops
from jattn.implementations.base import Start, Step
from jattn.problem import Block, Problem
from jattn.softmax import Running
from jattn.target import Target
from jattn.visits import Plan


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
    name: ClassVar[str] = "blockwise"
    skips: ClassVar[bool] = True
    backward: ClassVar[None] = None

    def __post_init__(self) -> None:
        for name in ("block_q", "block_kv"):
            size = getattr(self, name)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"Blockwise {name} must be a positive int or None, got {size!r}")

    def refuses(self, problem: Problem, target: Target) -> str | None:
        """Returns None: it takes everything."""
        return None

    def favours(self, problem: Problem, target: Target) -> str:
        """Returns what speaks for it."""
        return "memory stays linear, and blocks known to be empty are skipped"

    def plan(self, problem: Problem, target: Target) -> Plan:
        """Returns the blocks, those chosen by the caller or those that do the least work."""
        return Plan.of(problem, visits.choose_blocks(problem, target, self.block_q, self.block_kv), target)

    def forward(self, plan: Plan, problem: Problem) -> Running:
        """Attends: m and l `[*letters of q]`, o `[*letters of q, V]`."""

        def step(state: Running, keep: Any, operands: Any) -> Running:
            block: Block = operands[0]
            return block.consume(state, keep, plan.guard)

        def start(operands: Any) -> Running:
            block: Block = operands[0]
            return block.start()

        state: Running = self.walk(plan, start, step, (problem, [], []))
        return state

    def walk(self, plan: Plan, start: Start, step: Step, operands: Any) -> Any:
        """Folds `step` over the blocks of scores that count; see `loops.walk`."""
        problem, *others = operands
        return loops.walk(plan, start, step, (problem.with_positions(), *others))
