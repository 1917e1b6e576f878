"""The axes along which attention is tested: points of their product as problems, and small sets that cover all pairs.

A problem is a case of tests/cases.py with blocks small enough that there are several of every kind.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jattn
from tests import cases, naive
from tests.cases import Case

HEADS = {"mha": {"N": 2, "K": 2}, "gqa": {"N": 6, "K": 3}, "mqa": {"N": 3, "K": 1}}
BATCHES = {"single": (), "batch": (5,), "batches": (2, 1)}
DTYPES = ("float64", "float32", "bfloat16", "float16")
SHAPES = {  # no length is a multiple of its block, no value is as wide as its key
    "square": {"T": 13, "S": 13, "H": 3, "V": 5},
    "wide": {"T": 7, "S": 17, "H": 1, "V": 3},
    "tall": {"T": 17, "S": 7, "H": 80, "V": 11},
    "one_query": {"T": 1, "S": 11, "H": 192, "V": 5},
    "short": {"T": 5, "S": 11, "H": 256, "V": 2},
    "no_query": {"T": 0, "S": 5, "H": 3, "V": 2},
    "no_key": {"T": 5, "S": 0, "H": 3, "V": 2},
}
BLOCKS = {"square": (4, 2), "wide": (3, 4), "tall": (5, 2), "one_query": (4, 3), "short": (8, 16)}  # else (4, 4)
SCORES = {"none": (), **{name: (name,) for name in cases.SCORES}, "chain": ("bias_keys", "softcap", "alibi", "sink")}
# One of each kind, for a selection; the sweep takes all.
KINDS_OF_SCORE = ("none", "bias_full", "bias_keys", "softcap", "alibi", "relative", "function", "sink", "chain")
KINDS_OF_MASK = (
    "none",
    "empty",
    "causal",
    "window_array",
    "prefix_lm",
    "lengths",
    "lengths_per_head",
    "segments_cross",
    "segments_causal",
    "dense_heads",
    "function",
    "outside_window",
)
AXES = {
    "mask": KINDS_OF_MASK,
    "score": KINDS_OF_SCORE,
    "heads": tuple(HEADS),
    "dtype": DTYPES,
    "shape": tuple(SHAPES),
    "batch": tuple(BATCHES),
    "positions": ("counted", "given"),
}
_OF_SOME_LENGTH = {"prefix_lm", "lengths", "lengths_per_head"}  # masks whose lengths are drawn from 1 on


def possible(point: Mapping) -> bool:
    """Whether the choices made so far exclude one another."""
    return not (point.get("mask") in _OF_SOME_LENGTH and point.get("shape") in ("no_query", "no_key"))


class Setup(NamedTuple):
    case: Case
    implementation: jattn.Blockwise | str
    args: tuple  # q, k, v and the arrays of the scores: NumPy, all of it differentiable
    tangents: tuple  # as args

    def attention(self, q, k, v, arrays):
        """What is judged: (out, lse)."""
        chosen = cases.options(self.case, arrays)
        return jattn.attention_with_lse(q, k, v, implementation=self.implementation, **chosen)

    def naive(self, q, k, v, arrays):
        """Its judge in float64, and its measure at the problem's own precision: (out, lse)."""
        case = self.case._replace(dtype=str(q.dtype))
        return naive.attention(q, k, v, **cases.oracle(case, arrays, jnp))

    def wide(self) -> "Setup":
        """The same numbers in float64."""
        args, tangents = jax.tree.map(lambda x: x.astype(np.float64), (self.args, self.tangents))
        return self._replace(case=self.case._replace(dtype="float64"), args=args, tangents=tangents)


def problem(
    mask="none", score="none", heads="mha", dtype="float32", shape="square", batch="single", positions="counted"
) -> Setup:
    """The problem at one point of the product."""
    case = Case(
        "point",
        BATCHES[batch],
        mask=mask,
        scores=SCORES[score],
        dtype=dtype,
        positions=positions == "given",
        **HEADS[heads],
        **SHAPES[shape],
    )
    if positions == "counted" and case.T != case.S:
        case = case._replace(q_offset=case.S - case.T)
    block_q, block_kv = BLOCKS.get(shape, (4, 4))
    args = (*cases.inputs(case), cases.score_arrays(case))
    rng = np.random.default_rng(1)
    tangents = jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape)).astype(x.dtype), args)
    return Setup(case, jattn.Blockwise(block_q=block_q, block_kv=block_kv), args, tangents)


