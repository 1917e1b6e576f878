"""One table of cases for tests and bench: sizes, a mask, score modifiers, a dtype; all arrays follow from the seed.

What jattn is given (`options`) and what the oracle is given (`keep`, `score_functions`) are built side by side from the
same arrays, but independently: nothing below a `keep` or a `score` function touches jattn. Other sizes by `_replace`:

    case = CASES["causal"]._replace(T=8192, S=8192)
    q, k, v = inputs(case)
    out, lse = jattn.attention_with_lse(q, k, v, **options(case))
    exact = reference.attention(q, k, v, **oracle(case))
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jattn
from jattn import masks, scores


class Case(NamedTuple):
    """Sizes are distinct primes (and a multiple for N), so that a transposed axis cannot pass."""

    name: str
    B: tuple[int, ...] = ()  # leading batch dims
    T: int = 13  # queries
    S: int = 13  # keys
    N: int = 3  # query heads
    K: int = 3  # key/value heads
    H: int = 7  # query/key width
    V: int = 5  # value width
    mask: str = "none"  # a key of MASKS
    scores: tuple[str, ...] = ()  # keys of SCORES, in order
    dtype: str = "float32"
    scale: float | None = None
    q_offset: int | None = None
    positions: bool = False  # explicit q_positions and kv_positions, out of order
    dropout: float = 0.0
    seed: int = 0


class Mask(NamedTuple):
    """One row of MASKS."""

    build: Callable[..., Any]  # (**arrays) -> the jattn mask
    keep: Callable[..., Any]  # (q_pos, kv_pos, **arrays) -> bool, broadcastable to [..., N, T, S]
    arrays: Callable[..., dict[str, np.ndarray]] = lambda case, rng: {}  # what the mask carries


class Score(NamedTuple):
    """One row of SCORES."""

    build: Callable[..., Any]  # (**arrays) -> the jattn score modifier
    score: Callable[..., Any]  # (xp, score, q_pos, kv_pos, **arrays) -> score [..., N, T, S]; xp is numpy or jax.numpy
    arrays: Callable[..., dict[str, np.ndarray]] = lambda case, rng: {}  # what it carries, differentiable


def strided(q_pos, kv_pos, stride):
    """For masks.Function: the keys that lie a multiple of `stride` away."""
    return (q_pos - kv_pos) % stride == 0


def wave(score, q_pos, kv_pos, params):
    """For scores.Function: adds a wave of the distance, with learned height and frequency."""
    return score + params["height"] * jnp.cos(params["frequency"] * (q_pos - kv_pos).astype(score.dtype))


def _axes(array, count):
    """Appends axes of size 1, to lay an array of the leading dims against `count` later ones."""
    return np.asarray(array).reshape(np.shape(array) + (1,) * count)


def _causal(i, j):
    return j <= i


def _segments(i, j, q, kv):
    q, kv = q[..., None, :, None], kv[..., None, None, :]
    return (q == kv) & (q >= 0) & (kv >= 0)


def _runs(shape, rng):
    """Packed segments 0, 0, 0, 1, 1, ... of random lengths, the last one padding (-1)."""
    ids = np.cumsum(rng.random(shape) < 0.3, axis=-1)
    return np.where(ids == ids.max(-1, keepdims=True), -1, ids).astype(np.int32)


def _self_runs(case, rng):
    ids = _runs((*case.B, max(case.T, case.S)), rng)
    return {"q": ids[..., : case.T], "kv": ids[..., : case.S]}


def _integers(rng, low, high, shape):
    return rng.integers(low, high, shape, dtype=np.int32)


def _booleans(rng, share, shape):
    """True in about `share` of the places; a last query, where there are several, has no key."""
    array = rng.random(shape) < share
    array[..., 1:, :][..., -1:, :] = False
    return array


MASKS: dict[str, Mask] = {
    "none": Mask(lambda: None, lambda i, j: True),
    "full": Mask(masks.Full, lambda i, j: True),
    "empty": Mask(masks.Empty, lambda i, j: False),
    "causal": Mask(masks.Causal, _causal),
    "window": Mask(lambda: masks.Window(3, 2), lambda i, j: (i - 3 <= j) & (j <= i + 2)),
    "window_256": Mask(lambda: masks.Window(255, 0), lambda i, j: (i - 255 <= j) & (j <= i)),
    "window_left_open": Mask(lambda: masks.Window(None, 1), lambda i, j: j <= i + 1),
    "window_array": Mask(
        lambda left: masks.Window(left, 0),
        lambda i, j, left: (i - _axes(left, 3) <= j) & (j <= i),
        lambda case, rng: {"left": _integers(rng, 0, 5, case.B)},
    ),
    "sliding": Mask(lambda: masks.SlidingWindow(4), lambda i, j: (i - 4 < j) & (j <= i)),
    "prefix": Mask(lambda: masks.Prefix(5), lambda i, j: j < 5),
    "prefix_lm": Mask(
        lambda length: masks.Prefix(length) | masks.Causal(),
        lambda i, j, length: (j < _axes(length, 3)) | _causal(i, j),
        lambda case, rng: {"length": _integers(rng, 2, case.S, case.B)},
    ),
    "lengths": Mask(
        masks.Lengths,
        lambda i, j, q, kv: (i < _axes(q, 3)) & (j < _axes(kv, 3)),
        lambda case, rng: {
            "q": _integers(rng, case.T // 2, case.T + 1, case.B),
            "kv": _integers(rng, case.S // 2, case.S + 1, case.B),
        },
    ),
    "lengths_per_head": Mask(
        lambda kv: masks.Lengths(kv=kv),
        lambda i, j, kv: j < _axes(kv, 2),
        lambda case, rng: {"kv": _integers(rng, 0, case.S, (*case.B, case.N))},
    ),
    "segments": Mask(masks.Segments, _segments, _self_runs),
    "segments_cross": Mask(
        masks.Segments,
        _segments,
        lambda case, rng: {
            "q": _integers(rng, -1, 3, (*case.B, case.T)),
            "kv": _integers(rng, -1, 3, (*case.B, case.S)),
        },
    ),
    "segments_causal": Mask(
        lambda q, kv: masks.Segments(q, kv) & masks.Causal(),
        lambda i, j, q, kv: _segments(i, j, q, kv) & _causal(i, j),
        _self_runs,
    ),
    "dense": Mask(
        masks.Dense,
        lambda i, j, array: array,
        lambda case, rng: {"array": _booleans(rng, 0.6, (case.T, case.S))},
    ),
    "dense_heads": Mask(
        masks.Dense,
        lambda i, j, array: array,
        lambda case, rng: {"array": _booleans(rng, 0.4, (*case.B, case.N, case.T, case.S))},
    ),
    "bare_keys": Mask(
        lambda array: array,
        lambda i, j, array: array,
        lambda case, rng: {"array": _booleans(rng, 0.6, (*case.B, 1, 1, case.S))},
    ),
    "function": Mask(
        lambda stride: masks.Function(strided, stride),
        lambda i, j, stride: (i - j) % _axes(stride, 3) == 0,
        lambda case, rng: {"stride": np.int32(3)},
    ),
    "outside_window": Mask(
        lambda: ~masks.Window(1, 1) & masks.Causal(),
        lambda i, j: ~((i - 1 <= j) & (j <= i + 1)) & _causal(i, j),
    ),
}


def _bucket(distance, buckets, bidirectional, max_distance):
    """T5's bucket of `kv_pos - q_pos` (Raffel et al., 2020): one each for small distances, then logarithmic ones."""
    base, behind = np.zeros_like(distance), np.maximum(-distance, 0)
    if bidirectional:
        buckets //= 2
        base, behind = np.where(distance > 0, buckets, 0), np.abs(distance)
    near = buckets // 2
    # Exactly at the edge of a bucket the logarithms must not fall short by a rounding.
    far = np.log(np.maximum(behind, 1) / near) / np.log(max_distance / near) * (buckets - near) + 1e-9
    return base + np.where(behind < near, behind, np.minimum(near + far.astype(int), buckets - 1))


