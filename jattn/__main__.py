"""The tour: attention on your own words or your own array, step by step, then its proof on this machine.

python -m jattn [TEXT | FILE.txt | FILE.npy] [--out Y.npy] [--save PICTURE.png|.svg] [--heads N] [--seed S] [--causal]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import platform
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jaxlib
import numpy as np

import jattn
from jattn import plot

# William James, The Principles of Psychology, 1890, chapter XI.
PARAGRAPH = """
Every one knows what attention is. It is the taking possession by the mind, in clear and vivid form, of one out of what
seem several simultaneously possible objects or trains of thought. Focalization, concentration, of consciousness are of
its essence. It implies withdrawal from some things in order to deal effectively with others, and is a condition which
has a real opposite in the confused, dazed, scatterbrained state which in French is called distraction, and
Zerstreutheit in German.
"""

WIDTH = 64  # of a word's vector: D of a text
MAX_WORDS = 256  # walked at most
SHOWN = 64  # words in the picture at most; half of it in the pictures of several heads
LARGEST = 1e15  # of an array's values: beyond, products of two overflow float32
INDEX = {("a", "b"): ["d1", "d2"], ("a", "c"): ["d1", "d2", "d3"], "b": ["d1", "d2"], ("c", "d"): ["d4", "d5"]}


class BadInput(Exception):
    """What the user gave cannot be used: one line on stderr, exit status 2."""


class Input(NamedTuple):
    """What the tour attends to."""

    x: np.ndarray  # [T, D] or [B, T, D]  float32
    labels: list[str]  # T words, or T positions
    sentences: list[list[str]]  # of a text; none of an array
    source: str  # one line for the reader


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tour; returns 0, or 1 when a check of the proof fails, or 2 on bad input."""
    start = time.perf_counter()
    with contextlib.suppress(AttributeError, ValueError):  # not every stdout has it
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal may lack a letter
    try:
        options = _parse(argv)
        given = _read(options.input)
        _refuse(options, given.x)
        with jax.default_matmul_precision("highest"):
            return _tour(given, options, start)
    except BadInput as error:
        print("jattn:", " ".join(str(error).split()), file=sys.stderr)
        return 2


def _tour(given: Input, options: argparse.Namespace, start: float) -> int:
    """The notebook's steps in order, then the pictures, then the proof."""
    mask = jattn.masks.Causal() if options.causal else None
    x = jax.numpy.asarray(given.x)
    print(f"jattn {jattn.__version__}: {given.source}")
    if given.sentences:
        _bare_bones(x, given.labels)
        _retrieval(given.sentences)
    params = _params(x.shape[-1], options)
    first = x if x.ndim == 2 else x[0]
    q, k = _projections(params, first)
    weights = _weights(q, k, mask)
    _title("Attention", "y = weights v", "Every row becomes the sum of the values, weighted by its attention.")
    y = jax.jit(functools.partial(jattn.attend, mask=mask))(params, x)
    _shape("y", "[T, N*V]" if x.ndim == 2 else "[B, T, N*V]", y, "attend(params, x), all of it in one call")
    _title("Context vector", "Σ_t y_t", "The whole of x in one vector: the sum of the attended rows.")
    _shape("context", "[N*V]", jattn.context_vector(params, first, mask=mask), "")
    _picture(weights, given.labels, options)
    if options.out:
        _write(options.out, lambda file: np.save(file, np.asarray(y)))
    chosen = jattn.explain(*jax.eval_shape(jattn.project, params, x), mask=mask)
    return _prove(chosen, _checks(params, mask, given.x, np.asarray(y)), start)


# Input


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            hint = " (put a text of several words in quotes)" if message.startswith("unrecognized") else ""
            raise BadInput(message + hint)

    parser = Parser(prog="python -m jattn", description="Attention, step by step, on a text or on an array.")
    add = parser.add_argument
    add("input", nargs="?", metavar="TEXT | FILE.txt | FILE.npy", help="default: a paragraph by William James")
    add("--out", metavar="Y.npy", help="write the attended rows [..., T, N*V] here")
    add("--save", metavar="PICTURE.png|.svg", help="draw the weights here (needs matplotlib: the extra 'plot')")
    add("--heads", type=int, default=1, metavar="N", help="heads; must divide the width D (64 for a text)")
    add("--seed", type=int, default=0, metavar="S", help="of the random projections, 0 to 2**32 - 1")
    add("--causal", action="store_true", help="a word may attend to itself and the words before it only")
    add("--version", action="version", version=f"jattn {jattn.__version__}")
    options = parser.parse_args(argv)
    if not 0 <= options.seed < 2**32:
        raise BadInput(f"--seed must be from 0 to 2**32 - 1, got {options.seed}")
    return options


