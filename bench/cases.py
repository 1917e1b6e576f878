"""What is measured: the cases, their numbers, the figures that are to be reached, and the runs made of them.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, H width of a head, D = N*H width of the layer.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import ml_dtypes
import numpy as np

from tests import cases as table

WORKS = "forward", "grad", "jvp", "hvp", "layer", "layer-vmap"
MASKS: dict[str, tuple[str, tuple[str, ...]]] = {  # the mask and the scores, as the tests' table names them
    "full": ("none", ()),
    "causal": ("causal", ()),
    "window": ("window_256", ()),
    "segments": ("segments", ()),
    "bias": ("none", ("bias",)),
    "softcap": ("none", ("softcap",)),
}
DTYPES = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
SEGMENTS = 16
WINDOW, CAP = 256, 2.0  # as the tests' table has them, for those who are told in their own words

# Matrix products of [T, H] x [H, S] size: grad is 2 forward and 5 backward; a product has 2 tangents, or 1 where one
# factor is constant, so jvp takes 2 + 4 and hvp 7 + 12.
_PRODUCTS = {"forward": 2, "grad": 7, "jvp": 6, "hvp": 19, "layer": 2, "layer-vmap": 2}


class Setting(NamedTuple):
    """One piece of work at one size; every contender gets the same numbers, in the layout that is natural to it."""

    work: str = "forward"
    mask: str = "full"
    dtype: str = "f32"
    B: int = 1
    T: int = 4096
    S: int = 4096
    N: int = 8
    K: int = 8
    H: int = 64
    head_major: bool = False  # the caller keeps keys and values as [B, K, S, H], as a cache for decoding would

    def __str__(self) -> str:
        keys = "" if self.S == self.T else f" S{self.S}"
        heads = f" N{self.N}" if self.N == self.K else f" N{self.N} K{self.K}"
        layout = " head-major" if self.head_major else ""
        return f"{self.work} {self.mask} {self.dtype} B{self.B} T{self.T}{keys}{heads} H{self.H}{layout}"

    @property
    def problem(self) -> table.Case:
        """This case in the tests' table."""
        mask, scores = MASKS[self.mask]
        offset = self.S - self.T if self.decoding and self.mask in ("causal", "window") else None
        sizes = (self.B,), self.T, self.S, self.N, self.K, self.H, self.H
        return table.Case(str(self), *sizes, mask, scores, DTYPES[self.dtype].name, q_offset=offset)

    @property
    def decoding(self) -> bool:
        return self.T < self.S

    @property
    def pairs(self) -> int:
        """Admitted (query, key) pairs of one head: the work that nobody can leave out."""
        seen = np.arange(self.S - self.T, self.S) + 1
        if self.mask == "causal":
            return int(seen.sum())
        if self.mask == "window":
            return int(np.minimum(seen, WINDOW).sum())
        if self.mask == "segments":
            return int((np.bincount(segment_ids(self.S)) ** 2).sum())
        return self.T * self.S

    @property
    def flops(self) -> float:
        flops = 2.0 * _PRODUCTS[self.work] * self.B * self.N * self.pairs * self.H
        if self.work.startswith("layer"):
            flops += 2.0 * self.B * self.T * (self.N * self.H) * self.H * (2 * self.N + 2 * self.K)
        return flops

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values, which decoding has to read once."""
        return 2 * self.B * self.S * self.K * self.H * DTYPES[self.dtype].itemsize


def segment_ids(S: int) -> np.ndarray:
    """[S] ids of 16 packed documents of unequal lengths, whose edges fall on no block's edge."""
    shares = np.random.default_rng(1).permutation(np.linspace(0.5, 1.5, SEGMENTS))
    edges = np.round(np.cumsum(shares)[:-1] / SEGMENTS * S)
    return np.searchsorted(edges, np.arange(S), side="right").astype(np.int32)


