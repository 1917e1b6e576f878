"""The pictures and tables of the documentation, each made from the library by the expression that stands beside it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jattn
from jattn import masks, plot


class Entry(NamedTuple):
    """A mask of the gallery."""

    title: str
    says: str  # what it is for
    expression: str  # Python, with the names of `jattn.masks`
    sizes: dict[str, int]  # T, S and q_offset of `Mask.picture`

    @property
    def name(self) -> str:
        """The name of its file."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")

    @property
    def is_small(self) -> bool:
        """Whether it can be drawn as an array."""
        return max(self.sizes.values()) <= 64


SQUARE = dict(T=12, S=12)
MASKS = (
    Entry("Full", "Every query sees every key: an encoder without padding.", "Full()", SQUARE),
    Entry("Empty", "Nobody sees anything: `~Full()`, and what adds nothing to `|`.", "Empty()", SQUARE),
    Entry("Causal", "A decoder: a query sees its own position and those before it.", "Causal()", SQUARE),
    Entry(
        "Causal, decoding",
        "The last queries of a sequence against all its keys: `q_offset` says where the first query stands.",
        "Causal()",
        dict(T=3, S=12, q_offset=9),
    ),
    Entry(
        "Window", "Local attention: so many positions before the query's own and so many after.", "Window(3, 1)", SQUARE
    ),
    Entry(
        "Open window",
        "None leaves a side open: all that comes before, and a look-ahead of two.",
        "Window(None, 2)",
        SQUARE,
    ),
    Entry("Sliding window", "A causal window of n keys, the query's own included.", "SlidingWindow(4)", SQUARE),
    Entry("Prefix", "Every query sees the first keys, such as a prompt.", "Prefix(4)", SQUARE),
    Entry("Prefix LM", "A prompt that is read both ways, and a causal rest.", "Prefix(4) | Causal()", SQUARE),
    Entry(
        "Sinks and a window",
        "The first keys stay in sight of a sliding window.",
        "Causal() & (Prefix(2) | Window(3, 0))",
        SQUARE,
    ),
    Entry("Lengths", "Padding: rows and keys from a length on do not take part.", "Lengths(q=10, kv=8)", SQUARE),
    Entry(
        "Lengths of a batch",
        "Arrays are dynamic: other lengths do not recompile. One picture for each example.",
        "Lengths(kv=np.array([5, 9], np.int32))",
        SQUARE,
    ),
    Entry(
        "Segments",
        "Packing: a query sees the keys of its own segment. Negative ids are padding.",
        "Segments(np.repeat([0, 1, 2, -1], [4, 3, 3, 2]).astype(np.int32))",
        SQUARE,
    ),
    Entry(
        "Packed and causal",
        "Sequences packed into one row, each causal in itself.",
        "Causal() & Segments(np.repeat([0, 1, 2], [5, 3, 4]).astype(np.int32))",
        SQUARE,
    ),
    Entry("Chunks", "Chunked attention, as in Llama 4: causal within each chunk.", "Chunks(4) & Causal()", SQUARE),
    Entry(
        "Windows of a grid",
        "Positions count a grid row by row, here 4 x 6: a query sees its own tile, as in Swin.",
        "Chunks((2, 3), (4, 6))",
        dict(T=24, S=24),
    ),
    Entry(
        "Neighborhood",
        "A query sees what is near it on a grid, here within one step in each direction on 4 x 6.",
        "Neighborhood((4, 6), 1)",
        dict(T=24, S=24),
    ),
    Entry(
        "Dilated neighborhood",
        "Only every second column is a neighbour, so that the same number of keys reach twice as far.",
        "Neighborhood((4, 6), 1, (1, 2))",
        dict(T=24, S=24),
    ),
    Entry("Not", "What a mask does not allow: here all that is farther away than two.", "~Window(2, 2)", SQUARE),
    Entry(
        "Dense",
        "An explicit array, for what no predicate says.",
        "Dense(np.random.default_rng(0).random((12, 12)) < 0.4)",
        SQUARE,
    ),
    Entry(
        "Function",
        "A predicate of positions of one's own: here every third key, causally.",
        "Causal() & Function(lambda q_pos, kv_pos: (q_pos - kv_pos) % 3 == 0)",
        SQUARE,
    ),
    Entry(
        "By blocks",
        "A large mask is drawn by blocks, from intervals of positions, so nothing of T x S is built: █ and · are known "
        "to be full and empty, and the latter are never computed. ▒ is where both occur.",
        "Causal() & (Prefix(512) | Window(2047, 0))",
        dict(T=8192, S=8192),
    ),
)


