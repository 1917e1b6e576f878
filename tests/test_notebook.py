"""The NumPy notebook that jattn started from, in plain NumPy, beside the functions that took over its steps.

Each step is checked as it is, under jit, under vmap over any axis of any argument, and its gradient against finite
differences of the transcription.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests.reference import assert_within_budget

T, D, H, V = 6, 10, 20, 25


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


X, WQ, WK, WV = draw(0, T, D), draw(1, H, D), draw(2, H, D), draw(3, V, D)


# the notebook ---------------------------------------------------------------------------------------------------------


def bare_bones(x):
    scores = x @ x.T
    return scores @ x


def bare_bones_loops(x):
    scores = np.zeros((len(x), len(x)), x.dtype)
    for i, query in enumerate(x):
        for j, key in enumerate(x):
            scores[i, j] = query @ key
    enriched = np.zeros_like(x)
    for i in range(len(x)):
        for j, value in enumerate(x):
            enriched[i] += scores[i, j] * value
    return enriched


def projections(x, wq, wk, wv):
    return (wq @ x.T).T, (wk @ x.T).T, (wv @ x.T).T


def softmax(score):
    shifted = np.exp(score - score.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def weights(x, wq, wk, wv):
    q, k, _ = projections(x, wq, wk, wv)
    score = q @ k.T
    d = q.shape[-1]
    return softmax(score / x.dtype.type(np.sqrt(d)))


def attended(x, wq, wk, wv):
    _, _, v = projections(x, wq, wk, wv)
    return weights(x, wq, wk, wv) @ v


def context_vector(x, wq, wk, wv):
    return attended(x, wq, wk, wv).sum(axis=0)


# the same with jattn --------------------------------------------------------------------------------------------------


def _of_params(function):
    return lambda x, wq, wk, wv: function(jattn.from_matrices(wq, wk, wv), x)


def _core(params, x):
    return jattn.attention(*jattn.project(params, x))[:, 0]


def _weights(params, x):
    q, k, _ = jattn.project(params, x)
    return jattn.attention_weights(q, k)[0]


class Step(NamedTuple):
    notebook: Callable[..., Any]
    jattn: Callable[..., Any]
    arguments: tuple[np.ndarray, ...]


ALL = (X, WQ, WK, WV)
STEPS = {
    "enrich": Step(bare_bones, jattn.enrich, (X,)),
    "enrich_loops": Step(bare_bones_loops, jattn.enrich, (X,)),
    "project": Step(
        lambda *a: np.concatenate(projections(*a), axis=-1),
        _of_params(lambda params, x: jnp.concatenate([a[:, 0] for a in jattn.project(params, x)], axis=-1)),
        ALL,
    ),
    "weights": Step(weights, _of_params(_weights), ALL),
    "attention": Step(attended, _of_params(_core), ALL),
    "attend": Step(attended, _of_params(jattn.attend), ALL),
    "context_vector": Step(context_vector, _of_params(jattn.context_vector), ALL),
}
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def single(arrays):
    return tuple(np.asarray(a, np.float32) for a in arrays)


def test_shapes_of_the_notebook():
    params = jattn.from_matrices(*single((WQ, WK, WV)))
    x = single((X,))[0]
    q, k, v = jattn.project(params, x)
    assert (q.shape, k.shape, v.shape) == ((T, 1, 20), (T, 1, 20), (T, 1, 25))
    assert jattn.attention_weights(q, k).shape == (1, T, T)
    assert jattn.attend(params, x).shape == (T, 25)
    assert jattn.context_vector(params, x).shape == (25,)


@every_step
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_step(step, transform):
    rounded = single(step.arguments)
    exact = step.notebook(*(a.astype(np.float64) for a in rounded))
    assert_within_budget(transform(step.jattn)(*rounded), exact, step.notebook(*rounded))


@every_step
def test_step_in_float64(step):
    with jax.enable_x64(True):
        got = step.jattn(*step.arguments)
    exact = step.notebook(*step.arguments)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, exact, rtol=1e-13, atol=1e-13 * np.abs(exact).max())


@every_step
def test_step_under_vmap_over_any_axis_of_any_argument(step):
    arguments = single(step.arguments)
    for index, array in enumerate(arguments):
        variants = [array, array[::-1] * np.float32(0.5), -array]
        several = [(*arguments[:index], one, *arguments[index + 1 :]) for one in variants]
        exact = np.stack([step.notebook(*(a.astype(np.float64) for a in one)) for one in several])
        plain = np.stack([step.notebook(*one) for one in several])
        for axis in (*range(array.ndim + 1), -1):
            in_axes = [axis if i == index else None for i in range(len(arguments))]
            stacked = np.stack(variants, axis)
            got = jax.vmap(step.jattn, in_axes)(*arguments[:index], stacked, *arguments[index + 1 :])
            assert_within_budget(got, exact, plain)


@every_step
def test_gradient_of_step(step):
    with jax.enable_x64(True):
        cotangent = draw(4, *np.shape(step.notebook(*step.arguments)))
        loss = lambda *a: jnp.sum(step.jattn(*a) * cotangent)  # noqa: E731
        gradients = jax.jit(jax.grad(loss, argnums=range(len(step.arguments))))(*step.arguments)
    for index, array in enumerate(step.arguments):
        direction = draw(5, *array.shape)

        def moved(by, index=index, array=array, direction=direction):
            args = (*step.arguments[:index], array + by * direction, *step.arguments[index + 1 :])
            return np.sum(step.notebook(*args) * cotangent)

        by = 1e-5
        difference = (moved(by) - moved(-by)) / (2 * by)
        np.testing.assert_allclose(np.vdot(gradients[index], direction), difference, rtol=1e-6, atol=1e-6)


def test_the_notebook_s_softmax_overflows_and_jattn_s_does_not():
    x = single((X * 100,))[0]
    with np.errstate(over="ignore", invalid="ignore"):
        exponentials = np.exp(x @ x.T)
        assert np.isnan(exponentials / exponentials.sum(-1, keepdims=True)).any()
    weight = jattn.attention_weights(x[:, None], x[:, None], scale=1.0)[0]
    np.testing.assert_allclose(np.sum(weight, axis=-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(weight, softmax(x.astype(np.float64) @ x.T), atol=1e-6)


def test_retrieval_of_the_notebook():
    vocabulary, documents = ["a", "b", "c", "d"], ["d1", "d2", "d3", "d4", "d5"]
    index = {
        ("a", "b"): ["d1", "d2"],
        ("a", "c"): ["d1", "d2", "d3"],
        "b": ["d1", "d2"],
        ("c", "d"): ["d4", "d5"],
    }
    query = ("a", "c")
    results = set()
    for key, value in index.items():
        for term in query:
            if term in key:
                results.update(value)
    keys, values = jattn.multi_hot(index, vocabulary), jattn.multi_hot(index.values(), documents)
    found = jattn.lookup(jattn.multi_hot(query, vocabulary), keys, values)
    assert {document for document, hit in zip(documents, found, strict=True) if hit} == results
    assert results == {"d1", "d2", "d3", "d4", "d5"}
