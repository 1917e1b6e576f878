"""The walk: the notebook's steps in order, each with its equation and its shapes, then who attends to whom."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

import jax
import numpy as np

import jattn
from jattn import plot
from jattn.tour.files import write
from jattn.tour.text import MAX_WORDS, Input

SHOWN = 64  # words in the picture at most; half of it in the pictures of several heads
INDEX = {("a", "b"): ["d1", "d2"], ("a", "c"): ["d1", "d2", "d3"], "b": ["d1", "d2"], ("c", "d"): ["d4", "d5"]}


def random_params(D: int, options: argparse.Namespace) -> jattn.Params:
    """One head: the notebook's matrices (20, D), (20, D), (25, D). More: `init`, D // N wide each."""
    if options.heads > 1:
        return jattn.init(jax.random.key(options.seed), D, num_heads=options.heads)
    rng = np.random.default_rng(options.seed)
    wq, wk, wv = (np.float32(rng.standard_normal((rows, D)) / np.sqrt(D)) for rows in (20, 20, 25))
    return jattn.from_matrices(wq, wk, wv)


def walk(given: Input, params: jattn.Params, mask: Any, options: argparse.Namespace) -> np.ndarray:
    """Walks the steps and draws the weights; returns the attended rows, `[T, N*V]` or `[B, T, N*V]`."""
    x = jax.numpy.asarray(given.x)
    if given.sentences:
        _bare_bones(x, given.labels)
        _retrieval(given.sentences)
    first = x if x.ndim == 2 else x[0]
    q, k = _projections(params, first)
    weights = _weights(q, k, mask)
    _title("Attention", "y = weights v", "Every row becomes the sum of the values, weighted by its attention.")
    y = jax.jit(functools.partial(jattn.attend, mask=mask))(params, x)
    _shape("y", "[T, N*V]" if x.ndim == 2 else "[B, T, N*V]", y, "attend(params, x), all of it in one call")
    _title("Context vector", "Σ_t y_t", "The whole of x in one vector: the sum of the attended rows.")
    _shape("context", "[N*V]", jattn.context_vector(params, first, mask=mask), "")
    picture(weights, given.labels, options)
    return np.asarray(y)


def _bare_bones(x: jax.Array, words: list[str]) -> None:
    _title("Bare bones", "(x xᵀ) x", "Every word becomes a sum of all words, weighted by how alike they are.")
    enriched, scores = jattn.enrich(x), np.asarray(x @ x.T) / x.shape[-1]
    _shape("x", "[T, D]", x, "a row per word: hashes of its letters")
    _shape("enriched", "[T, D]", enriched, "the words, each mixed with those like it")
    _shape("x xᵀ", "[T, T]", scores, "how alike they are")
    places = {word.lower(): t for t, word in enumerate(words)}
    some = list(places.values())
    pairs = sorted(((scores[s, t], s, t) for i, t in enumerate(some) for s in some[:i]), reverse=True)
    for score, s, t in pairs[:3]:
        print(f"    most alike (over D): {words[s][:24]} ~ {words[t][:24]} {score:.2f}")


def _retrieval(sentences: list[list[str]]) -> None:
    _title("Retrieval", "query, key, value", "A query finds each entry that shares a term and unites their values.")
    found = search(("a", "c"), INDEX)
    for terms, documents in INDEX.items():
        print(f"    {' '.join(terms):<4} -> {' '.join(documents)}")
    print(f"    query a c finds {' '.join(found)}")
    index: dict[str, list[str]] = {}
    for i, sentence in enumerate(sentences):
        for word in dict.fromkeys(word.lower() for word in sentence):
            index.setdefault(word, []).append(f"s{i + 1}")
    longest = tuple(sorted(index, key=lambda word: (-len(word), word))[:2])
    print(f"  The same on your words: {len(index)} entries, word -> its sentences (s1 to s{len(sentences)})")
    found = search(longest, index)
    more = " ..." if len(found) > 8 else ""
    print(f"    query {' '.join(word[:24] for word in longest)} finds {' '.join(found[:8])}{more}")
    print("  Attention is the same with a soft match (softmax) and a sum for the union.")


def search(query: tuple[str, ...], index: dict[Any, list[str]]) -> list[str]:
    """The documents of every entry of an inverted index that shares a term with the query, by `jattn.lookup`."""
    terms = sorted({term for entry in index for term in ([entry] if isinstance(entry, str) else entry)})
    documents = sorted({name for names in index.values() for name in names}, key=lambda name: (len(name), name))
    keys, values = jattn.multi_hot(list(index), terms), jattn.multi_hot(list(index.values()), documents)
    found = np.asarray(jattn.lookup(jattn.multi_hot(query, terms), keys, values))
    return [name for name, hit in zip(documents, found, strict=True) if hit]


def _projections(params: jattn.Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    _title("Projections", "q = x wq, k = x wk, v = x wv", "A vector for each part that a row plays; not learned.")
    q, k, v = jattn.project(params, x)
    _shape("wq", "[D, N, H]", params.wq, "and wk; written [N*H, D] elsewhere")
    _shape("wv", "[D, N, V]", params.wv, "")
    _shape("q", "[T, N, H]", q, "what each row looks for")
    _shape("k", "[S, N, H]", k, "what each row offers; S = T, N heads")
    _shape("v", "[S, N, V]", v, "what each row hands over")
    return q, k


def _weights(q: jax.Array, k: jax.Array, mask: Any) -> np.ndarray:
    """The weights of the first rows, `[N, R, S]`."""
    T, H = q.shape[0], q.shape[-1]
    _title("Weights", f"softmax(q kᵀ / √H), H = {H}", "How a row shares out its attention; its weights sum to 1.")
    if mask is not None:
        print(f"  mask {mask}: a row sees itself and the rows before it")
    rows = np.arange(T if T <= MAX_WORDS else SHOWN)
    weights = np.asarray(jattn.attention_weights(q, k, rows=rows, mask=mask))
    _shape("weights", "[N, T, S]", weights, "" if T <= MAX_WORDS else f"(the first {SHOWN} rows)")
    return weights


def picture(weights: np.ndarray, labels: list[str], options: argparse.Namespace) -> None:
    """The weights in the terminal, the heads averaged, and with --save as a picture, a panel per head."""
    rows = labels[: weights.shape[1]]
    heads = "" if len(weights) == 1 else f" (the mean of {len(weights)} heads)"
    print(f"\nWho attends to whom{heads}: a row looks at its columns\n")
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    shades = plot.SHADES if plot.SHADES.encode(encoding, "replace").decode(encoding) == plot.SHADES else ".:+*#"
    print(plot.text_heat_map(weights.mean(0), rows, labels, shades=shades))
    print("The projections are random, so this shows the mechanism and not yet a meaning.", flush=True)
    if options.save:
        n = SHOWN if len(weights) == 1 else SHOWN // 2
        cut = f", the first {n} of {len(labels)}" if len(labels) > n else ""
        title = f"Who attends to whom{', causal' if options.causal else ''}{cut}"
        figure = plot.heat_map(weights[:, :n, :n], rows[:n], labels[:n], title=title)
        write(options.save, lambda file: plot.save(figure, file, options.save[-3:].lower()))


def _title(name: str, equation: str, meaning: str) -> None:
    print(f"\n{name}:  {equation}\n  {meaning}", flush=True)


def _shape(name: str, letters: str, array: Any, meaning: str) -> None:
    print(f"  {name:<9}{letters:<12}{list(array.shape)!s:<15} {meaning}".rstrip(), flush=True)
