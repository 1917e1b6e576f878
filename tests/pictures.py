"""Every mask beside what it admits, said element by element in plain Python."""

import numpy as np

from jattn import masks


def draw(T, S, admits):
    """bool [T, S] from a predicate of two indices."""
    return np.array([[bool(admits(i, j)) for j in range(S)] for i in range(T)]).reshape(T, S)


def striped(q_pos, kv_pos, period):
    return (q_pos + 2 * kv_pos) % period != 0


def near(i, j, shape=(3, 5), radius=(1, 1), dilation=(1, 1)):
    """Whether two positions of a grid are neighbours."""
    if not (0 <= i < shape[0] * shape[1] and 0 <= j < shape[0] * shape[1]):
        return False
    apart = zip(divmod(i, shape[1]), divmod(j, shape[1]), radius, dilation, strict=True)
    return all(abs(q - kv) <= r * d and (q - kv) % d == 0 for q, kv, r, d in apart)


def together(i, j, shape=(3, 5), tile=(2, 2)):
    """Whether two positions of a grid are in one tile."""
    tiles = zip(divmod(i, shape[1]), divmod(j, shape[1]), tile, strict=True)
    return max(i, j) < shape[0] * shape[1] and all(q // n == kv // n for q, kv, n in tiles)


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
        "chunks": (masks.Chunks(4), draw(T, S, lambda i, j: (offset + i) // 4 == j // 4)),
        "tiles": (masks.Chunks(2, (3, 5)), draw(T, S, lambda i, j: together(offset + i, j))),
        "neighbors": (masks.Neighborhood((3, 5), 1), draw(T, S, lambda i, j: near(offset + i, j))),
        "dilated": (
            masks.Neighborhood((2, 7), (None, 1), (1, 2)),
            draw(T, S, lambda i, j: near(offset + i, j, (2, 7), (9, 1), (1, 2))),
        ),
        "function": (masks.Function(striped, 3), stripes),
        "prefix_lm": (masks.Prefix(4) | masks.Causal(), prefix | causal),
        "packed": (masks.Causal() & masks.Segments(q_ids, kv_ids), causal & same),
        "outside": (~masks.Window(2, 1), ~window),
        "tangle": (~(masks.Causal() & masks.Dense(noise)) | masks.Function(striped, 3), ~(causal & noise) | stripes),
    }