def _read(source: str | None) -> Input:
    """A path ending in .npy is an array; one that exists, or looks like a path, is a text file; the rest is text."""
    if source is None:
        return _text(PARAGRAPH, "William James on attention, 1890")
    if os.path.isdir(source):
        raise BadInput(f"{source!r} is a directory; give a text, a text file or a .npy file")
    if source.lower().endswith(".npy"):
        return _array(source)
    is_path = source.lower().endswith(".txt") or re.fullmatch(r"(~|\.{0,2})/\S+|\S+\.[A-Za-z]\w{1,3}", source)
    if not os.path.exists(source) and not is_path:
        return _text(source, "your text")
    try:
        with open(source, encoding="utf-8-sig") as file:
            text = file.read(2**20)
    except UnicodeDecodeError as error:
        raise BadInput(f"{source!r} is not UTF-8 text (byte {error.start}: {error.reason})") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {source!r}: {getattr(error, 'strerror', None) or error}") from error
    return _text(text, repr(source))


def _text(text: str, source: str) -> Input:
    """Splits a text into sentences and words, and turns the words into vectors."""
    text = unicodedata.normalize("NFC", text)
    parts = re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n\s*\n", text)
    sentences = [[word for word in map(_bare, part.split()) if word] for part in parts]
    words = [word for sentence in sentences for word in sentence]
    if not words:
        raise BadInput("the text is empty: it has no words")
    walked = words[:MAX_WORDS]
    kept: list[list[str]] = []
    for sentence in filter(None, sentences):
        room = len(walked) - sum(len(other) for other in kept)
        kept += [sentence[:room]] if room else []
    note = f", of which the first {MAX_WORDS} are walked" if len(words) > MAX_WORDS else ""
    x = np.stack([_vector(word) for word in walked])
    return Input(x, walked, kept, f"{source}, {len(words)} words{note}")


def _bare(word: str) -> str:
    """A word without the punctuation around it, and without characters that would steer a terminal."""
    word = "".join(c for c in word if unicodedata.category(c)[0] != "C")
    inside = [i for i, c in enumerate(word) if unicodedata.category(c)[0] != "P"]
    return word[inside[0] : inside[-1] + 1] if inside else ""


def _vector(word: str) -> np.ndarray:
    """The vector of a word, `[D]` of length sqrt(D): the sum of hashes of its letter triples.

    The same word has the same vector in every process, and words spelled alike have vectors alike.
    """
    spelled = f"<{word.lower()}>"
    triples = [spelled[i : i + 3] for i in range(len(spelled) - 2)]
    digests = [hashlib.shake_256(triple.encode()).digest(4 * WIDTH) for triple in triples]
    total = np.sum([np.frombuffer(digest, "<u4") / 2.0**31 - 1 for digest in digests], axis=0)
    return np.asarray(total * np.sqrt(WIDTH) / np.linalg.norm(total), np.float32)