def numbers(case: Setting) -> dict[str, np.ndarray]:
    """The arrays of a case by name: q k v, cotangent, tangents, what the mask carries; or x and weights of a layer."""
    rng, dtype, problem = np.random.default_rng(0), DTYPES[case.dtype], case.problem
    B, T, S, N, K, H = case.B, case.T, case.S, case.N, case.K, case.H

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape, np.float32)).astype(dtype)

    if case.work.startswith("layer"):
        D = N * H
        shapes = {"wq": (D, N, H), "wk": (D, K, H), "wv": (D, K, H), "wo": (N, H, D)}
        data = {"x": normal(B, T, D)} | {name: normal(*shape, scale=D**-0.5) for name, shape in shapes.items()}
    else:
        data = dict(zip("qkv", table.inputs(problem), strict=True))
    if case.work in ("grad", "hvp"):
        data["cot"] = normal(B, T, N, H)
    if case.work in ("jvp", "hvp"):
        data |= {"dq": normal(B, T, N, H), "dk": normal(B, S, K, H), "dv": normal(B, S, K, H)}
    if case.mask == "bias":
        data["bias"] = table.score_arrays(problem)["bias"]["array"].astype(dtype)
    if case.mask == "segments":
        data["segments"] = np.broadcast_to(segment_ids(S), (B, S)).copy()
    return data


class Trial(NamedTuple):
    """Every case with every contender, timed in turn in one loop, so that any two of them can be compared."""

    cases: tuple[Setting, ...]
    contenders: tuple[str, ...] | None = None  # None: all


class Target(NamedTuple):
    """A figure of jattn's that is to be reached by each of `cases` (none: by every case); the worst of them is shown.

    `against` is a contender or another case, whose time divides ours; "gemm" or "read", the rate of which ours is a
    share; "compile", for seconds; or "compile growth", for these over the seconds of the shortest of `cases`.
    """

    cases: tuple[Setting, ...]
    against: str | Setting
    limit: float
    at_least: bool = False


def _size(**changes) -> Setting:
    return Setting()._replace(S=changes.get("T", Setting().T))._replace(**changes)


LONG, WIDE = _size(), _size(B=2, T=2048, H=128)
_BOTH = [shape._replace(mask=mask) for shape in (LONG, WIDE) for mask in ("full", "causal")]
_SHORT = tuple(_size(B=B, T=T) for B in (1, 8) for T in (64, 128, 256, 512))
STEP = _size(T=1, S=8192, N=32, K=8, H=128)
_WINDOW, _WINDOW_32K = (_size(mask="window", T=T, N=2, K=2) for T in (8192, 32768))
_PACKED = _size(mask="segments", T=8192)
_SELF = [  # case, what it is compared with, limit
    *((shape._replace(work="jvp"), shape, 2.5) for shape in (LONG, WIDE)),
    *((shape._replace(work="hvp"), shape, 8.0) for shape in (LONG, WIDE)),
    (_WINDOW_32K, _WINDOW_32K._replace(mask="full"), 1 / 20),
    (_WINDOW_32K, _WINDOW, 4.4),
    (_PACKED, _PACKED._replace(mask="full"), 1 / 6),
    *((case._replace(dtype="bf16"), case, 1.0) for case in (LONG, LONG._replace(work="grad"), STEP)),
]

TARGETS = [
    *(Target((shape,), "torch", 0.90) for shape in (LONG, WIDE)),
    Target((LONG,), "jax.nn", 0.35),
    *(Target((shape,), "gemm", 0.75, at_least=True) for shape in (LONG, WIDE)),
    *(Target((shape._replace(mask="causal"),), "torch", 0.95) for shape in (LONG, WIDE)),
    Target(_SHORT, "jax.nn", 1.0),
    Target(_SHORT, "torch", 1.1),
    *(Target((case._replace(work="grad"),), "torch", 0.90) for case in _BOTH),
    *(Target((case._replace(work="grad"),), "jax.nn", 0.40) for case in _BOTH),
    *(Target((case,), other, limit) for case, other, limit in _SELF),
    *(Target((STEP._replace(head_major=major),), "torch", 0.5) for major in (False, True)),
    *(Target((STEP._replace(head_major=major),), "jax.nn", 0.2) for major in (False, True)),
    *(Target((STEP._replace(head_major=major),), "read", 0.7, at_least=True) for major in (False, True)),
    Target((), "compile", 3.0),
    Target((LONG, _size(T=16384)), "compile growth", 1.5),
]

