"""project against one matrix product per head in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests.reference import assert_within_budget

D, N, K, H, V, C = 11, 6, 3, 7, 5, 17
T, S = 13, 19


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def parameters(bias=True, context_dim=C):
    biases = {"bq": draw(N, H), "bk": draw(K, H), "bv": draw(K, V)} if bias else {}
    return jattn.Params(wq=draw(D, N, H), wk=draw(context_dim, K, H), wv=draw(context_dim, K, V), **biases)


def loops(params, x, context=None):
    """Each head a matrix product of its own."""
    context = x if context is None else context

    def heads(rows, w, b):
        b = np.zeros(w.shape[1:], w.dtype) if b is None else b
        return np.stack([rows @ w[:, n] + b[n] for n in range(w.shape[1])], axis=-2)

    return heads(x, params.wq, params.bq), heads(context, params.wk, params.bk), heads(context, params.wv, params.bv)


def check(got, params, *rows):
    exact = loops(*jax.tree.map(lambda a: np.asarray(a, np.float64), (params, *rows)))
    for one, right, plain in zip(got, exact, loops(params, *rows), strict=True):
        assert_within_budget(one, right, plain)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["plain", "jit"])
@pytest.mark.parametrize("bias", [False, True])
def test_project(bias, transform):
    params, x, context = parameters(bias), draw(T, D), draw(S, C)
    check(transform(jattn.project)(params, x, context), params, x, context)
    params = parameters(bias, context_dim=D)
    got = transform(jattn.project)(params, x)
    assert [a.shape for a in got] == [(T, N, H), (T, K, H), (T, K, V)]
    check(got, params, x)


def test_leading_dims_are_vmap_over_any_axis():
    params, x, context = parameters(), draw(2, 3, T, D), draw(2, 3, S, C)
    check(jattn.project(params, x, context), params, x, context)
    for axis in (0, 1, -1):
        one, other = np.moveaxis(x[0], 0, axis), np.moveaxis(context[0], 0, axis)
        check(jax.vmap(jattn.project, in_axes=(None, axis, axis))(params, one, other), params, x[0], context[0])


def test_vmap_over_parameters():
    params, x = [jax.tree.map(lambda a, s=sign: s * a, parameters(context_dim=D)) for sign in (1, -1)], draw(T, D)
    for axis in (0, 1, -1):
        stacked = jax.tree.map(lambda *a, axis=axis: np.stack(a, axis), *params)
        got = jax.vmap(jattn.project, in_axes=(axis, None))(stacked, x)
        for i, one in enumerate(params):
            check([a[i] for a in got], one, x)


def test_derivatives():
    args = (parameters(), draw(T, D), draw(S, C))
    cotangents = (draw(T, N, H, seed=1), draw(S, K, H, seed=1), draw(S, K, V, seed=1))

    def loss(params, x, context):
        return sum(jnp.sum(a * c) for a, c in zip(jattn.project(params, x, context), cotangents, strict=True))

    params, x, context = jax.grad(loss, argnums=(0, 1, 2))(*args)
    cq, ck, cv = cotangents
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    close(x, np.einsum("tnh,dnh->td", cq, args[0].wq))
    close(context, np.einsum("skh,ckh->sc", ck, args[0].wk) + np.einsum("skv,ckv->sc", cv, args[0].wv))
    close(params.wq, np.einsum("td,tnh->dnh", args[1], cq))
    close(params.wk, np.einsum("sc,skh->ckh", args[2], ck))
    close(params.wv, np.einsum("sc,skv->ckv", args[2], cv))
    for got, cotangent in ((params.bq, cq), (params.bk, ck), (params.bv, cv)):
        close(got, cotangent.sum(0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_results_have_the_dtype_of_the_rows(dtype):
    with jax.enable_x64(dtype == "float64"):
        params, x, context = jax.tree.map(lambda a: jnp.asarray(a, dtype), (parameters(), draw(T, D), draw(S, C)))
        got = jattn.project(params, x, context)
        assert {a.dtype for a in got} == {jnp.dtype(dtype)}
        exact = loops(*jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x, context)))
        for one, right in zip(got, exact, strict=True):  # one rounding of a sum taken in float32, or float64's own
            np.testing.assert_allclose(
                np.asarray(one, np.float64),
                right,
                rtol=2 * float(jnp.finfo(dtype).eps),
                atol=1e-5 if dtype != "float64" else 1e-13,
            )