def _relative(xp, score, i, j, table, bidirectional, max_distance):
    bias = table[_bucket(j - i, table.shape[0], bidirectional, max_distance)]  # [..., 1, T, S, N]
    return score + xp.broadcast_to(xp.moveaxis(bias[..., 0, :, :, :], -1, -3), score.shape)


def _table(case, rng):
    return {"table": rng.normal(size=(8, case.N))}


def _heads(xp, array, score):
    return xp.broadcast_to(array[:, None, None], score.shape)


def _distance(xp, distance, score):
    return xp.broadcast_to(distance, score.shape).astype(score.dtype)


SCORES: dict[str, Score] = {
    "bias": Score(
        scores.Bias,
        lambda xp, s, i, j, array: s + xp.broadcast_to(array, s.shape),
        lambda case, rng: {"array": rng.normal(size=(case.T, case.S))},
    ),
    "bias_full": Score(
        scores.Bias,
        lambda xp, s, i, j, array: s + xp.broadcast_to(array, s.shape),
        lambda case, rng: {"array": rng.normal(size=(*case.B, case.N, case.T, case.S))},
    ),
    "bias_keys": Score(
        scores.Bias,
        lambda xp, s, i, j, array: s + xp.broadcast_to(array, s.shape),
        lambda case, rng: {"array": rng.normal(size=(case.N, 1, case.S))},
    ),
    "softcap": Score(lambda: scores.SoftCap(2.0), lambda xp, s, i, j: 2.0 * xp.tanh(s / 2.0)),
    "alibi": Score(
        scores.ALiBi,
        lambda xp, s, i, j, slopes: s - _heads(xp, slopes, s) * _distance(xp, np.abs(i - j), s),
        lambda case, rng: {"slopes": rng.uniform(0.1, 0.5, case.N)},
    ),
    "relative": Score(
        lambda table: scores.RelativePosition(table, max_distance=11),
        lambda xp, s, i, j, table: _relative(xp, s, i, j, table, True, 11),
        _table,
    ),
    "relative_causal": Score(
        lambda table: scores.RelativePosition(table, bidirectional=False, max_distance=11),
        lambda xp, s, i, j, table: _relative(xp, s, i, j, table, False, 11),
        _table,
    ),
    "function": Score(
        lambda **params: scores.Function(wave, params),
        lambda xp, s, i, j, height, frequency: s + height * xp.cos(frequency * _distance(xp, i - j, s)),
        lambda case, rng: {"height": rng.uniform(0.5, 1.0, ()), "frequency": rng.uniform(0.5, 1.0, ())},
    ),
    # The sink is no function of a score: `oracle` hands its logits over separately.
    "sink": Score(
        scores.Sink,
        lambda xp, s, i, j, logits: s,
        lambda case, rng: {"logits": rng.normal(size=case.N)},
    ),
}


