"""Which axes an array has: one rule for all that masks, scores and the scale carry, and for functions of one's own."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, scores
from tests.plain import quick

B, T, S, N, K = 3, 6, 6, 4, 2
BLOCKS = jattn.Blockwise(4, 4)
both = pytest.mark.parametrize("implementation", ["dense", BLOCKS], ids=["dense", "blockwise"])


def operands(B=B, N=N, K=K, T=T, S=S):
    rng = np.random.default_rng(0)
    shapes = (B, T, N, 8), (B, S, K, 8), (B, S, K, 5)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def numbers(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def counts(shape, seed=0):
    return np.random.default_rng(seed).integers(0, T, shape).astype(np.int32)


HALVES = np.arange(T, dtype=np.int32) // 3
# What carries an array: how it is made, its own axes in the table of README, and those that it may have.
CARRIERS = {
    "mask": (lambda a: dict(mask=a > 0), numbers, "NTS"),
    "Bias": (lambda a: dict(scores=scores.Bias(a)), numbers, "NTS"),
    "scale": (lambda a: dict(scale=a), numbers, "N"),
    "ALiBi": (lambda a: dict(scores=scores.ALiBi(a)), numbers, "N"),
    "Sink": (lambda a: dict(scores=scores.Sink(a)), numbers, "N"),
    "SoftCap": (lambda a: dict(scores=scores.SoftCap(1 + abs(a))), numbers, ""),
    "Window": (lambda a: dict(mask=masks.Window(a, 1)), counts, ""),
    "Prefix": (lambda a: dict(mask=masks.Prefix(a)), counts, ""),
    "Lengths": (lambda a: dict(mask=masks.Lengths(kv=a)), counts, ""),
    "Segments of queries": (lambda a: dict(mask=masks.Segments(a // 3, HALVES)), counts, "T"),
    "Segments of keys": (lambda a: dict(mask=masks.Segments(HALVES, a // 3)), counts, "S"),
}
SIZES = dict(B=B, N=N, T=T, S=S)


def readings(own):
    """Each way to write an array, as the axes that it has: aligned right, lacking some in front, 1 in place of any."""
    full = "B" + own if "N" in own else "BN" + own
    yield from (full, full.replace("B", "1"), full.replace("N", "1"))
    if "N" in own:
        yield from (own[i:] for i in range(len(own)))
    else:
        yield from ("B" + own, "1" + own, own)


@both
@pytest.mark.parametrize("name", CARRIERS)
def test_an_array_is_aligned_right_with_its_shape(name, implementation):
    make, random, own = CARRIERS[name]
    q, k, v = operands()

    @functools.partial(jax.jit, static_argnums=0)
    def f(letters, array):
        return jattn.attention(q, k, v, implementation=implementation, **make(array))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, 0, 0))
    @functools.partial(jax.vmap, in_axes=(1, 1, 1, 0), out_axes=1)
    def alone(q, k, v, array):
        """One head of one example, with what is its own."""
        one = make(array[None] if "N" in own else array)
        return jattn.attention(q[:, None], k[:, None], v[:, None], implementation="dense", **one)[:, 0]

    def wanted(full):
        return alone(q, *(np.repeat(a, N // K, 2) for a in (k, v)), full)

    for letters in readings(own):
        shape = [SIZES.get(letter, 1) for letter in letters]
        array = random(shape)
        # The same in full: [B, N, *own], where nothing can be read in two ways.
        behind = own.replace("N", "")
        has = letters[: len(letters) - len(behind)] if len(letters) > len(behind) else ""
        if "N" in own or len(has) == 2:
            full = array.reshape((1,) * (len(behind) + 2 - len(letters)) + tuple(shape))
        else:
            full = array.reshape((*(shape[: len(has)] or [1]), 1, *shape[len(has) :]))
        full = np.broadcast_to(full, [B, N, *(SIZES[a] for a in behind)])
        np.testing.assert_allclose(f(letters, array), wanted(full), rtol=2e-5, atol=2e-5, err_msg=letters)


TWICE = {
    "mask": (lambda a: dict(mask=a > 0), (N, T, S)),
    "Bias": (lambda a: dict(scores=scores.Bias(a)), (N, T, S)),
    "Bias of rows": (lambda a: dict(scores=scores.Bias(a)), (N, T, 1)),
    "Window": (lambda a: dict(mask=masks.Window(abs(a).astype(np.int32), 1)), (N,)),
    "SoftCap": (lambda a: dict(scores=scores.SoftCap(1 + abs(a))), (N,)),
    "Function": (lambda a: dict(scores=scores.Function(lambda s, i, j, a: s * a, a, axes="NT")), (N, T)),
}


@pytest.mark.parametrize("name", TWICE)
def test_what_fits_heads_and_examples_is_refused(name):
    """Both spelled out are taken, and mean what they say."""
    make, shape = TWICE[name]
    q, k, v = operands(B=N)
    array = 3 * numbers(shape)
    with pytest.raises(ValueError, match=r"in two ways.*agrees with N=4: write \[1, N.*for heads, or \[B, 1.*examples"):
        jattn.attention(q, k, v, **make(array))
    heads, examples = (jattn.attention(q, k, v, **make(a)) for a in (array[None], array[:, None]))
    for one in range(N):
        alone = jattn.attention(q[one], k[one], v[one], **make(array))  # without a batch there is but one way
        np.testing.assert_allclose(heads[one], alone, rtol=1e-5, atol=1e-5)
        alone = jattn.attention(q[one], k[one], v[one], **make(array[one]))
        np.testing.assert_allclose(examples[one], alone, rtol=1e-5, atol=1e-5)
    mapped = jax.vmap(lambda q, k, v: jattn.attention(q, k, v, **make(array)))(q, k, v)
    np.testing.assert_allclose(mapped, heads, rtol=1e-5, atol=1e-5)


def test_what_fits_in_two_ways_that_are_the_same_is_taken():
    q, k, v = operands(B=N)
    for ones in (np.zeros((1, T, S), np.float32), np.zeros((1, 1, T, S), np.float32), np.zeros((T, S), np.float32)):
        jattn.attention(q, k, v, scores=scores.Bias(ones))
    two = [np.stack([a] * N) for a in (q, k, v)]
    with pytest.raises(ValueError, match=r"\[1, B, N, T, S\] for heads, or \[B, B, 1, T, S\]"):
        jattn.attention(*two, scores=scores.Bias(np.zeros((N, N, T, S), np.float32)))


@pytest.mark.parametrize("name", sorted(set(CARRIERS) - set(TWICE)))
def test_what_belongs_to_heads_or_to_examples_is_taken_where_sizes_agree(name):
    """Numbers of heads are of heads, and ids, lengths and positions are of examples, whatever the sizes."""
    make, random, own = CARRIERS[name]
    q, k, v = operands(B=N)
    array = random([N, *(SIZES[a] for a in own if a != "N")])
    full = array[None] if own == "N" else array[:, None]
    got, wanted = (jattn.attention(q, k, v, **make(a)) for a in (array, full))
    np.testing.assert_array_equal(got, wanted)


def test_explain_says_which_size_it_took_for_what():
    """So that arrays laid out as [B, N, T, H] are noticed."""
    told = jattn.explain(*operands())
    assert told.sizes == {"batch": (B,), "T": T, "S": S, "N": N, "K": K, "H": 8, "V": 5}
    assert f"batch=({B},), T={T}, S={S}, N={N}, K={K}, H=8, V=5" in str(told)


def pick(table, index):
    """Of each row's own table that of each key."""
    return jnp.take_along_axis(table, index[..., None], -1)[..., 0]


