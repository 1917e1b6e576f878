"""Attention before it has parameters: enriching rows by one another, and retrieval by query, key and value."""

from collections.abc import Hashable, KeysView, Mapping, Sequence, ValuesView
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jattn import checks


def enrich(x: ArrayLike) -> jax.Array:
    """Adds to each row every row, weighed by how alike the two are: bare-bones attention.

        y = (x xᵀ) x = x (xᵀ x),   y_t = Σ_s (x_t·x_s) x_s

    No parameters and no softmax. The product is formed in the cheaper order: through the scores `[T, T]` in O(T² D),
    or, for T > D, through `xᵀ x` `[D, D]` in O(T D²). Sums are taken in float32 or wider.

    Args:
      x: `[..., T, D]` rows.

    Returns:
      `[..., T, D]`, in the dtype of `x`.

    Raises:
      ValueError: fewer than two axes.
      TypeError: a dtype that is not real floating.
    """
    x = checks.floating("x", x)
    checks.rank("x", x, "..., T, D")
    T, D = x.shape[-2:]
    wide = x.astype(checks.wide(x))
    if T > D:
        return jnp.einsum("...td,...de->...te", wide, jnp.einsum("...sd,...se->...de", wide, wide)).astype(x.dtype)
    return jnp.einsum("...ts,...sd->...td", jnp.einsum("...td,...sd->...ts", wide, wide), wide).astype(x.dtype)


def multi_hot(terms: Any, vocabulary: Sequence[Hashable]) -> np.ndarray:
    """Writes sets of terms as rows of bits.

        row[a] = (vocabulary[a] in terms)

    Args:
      terms: one set of terms, a tuple, a set or a single term such as a bare string (never its characters), for one
        row `[A]`; or many, a list, a dict or a dict's `keys()` or `values()`, for rows `[S, A]`, one for each of its
        entries, which are tuples, sets, lists or single terms.
      vocabulary: A different terms; their order is the order of the bits.

    Returns:
      `[A]` or `[S, A]` bool. An inverted index becomes `multi_hot(index.keys(), terms)` and
      `multi_hot(index.values(), documents)`.

    Raises:
      ValueError: a term that is not in the vocabulary, or a vocabulary with a term twice.
      TypeError: a vocabulary that is a bare string.
    """
    if isinstance(vocabulary, str | bytes):
        raise TypeError(f"vocabulary must be a sequence of terms, got the bare string {vocabulary!r}")
    place = {term: a for a, term in enumerate(vocabulary)}
    if len(place) != len(vocabulary):
        raise ValueError(f"vocabulary must hold each term once, got {list(vocabulary)!r}")

    def row(entry: Any) -> np.ndarray:
        bits = np.zeros(len(place), bool)
        for term in entry if isinstance(entry, tuple | set | frozenset | list) else (entry,):
            if term not in place:
                raise ValueError(f"terms: {term!r} is not in the vocabulary {list(vocabulary)!r}")
            bits[place[term]] = True
        return bits

    if isinstance(terms, list | Mapping | KeysView | ValuesView):
        return np.array([row(entry) for entry in terms], bool).reshape(len(terms), len(place))
    return row(terms)


def lookup(query: ArrayLike, keys: ArrayLike, values: ArrayLike, *, min_matches: int = 1) -> jax.Array:
    """Retrieves the union of the values of every entry whose key shares enough terms with the query.

        out = ∪ { values_s : |query ∩ keys_s| ≥ min_matches }

    This is attention with a hard match where attention has a softmax and a union where it has a sum:

        lookup      out = any_s  [query·keys_s ≥ min_matches]  and  values_s
        attention   out = Σ_s    softmax_s(query·keys_s)        ·   values_s

    Args:
      query: `[..., A]` bool, the terms asked for.
      keys: `[S, A]` bool, the terms under which each of S entries is filed.
      values: `[S, C]` bool, what each entry holds (its documents).
      min_matches: how many terms must be shared; 1 is the union over every entry that shares a term.

    Returns:
      `[..., C]` bool. A query that matches no entry gets nothing: all False.

    Raises:
      ValueError: shapes that do not agree, or `min_matches` below 1.
      TypeError: arrays that are not boolean.
    """
    if isinstance(min_matches, bool) or not isinstance(min_matches, int) or min_matches < 1:
        raise ValueError(f"min_matches must be a positive int, got {min_matches!r}")
    query, keys, values = (checks.boolean(n, a) for n, a in (("query", query), ("keys", keys), ("values", values)))
    checks.rank("query", query, "..., A")
    checks.rank("keys", keys, "S, A")
    S, A = keys.shape
    checks.shape("query", query, "..., A", (*query.shape[:-1], A))
    checks.rank("values", values, "S, C")
    checks.shape("values", values, "S, C", (S, values.shape[1]))
    matches = jnp.einsum("...a,sa->...s", query.astype(jnp.int32), keys.astype(jnp.int32))
    found = (matches >= min_matches).astype(jnp.int32)
    return jnp.einsum("...s,sc->...c", found, values.astype(jnp.int32)) > 0