_GQA = {"N": 15, "K": 3}
CASES: dict[str, Case] = {
    case.name: case
    for case in [
        Case("mha", T=11),
        Case("gqa", (2,), T=11, **_GQA),
        Case("mqa", T=11, N=5, K=1, mask="full", scale=0.3),
        Case("two_batch_dims", (2, 3), T=11, N=5, K=1, H=1, mask="dense_heads"),
        Case("one_query", T=1, mask="causal", q_offset=12, **_GQA),
        Case("no_query", T=0, mask="lengths"),
        Case("no_key", S=0),
        Case("empty", T=11, mask="empty"),
        Case("causal", (2,), mask="causal", **_GQA),
        Case("causal_more_queries", S=5, mask="causal", q_offset=-8),
        Case("window", T=11, mask="window", q_offset=1, **_GQA),
        Case("window_open", mask="window_left_open", scores=("softcap",)),
        Case("window_array", (2,), mask="window_array"),
        Case("sliding", mask="sliding", scores=("sink",), **_GQA),
        Case("prefix_lm", (2,), mask="prefix_lm"),
        Case("lengths", (2,), T=11, mask="lengths", **_GQA),
        Case("lengths_per_head", (2,), T=11, mask="lengths_per_head", scores=("sink",)),
        Case("segments", (2,), mask="segments", **_GQA),
        Case("segments_cross", (2,), T=11, mask="segments_cross", scores=("bias_keys",)),
        Case("packed", (2,), mask="segments_causal", scores=("alibi",)),
        Case("dense", T=11, mask="dense", scores=("bias", "softcap")),
        Case("outside_window", mask="outside_window"),
        Case("bias", (2,), T=11, mask="bare_keys", scores=("bias_full",), **_GQA),
        Case("softcap_then_bias", T=11, mask="prefix", scores=("softcap", "bias"), **_GQA),
        Case("alibi", T=11, mask="causal", scores=("alibi",), q_offset=2, **_GQA),
        Case("relative", T=11, scores=("relative",), q_offset=2, **_GQA),
        Case("relative_causal", (2,), T=11, mask="causal", scores=("relative_causal",), positions=True, **_GQA),
        Case("function", (2,), T=11, mask="function", scores=("function", "bias_keys"), q_offset=0, **_GQA),
        Case("dropout", (2,), mask="causal", dropout=0.3, **_GQA),
        Case("bfloat16", (2,), mask="causal", scores=("bias",), dtype="bfloat16", **_GQA),
        Case("float16", T=11, mask="window", scores=("softcap",), q_offset=2, dtype="float16"),
        Case("float64", (2,), mask="segments_causal", scores=("bias", "alibi", "sink"), dtype="float64", **_GQA),
    ]
}


def _rng(case: Case, purpose: str) -> np.random.Generator:
    return np.random.default_rng([case.seed, zlib.crc32(purpose.encode())])


def precision(case: Case):
    """The context in which the case's arrays keep their dtype."""
    return jax.enable_x64(case.dtype == "float64")


def normal(case: Case, purpose: str, *shape: int) -> np.ndarray:
    """Normal numbers in the case's dtype."""
    return _rng(case, purpose).normal(size=shape).astype(ml_dtypes.finfo(case.dtype).dtype)


