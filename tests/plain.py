"""What a test of one feature wants at hand: operands, the obvious attention, a loss, its derivatives, a comparison.

Nothing of jattn is imported.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests import naive


def quick(f, *arrays, **options):
    """f(*arrays, **options), compiled."""
    return jax.jit(lambda *arrays: f(*arrays, **options))(*arrays)


_KEPT = {}


def once(make, *key):
    """make(), or what it gave to the first test with this key: judges are the same for every implementation."""
    if key not in _KEPT:
        _KEPT[key] = make()
    return _KEPT[key]


def qkv(T=7, S=11, N=6, K=2, H=5, V=3, *, batch=(), seed=0, dtype=float):
    """Normal query, key and value. No two sizes are equal, so that a transposed axis cannot pass."""
    rng = np.random.default_rng(seed)
    shapes = (*batch, T, N, H), (*batch, S, K, H), (*batch, S, K, V)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def logits(q, k, scale=None):
    """[..., T, N, H], [..., S, K, H] -> [..., N, T, S]"""
    k = jnp.repeat(k, q.shape[-2] // k.shape[-2], axis=-2)
    return jnp.einsum("...tnh,...snh->...nts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)


def attend(q, k, v, allowed=True, score=lambda s: s, *, sink=None, scale=None):
    """(out, lse); `score` maps logits [..., N, T, S], `allowed` broadcasts to them, `sink` is [N]."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # it is jattn that must be strict
        return naive.attention(q, k, v, keep=allowed, scores=(lambda s, _: score(s),), sink=sink, scale=scale)


def loss(out, lse=None):
    """A number that feels every element of out, and of lse where it is finite."""
    total = jnp.sin(out + 0.3).sum()
    return total if lse is None else total + (jnp.where(jnp.isneginf(lse), 0, lse) ** 3).sum()


def derivatives(f, *points, seed=1):
    """Value, tangent, gradient and Hessian-vector product of the scalar f at each point, a pytree; compiled once."""

    @jax.jit
    def run(x, dx):
        (value, gradient), (tangent, hvp) = jax.jvp(jax.value_and_grad(f), (x,), (dx,))
        return {"value": value, "tangent": tangent, "gradient": gradient, "hvp": hvp}

    rng = np.random.default_rng(seed)
    dx = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), points[0])
    results = [run(x, dx) for x in points]
    return results if len(points) > 1 else results[0]


def assert_differentiable(f, args, *, tol, eps=1e-4):
    """The derivatives of f(*args), and theirs in turn, forwards and backwards, are differences along one direction.

    It is what jax.test_util.check_grads(order=2) asks, with a program for each order where that compiles dozens.
    """

    def pulled(*args):
        out, pull = jax.vjp(f, *args)
        return pull(out)

    _assert_differentiable(f, args, tol, eps)
    _assert_differentiable(lambda *both: jax.jvp(f, *both), (args, args), tol, eps)
    _assert_differentiable(pulled, args, tol, eps)


def _assert_differentiable(f, args, tol, eps):
    @jax.jit
    def run(args, tangent, cotangent):
        out, along = jax.jvp(f, args, tangent)
        again, pull = jax.vjp(f, *args)
        return out, again, along, pull(cotangent)

    def inner(x, y):
        return sum(np.vdot(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))

    rng = np.random.default_rng(0)
    tangent, cotangent = (
        jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), tree)
        for tree in (args, jax.eval_shape(f, *args))
    )
    out, again, along, pulled = run(args, tangent, cotangent)
    after = run(jax.tree.map(lambda x, d: x + eps * d, args, tangent), tangent, cotangent)[0]
    before = run(jax.tree.map(lambda x, d: x - eps * d, args, tangent), tangent, cotangent)[0]
    difference = jax.tree.map(lambda a, b: (a - b) / (2 * eps), after, before)
    close = functools.partial(np.testing.assert_allclose, rtol=tol, atol=tol)
    jax.tree.map(close, again, out)
    jax.tree.map(close, along, difference)
    close(inner(tangent, pulled), inner(difference, cotangent))


def assert_close(actual, expected, tol=1e-10):
    """Pytrees agree to `tol` of the largest entry of each expected leaf (and are as finite)."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, float), np.asarray(e, float)
        finite = np.abs(e[np.isfinite(e)])
        message = f"at {jax.tree_util.keystr(path) or 'root'}"
        np.testing.assert_allclose(a, e, rtol=tol, atol=tol * max(1.0, finite.max(initial=0)), err_msg=message)