def mask_of(entry: Entry) -> masks.Mask:
    """Evaluates the expression of an entry."""
    names = {name: value for name, value in vars(masks).items() if not name.startswith("_")}
    return eval(entry.expression, names | {"np": np})


def pictures() -> Iterator[tuple[str, bytes]]:
    """Draws each mask of the gallery that is small enough to be an array, as the name and the bytes of an SVG."""
    for entry in MASKS:
        if entry.is_small:
            figure = plot.mask_picture(mask_of(entry), **entry.sizes, title="")
            plot.save(figure, file := io.BytesIO(), "svg")
            yield entry.name, file.getvalue()


def masks_page() -> str:
    """Writes the gallery: of each mask the expression, the picture in characters, and beside it the drawing."""
    parts = []
    for entry in MASKS:
        sizes = ", ".join(f"{name}={size}" for name, size in entry.sizes.items())
        mask = mask_of(entry)
        parts += [
            f"## {entry.title}",
            entry.says,
            f"```python\nmask = {entry.expression}\nprint(mask.picture({sizes}))\n```",
        ]
        parts += ['<div class="side-by-side" markdown="1">', f"```text\n{mask.picture(**entry.sizes)}\n```"]
        if entry.is_small:
            parts += [f"![{entry.title}: queries downwards, keys across](pictures/{entry.name}.svg)"]
        parts += ["</div>"]
    return "\n\n".join(parts)


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def problems() -> Iterator[tuple[str, jattn.Explanation]]:
    """Asks `explain` about typical problems, on the machine that builds the documentation."""
    short, middle, long = _array(8, 64, 8, 64), _array(1, 512, 8, 64), _array(1, 8192, 8, 64)
    step, cache = _array(1, 1, 32, 128), _array(1, 8192, 8, 128)
    packed = masks.Segments(np.repeat(np.arange(8, dtype=np.int32), 1024))
    yield "B8 T64, 8 heads", jattn.explain(short, short, short)
    yield "T512, 8 heads", jattn.explain(middle, middle, middle)
    yield "T8192, 8 heads", jattn.explain(long, long, long)
    yield "the same, `Causal()`", jattn.explain(long, long, long, mask=masks.Causal())
    yield "the same, `Window(255, 0)`", jattn.explain(long, long, long, mask=masks.Window(255, 0))
    yield "the same, `Segments`, 8 of 1024", jattn.explain(long, long, long, mask=packed)
    yield "decoding, T1 S8192, 32 heads on 8", jattn.explain(step, cache, cache)


def implementations_table() -> str:
    """Writes what `explain` says of typical problems."""
    lines = ["| problem | chosen | blocks of queries, keys | skipped | temp memory | why |", "| --- " * 6 + "|"]
    for problem, told in problems():
        skipped = "" if told.empty is None else f"{told.empty:.0%}"
        sizes = f"{told.block_sizes[-2]}, {told.block_sizes[-1]}" if told.implementation != "dense" else ""
        reason = told.reasons[told.implementation].removeprefix("taken: ")
        cells = [problem, told.implementation, sizes, skipped, f"{told.temp_bytes / 2**20:.1f} MiB", reason]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