def idle(p: Setup) -> tuple[np.ndarray, np.ndarray]:
    """Which queries attend to nothing and which keys nothing attends to: bool [..., T, N, 1] and [..., S, K, 1]."""
    keep, K = cases.keep(p.case), p.case.K
    queries, keys = ~keep.any(-1), ~keep.any(-2)  # [..., N, T], [..., N, S]
    keys = keys.reshape((*keys.shape[:-2], K, p.case.N // K, p.case.S)).all(-2)
    return np.swapaxes(queries, -1, -2)[..., None], np.swapaxes(keys, -1, -2)[..., None]


def fill_idle(p: Setup, query: float, key: float, value: float) -> Setup:
    """The problem with these numbers in all the places that must not matter."""
    q, k, v, arrays = p.args
    queries, keys = idle(p)
    places = ((q, queries, query), (k, keys, key), (v, keys, value))
    return p._replace(args=(*(np.where(there, np.asarray(x, a.dtype), a) for a, there, x in places), arrays))


def cover(axes: Mapping[str, Sequence[str]], *, seed: int = 0, tries: int = 20) -> list[dict[str, str]]:
    """Points of the product among which every possible pair of choices occurs: greedy, the same at each call."""
    rng = random.Random(seed)
    pairs = [
        ((a, x), (b, y)) for a, b in itertools.combinations(axes, 2) for x, y in itertools.product(axes[a], axes[b])
    ]
    missing = {pair for pair in pairs if possible(dict(pair))}

    def gain(point: Mapping) -> int:
        return len(missing.intersection(_pairs(axes, point))) if possible(point) else -1

    def grow(start: Iterable) -> dict[str, str]:
        point = dict(start)
        for name in rng.sample(list(axes), len(axes)):
            if name not in point:
                choices = rng.sample(axes[name], len(axes[name]))
                point[name] = max(choices, key=lambda choice: gain(point | {name: choice}))
        return point

    points = []
    while missing:
        starts = rng.choices([pair for pair in pairs if pair in missing], k=tries)
        best = max(map(grow, starts), key=gain)
        missing.difference_update(_pairs(axes, best))
        points.append({name: best[name] for name in axes})
    return points


def _pairs(axes: Mapping, point: Mapping) -> Iterable:
    return itertools.combinations([(name, point[name]) for name in axes if name in point], 2)


def name_of(point: Mapping[str, str]) -> str:
    """The id of a test."""
    return "-".join(point.values())


def compiled(mode: Callable, f: Callable, p: Setup, **options) -> Callable:
    """mode(f, args, tangents) as a function of a problem like p, at its precision: NumPy arrays."""
    with cases.precision(p.case):
        lowered = jax.jit(lambda args, tangents: mode(f, args, tangents)).lower(p.args, p.tangents)
        executable = lowered.compile(compiler_options=options)

    def run(p: Setup):
        with cases.precision(p.case):
            return jax.tree.map(np.asarray, executable(p.args, p.tangents))

    return run


def run(mode: Callable, f: Callable, p: Setup, **options):
    """mode(f, args, tangents) as NumPy arrays, at the precision of the problem, compiled with these options."""
    return compiled(mode, f, p, **options)(p)


def assert_close(actual, exact, *, tol: float):
    """Trees of float64 arrays agree to `tol` of the largest number of each array (of 1 where all are smaller)."""
    for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(exact), strict=True):
        largest = np.max(np.abs(e), where=np.isfinite(e), initial=1.0)
        assert math.isfinite(largest)
        np.testing.assert_allclose(a, e, rtol=0, atol=tol * largest, err_msg=jax.tree_util.keystr(path))
