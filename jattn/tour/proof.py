"""The proof: checks of the library against float64 NumPy on this machine, and their table."""

from __future__ import annotations

import functools
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jaxlib.version
import numpy as np

import jattn
from jattn.tour.walk import INDEX, search

Check = Callable[[], tuple[float, float]]  # returns its error and its limit


def prove(chosen: jattn.Explanation, checks: dict[str, Check], start: float) -> int:
    """Runs the checks and prints the table; returns the exit status. To pass: error <= limit, so a NaN fails."""
    device, name = jax.devices()[0], chosen.implementation
    versions = (
        f"jattn {jattn.__version__}, jax {jax.__version__}, jaxlib {jaxlib.version.__version__}, numpy {np.__version__}"
    )
    print("\nProof on this machine")
    print(f"  device          {device.device_kind}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"  versions        {versions}")
    print(f"                  Python {platform.python_version()}, {platform.system()}")
    print(f"  implementation  {name} ({chosen.reasons[name]})")
    print("  arithmetic      float32, matrix products at highest precision\n")
    print(f"  {'check, against float64 NumPy':<42}{'error':>9}    limit")
    failed = 0
    for name, check in checks.items():
        _progress(f"checking {name}")
        try:
            (error, limit), raised = check(), ""
        except Exception as problem:  # a check that raises has failed, and the table goes on
            error, limit, raised = np.nan, np.nan, f" {type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
        _progress("")
        verdict = "pass" if error <= limit else "FAIL"
        failed += verdict == "FAIL"
        print(f"  {name:<42}{error:9.1e} <= {limit:.1e}  {verdict}{raised}", flush=True)
    verdict = f"{failed} of {len(checks)} checks FAIL" if failed else f"all {len(checks)} checks pass"
    print(f"\n{verdict} ({time.perf_counter() - start:.1f} s)")
    return 1 if failed else 0


def _progress(doing: str) -> None:
    """One changing line on a terminal, plain lines elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{doing}{' ...' if doing else ''}", end="", file=sys.stderr, flush=True)
    elif doing:
        print(f"jattn: {doing} ...", file=sys.stderr, flush=True)


def checks(params: jattn.Params, mask: Any, given: np.ndarray, y: np.ndarray) -> dict[str, Check]:
    """The checks by name: they judge by float64 NumPy that shares no code.

    The first is about the user's own input; the rest about a small problem of unit scale, the same each time.
    """
    rng = np.random.default_rng(1890)
    xs = rng.standard_normal((3, 13, params.wq.shape[0])).astype(np.float32)
    x, exact = xs[0], functools.partial(reference, causal=mask is not None)
    want, limit = exact(params, x), _limit(params, xs)

    def f(params: jattn.Params, x: Any, **options: Any) -> jax.Array:
        return jattn.attend(params, x, mask=mask, **options)

    def weights() -> jax.Array:
        q, k, _ = jattn.project(params, jax.numpy.asarray(x))
        return jattn.attention_weights(q, k, mask=mask)

    return {
        "attend, your input": lambda: _yours(exact, params, given, y),
        "attend": lambda: (_error(f(params, x), want), limit),
        "attend, dense": lambda: (_error(f(params, x, implementation="dense"), want), limit),
        "attend, blockwise": lambda: (_error(f(params, x, implementation="blockwise"), want), limit),
        "weights": lambda: (_error(weights(), exact(params, x, weights=True)), limit),
        "context vector": lambda: (_error(jattn.context_vector(params, x, mask=mask), want.sum(0)), 4 * limit),
        "enrich, the two loops": lambda: _enrich(x),
        "lookup, sets of names": _lookup,
        "jit": lambda: (_error(jax.jit(f)(params, x), want), limit),
        "vmap": lambda: (_error(jax.vmap(f, (None, 0))(params, xs), np.stack([exact(params, x) for x in xs])), limit),
        "grad, finite differences": lambda: _grad(f, exact, params, x, rng),
        "jvp, finite differences": lambda: _jvp(f, exact, params, x, rng),
    }


def _yours(exact: Callable[..., Any], params: jattn.Params, given: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """What the walk made of the user's input, in at most 64 of its rows."""
    last, attended = (given, y) if given.ndim == 2 else (given[-1], y[-1])
    rows = np.unique(np.linspace(0, len(last) - 1, 64).astype(int))
    return _error(attended[rows], exact(params, last, rows=rows)), _limit(params, last)


def _enrich(x: np.ndarray) -> tuple[float, float]:
    """Bare-bones attention, against two loops over the rows."""
    each = x.astype(np.float64)
    looped = np.stack([np.sum([(t @ s) * s for s in each], axis=0) for t in each])
    return _error(jattn.enrich(x), looped), 1e-6 * np.abs(looped).max()


def _lookup() -> tuple[float, float]:
    """Retrieval, against Python's sets; the error is how many names differ."""
    union = {name for terms, names in INDEX.items() if {"a", "c"} & set(terms) for name in names}
    return float(len(union ^ set(search(("a", "c"), INDEX)))), 0.0


def _grad(
    f: Callable[..., Any], exact: Callable[..., Any], params: jattn.Params, x: np.ndarray, rng: Any
) -> tuple[float, float]:
    """The gradient of a random loss along random directions, by reverse mode; the error is relative."""
    c = np.float32(rng.standard_normal(exact(params, x).shape))
    gradient = jax.grad(lambda at: (f(*at) * c).sum())((params, jax.numpy.asarray(x)))
    got, want = [], []
    for _ in range(4):
        direction = _direction(params, x, rng)
        dots = jax.tree.map(lambda g, d: np.sum(np.float64(g) * d), gradient, direction)
        got.append(sum(jax.tree.leaves(dots)))
        want.append(np.sum(c * _difference(exact, params, x, direction)))
    return _error(np.stack(got), np.stack(want)) / np.abs(want).max(), 1e-4


def _jvp(
    f: Callable[..., Any], exact: Callable[..., Any], params: jattn.Params, x: np.ndarray, rng: Any
) -> tuple[float, float]:
    """The derivative of every output along a random direction, by forward mode; the error is relative."""
    direction = _direction(params, x, rng)
    _, got = jax.jvp(f, (params, jax.numpy.asarray(x)), jax.tree.map(jax.numpy.asarray, direction))
    want = _difference(exact, params, x, direction)
    return _error(got, want) / np.abs(want).max(), 1e-4


def _direction(params: jattn.Params, x: np.ndarray, rng: Any) -> tuple[jattn.Params, np.ndarray]:
    """A random tangent, every leaf in proportion to the size of what it moves."""
    moved: tuple[jattn.Params, np.ndarray] = jax.tree.map(
        lambda leaf: np.float32(rng.standard_normal(leaf.shape) * np.std(leaf)), (params, x)
    )
    return moved


def _difference(exact: Callable[..., Any], params: jattn.Params, x: np.ndarray, direction: Any) -> np.ndarray:
    """The central difference of the float64 reference along a direction."""
    step = 1e-5

    def at(signed: float) -> Any:
        return exact(*jax.tree.map(lambda here, d: np.float64(here) + signed * np.float64(d), (params, x), direction))

    return np.asarray((at(step) - at(-step)) / (2 * step))


def reference(
    params: jattn.Params, x: np.ndarray, *, causal: bool, rows: Any = slice(None), weights: bool = False
) -> np.ndarray:
    """Attention in float64 NumPy, a head at a time: `[T, D] -> [T, N*V]`, or the weights `[N, T, S]`."""
    x, wq, wk, wv = (np.asarray(array, np.float64) for array in (x, *params[:3]))
    allowed = np.arange(len(x)) <= np.arange(len(x))[rows, None] if causal else True
    heads, shares = [], []
    for n in range(wq.shape[1]):
        logits = (x[rows] @ wq[:, n]) @ (x @ wk[:, n]).T / np.sqrt(wq.shape[2])
        logits = np.where(allowed, logits, -np.inf)
        share = np.exp(logits - logits.max(-1, keepdims=True))
        shares.append(share / share.sum(-1, keepdims=True))
        heads.append(shares[-1] @ (x @ wv[:, n]))
    return np.stack(shares) if weights else np.concatenate(heads, -1)


def _limit(params: jattn.Params, x: np.ndarray) -> float:
    """The error to expect of float32, with room: it grows with the scores, up to a tenth of the largest value."""
    x, wq, wk, wv = (np.asarray(array, np.float64) for array in (x, *params[:3]))
    D, N, H = wq.shape
    longest = [np.linalg.norm((x @ w.reshape(D, -1)).reshape(-1, N, H), axis=-1).max() for w in (wq, wk)]
    score = (8 + np.sqrt(D) / 4) * longest[0] * longest[1] / np.sqrt(H)
    share = np.finfo(np.float32).eps * (score + np.sqrt(x.shape[-2]) + 4)
    return float(min(share, 0.1) * np.abs(x @ wv.reshape(D, -1)).max())


def _error(got: Any, want: np.ndarray) -> float:
    """The largest difference; infinite when the shapes differ."""
    got = np.asarray(got, np.float64)
    return float(np.abs(got - want).max()) if got.shape == np.shape(want) else float("inf")
