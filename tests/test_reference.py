"""The oracle judges the library, so here it is judged: by closed forms, by its own mistakes, and by what it imports."""

import ast
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import cases, naive, reference
from tests.cases import CASES


def test_known_answer():
    q, k = np.ones((1, 1, 1)), np.log([1.0, 3.0]).reshape(2, 1, 1)  # logits log 1, log 3: weights 1/4, 3/4
    v = np.array([0.0, 4.0]).reshape(2, 1, 1)
    out, lse, weights = reference.attention(q, k, v, scale=1.0)
    np.testing.assert_allclose(out, [[[3.0]]])
    np.testing.assert_allclose(lse, [[np.log(4.0)]])
    np.testing.assert_allclose(weights, [[[0.25, 0.75]]])


def test_known_answer_with_everything():
    q, k = np.ones((1, 1, 1)), np.log([1.0, 3.0, 5.0]).reshape(3, 1, 1)
    v = np.array([0.0, 4.0, 8.0]).reshape(3, 1, 1)
    out, lse, weights = reference.attention(
        q,
        k,
        v,
        scale=1.0,
        keep=np.array([True, True, False]),
        scores=[lambda score, head: score + np.log(2.0)],  # 2, 6, and 2 from the sink
        sink=np.log([2.0]),
        dropout=np.array([0.0, 2.0, 2.0]),
    )
    np.testing.assert_allclose(weights, [[[0.0, 1.2, 0.0]]])
    np.testing.assert_allclose(out, [[[4.8]]])
    np.testing.assert_allclose(lse, [[np.log(10.0)]])


def test_a_query_without_keys_and_keys_without_queries():
    q, k, v = (np.ones((2, 1, 1)), np.full((2, 1, 1), np.nan), np.full((2, 1, 1), np.inf))
    k[0], v[0] = 1.0, 7.0
    out, lse, weights = reference.attention(q, k, v, keep=np.array([[True, False], [False, False]]))
    np.testing.assert_array_equal(out[..., 0], [[7.0], [0.0]])
    np.testing.assert_array_equal(lse, [[1.0], [-np.inf]])
    np.testing.assert_array_equal(weights, [[[1.0, 0.0], [0.0, 0.0]]])
    _, lse, _ = reference.attention(q, k, v, keep=False, sink=[0.5])
    np.testing.assert_array_equal(lse, [[0.5], [0.5]])


def test_each_query_head_reads_its_own_group():
    v = np.array([10.0, 20.0]).reshape(1, 2, 1)  # K=2, so N=6 makes groups of three
    out, _, _ = reference.attention(np.zeros((1, 6, 1)), np.zeros((1, 2, 1)), v)
    np.testing.assert_array_equal(out[0, :, 0], [10, 10, 10, 20, 20, 20])


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_naive_agrees_with_the_oracle(case):
    q, k, v = (a.astype(np.float64) for a in cases.inputs(case))
    case = case._replace(dtype="float64")
    out, lse, _ = reference.attention(q, k, v, **cases.oracle(case))
    with jax.enable_x64(True):
        got_out, got_lse = jax.jit(lambda *a: naive.attention(*a, **cases.oracle(case, xp=jnp)))(q, k, v)
    np.testing.assert_allclose(got_out, out, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(got_lse, lse, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["segments_cross", "float64", "function"])
def test_derivatives_of_naive_agree_with_finite_differences_of_the_oracle(name):
    case = CASES[name]._replace(dtype="float64")
    args = (*cases.inputs(case), cases.score_arrays(case))
    rng = np.random.default_rng(1)
    tangents = jax.tree.map(lambda a: rng.normal(size=a.shape), args)

    def exact(step):
        moved = jax.tree.map(lambda a, t: a + step * t, args, tangents)
        out, lse, _ = reference.attention(*moved[:3], **cases.oracle(case, moved[3]))
        return out, np.where(np.isinf(lse), 0.0, lse)

    with jax.enable_x64(True):
        _, got = jax.jvp(lambda *a: naive.attention(*a[:3], **cases.oracle(case, a[3], jnp)), args, tangents)
    step = 1e-5
    for tangent, after, before in zip(got, exact(step), exact(-step), strict=True):
        np.testing.assert_allclose(tangent, (after - before) / (2 * step), atol=1e-8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 1.0},
        {"keep": True},
        {"scores": ()},
        {"sink": np.zeros(15)},
        {"dropout": 1.001},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_the_comparison_fails_on_a_wrong_answer(wrong):
    case = CASES["alibi"]
    args, right = cases.inputs(case), cases.oracle(case)
    exact = reference.attention(*args, **right)[0]
    rounded = np.asarray(naive.attention(*args, **cases.oracle(case, xp=jnp))[0])
    reference.assert_within_budget(rounded, exact, rounded)
    with pytest.raises(AssertionError, match="exceeds"):
        reference.assert_within_budget(
            reference.attention(*args, **right | wrong)[0].astype(np.float32), exact, rounded
        )


def test_the_comparison_fails_on_what_a_tolerance_may_overlook():
    exact, single = np.array([[1.0, 2.0], [3.0, -np.inf]]), np.array([[1.0, 2.0], [3.0, -np.inf]], np.float32)
    reference.assert_within_budget(single, exact, single)
    for wrong in (
        np.array([[1.0, np.nan], [3.0, -np.inf]], np.float32),
        np.array([[1.0, 2.0], [3.0, 0.0]], np.float32),
        np.array([[1.0, 2.0], [3.0, np.inf]], np.float32),
        np.array([[1.0, 2.0], [-np.inf, -np.inf]], np.float32),
        single.T,
        single[0],
        single.astype(np.float64),
        single * np.float32(1 + 1e-6),
    ):
        with pytest.raises(AssertionError):
            reference.assert_within_budget(wrong, exact, single)


def test_a_scalar_is_measured_by_the_worse_of_two_draws_and_an_array_by_the_first():
    exact, lucky, unlucky, wrong = 1.0, np.float32(1), np.float32(1 + 1e-6), np.float32(1 + 2e-6)
    for again in (None, lucky):
        with pytest.raises(AssertionError, match="exceeds"):
            reference.assert_within_budget(wrong, exact, lucky, again)
    reference.assert_within_budget(wrong, exact, lucky, unlucky)
    reference.assert_within_budget(wrong, exact, unlucky, lucky)
    with pytest.raises(AssertionError, match="exceeds"):
        reference.assert_within_budget(wrong[None], np.ones(1), lucky[None], unlucky[None])
    with pytest.raises(AssertionError, match="exceeds"):
        reference.assert_within_budget(np.float32(np.nan), exact, lucky, unlucky)


def test_the_oracle_is_small_and_shares_no_code_with_the_library():
    for module, most in ((reference, 80), (naive, 80)):
        source = Path(inspect.getfile(module)).read_text()
        assert len(source.splitlines()) <= most
        imported = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
        }
        assert imported <= {"numpy", "ml_dtypes", "jax"}
