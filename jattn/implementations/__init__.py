"""The implementations of attention: the one place that knows their names, and which is taken."""

from typing import Any

from jattn.implementations.base import Implementation
from jattn.implementations.blockwise import Blockwise as Blockwise
from jattn.implementations.dense import Dense as Dense
from jattn.problem import Problem
from jattn.target import Target

LOOPLESS: Implementation = Dense()  # for transforms that cannot see into loops
BY_NAME: dict[str, Implementation] = {"dense": LOOPLESS, "blockwise": Blockwise()}
CANDIDATES: tuple[Implementation, ...] = (Dense(sparing=True), Blockwise())  # the first that does not refuse is taken


def named(implementation: Any) -> Implementation | None:
    """Returns the implementation that the caller asks for, None for None; ValueError if there is none of that name."""
    if implementation is None or isinstance(implementation, Blockwise):
        return implementation
    if not isinstance(implementation, str) or implementation not in BY_NAME:
        raise ValueError(
            f"implementation must be None, one of {list(BY_NAME)} or a jattn.Blockwise, got {implementation!r}"
        )
    return BY_NAME[implementation]


def choose(problem: Problem, target: Target, asked: Implementation | None) -> tuple[Implementation, dict[str, str]]:
    """Returns the implementation that takes the problem, and for each by its name why it was or was not taken.

    One that is asked for never gives way to another: NotImplementedError with its reason where it refuses.
    """
    if asked is not None:
        reason = asked.refuses(problem, target)
        if reason is not None:
            raise NotImplementedError(f"implementation={asked.name!r} refuses: {reason}")
        others = {name: f"not taken: implementation={asked.name!r} was asked for" for name in BY_NAME}
        return asked, others | {asked.name: "taken: asked for by name"}
    reasons: dict[str, str] = {}
    for i, candidate in enumerate(CANDIDATES):
        reason = candidate.refuses(problem, target)
        if reason is None:
            reasons[candidate.name] = f"taken: {candidate.favours(problem, target)}"
            later = {other.name: f"not taken: {candidate.name} does it" for other in CANDIDATES[i + 1 :]}
            return candidate, reasons | later
        reasons[candidate.name] = f"not taken: {reason}"
    raise NotImplementedError(f"no implementation takes this: {reasons}")
