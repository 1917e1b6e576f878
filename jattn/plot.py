"""Pictures of weights and masks: in the terminal with NumPy alone, in a file with matplotlib (the extra `plot`).

    print(text_heat_map(weights, words, words))
    heat_map(weights, words, words, title="who attends to whom").savefig("weights.png")
    mask_picture(masks.Causal() & masks.Window(3, 0), 12).savefig("mask.svg")

Figures are plain `matplotlib.figure.Figure` values: no pyplot, no global state, no window.
"""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHADES = "·░▒▓█"
PANELS = 16  # heads drawn at most: a picture with more cannot be read
_LABEL, _STRONGEST, _HEADER = 12, 10, 10  # terminal columns of a row label and of a strongest key; lines of the header
_PAPER, _INK, _ABSENT = "#ffffff", "#2b2b3a", "#ececf0"
_RAMP = ["#fdf6e9", "#fbd39c", "#f2956b", "#c9496f", "#7a2a7c", "#2a1650"]


def text_heat_map(
    weights: Any, rows: Sequence[str], columns: Sequence[str], *, width: int = 80, shades: str = SHADES
) -> str:
    """Draws weights `[T, S]` in `width` terminal columns: a row per query, two characters per key.

    A zero is blank, so a mask can be seen; each shade is twice the one before it, up to the largest weight shown; each
    row ends with its strongest key. What does not fit is cut, and the last line says so.

    Args:
      weights: `[T, S]`, not negative.     rows: T labels.     columns: S labels.
      width: columns of the terminal.      shades: characters from weak to strong.
    """
    weights = _checked(weights, rows, columns, rank=2)
    label = min(_LABEL, max((_width(row) for row in rows), default=0))
    fit = (width - label - 2 - _STRONGEST - 7) // 2
    if fit < 1:
        raise ValueError(f"{width=} leaves no room for a key beside labels of {label} columns")
    shown = weights[:fit, :fit]
    top = float(np.max(shown, initial=0.0, where=np.isfinite(shown)))
    head = [" " * (label + 2) + line for line in _vertical(columns[:fit])]
    if head:
        head[-1] = f"{head[-1]:<{label + 2 + 2 * shown.shape[1]}}  strongest"
    body = []
    for row, full, cells in zip(rows, weights, shown, strict=False):
        drawn = "".join(_shade(cell, top, shades) * 2 for cell in cells)
        best = int(np.argmax(full)) if full.size else 0
        none = not full.size or full[best] <= 0
        strongest = "(none)" if none else f"{_fit(columns[best], _STRONGEST)} {full[best]:.2f}"
        body.append(f"{_fit(row, label)}  {drawn}  {strongest}".rstrip())
    strong = [f"{shade * 2} {top / 2 ** (len(shades) - i):.3f}" for i, shade in enumerate(shades[1:], 1)]
    legend = "  ".join([f"{shades[0] * 2} less", *strong]) + f" to {top:.3f}   blank 0"
    cut = [f"(cut to fit: {len(shown)} of {len(rows)} rows, {shown.shape[1]} of {len(columns)} columns)"]
    return "\n".join([*head, *body, "", legend, *(cut if shown.shape != weights.shape else [])])


def heat_map(
    weights: Any, rows: Sequence[str] | None = None, columns: Sequence[str] | None = None, *, title: str = ""
) -> Figure:
    """Draws attention weights, one panel per head, on one colour scale (of square roots, so that small shares show).

    Zeros are grey, so a mask can be seen, and a dot marks the largest of each row.

    Args:
      weights: `[T, S]`, or `[N, T, S]` for a panel per head (the first 16).
      rows: T labels, `columns`: S labels; positions when None.     title: printed above.
    """
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    rows = rows if rows is not None else [str(t) for t in range(np.shape(weights)[-2])]
    columns = columns if columns is not None else [str(s) for s in range(np.shape(weights)[-1])]
    weights = _checked(weights, rows, columns, rank=3)
    panels = weights[:PANELS]
    figure, axes, cell = _panels(*panels.shape)
    colours = LinearSegmentedColormap.from_list("jattn", _RAMP).with_extremes(bad=_ABSENT)
    top = float(np.max(panels, initial=1e-12, where=np.isfinite(panels)))
    for n, (panel, ax) in enumerate(zip(panels, axes, strict=True)):
        absent = np.ma.masked_where(~(panel > 0), panel)
        image = ax.imshow(absent, cmap=colours, norm=PowerNorm(0.5, 0, top), interpolation="nearest")
        _label(ax, rows, columns, cell)
        if len(panels) > 1:
            ax.set_xlabel(f"head {n}", color=_INK, fontsize=10)
        if cell > 0.05:
            for t, row in enumerate(panel):
                if row.size and row.max() > 0:
                    colour = _PAPER if row.max() > 0.2 * top else _INK
                    ax.plot(int(row.argmax()), t, "o", color=colour, markersize=9 * cell, markeredgewidth=0)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0, colors=_INK)
    bar.set_label("share of attention", color=_INK, fontsize=9)
    cut = f"(the first {PANELS} of {len(weights)} heads)" if len(weights) > PANELS else ""
    _title(figure, " ".join(filter(None, [title, cut])))
    return figure


