"""Every mask beside what it admits, said element by element in plain Python."""

import numpy as np

from jattn import masks


def draw(T, S, admits):
    """bool [T, S] from a predicate of two indices."""
    return np.array([[bool(admits(i, j)) for j in range(S)] for i in range(T)]).reshape(T, S)


def striped(q_pos, kv_pos, period):
    return (q_pos + 2 * kv_pos) % period != 0


def catalogue(T=11, S=11, offset=0):
    """name -> (mask, bool [T, S]) for queries at positions offset, offset + 1, ..."""
    rng = np.random.default_rng(T * S)
    q_ids, kv_ids = np.sort(rng.integers(-1, 3, T)).astype(np.int32), np.sort(rng.integers(-1, 3, S)).astype(np.int32)
    noise = rng.random((T, S)) < 0.6
    live = max(offset + 5, 2)
    causal = draw(T, S, lambda i, j: j <= offset + i)
    window = draw(T, S, lambda i, j: offset + i - 2 <= j <= offset + i + 1)
    prefix = draw(T, S, lambda i, j: j < 4)
    same = draw(T, S, lambda i, j: q_ids[i] == kv_ids[j] >= 0)
    stripes = draw(T, S, lambda i, j: (offset + i + 2 * j) % 3 != 0)
    return {
        "full": (masks.Full(), np.ones((T, S), bool)),
        "empty": (masks.Empty(), np.zeros((T, S), bool)),
        "causal": (masks.Causal(), causal),
        "window": (masks.Window(2, 1), window),
        "left": (masks.Window(3, None), draw(T, S, lambda i, j: offset + i - 3 <= j)),
        "right": (masks.Window(None, 2), draw(T, S, lambda i, j: j <= offset + i + 2)),
        "self": (masks.Window(0, 0), draw(T, S, lambda i, j: j == offset + i)),
        "moving": (masks.Window(np.int32(2), np.int32(1)), window),
        "sliding": (masks.SlidingWindow(3), draw(T, S, lambda i, j: offset + i - 2 <= j <= offset + i)),
        "prefix": (masks.Prefix(4), prefix),
        "prompt": (masks.Prefix(np.int32(4)), prefix),
        "lengths": (masks.Lengths(live, 9), draw(T, S, lambda i, j: offset + i < live and j < 9)),
        "padded": (masks.Lengths(kv=np.int32(3)), draw(T, S, lambda i, j: j < 3)),
        "segments": (masks.Segments(q_ids, kv_ids), same),
        "dense": (masks.Dense(noise), noise),
        "function": (masks.Function(striped, 3), stripes),
        "prefix_lm": (masks.Prefix(4) | masks.Causal(), prefix | causal),
        "packed": (masks.Causal() & masks.Segments(q_ids, kv_ids), causal & same),
        "outside": (~masks.Window(2, 1), ~window),
        "tangle": (~(masks.Causal() & masks.Dense(noise)) | masks.Function(striped, 3), ~(causal & noise) | stripes),
    }