_FORWARD = [
    *_BOTH,
    *_SHORT,
    *(_size(T=T, mask=mask) for T in (1024, 16384) for mask in ("full", "causal")),
    *(_size(T=T, N=2, K=2, mask=mask) for T in (8192, 32768) for mask in ("causal", "window")),
    _size(B=4, T=1024, N=4, K=4, H=32),
    _size(T=2048, N=32, K=8, H=128, mask="causal"),
    *(_size(T=2048, mask=mask) for mask in ("window", "segments", "bias", "softcap")),
    _PACKED,
]
_DERIVATIVES = [
    *(case._replace(work="grad") for case in _BOTH),
    *(_size(work="grad", T=T, mask="causal") for T in (64, 512)),
    *(_size(work="grad", T=2048, mask=mask) for mask in ("window", "segments", "bias", "softcap")),
    _size(work="grad", T=2048, N=32, K=8, H=128, mask="causal"),
    _size(work="grad", T=32768, N=2, K=2, mask="window"),
    *(_size(work=work, T=T) for work in ("jvp", "hvp") for T in (512, 2048)),
]
_DECODING = [
    *(STEP._replace(S=S, head_major=major) for S in (1024, 8192, 32768) for major in (False, True)),
    *(STEP._replace(T=16, S=S, mask="causal", head_major=major) for S in (8192, 32768) for major in (False, True)),
]
_HALF = [case._replace(dtype="bf16") for case in (LONG, LONG._replace(work="grad"), STEP, _size(T=512, B=8))]
_LAYER = [_size(work=w, mask="causal", B=B, T=T) for w in ("layer", "layer-vmap") for B, T in ((8, 256), (1, 2048))]

FULL = [
    *(Trial((case,)) for case in (*_FORWARD, *_DERIVATIVES, *_DECODING, *_HALF, *_LAYER)),
    *(Trial(tuple(dict.fromkeys((case, other))), ("jattn",)) for case, other, _ in _SELF),
]

_BIG, _LONG_KEYS = _size(B=4, N=16, K=16, H=128), _size(T=8192)
_SHOWN_ON_GPU = [
    *(
        shape._replace(dtype="bf16", work=work, mask=mask)
        for work in ("forward", "grad")
        for shape in (LONG, _BIG)
        for mask in ("full", "causal")
    ),
    *(STEP._replace(dtype="bf16", head_major=major) for major in (False, True)),
    *(_LONG_KEYS._replace(dtype="bf16", mask=mask) for mask in ("window", "segments")),
]
ON_GPU = [  # bfloat16, which is what a GPU's kernels are made for, and float32 once
    *(Trial((case,)) for case in _SHOWN_ON_GPU),
    *(Trial((_LONG_KEYS._replace(dtype="bf16", mask=mask, work="grad"),)) for mask in ("window", "segments")),
    *(Trial((LONG._replace(work=work),)) for work in ("forward", "grad")),
    Trial((_LONG_KEYS._replace(dtype="bf16", mask="causal", N=32, H=128),)),
    *(Trial((_size(T=2048, dtype="bf16", work=work),)) for work in ("jvp", "hvp")),
    *(Trial((_size(T=2048, dtype="bf16", mask=mask),)) for mask in ("bias", "softcap")),
    Trial((_size(work="layer", dtype="bf16", mask="causal", B=8, T=256),)),
]

# The few that the README shows, as far as they are part of a run.
SHOWN = [
    *(case._replace(work=work) for work in ("forward", "grad") for case in _BOTH),
    *(_size(T=512), STEP, STEP._replace(head_major=True), LONG._replace(dtype="bf16")),
    *_SHOWN_ON_GPU,
]

_TINY = _size(T=512)
QUICK = [
    *(Trial((case,)) for case in (_size(T=64), _size(T=256, B=8), _size(T=1024), _size(T=1024, mask="causal"))),
    *(Trial((_size(T=1024, mask=mask),)) for mask in ("window", "segments", "bias", "softcap")),
    *(Trial((_size(work="grad", T=512, mask=mask),)) for mask in ("full", "causal")),
    Trial(tuple(_TINY._replace(work=work) for work in ("forward", "jvp", "hvp")), ("jattn", "jax.nn")),
    *(Trial((STEP._replace(head_major=major),)) for major in (False, True)),
    Trial((_TINY, _TINY._replace(dtype="bf16")), ("jattn", "jax.nn", "torch")),
    *(Trial((case,)) for case in (_size(work=work, mask="causal", B=8, T=128) for work in ("layer", "layer-vmap"))),
]


def product(works, masks, dtypes, sizes, shape) -> list[Trial]:
    """One trial for each combination; `shape` is (B, N, K, H) and each size a T."""
    B, N, K, H = shape
    grid = itertools.product(works, masks, dtypes, sizes)
    return [Trial((Setting(work, mask, dtype, B, T, T, N, K, H),)) for work, mask, dtype, T in grid]