def _array(path: str) -> Input:
    """Reads `[T, D]` or `[B, T, D]` from a .npy file; refuses what attention cannot be computed on."""
    try:
        x = np.load(path, allow_pickle=False)
    except OSError as error:
        raise BadInput(f"cannot read {path!r}: {error.strerror or error}") from error
    except Exception as error:  # a corrupt header may raise nearly anything
        raise BadInput(f"{path!r} is not a plain .npy array: {error}") from error
    if not isinstance(x, np.ndarray):
        raise BadInput(f"{path!r} is an .npz archive; save its array alone, with np.save")
    if x.dtype.kind not in "iuf":
        raise BadInput(f"{path!r} must hold real numbers, got dtype {x.dtype}")
    if x.ndim not in (2, 3) or not x.size:
        raise BadInput(f"{path!r} must be [T, D] or [B, T, D], none of them 0, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise BadInput(f"{path!r} holds {np.sum(~np.isfinite(x))} values that are NaN or infinite")
    largest = max(abs(float(x.max())), abs(float(x.min())))
    if largest > LARGEST:
        raise BadInput(f"{path!r} holds values up to {largest:.0e}, whose products overflow float32; scale them down")
    note = "" if x.dtype == np.float32 else f" {x.dtype}, computed in float32"
    return Input(x.astype(np.float32), [str(t) for t in range(x.shape[-2])], [], f"{path!r}, {list(x.shape)}{note}")


def _refuse(options: argparse.Namespace, x: np.ndarray) -> None:
    """Refuses, before the long work, what would fail after it."""
    D = x.shape[-1]
    if options.heads < 1 or D % options.heads:
        raise BadInput(f"--heads must divide the width D={D}, got {options.heads}")
    _claim("--out", options.out, (".npy",), options.input)
    _claim("--save", options.save, (".png", ".svg"), options.input)
    if options.save:
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            raise BadInput("--save needs matplotlib: pip install '.[plot]'") from error


def _claim(flag: str, path: str | None, endings: tuple[str, ...], source: str | None) -> None:
    """Makes sure that `path` can be written, and leaves nothing behind."""
    if path is None:
        return
    if not path.lower().endswith(endings):
        raise BadInput(f"{flag} must end in {' or '.join(endings)}, got {path!r}")
    existed = os.path.exists(path)
    if existed and source is not None and os.path.exists(source) and os.path.samefile(path, source):
        raise BadInput(f"{flag} {path!r} would overwrite the input")
    try:
        with open(path, "ab"):
            pass
        if not existed:
            os.remove(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{flag}: cannot write {path!r}: {getattr(error, 'strerror', None) or error}") from error


def _write(path: str, save: Callable[[Any], object]) -> None:
    try:
        with open(path, "wb") as file:
            save(file)
    except OSError as error:
        raise BadInput(f"cannot write {path!r}: {error.strerror}") from error
    print(f"\nwritten: {path}")


# The walk


def _title(name: str, equation: str, meaning: str) -> None:
    print(f"\n{name}:  {equation}\n  {meaning}", flush=True)


def _shape(name: str, letters: str, array: Any, meaning: str) -> None:
    print(f"  {name:<9}{letters:<12}{list(array.shape)!s:<15} {meaning}".rstrip(), flush=True)


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
    found = _search(("a", "c"), INDEX)
    for terms, documents in INDEX.items():
        print(f"    {' '.join(terms):<4} -> {' '.join(documents)}")
    print(f"    query a c finds {' '.join(found)}")
    index: dict[str, list[str]] = {}
    for i, sentence in enumerate(sentences):
        for word in dict.fromkeys(word.lower() for word in sentence):
            index.setdefault(word, []).append(f"s{i + 1}")
    longest = tuple(sorted(index, key=lambda word: (-len(word), word))[:2])
    print(f"  The same on your words: {len(index)} entries, word -> its sentences (s1 to s{len(sentences)})")
    found = _search(longest, index)
    more = " ..." if len(found) > 8 else ""
    print(f"    query {' '.join(word[:24] for word in longest)} finds {' '.join(found[:8])}{more}")
    print("  Attention is the same with a soft match (softmax) and a sum for the union.")


def _search(query: tuple[str, ...], index: dict[Any, list[str]]) -> list[str]:
    """The documents of every entry of an inverted index that shares a term with the query, by `jattn.lookup`."""
    terms = sorted({term for entry in index for term in ([entry] if isinstance(entry, str) else entry)})
    documents = sorted({name for names in index.values() for name in names}, key=lambda name: (len(name), name))
    keys, values = jattn.multi_hot(list(index), terms), jattn.multi_hot(list(index.values()), documents)
    found = np.asarray(jattn.lookup(jattn.multi_hot(query, terms), keys, values))
    return [name for name, hit in zip(documents, found, strict=True) if hit]


def _params(D: int, options: argparse.Namespace) -> jattn.Params:
    """One head: the notebook's matrices (20, D), (20, D), (25, D). More: `init`, D // N wide each."""
    if options.heads > 1:
        return jattn.init(jax.random.key(options.seed), D, num_heads=options.heads)
    rng = np.random.default_rng(options.seed)
    wq, wk, wv = (np.float32(rng.standard_normal((rows, D)) / np.sqrt(D)) for rows in (20, 20, 25))
    return jattn.from_matrices(wq, wk, wv)


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


def _picture(weights: np.ndarray, labels: list[str], options: argparse.Namespace) -> None:
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
        _write(options.save, lambda file: plot.save(figure, file, options.save[-3:].lower()))


# The proof


def _prove(chosen: jattn.Explanation, checks: dict[str, Callable[[], tuple[float, float]]], start: float) -> int:
    """Runs the checks and prints the table; returns the exit status. To pass: error <= limit, so a NaN fails."""
    device, name = jax.devices()[0], chosen.implementation
    versions = f"jattn {jattn.__version__}, jax {jax.__version__}, jaxlib {jaxlib.__version__}, numpy {np.__version__}"
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


def _checks(
    params: jattn.Params, mask: Any, given: np.ndarray, y: np.ndarray
) -> dict[str, Callable[[], tuple[float, float]]]:
    """The checks by name: each returns its error and its limit, and judges by float64 NumPy that shares no code.

    The first is about the user's own input; the rest about a small problem of unit scale, the same each time.
    """
    D, causal = params.wq.shape[0], mask is not None
    rng = np.random.default_rng(1890)
    xs = rng.standard_normal((3, 13, D)).astype(np.float32)
    x, exact = xs[0], functools.partial(_reference, causal=causal)
    want, limit = exact(params, x), _limit(params, xs)

    def f(params: jattn.Params, x: Any, **options: Any) -> jax.Array:
        return jattn.attend(params, x, mask=mask, **options)

    def yours() -> tuple[float, float]:
        last, attended = (given, y) if given.ndim == 2 else (given[-1], y[-1])
        rows = np.unique(np.linspace(0, len(last) - 1, 64).astype(int))
        return _error(attended[rows], exact(params, last, rows=rows)), _limit(params, last)

    def weights() -> tuple[float, float]:
        q, k, _ = jattn.project(params, jax.numpy.asarray(x))
        return _error(jattn.attention_weights(q, k, mask=mask), exact(params, x, weights=True)), limit

    def enrich() -> tuple[float, float]:
        each = x.astype(np.float64)
        looped = np.stack([np.sum([(t @ s) * s for s in each], axis=0) for t in each])
        return _error(jattn.enrich(x), looped), 1e-6 * np.abs(looped).max()

    def lookup() -> tuple[float, float]:
        union = {name for terms, names in INDEX.items() if {"a", "c"} & set(terms) for name in names}
        return float(len(union ^ set(_search(("a", "c"), INDEX)))), 0.0

    return {
        "attend, your input": yours,
        "attend": lambda: (_error(f(params, x), want), limit),
        "attend, dense": lambda: (_error(f(params, x, implementation="dense"), want), limit),
        "attend, blockwise": lambda: (_error(f(params, x, implementation="blockwise"), want), limit),
        "weights": weights,
        "context vector": lambda: (_error(jattn.context_vector(params, x, mask=mask), want.sum(0)), 4 * limit),
        "enrich, the two loops": enrich,
        "lookup, sets of names": lookup,
        "jit": lambda: (_error(jax.jit(f)(params, x), want), limit),
        "vmap": lambda: (_error(jax.vmap(f, (None, 0))(params, xs), np.stack([exact(params, x) for x in xs])), limit),
        "grad, finite differences": lambda: _grad(f, exact, params, x, rng),
        "jvp, finite differences": lambda: _jvp(f, exact, params, x, rng),
    }


def _grad(f: Callable, exact: Callable, params: jattn.Params, x: np.ndarray, rng: Any) -> tuple[float, float]:
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


def _jvp(f: Callable, exact: Callable, params: jattn.Params, x: np.ndarray, rng: Any) -> tuple[float, float]:
    """The derivative of every output along a random direction, by forward mode; the error is relative."""
    direction = _direction(params, x, rng)
    _, got = jax.jvp(f, (params, jax.numpy.asarray(x)), jax.tree.map(jax.numpy.asarray, direction))
    want = _difference(exact, params, x, direction)
    return _error(got, want) / np.abs(want).max(), 1e-4


def _direction(params: jattn.Params, x: np.ndarray, rng: Any) -> tuple[jattn.Params, np.ndarray]:
    """A random tangent, every leaf in proportion to the size of what it moves."""
    return jax.tree.map(lambda leaf: np.float32(rng.standard_normal(leaf.shape) * np.std(leaf)), (params, x))


def _difference(exact: Callable, params: jattn.Params, x: np.ndarray, direction: Any) -> np.ndarray:
    """The central difference of the float64 reference along a direction."""
    step = 1e-5

    def at(signed: float) -> np.ndarray:
        return exact(*jax.tree.map(lambda here, d: np.float64(here) + signed * np.float64(d), (params, x), direction))

    return (at(step) - at(-step)) / (2 * step)


def _reference(
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


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `python -m jattn | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