def fire(score, q_pos, kv_pos, params):
    distance = jnp.log1p(abs(q_pos - kv_pos).astype(score.dtype))
    hidden = jax.nn.relu(distance[..., None] * params["in"])
    return score + (hidden * params["out"]).sum(-1)


W = 3  # of a grid of keys
apart = abs(np.arange(T)[:, None] - np.arange(S)).astype(np.float32)
# A function, its arrays, their axes, and what it adds to the scores [B, N, T, S] or multiplies them by.
FUNCTIONS = {
    "temperature of heads": (lambda s, i, j, t: s * t, (N,), "N", None, lambda t: t[:, None, None]),
    "temperature of examples": (lambda s, i, j, t: s * t, (B,), "", None, lambda t: t[:, None, None, None]),
    "temperature of both": (lambda s, i, j, t: s * t, (B, N), "N", None, lambda t: t[:, :, None, None]),
    "temperature of queries": (lambda s, i, j, t: s * t, (B, T), "T", None, lambda t: t[:, None, :, None]),
    "kerple": (
        lambda s, i, j, a: s - a[0] * jnp.log1p(a[1] ** 2 * abs(i - j).astype(s.dtype)),
        {0: (N,), 1: (N,)},
        "N",
        lambda a: -a[0][:, None, None] * jnp.log1p(a[1][:, None, None] ** 2 * apart),
        None,
    ),
    "fire": (
        fire,
        {"in": (7,), "out": (N, 7)},
        {"in": None, "out": "Nr"},
        lambda a: jnp.einsum("tsr,nr->nts", jnp.maximum(np.log1p(apart)[..., None] * a["in"], 0), a["out"]),
        None,
    ),
    "decomposed relative positions": (
        lambda s, i, j, a: s + pick(a["rows"], j // W) + pick(a["columns"], j % W),
        {"rows": (B, N, T, S // W), "columns": (B, N, T, W)},
        "NTr",
        lambda a: a["rows"][..., np.arange(S) // W] + a["columns"][..., np.arange(S) % W],
        None,
    ),
    "a table of keys": (lambda s, i, j, a: s + a[..., 0] * a[..., 1], (S, 2), "Sr", lambda a: a[:, 0] * a[:, 1], None),
}  # fmt: skip


@both
@pytest.mark.parametrize("name", FUNCTIONS)
@jax.numpy_rank_promotion("allow")
def test_a_score_of_ones_own_knows_head_example_and_query(name, implementation):
    """Values and gradients against scores with the same bias or scale, all at once."""
    fn, shapes, axes, added, scaled = FUNCTIONS[name]
    leaf = lambda x: isinstance(x, tuple)  # noqa: E731
    params = jax.tree.map(lambda shape: numbers(shape, len(shape)), shapes, is_leaf=leaf)
    q, k, v = operands()

    def ours(params, q, k, v):
        return jattn.attention(q, k, v, scores=scores.Function(fn, params, axes=axes), implementation=implementation)

    def plain(params, q, k, v):
        logits = jnp.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, N // K, 8), k).reshape(B, N, T, S) / np.sqrt(8)
        logits = logits + added(params) if scaled is None else logits * scaled(params)
        p = jax.nn.softmax(logits, -1).reshape(B, K, N // K, T, S)
        return jnp.einsum("bkgts,bskv->btkgv", p, v).reshape(B, T, N, 5)

    def run(f, *args):
        return f(*args), jax.grad(lambda *args: jnp.sin(f(*args)).sum(), (0, 1, 2, 3))(*args)

    got, wanted = (quick(functools.partial(run, f), params, q, k, v) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-5), got, wanted)
    if name == "temperature of heads":
        doubled = [np.stack([a, a]) for a in (q, k, v)]
        mapped = quick(jax.vmap(ours), np.stack([params, 2 * params]), *doubled)
        np.testing.assert_allclose(mapped[0], got[0], rtol=3e-5, atol=3e-5)
        np.testing.assert_allclose(mapped[1], quick(ours, 2 * params, q, k, v), rtol=3e-5, atol=3e-5)


@both
def test_a_mask_of_ones_own_knows_the_tokens_of_its_example(implementation):
    q, k, v = operands()
    tokens, heads = counts((B, T)) % 3, np.arange(N) % 2 == 0

    def same(q_pos, kv_pos, asking, asked, free):
        return (asking == asked) | free

    mask = masks.Function(same, tokens, tokens, heads[None], axes=("T", "S", "N"))
    wanted = (tokens[:, None, :, None] == tokens[:, None, None, :]) | heads[:, None, None]
    np.testing.assert_array_equal(mask.to_array(T, S), wanted)

    def f(mask, q, k, v):
        return jattn.attention(q, k, v, mask=mask & masks.Causal(), implementation=implementation)

    np.testing.assert_allclose(quick(f, mask, q, k, v), quick(f, masks.Dense(wanted), q, k, v), rtol=1e-5, atol=1e-5)
    mapped = jax.vmap(lambda t, q, k, v: f(masks.Function(same, t, t, heads, axes=("T", "S", "N")), q, k, v))
    np.testing.assert_allclose(quick(mapped, tokens, q, k, v), quick(f, mask, q, k, v), rtol=1e-5, atol=1e-5)


@both
def test_a_tree_of_drafted_tokens_for_each_example(implementation):
    """A query sees its ancestors: of each example a table of its own, looked up by position."""
    rng = np.random.default_rng(1)
    parents = np.stack([[rng.integers(-1, i) for i in range(T)] for _ in range(B)]).astype(np.int32)
    wanted = np.zeros((B, 1, T, S), bool)
    for b in range(B):
        for t in range(T):
            at = t
            while at >= 0:
                wanted[b, 0, t, at] = True
                at = parents[b, at]

    def descends(q_pos, kv_pos, table):
        row = jnp.take_along_axis(table, q_pos[..., None, None], -2)[..., 0, :]
        return jnp.take_along_axis(row, kv_pos[..., None], -1)[..., 0]

    q, k, v = operands()
    mask = masks.Function(descends, wanted[:, 0], axes="ab")
    f = lambda mask: jattn.attention(q, k, v, mask=mask, implementation=implementation)  # noqa: E731
    got, same = quick(f, mask), quick(f, masks.Dense(wanted))
    np.testing.assert_allclose(got, same, rtol=1e-5, atol=1e-5)


@both
def test_a_function_with_axes_may_close_over_what_is_traced(implementation):
    q, k, v = operands()

    def f(sharpness, by_head):
        own = scores.Function(lambda s, i, j, t: s * t * sharpness, by_head, axes="N")
        return jnp.sin(jattn.attention(q, k, v, scores=own, implementation=implementation)).sum()

    def plain(sharpness, by_head):
        scale = by_head * sharpness / np.sqrt(8)
        return jnp.sin(jattn.attention(q, k, v, scale=scale, implementation=implementation)).sum()

    got, wanted = (quick(jax.value_and_grad(g, (0, 1)), jnp.float32(0.7), numbers(N)) for g in (f, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-5), got, wanted)


def test_arrays_of_a_function_are_never_expanded():
    """Temporaries of decomposed relative positions stay far below the scores."""
    T, W = 4096, 64
    q = jax.ShapeDtypeStruct((T, 1, 8), jnp.float32)
    rel = {name: jax.ShapeDtypeStruct((1, T, W), jnp.float32) for name in ("rows", "columns")}

    def f(q, rel):
        own = scores.Function(
            lambda s, i, j, a: s + pick(a["rows"], j // W) + pick(a["columns"], j % W), rel, axes="NTr"
        )
        return jattn.attention(q, q, q, scores=own).sum()

    for g in (f, jax.grad(f, (0, 1))):
        mebibytes = jax.jit(g).lower(q, rel).compile().memory_analysis().temp_size_in_bytes / 2**20
        assert mebibytes < 24  # the scores are 64


class Picked(masks.Mask):
    """A mask of one's own class whose array has an axis of its own, so that it bounds no block."""

    table: jax.Array
    axes: ClassVar = {"table": "Tr"}

    def __call__(self, q_pos, kv_pos):
        return pick(self.table, kv_pos)


@both
def test_a_mask_class_with_an_axis_of_its_own(implementation):
    q, k, v = operands()
    table = numbers((T, S)) > 0
    got = jattn.attention(q, k, v, mask=Picked(table), implementation=implementation)
    np.testing.assert_allclose(got, jattn.attention(q, k, v, mask=table), rtol=1e-5, atol=1e-5)
    assert set(Picked(table).picture(T, S, width=2)) <= {"▒", "\n"}


MAKERS = {
    "scores": functools.partial(scores.Function, lambda s, i, j, a: s),
    "masks": functools.partial(masks.Function, lambda i, j, a: i > j),
}


@pytest.mark.parametrize("name", MAKERS)
def test_axes_that_are_none_are_refused(name):
    make = MAKERS[name]
    array = np.ones((N, T), np.float32)
    for wrong in ("TN", "B", "nT", "NTT", 3):
        with pytest.raises(ValueError, match='axes must be some of "NTS"'):
            make(array, axes=wrong)
    with pytest.raises(ValueError, match="axes must be letters, or a tree"):
        make(array, axes=("N", "T"))


@both
def test_none_among_the_arrays_of_a_function(implementation):
    q, k, v = operands()
    f = lambda s, i, j, p: s * p["a"]  # noqa: E731
    for axes in (None, "N", {"a": "N", "b": None}):
        own = scores.Function(f, {"a": numbers(() if axes is None else (1,)), "b": None}, axes=axes)
        got = jattn.attention(q, k, v, scores=own, implementation=implementation)
        wanted = jattn.attention(q, k, v, scale=numbers(())[None] / np.sqrt(8), implementation="dense")
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    mask = masks.Function(lambda i, j, a, b: j <= i + b, None, np.int32(1))
    np.testing.assert_array_equal(mask.to_array(T, S), masks.Window(None, 1).to_array(T, S))


def test_a_picture_shows_the_first_of_examples_and_heads_only():
    """What has axes of its own, or none, is not cut."""
    rng = np.random.default_rng(0)
    table = rng.random((B, N, T, S)) < 0.5
    wanted = masks.Dense(table[0, 0]).picture(T, S)
    assert masks.Dense(table).picture(T, S) == wanted
    assert masks.Function(lambda i, j, t: pick(t, j), table[0, 0], axes="Tr").picture(T, S) == wanted
    assert masks.Function(lambda i, j, t: pick(t, j), table, axes="NTr").picture(T, S) == wanted
    assert masks.Function(lambda i, j, t: t[i, j, 0], table[0, 0][..., None]).picture(T, S) == wanted


class Looked(masks.Mask):
    """A mask of one's own with an array that belongs to no axis."""

    table: jax.Array
    payload: ClassVar = ("table",)

    def __call__(self, q_pos, kv_pos):
        return self.table[kv_pos]


@both
def test_a_mask_class_with_an_array_of_no_axis(implementation):
    q, k, v = operands()
    table = np.arange(S) % 2 == 0
    got = jattn.attention(q, k, v, mask=Looked(jnp.asarray(table)), implementation=implementation)
    np.testing.assert_allclose(got, jattn.attention(q, k, v, mask=table[None]), rtol=1e-5, atol=1e-5)


def test_integers_of_a_function_are_not_cut():
    ids = np.array([1, 2**32 + 1, 2**32 + 1, 1, 1, 2**32 + 1], np.int64)
    f = lambda i, j, a, b: a == b  # noqa: E731
    for axes in (("T", "S"), None):
        with pytest.raises(ValueError, match=r"Function.*must be integers that fit int32, got 1 \.\.\. 4294967297"):
            masks.Function(f, ids, ids, axes=axes).to_array(T, S)
    with jax.enable_x64(True):
        got = masks.Function(f, ids, ids, axes=("T", "S")).to_array(T, S)
    np.testing.assert_array_equal(got, ids[:, None] == ids)


def test_errors_of_a_function_with_axes():
    q, k, v = operands()
    wanted = r"scores: Function params must be \[..., N=4 or 1, r\] with batch dims ...=\(3,\)"
    with pytest.raises(ValueError, match=wanted):
        jattn.attention(q, k, v, scores=scores.Function(lambda s, i, j, a: s, np.ones((5, 2), np.float32), axes="Nr"))
    for own, array in (("ab", np.ones(3, np.float32)), ("NTab", np.ones(5, np.float32))):
        with pytest.raises(ValueError, match=r"Function params must be \[.*a, b\] with batch dims"):
            jattn.attention(q, k, v, scores=scores.Function(lambda s, i, j, a: s, array, axes=own))
    with pytest.raises(ValueError, match="mask: Function args must be"):
        jattn.attention(q, k, v, mask=masks.Function(lambda i, j, a: i > j, np.ones(5, bool), axes="T"))
