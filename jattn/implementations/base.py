"""The contract of implementations: each is one static value with these members, and nobody asks more of it."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from jattn.problem import Problem
from jattn.softmax import Running
from jattn.target import Target
from jattn.visits import Plan

Start = Callable[[Any], Any]  # operands of a block of rows -> their state
Step = Callable[[Any, Any, Any], Any]  # state, keep, operands of a block of scores -> state


class Backward(NamedTuple):
    """What a backward pass is told beside the problem."""

    state: Running  # what the forward gave, o divided by l
    dout: jax.Array | None  # the cotangent of the output, [*letters of q, V]; None for 0
    dl: jax.Array | None  # that of l, [*letters of q], with m constant: dlse / l; None for 0


class Implementation(Protocol):
    """A way to compute attention. It is hashable, compares by content and holds no arrays."""

    @property
    def name(self) -> str:
        """What the caller writes for it."""

    @property
    def skips(self) -> bool:
        """Whether it leaves out the blocks that the mask leaves empty."""

    def refuses(self, problem: Problem, target: Target) -> str | None:
        """Returns why it cannot or should not take the problem; None if it takes it."""

    def favours(self, problem: Problem, target: Target) -> str:
        """Returns what speaks for it, where it takes the problem."""

    def plan(self, problem: Problem, target: Target) -> Plan:
        """Returns how it cuts the problem."""

    def forward(self, plan: Plan, problem: Problem) -> Running:
        """Attends: m and l `[*letters of q]`, o `[*letters of q, V]`. A kernel's result is m = lse, l = 1, o = out."""

    def walk(self, plan: Plan, start: Start, step: Step, operands: Any) -> Any:
        """Folds `step` over the blocks of scores. The derivative rule is written with it.

        Args:
          operands: (problem, directions, residuals), each leaf a `Lettered`. `start` and `step` get them cut to a block
            and fitted to it, the problem as a `Block`. States are linear in the directions.

        Returns:
          the last states, each array `[*letters of q, ...]`.
        """

    @property
    def backward(self) -> Callable[[Plan, Problem, Backward], tuple[Any, Any, Any]] | None:
        """Gives the cotangents of q, k and v; None if there is no such kernel, and the walk is transposed."""
