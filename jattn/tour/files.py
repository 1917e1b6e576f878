"""What the tour reads and writes: a text, a text file or an array in; rows and a picture out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from jattn.tour.text import PARAGRAPH, BadInput, Input, embed

LARGEST = 1e15  # of an array's values: beyond, products of two overflow float32


def read(source: str | None) -> Input:
    """A path ending in .npy is an array; one that exists, or looks like a path, is a text file; the rest is text."""
    if source is None:
        return embed(PARAGRAPH, "William James on attention, 1890")
    if os.path.isdir(source):
        raise BadInput(f"{source!r} is a directory; give a text, a text file or a .npy file")
    if source.lower().endswith(".npy"):
        return _array(source)
    is_path = source.lower().endswith(".txt") or re.fullmatch(r"(~|\.{0,2})/\S+|\S+\.[A-Za-z]\w{1,3}", source)
    if not os.path.exists(source) and not is_path:
        return embed(source, "your text")
    try:
        with open(source, encoding="utf-8-sig") as file:
            text = file.read(2**20)
    except UnicodeDecodeError as error:
        raise BadInput(f"{source!r} is not UTF-8 text (byte {error.start}: {error.reason})") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {source!r}: {getattr(error, 'strerror', None) or error}") from error
    return embed(text, repr(source))


def _array(path: str) -> Input:
    """Reads `[T, D]` or `[B, T, D]` from a .npy file; refuses what attention cannot be computed on."""
    try:
        x = np.load(path, allow_pickle=False)
    except OSError as error:
        raise BadInput(f"cannot read {path!r}: {error.strerror or error}") from error
    except Exception as error:  # a corrupt header may raise nearly anything
        raise BadInput(f"{path!r} is not a plain .npy array: {error}") from error
    if not isinstance(x, np.ndarray):
        raise BadInput(f"{path!r} is an .npz archive; save its array alone, with np.save")
    if x.dtype.kind not in "iuf":
        raise BadInput(f"{path!r} must hold real numbers, got dtype {x.dtype}")
    if x.ndim not in (2, 3) or not x.size:
        raise BadInput(f"{path!r} must be [T, D] or [B, T, D], none of them 0, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise BadInput(f"{path!r} holds {np.sum(~np.isfinite(x))} values that are NaN or infinite")
    largest = max(abs(float(x.max())), abs(float(x.min())))
    if largest > LARGEST:
        raise BadInput(f"{path!r} holds values up to {largest:.0e}, whose products overflow float32; scale them down")
    note = "" if x.dtype == np.float32 else f" {x.dtype}, computed in float32"
    return Input(x.astype(np.float32), [str(t) for t in range(x.shape[-2])], [], f"{path!r}, {list(x.shape)}{note}")


def claim(flag: str, path: str | None, endings: tuple[str, ...], source: str | None) -> None:
    """Makes sure that `path` can be written, and leaves nothing behind."""
    if path is None:
        return
    if not path.lower().endswith(endings):
        raise BadInput(f"{flag} must end in {' or '.join(endings)}, got {path!r}")
    existed = os.path.exists(path)
    if existed and source is not None and os.path.exists(source) and os.path.samefile(path, source):
        raise BadInput(f"{flag} {path!r} would overwrite the input")
    try:
        with open(path, "ab"):
            pass
        if not existed:
            os.remove(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{flag}: cannot write {path!r}: {getattr(error, 'strerror', None) or error}") from error


def write(path: str, save: Callable[[Any], object]) -> None:
    """Has `save` write to the file of this path, and says so."""
    try:
        with open(path, "wb") as file:
            save(file)
    except OSError as error:
        raise BadInput(f"cannot write {path!r}: {error.strerror}") from error
    print(f"\nwritten: {path}")
