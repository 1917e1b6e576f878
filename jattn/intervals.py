"""Intervals: what is known of all the values in a block at once, with comparisons that tell certain from possible."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Interval:
    """What is known of all the values in a block: each lies between `lo` and `hi`.

    Comparing intervals gives an interval of booleans: `lo` is whether the comparison holds for certain, everywhere in
    the block, and `hi` whether it is possible, somewhere. So a mask's predicate of positions, read with intervals for
    positions, tells whether a block is empty (`not hi`), full (`lo`) or partial.
    NumPy bounds stay NumPy: what is known while tracing is decided while tracing.
    """

    __slots__ = ("hi", "lo")
    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, lo: Any, hi: Any) -> None:
        self.lo, self.hi = lo, hi

    @staticmethod
    def of(value: Any) -> "Interval":
        """Returns `value` if it is an interval, else the interval that holds it alone."""
        return value if isinstance(value, Interval) else Interval(value, value)

    def __le__(self, other: Any) -> "Interval":
        other = Interval.of(other)
        return Interval(self.hi <= other.lo, self.lo <= other.hi)

    def __lt__(self, other: Any) -> "Interval":
        other = Interval.of(other)
        return Interval(self.hi < other.lo, self.lo < other.hi)

    def __ge__(self, other: Any) -> "Interval":
        return Interval.of(other) <= self

    def __gt__(self, other: Any) -> "Interval":
        return Interval.of(other) < self

    def __eq__(self, other: Any) -> "Interval":  # type: ignore[override]
        other = Interval.of(other)
        return Interval((self.hi <= other.lo) & (self.lo >= other.hi), (self.lo <= other.hi) & (self.hi >= other.lo))

    def __and__(self, other: Any) -> "Interval":
        other = Interval.of(other)
        return Interval(self.lo & other.lo, self.hi & other.hi)

    def __or__(self, other: Any) -> "Interval":
        other = Interval.of(other)
        return Interval(self.lo | other.lo, self.hi | other.hi)

    def __invert__(self) -> "Interval":
        return Interval(~self.hi, ~self.lo)

    def __floordiv__(self, divisor: Any) -> "Interval":
        return Interval(self.lo // divisor, self.hi // divisor) if _is_positive(divisor) else NotImplemented

    def __mod__(self, divisor: Any) -> "Interval":
        if not _is_positive(divisor):
            return NotImplemented
        turns = self.lo // divisor != self.hi // divisor  # then it holds every remainder, for all that is known
        xp = jnp if isinstance(turns, jax.Array) else np
        return Interval(xp.where(turns, 0, self.lo % divisor), xp.where(turns, divisor - 1, self.hi % divisor))

    def __bool__(self) -> bool:
        raise TypeError("what is known of a block is neither true nor false: join predicates by & | ~")

    __rand__ = __and__
    __ror__ = __or__


def _is_positive(divisor: Any) -> bool:
    return isinstance(divisor, int) and divisor > 0
