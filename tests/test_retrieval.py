"""enrich against its two loops, lookup against sets of words."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests.reference import assert_within_budget

VOCABULARY = ("a", "b", "c", "d")
DOCUMENTS = ("d1", "d2", "d3", "d4", "d5")
INDEX = {
    ("a", "b"): ["d1", "d2"],
    ("a", "c"): ["d1", "d2", "d3"],
    "b": ["d1", "d2"],
    ("c", "d"): ["d4", "d5"],
}


def loops(x):
    """Bare-bones attention as two loops: each row becomes the sum of all rows, weighted by its products with them."""
    x = np.asarray(x, np.float64)
    enriched = np.zeros_like(x)
    for t in range(len(x)):
        for s in range(len(x)):
            enriched[t] += (x[t] @ x[s]) * x[s]
    return enriched


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(3, 11), (11, 3), (7, 7), (1, 5), (5, 1), (0, 3)], ids=str)
def test_enrich_is_the_two_loops_in_either_order_of_the_product(shape):
    x = rows(*shape)
    assert_within_budget(jattn.enrich(x), loops(x), (x @ x.T) @ x)
    assert_within_budget(jax.jit(jattn.enrich)(x), loops(x), (x @ x.T) @ x)


def test_enrich_takes_leading_dims_and_vmap_over_any_axis():
    x = rows(2, 3, 11, 7)
    exact = np.stack([[loops(one) for one in some] for some in x])
    plain = (x @ x.swapaxes(-1, -2)) @ x
    assert_within_budget(jattn.enrich(x), exact, plain)
    for axis in (0, 1, 2, -1):
        moved = np.moveaxis(x[0], 0, axis) if axis != -1 else np.moveaxis(x[0], 0, -1)
        assert_within_budget(jax.vmap(jattn.enrich, in_axes=axis)(moved), exact[0], plain[0])


def test_enrich_has_the_derivatives_of_the_loops():
    x, tangent, cotangent = rows(5, 3), rows(5, 3, seed=1), rows(5, 3, seed=2)
    _, got = jax.jvp(jattn.enrich, (x,), (tangent,))
    exact = sum(a @ b.T @ c for a, b, c in ((tangent, x, x), (x, tangent, x), (x, x, tangent)))
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)
    grad = jax.grad(lambda x: jnp.sum(jattn.enrich(x) * cotangent))(x)
    np.testing.assert_allclose(np.sum(grad * tangent), np.sum(cotangent * exact), rtol=1e-4)


def test_enrich_keeps_memory_linear_in_the_rows():
    x = jax.ShapeDtypeStruct((50_000, 4), jnp.float32)
    assert jax.jit(jattn.enrich).lower(x).compile().memory_analysis().temp_size_in_bytes < 2**22


def test_multi_hot_of_one_set_of_terms():
    np.testing.assert_array_equal(jattn.multi_hot(("a", "c"), VOCABULARY), [True, False, True, False])
    for same in ({"c", "a"}, frozenset("ac"), ("c", "a", "a")):
        np.testing.assert_array_equal(jattn.multi_hot(same, VOCABULARY), [True, False, True, False])
    assert jattn.multi_hot((), VOCABULARY).shape == (4,)
    assert jattn.multi_hot("b", VOCABULARY).dtype == bool


def test_multi_hot_of_rows():
    expected = [[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]]
    for terms in (INDEX, INDEX.keys(), list(INDEX)):
        np.testing.assert_array_equal(jattn.multi_hot(terms, VOCABULARY), np.array(expected, bool))
    expected = [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]
    for terms in (
        INDEX.values(),
        list(INDEX.values()),
        [tuple(v) for v in INDEX.values()],
        [set(v) for v in INDEX.values()],
    ):
        np.testing.assert_array_equal(jattn.multi_hot(terms, DOCUMENTS), np.array(expected, bool))
    np.testing.assert_array_equal(jattn.multi_hot(["b"], VOCABULARY), [[False, True, False, False]])


def test_a_bare_string_is_one_term_and_never_its_characters():
    vocabulary = ("d", "1", "d1", "ab", "a", "b")
    np.testing.assert_array_equal(jattn.multi_hot("d1", vocabulary), [0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(jattn.multi_hot(["d1", "ab"], vocabulary), [[0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]])
    with pytest.raises(ValueError, match="ab"):
        jattn.multi_hot("ab", VOCABULARY)


@pytest.mark.parametrize("terms", ["e", ("a", "e"), {"e"}, [("a", "b"), "e"], {("a", "e"): ["d1"]}], ids=repr)
def test_an_unknown_term_is_an_error_that_names_it(terms):
    with pytest.raises(ValueError, match="'e'"):
        jattn.multi_hot(terms, VOCABULARY)


def test_a_vocabulary_is_a_sequence_of_different_terms():
    with pytest.raises(TypeError, match="vocabulary"):
        jattn.multi_hot("a", "abcd")
    with pytest.raises(ValueError, match="'a'"):
        jattn.multi_hot("a", ("a", "b", "a"))


def retrieve(query, min_matches=1):
    """The union of the documents of every entry that shares enough terms with the query, as Python says it."""
    found = set()
    for terms, documents in INDEX.items():
        terms = {terms} if isinstance(terms, str) else set(terms)
        if len(terms & set(query)) >= min_matches:
            found |= set(documents)
    return [document in found for document in DOCUMENTS]


KEYS = ((1, 1, 0, 0), (1, 0, 1, 0), (0, 1, 0, 0), (0, 0, 1, 1))
QUERIES = [("a", "c"), ("a",), ("b",), ("d",), (), ("a", "b", "c", "d"), ("b", "d")]


def arrays(*queries):
    hot = np.array([[term in query for term in VOCABULARY] for query in queries])
    values = np.array([[d in documents for d in DOCUMENTS] for documents in INDEX.values()])
    return hot, np.array(KEYS, bool), values


def test_lookup_of_the_notebook():
    got = jattn.lookup(
        jattn.multi_hot(("a", "c"), VOCABULARY),
        jattn.multi_hot(INDEX, VOCABULARY),
        jattn.multi_hot(INDEX.values(), DOCUMENTS),
    )
    assert got.dtype == bool
    np.testing.assert_array_equal(got, [True] * 5)
    got = jattn.lookup(
        jattn.multi_hot("b", VOCABULARY), jattn.multi_hot(INDEX, VOCABULARY), jattn.multi_hot(INDEX.values(), DOCUMENTS)
    )
    np.testing.assert_array_equal(got, [True, True, False, False, False])


@pytest.mark.parametrize("min_matches", [1, 2])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.vmap], ids=["plain", "jit", "vmap"])
def test_lookup_is_the_union_over_matching_entries(transform, min_matches):
    queries, keys, values = arrays(*QUERIES)
    got = transform(lambda query: jattn.lookup(query, keys, values, min_matches=min_matches))(queries)
    np.testing.assert_array_equal(got, [retrieve(query, min_matches) for query in QUERIES])
    assert got.dtype == bool


def test_lookup_under_vmap_over_any_axis_of_any_argument():
    queries, keys, values = arrays(*QUERIES)
    rng = np.random.default_rng(0)
    many_keys, many_values = rng.random((3, *keys.shape)) < 0.5, rng.random((3, *values.shape)) < 0.5
    each_key = [jattn.lookup(queries, one, values) for one in many_keys]
    each_value = [jattn.lookup(queries, keys, one) for one in many_values]
    for axis in (0, 1, 2, -1):
        got = jax.vmap(jattn.lookup, in_axes=(None, axis, None))(queries, np.moveaxis(many_keys, 0, axis), values)
        np.testing.assert_array_equal(got, each_key)
        got = jax.vmap(jattn.lookup, in_axes=(None, None, axis))(queries, keys, np.moveaxis(many_values, 0, axis))
        np.testing.assert_array_equal(got, each_value)
    got = jax.vmap(jattn.lookup, in_axes=(1, None, None))(queries.T, keys, values)
    np.testing.assert_array_equal(got, jattn.lookup(queries, keys, values))


def test_lookup_takes_leading_dims_of_the_query():
    queries, keys, values = arrays(*QUERIES[:6])
    got = jattn.lookup(queries.reshape(2, 3, 4), keys, values)
    np.testing.assert_array_equal(got, np.array([retrieve(q) for q in QUERIES[:6]]).reshape(2, 3, 5))


def test_lookup_with_no_entries_finds_nothing():
    got = jattn.lookup(np.ones(4, bool), np.zeros((0, 4), bool), np.zeros((0, 5), bool))
    np.testing.assert_array_equal(got, [False] * 5)


def test_lookup_counts_matches_exactly_in_a_large_vocabulary():
    A = 2**11 + 1  # beyond what float16 or bfloat16 could count
    query, keys = np.ones(A, bool), np.ones((2, A), bool)
    keys[1, 0] = False
    got = jattn.lookup(query, keys, np.eye(2, dtype=bool), min_matches=A)
    np.testing.assert_array_equal(got, [True, False])


def test_lookup_traces_once():
    queries, keys, values = arrays(*QUERIES)
    lookup = jax.jit(chex.assert_max_traces(jattn.lookup, n=1))
    for query in queries:
        lookup(query, keys, values)


def test_lookup_is_attention_with_a_hard_match():
    """The docstring's claim: with a hard match for softmax and a union for the sum, attention is retrieval.

    A logit of 0 for a matching entry and none for others makes softmax weigh the matching entries equally; then a
    document is found where the weighted sum is not 0.
    """
    queries, keys, values = arrays(*QUERIES)
    match = (queries.astype(int) @ keys.T.astype(int)) > 0
    q, k = np.zeros((len(queries), 1, 1), np.float32), np.zeros((len(keys), 1, 1), np.float32)
    out = jattn.attention(q, k, values[:, None, :].astype(np.float32), mask=match)
    np.testing.assert_array_equal(out[:, 0] > 0, jattn.lookup(queries, keys, values))