def inputs(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns query `[..., T, N, H]`, key `[..., S, K, H]`, value `[..., S, K, V]`."""
    return (
        normal(case, "query", *case.B, case.T, case.N, case.H),
        normal(case, "key", *case.B, case.S, case.K, case.H),
        normal(case, "value", *case.B, case.S, case.K, case.V),
    )


def mask_arrays(case: Case) -> dict[str, np.ndarray]:
    """Returns the arrays that the case's mask carries."""
    return MASKS[case.mask].arrays(case, _rng(case, "mask"))


def score_arrays(case: Case) -> dict[str, dict[str, np.ndarray]]:
    """Returns the arrays that the case's scores carry, float32 or wider: the differentiable rest of the inputs."""
    dtype = np.promote_types(case.dtype, np.float32) if case.dtype != "bfloat16" else np.float32
    return {
        name: {key: np.asarray(array, dtype) for key, array in SCORES[name].arrays(case, _rng(case, name)).items()}
        for name in case.scores
    }


def build_mask(case: Case, arrays: dict[str, Any] | None = None) -> Any:
    """Returns the jattn mask."""
    return MASKS[case.mask].build(**(mask_arrays(case) if arrays is None else arrays))


def build_scores(case: Case, arrays: dict[str, dict[str, Any]] | None = None) -> tuple[Any, ...]:
    """Returns the jattn score modifiers, around the given arrays."""
    arrays = score_arrays(case) if arrays is None else arrays
    return tuple(SCORES[name].build(**arrays[name]) for name in case.scores)


def _positions(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The positions `[T]` or `[..., T]` of the queries and of the keys."""
    if case.positions:
        rng = _rng(case, "positions")
        q, kv = np.arange(case.T) + 2, np.arange(case.S)
        q, kv = (rng.permuted(np.broadcast_to(a, (*case.B, len(a))), axis=-1) for a in (q, kv))
    else:
        q, kv = np.arange(case.T) + (case.q_offset or 0), np.arange(case.S)
    return q.astype(np.int32), kv.astype(np.int32)


def _grid(case: Case) -> tuple[np.ndarray, np.ndarray]:
    q, kv = _positions(case)
    return q[..., None, :, None], kv[..., None, None, :]  # against [..., N, T, S]


def options(case: Case, arrays: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Returns the keyword arguments that make jattn.attention compute the case; `arrays` are those of the scores."""
    chosen: dict[str, Any] = {"mask": build_mask(case), "scores": build_scores(case, arrays), "scale": case.scale}
    if case.positions:
        chosen["q_positions"], chosen["kv_positions"] = _positions(case)
    elif case.q_offset is not None:
        chosen["q_offset"] = case.q_offset
    if case.dropout:
        chosen["dropout"] = jattn.Dropout(case.dropout, jax.random.key(case.seed))
    return chosen


def keep(case: Case) -> np.ndarray:
    """Returns the NumPy mask `[..., N, T, S]`, True where attending is allowed."""
    allowed = MASKS[case.mask].keep(*_grid(case), **mask_arrays(case))
    return np.broadcast_to(allowed, (*case.B, case.N, case.T, case.S))


def score_functions(case: Case, xp: Any, arrays: dict[str, dict[str, Any]]) -> list[Callable[..., Any]]:
    """Returns a function of (score, index) for each modifier: index `(..., n)` for the oracle, `...` for plain code."""
    i, j = _grid(case)

    def of(name: str) -> Callable[..., Any]:
        def function(score: Any, index: Any) -> Any:
            if index is ...:
                return SCORES[name].score(xp, score, i, j, **arrays[name])
            whole = np.broadcast_to(score, (*case.B, case.N, *score.shape))
            return SCORES[name].score(xp, whole, i, j, **arrays[name])[index]

        return function

    return [of(name) for name in case.scores]


def dropout_multiplier(case: Case) -> np.ndarray | None:
    """Returns what the weights are multiplied by, `[..., N, T, S]`: where the bits fall is jattn's to say, so ask it.

    With all logits equal and nothing masked, a weight that attention_weights gives as zero is one that was dropped.
    """
    if not case.dropout:
        return None
    q, k = (np.zeros_like(a, np.float32) for a in inputs(case)[:2])
    with jax.ensure_compile_time_eval():  # the oracle may be asked within a trace
        weights = jattn.attention_weights(q, k, dropout=options(case)["dropout"])
    return np.where(np.asarray(weights) > 0, 1 / (1 - case.dropout), 0.0)


def oracle(case: Case, arrays: dict[str, dict[str, Any]] | None = None, xp: Any = np) -> dict[str, Any]:
    """Returns the keyword arguments that make reference.attention, or naive.attention with xp=jnp, compute the case."""
    arrays = score_arrays(case) if arrays is None else arrays
    chosen: dict[str, Any] = {"keep": keep(case), "scores": score_functions(case, xp, arrays), "scale": case.scale}
    if "sink" in arrays:
        chosen["sink"] = arrays["sink"]["logits"]
    if case.dropout:
        chosen["dropout"] = dropout_multiplier(case)
    return chosen