def mask_picture(mask: Any, T: int, S: int | None = None, *, q_offset: int = 0, title: str | None = None) -> Figure:
    """Draws which key (across) each query (down) may attend to; one panel per batch element or head that differs.

    Args:
      mask: a mask of `jattn.masks`, or a boolean array `[..., T, S]`.     T, S: lengths (S = T when None).
      q_offset: position of the first query.     title: `str(mask)` when None.
    """
    from matplotlib.colors import ListedColormap

    S = T if S is None else S
    array = mask.to_array(T, S, q_offset=q_offset) if hasattr(mask, "to_array") else mask
    allowed = np.asarray(array)
    if allowed.dtype != bool:
        raise TypeError(f"mask must be boolean, got {allowed.dtype}")
    allowed = np.broadcast_to(allowed, (*allowed.shape[:-2], T, S)).reshape(-1, T, S)
    panels = allowed[:PANELS]
    figure, axes, cell = _panels(*panels.shape)
    queries, keys = [str(q_offset + t) for t in range(T)], [str(s) for s in range(S)]
    for panel, ax in zip(panels, axes, strict=True):
        ax.imshow(panel, cmap=ListedColormap([_ABSENT, _RAMP[-2]]), vmin=0, vmax=1, interpolation="nearest")
        _label(ax, queries, keys, cell, turn=False)
        ax.set_ylabel("query position", color=_INK, fontsize=9)
        ax.set_xlabel(f"key position ({panel.sum()} of {panel.size} pairs)", color=_INK, fontsize=9)
    name = str(mask) if hasattr(mask, "to_array") else "mask"
    _title(figure, name if title is None else title)
    return figure


def save(figure: Figure, file: Any, kind: str) -> None:
    """Writes a figure to a path or a binary file as `png` or `svg`: the same figure, the same bytes, no warnings.

    A letter that the font lacks is drawn as a box.
    """
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "jattn"}):
        warnings.filterwarnings("ignore", message=".*[Gg]lyph")
        figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)


def _checked(weights: Any, rows: Sequence[str], columns: Sequence[str], rank: int) -> np.ndarray:
    """Returns weights as a NumPy array of rank `rank` (a panel axis is added), or says what is wrong with them."""
    array = np.asarray(weights)
    if array.shape[-2:] != (len(rows), len(columns)) or not 2 <= array.ndim <= rank:
        wanted = "[T, S]" if rank == 2 else "[T, S] or [N, T, S]"
        raise ValueError(f"weights must be {wanted} with T={len(rows)} and S={len(columns)}, got shape {array.shape}")
    if (array < 0).any():
        raise ValueError(f"weights must not be negative, got {array.min()}")
    return array.astype(np.float64)[(None,) * (rank - array.ndim)]


def _shade(weight: float, top: float, shades: str) -> str:
    if not math.isfinite(weight):
        return "?"
    if weight <= 0:
        return " "
    halvings = max(0, math.ceil(math.log2(top / weight)) - 1)
    return shades[max(0, len(shades) - 1 - halvings)]


def _width(text: str) -> int:
    """Terminal columns of a text: letters of East Asia take two, combining marks none."""
    wide = {"W": 2, "F": 2}
    return sum(0 if unicodedata.combining(c) else wide.get(unicodedata.east_asian_width(c), 1) for c in text)


def _fit(text: str, width: int) -> str:
    """Pads or cuts a text to exactly `width` terminal columns."""
    if _width(text) > width:
        while text and _width(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - _width(text))


def _vertical(words: Sequence[str]) -> list[str]:
    """Writes words downwards, two columns each, the last letters on the last line."""
    spelled = []
    for word in words:
        letters: list[str] = []
        for c in word:
            if unicodedata.combining(c) and letters:
                letters[-1] += c
            else:
                letters.append(c)
        spelled.append(letters if len(letters) <= _HEADER else [*letters[: _HEADER - 1], "…"])
    height = max(map(len, spelled), default=0)
    upright = [[""] * (height - len(letters)) + letters for letters in spelled]
    return ["".join(_fit(letters[line], 2) for letters in upright).rstrip() for line in range(height)]


def _panels(count: int, T: int, S: int) -> tuple[Figure, list[Any], float]:
    """Returns an empty figure, `count` axes in a grid as square as may be, and the size of a cell in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if not count * T * S:
        raise ValueError(f"there is nothing to draw: {count} panels of {T} rows and {S} columns")
    across = math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    cell = min(0.3, 9.0 / max(T, S, 1) if count == 1 else 3.2 / max(T, S, 1))
    size = (across * max(cell * S + 1.1, 2.4) + 1.0, down * max(cell * T + 1.0, 2.2) + 0.5)
    figure = Figure(figsize=size, dpi=160, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12), facecolor=_PAPER)
    grid = figure.subplots(down, across, squeeze=False)
    for ax in grid.flat[count:]:
        ax.remove()
    return figure, list(grid.flat[:count]), cell


def _label(ax: Any, rows: Sequence[str], columns: Sequence[str], cell: float, *, turn: bool = True) -> None:
    """Names the rows at the left and the columns on top, in a size that fits, with white lines between the cells."""
    size = min(9.0, max(4.0, 48 * cell)) if turn else 8.0
    every = math.ceil(1.05 * size / (72 * cell)) if turn else math.ceil(max(len(rows), len(columns)) / 16)
    ax.xaxis.tick_top()
    ax.set_xticks(range(0, len(columns), every), labels=columns[::every], rotation=90 if turn else 0)
    ax.set_yticks(range(0, len(rows), every), labels=rows[::every])
    for text in [*ax.get_xticklabels(), *ax.get_yticklabels()]:
        text.set(parse_math=False, fontsize=size, color=_INK)
    ax.tick_params(length=0, pad=2)
    ax.spines[:].set_visible(False)
    if max(len(rows), len(columns)) <= 64:
        ax.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
        ax.grid(which="minor", color=_PAPER, linewidth=min(0.8, 3 * cell))
        ax.tick_params(which="minor", length=0)


def _title(figure: Figure, text: str) -> None:
    if text:
        figure.suptitle(text, x=0.02, ha="left", color=_INK, fontsize=11, fontweight="bold", parse_math=False)
