"""Axis letters: an array with the names of its leading axes, so that blocks are cut, padded and fitted by name.

    a b c ...  batch        K  key/value heads      T  queries
                            G  query heads of each  S  keys

An axis along which an array would only broadcast has no letter and is not there at all; axes behind the lettered ones
(H, V, buckets) are the array's own. Arrays keep the order of axes in which the caller gave them, until a block of them
is `fitted` to the one order in which it is computed.
"""

import dataclasses
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn import checks

_BATCH = "".join(letter for letter in string.ascii_letters if letter not in "KGTSN")
# What a block of an array has to line up with; what goes whole to a function of one's own lines up with nothing.
ROWS, KEYS, SCORES, WHOLE = "rows", "keys", "scores", "whole"
_Tree = TypeVar("_Tree")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of a problem: each letter with its size, batch axes first, then KGTS."""

    letters: str
    sizes: tuple[Any, ...]

    @classmethod
    def of(cls, batch: Iterable[Any], K: Any, G: Any, T: Any, S: Any) -> "Axes":
        """Returns the axes `(*batch, K, G, T, S)`."""
        batch = tuple(batch)
        if len(batch) > len(_BATCH):
            raise ValueError(f"at most {len(_BATCH)} batch dims have a letter, got {len(batch)}")
        return cls(_BATCH[: len(batch)] + "KGTS", (*batch, K, G, T, S))

    def __getitem__(self, letter: str) -> Any:
        return self.sizes[self.letters.index(letter)]

    def shape(self, letters: str) -> tuple[Any, ...]:
        """The sizes of some of the axes."""
        return tuple([self.sizes[self.letters.index(letter)] for letter in letters])

    def batched(self, size: Any) -> "Axes":
        """Returns the axes with one more of the batch, the first."""
        letter = next((letter for letter in _BATCH if letter not in self.letters), None)
        if letter is None:
            raise ValueError(f"at most {len(_BATCH)} batch dims, those of vmap included, have a letter")
        return Axes(letter + self.letters, (size, *self.sizes))

    def replace(self, **sizes: Any) -> "Axes":
        """Returns the axes with some sizes changed."""
        return Axes(self.letters, tuple(sizes.get(a, n) for a, n in zip(self.letters, self.sizes, strict=True)))

    @property
    def batch(self) -> str:
        """The letters of the batch."""
        return self.letters[:-4]

    @property
    def are_known(self) -> bool:
        """Whether no size is symbolic."""
        return all(isinstance(size, int) for size in self.sizes)


class Order(NamedTuple):
    """The axes of a block, in the order in which it is computed: those of several heads, of the rows, and the keys."""

    lead: str
    rows: str  # lead, then T and G as far as there are

    def of(self, fits: str) -> str:
        """The axes to which an array is fitted that lines up with `fits`."""
        return {ROWS: self.rows, KEYS: self.lead + "S", SCORES: self.rows + "S"}[fits]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Lettered:
    """An array whose leading axes have letters.

    Args:
      array: `[*letters, ...]`.
      letters: a letter for each of its leading axes.
      fits: what a block of it lines up with: the "rows" (queries), the "keys", the "scores" between them, or nothing,
        "whole".
    """

    array: Any
    letters: str = dataclasses.field(metadata=dict(static=True))
    fits: str = dataclasses.field(default=SCORES, metadata=dict(static=True))

    @classmethod
    def bare(cls, array: Any, letters: str, fits: str = SCORES, kept: str = "") -> "Lettered":
        """Letters an array, dropping axes of 1, but those `kept`."""
        names = "".join(a for a, size in zip(letters, array.shape, strict=False) if a in kept or not is_one(size))
        if len(names) < len(letters):
            sizes = [size for a, size in zip(letters, array.shape, strict=False) if a in names]
            array = array.reshape((*sizes, *array.shape[len(letters) :]))
        return cls(array, names, fits)

    def replace(self, array: Any, letters: str | None = None) -> "Lettered":
        """Returns another array in its place."""
        return Lettered(array, self.letters if letters is None else letters, self.fits)

    def size(self, axis: str) -> Any:
        """The size of an axis that it has."""
        return self.array.shape[self.letters.index(axis)]

    def has_own_axes(self) -> bool:
        """Whether there are axes behind the lettered ones."""
        return len(self.array.shape) > len(self.letters)

    def fitted(self, order: Order) -> Any:
        """Returns the array with the axes of a block, 1 where it has none; what goes whole as it is."""
        return self.array if self.fits == WHOLE else fit(self.array, self.letters, order.of(self.fits))

    def slice(self, starts: dict[str, Any], blocks: Axes, *, barrier: bool = False) -> "Lettered":
        """Returns the block of some axes from `starts` on. A batch or head axis cut to 1 has no letter any more.

        Args:
          barrier: keeps a narrow array narrow outside of the loop that cuts it.
        """
        cut = {self.letters.index(axis): (axis, start) for axis, start in starts.items() if axis in self.letters}
        if not cut:
            return self
        array, letters = self.array, self.letters
        for axis, _ in cut.values():
            letters = within(letters, axis, blocks[axis])
        gone = [at for at, (axis, _) in cut.items() if axis not in letters]
        shape = [blocks[cut[at][0]] if at in cut else size for at, size in enumerate(array.shape)]
        if any(array.shape[at] == 0 for at in cut):  # a loop that runs no times asks for this
            part = jnp.zeros(shape, array.dtype)
        else:
            indices = [cut[at][1] if at in cut else np.int32(0) for at in range(array.ndim)]
            array, indices = _cut_within_loop(array, indices, barrier)
            part = lax.dynamic_slice(array, indices, shape, allow_negative_indices=False)
        return self.replace(lax.squeeze(part, gone) if gone else part, letters)

    def pieces(self, axis: str, block: int) -> Any:
        """Returns all the blocks of an axis, `[blocks, ..., block, ...]`; a batch or head axis cut to 1 is gone."""
        at = self.letters.index(axis)
        array = self.array
        if within(self.letters, axis, block) == self.letters:
            array = array.reshape((*array.shape[:at], -(-array.shape[at] // block), block, *array.shape[at + 1 :]))
        return jnp.moveaxis(array, at, 0) if at else array

    def taken(self, axis: str, block: int, order: Any) -> "Lettered":
        """Returns the blocks `order` of an axis side by side."""
        if axis not in self.letters:
            return self
        at = self.letters.index(axis)
        blocks = self.array.reshape((*self.array.shape[:at], -1, block, *self.array.shape[at + 1 :]))
        return self.replace(lax.collapse(jnp.take(blocks, order, axis=at, mode="clip"), at, at + 2))

    def padded(self, axis: str, block: int, *, zero: bool) -> "Lettered":
        """Fills up the last block of an axis: with 0, or by repeating the last, which asks for nothing that is new."""
        if axis not in self.letters:
            return self
        at, array = self.letters.index(axis), self.array
        size = array.shape[at]
        if isinstance(size, int) and (size % block == 0):
            return self
        widths = [(0, -(-size // block) * block - size if i == at else 0) for i in range(array.ndim)]
        return self.replace(jnp.pad(array, widths) if zero else jnp.pad(array, widths, mode="edge"))

    def rows(self, start: Any, blocks: Axes, *, barrier: bool) -> "Lettered":
        """Returns a block of rows T, the last row repeated behind the end. The array stays where it is, uncopied."""
        size, array, block = self.size("T"), self.array, blocks["T"]
        if isinstance(size, int) and size % block == 0:
            return self.slice({"T": start}, blocks, barrier=barrier)
        array, start = _cut_within_loop(array, start, barrier)
        index = jnp.minimum(start + jnp.arange(block, dtype=jnp.int32), size - 1)
        return self.replace(jnp.take(array, index, axis=self.letters.index("T"), mode="clip"))


def _cut_within_loop(array: Any, start: Any, barrier: bool) -> tuple[Any, Any]:
    # XLA has no narrow floats on a CPU. It widens what is cut, and because that is the same array each time, it would
    # do so before the loop; the barrier says that it is not.
    narrow = barrier and checks.is_narrow(array)
    return lax.optimization_barrier((array, start)) if narrow else (array, start)


def lettered(array: Any, own_axes: str, axes: Axes, name: str, keep_integers: bool = False) -> Lettered:
    """Names the axes of an array, which is aligned right with `[..., *own_axes]`; what it lacks or has as 1 broadcasts.

    Without N among its own axes it may have one more dim than the batch has, which is N, in front of them. ValueError
    if it does not fit, or if it does without N too.

    Args:
      own_axes: some of "NTS", or "SK", then a small letter for each axis that is the array's alone.
      keep_integers: takes integers as they come, and not as int32, as positions are.
    """
    array = array if hasattr(array, "dtype") else jnp.asarray(array)  # a number that took the place of an array
    named = own_axes.rstrip(string.ascii_lowercase)
    count = np.ndim(array) - (len(own_axes) - len(named))  # of axes that may have letters
    letters, shape = _aligned(named, count, axes), np.shape(array)[: max(count, 0)]
    if letters is None or not _fits(shape, letters, axes):
        raise ValueError(f"{name} must be {_spelled(own_axes, named, axes)}; got shape {np.shape(array)}")
    if "N" in named and len(named) > 1:
        refuse_two_readings(name, shape, named, axes)
    if jnp.issubdtype(array.dtype, jnp.integer):
        array = checks.uncut(name, array) if keep_integers else checks.int32(name, array)  # as positions are
    sizes: list[Any] = []
    for letter, size in zip(letters, shape, strict=True):
        parted = (1, 1) if is_one(size) else axes.shape("KG")
        sizes += parted if letter == "N" else [size]
    return Lettered.bare(array.reshape((*sizes, *array.shape[len(shape) :])), letters.replace("N", "KG"))


def _aligned(named: str, count: int, axes: Axes) -> str | None:
    """The letters of so many axes, aligned right with the batch and `named`; None if there are too many, or too few."""
    every = axes.batch + named
    if 0 <= count <= len(every):
        return every[len(every) - count :]
    heads_are_left = not {"N", "K"} & {*named} and count == len(every) + 1
    return axes.batch + "N" + named if heads_are_left else None


def _spelled(own_axes: str, named: str, axes: Axes) -> str:
    """The shape that an array is to have, for an error."""
    N = axes["K"] * axes["G"]
    sizes = [f"{a}={N if a == 'N' else axes[a]} or 1" for a in named]
    heads = "" if {"N", "K"} & {*named} else f", or with one more leading dim for the N={N} heads"
    wanted = ", ".join(["...", *sizes, *own_axes[len(named) :]])
    return f"[{wanted}] with batch dims ...={axes.shape(axes.batch)}{heads}"


def lettered_leaves(tree: Any, letters: Sequence[str | None], axes: Axes, name: str) -> Any:
    """Names the axes of each leaf of a pytree; one whose letters are None belongs to none."""
    leaves, structure = jax.tree.flatten(tree)
    each = zip(leaves, letters, strict=True)
    done = [
        whole(leaf, name) if own is None else lettered(leaf, own, axes, name, keep_integers=True) for leaf, own in each
    ]
    return jax.tree.unflatten(structure, done)


def leaves_of_axes(tree: Any, letters: Sequence[str | None]) -> list[tuple[Any, str]]:
    """Returns the leaves of a pytree that belong to axes, each with its letters."""
    return [(leaf, own) for leaf, own in zip(jax.tree.leaves(tree), letters, strict=True) if own is not None]


def letters_of_leaves(tree: Any, axes: Any, name: str) -> tuple[str | None, ...]:
    """Returns the letters of each leaf, from a pytree of letters that has the tree's structure, as far as it goes."""
    try:
        each = jax.tree.broadcast(axes, tree, is_leaf=lambda leaf: leaf is None)
    except ValueError as error:
        raise ValueError(f"{name} axes must be letters, or a tree of them as that of its arrays: {error}") from error
    both = (jax.tree.leaves(part, is_leaf=lambda leaf: leaf is None) for part in (each, tree))
    letters = tuple(own for own, leaf in zip(*both, strict=True) if leaf is not None)
    for own in letters:
        if own is not None and not (isinstance(own, str) and re.fullmatch("N?T?S?[a-z]*", own)):
            raise ValueError(
                f'{name} axes must be some of "NTS" in this order, then small letters, or None, got {own!r}'
            )
    return letters


