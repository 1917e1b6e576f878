"""Functions of one's own that close over arrays being traced: these are arguments, in every transform."""

import functools
import gc
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, scores
from tests.plain import assert_close, quick

both = pytest.mark.parametrize("implementation", ["dense", jattn.Blockwise(3, 4)], ids=["dense", "blockwise"])


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((7, 4, 5), (7, 2, 5), (7, 2, 3)))


def near(n, q, k, v, implementation):
    """Closes over n."""
    return jattn.attention(q, k, v, mask=masks.Function(lambda i, j: abs(i - j) < n), implementation=implementation)


def heated(a, q, k, v, implementation):
    """Closes over a; the same as `cooled` says with a parameter."""
    scaled = scores.Function(lambda s, i, j, _: s * a - 0.1 * a * abs(i - j).astype(s.dtype))
    return jattn.attention(q, k, v, scores=(scaled,), implementation=implementation)


def cooled(a, q, k, v, implementation):
    scaled = scores.Function(lambda s, i, j, a: s * a - 0.1 * a * abs(i - j).astype(s.dtype), a)
    return jattn.attention(q, k, v, scores=(scaled,), implementation=implementation)


@both
def test_a_mask_that_closes_over_a_tracer(implementation):
    x = draw()
    distance = np.abs(np.subtract.outer(np.arange(7), np.arange(7)))
    wanted = [jattn.attention(*x, mask=distance < n, implementation="dense") for n in (2, 4)]
    assert_close(jax.jit(lambda n: near(n, *x, implementation))(2), wanted[0], 1e-5)
    got = jax.vmap(lambda n: near(n, *x, implementation))(jnp.array([2, 4]))
    assert_close(got, jnp.stack(wanted), 1e-5)


@both
def test_a_score_that_closes_over_a_tracer_and_its_derivatives(implementation):
    x = draw()

    def all_of(f):
        def loss(a, q):
            return jnp.sin(f(a, q, *x[1:], implementation)).sum()

        at = jnp.float32(0.7), x[0]
        gradient, hvp = jax.jvp(jax.grad(loss, (0, 1)), at, (jnp.float32(0.3), jnp.cos(x[0])))
        mapped = jax.vmap(jax.grad(loss), (0, None))(jnp.array([0.5, 1.5]), x[0])
        return loss(*at), gradient, hvp, mapped

    assert_close(jax.jit(lambda: all_of(heated))(), jax.jit(lambda: all_of(cooled))(), 1e-4)


@both
def test_what_a_function_holds_is_found_wherever_it_holds_it(implementation):
    x = draw()

    class Settings:
        def __init__(self, n):
            self.n = n

        def near(self, i, j):
            return abs(i - j) < self.n

    def through(make):
        def f(n):
            return jattn.attention(*x, mask=masks.Function(make(n)), implementation=implementation)

        return quick(f, 3)

    wanted = near(3, *x, "dense")
    for make in (
        lambda n: Settings(n).near,
        lambda n: functools.partial(lambda i, j, settings: abs(i - j) < settings.n, settings=SimpleNamespace(n=n)),
        lambda n: (lambda held: lambda i, j: abs(i - j) < held[1]["n"])({1: {"n": n}, "a": 2}),
    ):
        assert_close(through(make), wanted, 1e-5)


def test_a_function_that_names_what_is_not_there_yet():
    x = draw()
    causal = masks.Function(lambda i, j: j <= i if True else later)
    out = jattn.attention(*x, mask=causal)
    later = None
    assert_close(out, jattn.attention(*x, mask=masks.Causal()), 1e-5)


def test_nothing_captured_stays():
    x = draw()

    def gradient(table):
        def f(q):
            biased = scores.Function(lambda s, i, j, _: s + table[i - j])
            return jattn.attention(q, *x[1:], scores=(biased,), implementation="dense").sum()

        return jax.grad(f)(x[0])

    def live():
        gc.collect()
        return sum(array.size for array in jax.live_arrays() if array.size >= 10007)

    before = live()
    for _ in range(3):
        jax.grad(lambda table: gradient(table).sum())(jnp.ones(10007)).block_until_ready()
    assert live() <= before
