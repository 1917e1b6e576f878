"""The exact answer in NumPy, float64, at a sample of the queries, so that it is cheap at any length.

Only sampled queries get a cotangent, so dk and dv are exact sums over the sample; tangents are complex steps,
f'(x) u = Im f(x + i h u) / h, which is exact to rounding, and of the gradient gives the Hessian-vector product.
"""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np

from bench.cases import CAP, DTYPES, Setting
from tests import cases as table

SLACK = 16.0
_STEP = 1e-20


def sample(T: int) -> np.ndarray:
    """Up to 16 query indices, the first and the last among them."""
    return np.unique(np.linspace(0, T - 1, 16).round().astype(int))


def probe(case: Setting, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The numbers of the case with a cotangent that is zero outside the sampled queries."""
    if "cot" not in data:
        return data
    cot = np.zeros_like(data["cot"])
    cot[:, sample(case.T)] = data["cot"][:, sample(case.T)]
    return data | {"cot": cot}


def allowed(case: Setting, data: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """[B, R, S], from the mask's definition in the tests' table."""
    positions, arrays = rows + case.S - case.T, {}
    if case.mask == "segments":
        arrays = {"q": data["segments"][:, positions], "kv": data["segments"]}
    keep = table.MASKS[case.problem.mask].keep(positions[:, None], np.arange(case.S)[None], **arrays)
    return np.broadcast_to(keep, (case.B, 1, len(rows), case.S))[:, 0]


def _heads(case, data, rows, q, k, v, cot=None):
    """out [B, R, N, H] at the sampled rows, or with their cotangent (dq [B, R, N, H], dk, dv [B, S, K, H])."""
    G, scale = case.N // case.K, 1 / np.sqrt(case.H)
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    keep = allowed(case, data, rows)
    for b, n in np.ndindex(case.B, case.N):
        kn, vn = k[b, :, n // G], v[b, :, n // G]
        score = (scale * (q[b, :, n] @ kn.T)).astype(q.dtype)
        slope = 1.0
        if case.mask == "bias":
            score = score + data["bias"][rows]
        if case.mask == "softcap":
            capped = np.tanh(score / CAP)
            score, slope = CAP * capped, 1 - capped**2
        score = np.where(keep[b], score, -np.inf)
        weight = np.where(keep[b], np.exp(score - score.real.max(1, keepdims=True)), 0)
        weight = weight / weight.sum(1, keepdims=True)
        out[b, :, n] = weight @ vn
        if cot is not None:
            dweight = cot[b, :, n] @ vn.T
            dscore = scale * slope * weight * (dweight - (weight * dweight).sum(1, keepdims=True))
            dq[b, :, n] = dscore @ kn
            dk[b, :, n // G] += dscore.T @ q[b, :, n]
            dv[b, :, n // G] += weight.T @ cot[b, :, n]
    return (out,) if cot is None else (dq, dk, dv)


def answer(case: Setting, data: dict[str, np.ndarray], precision: type = np.float64) -> list[np.ndarray]:
    """What the case should give for `probe(case, data)`, computed in `precision`, with query axes cut to the sample.

    forward: out. grad: dq, dk, dv. jvp: out and its tangent. hvp: dq, dk, dv and their tangents. layer: y.
    """
    rows = sample(case.T)
    data = {name: array if name == "segments" else array.astype(precision) for name, array in data.items()}
    if case.work.startswith("layer"):
        q = np.einsum("btd,dnh->btnh", data["x"][:, rows], data["wq"], optimize=True)
        k, v = (np.einsum("btd,dnh->btnh", data["x"], data[w], optimize=True) for w in ("wk", "wv"))
        (out,) = _heads(case, data, rows, q, k, v)
        return [np.einsum("btnh,nhe->bte", out, data["wo"], optimize=True)]
    primal = data["q"][:, rows], data["k"], data["v"]
    cot = data["cot"][:, rows] if "cot" in data else None
    if "dq" not in data:
        return list(_heads(case, data, rows, *primal, cot))
    step = precision(_STEP)
    tangent = data["dq"][:, rows], data["dk"], data["dv"]
    stepped = _heads(case, data, rows, *(a + 1j * step * u for a, u in zip(primal, tangent, strict=True)), cot)
    return [*(a.real for a in stepped), *(a.imag / step for a in stepped)]


def at_sample(case: Setting, outputs: list[np.ndarray]) -> list[np.ndarray]:
    """Cuts a contender's outputs as `answer` is cut."""
    queries = {"grad": (0,), "hvp": (0, 3)}.get(case.work, range(len(outputs)))
    return [a[:, sample(case.T)] if i in queries else a for i, a in enumerate(outputs)]


def error(case: Setting, actual: list[np.ndarray], exact: list[np.ndarray]) -> float:
    """The largest error, relative to the largest entry at the same position.

    Derivatives cancel (the first query of a causal mask has dq = 0), so theirs is relative to the largest of all.
    """
    if [a.shape for a in actual] != [e.shape for e in exact]:
        return np.inf
    worst = 0.0
    for a, e in zip(actual, exact, strict=True):
        axes = (0, *range(2, e.ndim)) if case.work in ("forward", "layer", "layer-vmap") else None
        distance = np.abs(a.astype(np.float64) - e).max(axes) / np.abs(e).max(axes)
        worst = max(worst, np.nan_to_num(distance, nan=np.inf).max())
    return float(worst)


def budget(case: Setting, exact: list[np.ndarray], plain: list[np.ndarray]) -> float:
    """What may be wrong: a multiple of the error of plain float32 code rounded to the dtype, plus one rounding."""
    dtype = DTYPES[case.dtype]
    eps = float(ml_dtypes.finfo(dtype).eps)
    if jax.default_backend() == "gpu":
        eps = max(eps, 2.0**-10)  # XLA multiplies float32 as TensorFloat-32 there, unless told otherwise
    return SLACK * (error(case, [a.astype(dtype) for a in plain], exact) + eps / 2)