def whole(leaf: Any, name: str) -> Lettered:
    """An array that belongs to no axis."""
    return Lettered(jnp.asarray(checks.uncut(name, leaf)), "", WHOLE)


def _fits(shape: Sequence[Any], letters: str, axes: Axes) -> bool:
    full = [axes["K"] * axes["G"] if letter == "N" else axes[letter] for letter in letters]
    return all(size in (1, n) for size, n in zip(shape, full, strict=True))


def refuse_two_readings(name: str, shape: Sequence[Any], named: str, axes: Axes) -> None:
    """ValueError where an array that fits `[..., *named]`, with N among them, fits as one of examples without N too."""
    rest = named.replace("N", "")
    lead = len(shape) - len(rest)
    if not 0 < lead <= len(axes.batch) or all(map(is_one, shape[:lead])):
        return
    batch = axes.batch[len(axes.batch) - lead :]
    if _fits(shape, batch + rest, axes) and _fits(shape, batch[1:] + "N" + rest, axes):
        some = ["B"] * (lead - 1)
        raise ValueError(
            f"{name} of shape {list(shape)} fits in two ways, because the batch {list(axes.shape(axes.batch))} agrees "
            f"with N={axes['K'] * axes['G']}: write [{', '.join(['1', *some, *named])}] for heads, or "
            f"[{', '.join(['B', *some, '1', *rest])}] for examples"
        )


def fit(array: Any, letters: str, order: str) -> Any:
    """Brings the lettered axes of an array into an order, 1 where it has none."""
    if letters == order:
        return array
    places = [order.index(letter) for letter in letters]
    permutation = sorted(range(len(letters)), key=places.__getitem__)
    if permutation != list(range(len(letters))):
        array = array.transpose(*permutation, *range(len(letters), array.ndim))
    missing = [i for i, letter in enumerate(order) if letter not in letters]
    return jnp.expand_dims(array, missing) if missing else array


def fitted(tree: _Tree, order: Order) -> _Tree:
    """Fits every lettered array of a pytree to a block."""
    result: _Tree = jax.tree.map(lambda leaf: leaf.fitted(order), tree, is_leaf=is_lettered)
    return result


def within(letters: str, axis: str, block: int) -> str:
    """The letters inside a loop over the blocks of an axis."""
    return letters.replace(axis, "") if block == 1 and axis not in "TS" else letters


def is_lettered(leaf: Any) -> bool:
    """Whether it is an array with letters."""
    return isinstance(leaf, Lettered)


def is_one(size: Any) -> bool:
    """Whether a size is known to be 1."""
    return isinstance(size, int) and size == 1
