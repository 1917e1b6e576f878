"""What a test of one feature wants at hand: operands, the obvious attention, a loss, its derivatives, a comparison.

Nothing of jattn is imported.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tests import naive


def quick(f, *arrays, **options):
    """f(*arrays, **options), compiled."""
    return jax.jit(lambda *arrays: f(*arrays, **options))(*arrays)


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
        value, tangent = jax.jvp(f, (x,), (dx,))
        gradient, hvp = jax.jvp(jax.grad(f), (x,), (dx,))
        return {"value": value, "tangent": tangent, "gradient": gradient, "hvp": hvp}

    rng = np.random.default_rng(seed)
    dx = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), points[0])
    results = [run(x, dx) for x in points]
    return results if len(points) > 1 else results[0]


def assert_close(actual, expected, tol=1e-10):
    """Pytrees agree to `tol` of the largest entry of each expected leaf (and are as finite)."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, float), np.asarray(e, float)
        finite = np.abs(e[np.isfinite(e)])
        message = f"at {jax.tree_util.keystr(path) or 'root'}"
        np.testing.assert_allclose(a, e, rtol=tol, atol=tol * max(1.0, finite.max(initial=0)), err_msg=message)
