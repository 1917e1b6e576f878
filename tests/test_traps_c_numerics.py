"""Traps C1-C15: NaN, empty rows and numerics."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, scores
from tests import plain, reference
from tests.pictures import draw
from tests.plain import assert_close, derivatives, loss, once, qkv, quick

SMALL = jattn.Blockwise(block_q=3, block_kv=4)
both = pytest.mark.parametrize("implementation", ["dense", SMALL], ids=["dense", "blockwise"])
TOL = dict(rtol=2e-5, atol=2e-5)
T, S, N = 7, 11, 6
DEAD = np.arange(T) == 3


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def i32(*values):
    return np.asarray(values[0] if len(values) == 1 else values, np.int32)


EMPTY = {
    "Empty": masks.Empty(),
    "Dense": masks.Dense(np.zeros((T, S), bool)),
    "Dense scalar": masks.Dense(np.zeros((), bool)),
    "Lengths of keys": masks.Lengths(kv=0),
    "Lengths of queries": masks.Lengths(q=i32(0)),
    "Prefix": masks.Prefix(0),
    "traced Prefix": masks.Prefix(i32(0)),
    "padding": masks.Segments(np.full(T, -1, np.int32), np.full(S, -1, np.int32)),
    "other segments": masks.Segments(np.full(T, 1, np.int32), np.full(S, 2, np.int32)),
    "contradiction": masks.Prefix(3) & ~masks.Prefix(5),
}


@both
@pytest.mark.parametrize("name", EMPTY)
def test_c1_a_row_without_keys_is_zero(implementation, name):
    mask = EMPTY[name]

    @jax.jit
    def run(q, k, v):
        def f(q, k, v):
            out, lse = jattn.attention_with_lse(q, k, v, mask=mask, implementation=implementation)
            return loss(out, lse), (out, lse)

        return jax.value_and_grad(f, (0, 1, 2), has_aux=True)(q, k, v)

    (_, (out, lse)), gradients = run(*qkv())
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


@both
def test_c1_one_row_without_keys_among_others(implementation, x64):
    allowed = draw(T, S, lambda i, j: j <= i + 4 and not DEAD[i])
    mask = masks.Causal() & masks.Dense(~DEAD[:, None])

    def ours(x):
        return loss(*jattn.attention_with_lse(*x, mask=mask, q_offset=4, implementation=implementation))

    got = derivatives(ours, qkv())
    assert_close(got, once(lambda: derivatives(lambda x: loss(*plain.attend(*x, allowed)), qkv()), "c1"))
    np.testing.assert_array_equal(got["gradient"][0][DEAD], 0)


@both
def test_c2_a_row_without_keys_is_not_the_mean_of_the_values(implementation):
    mask = jnp.asarray(~DEAD[:, None])

    @jax.jit
    def only_the_dead_row(q, k, v):
        return jax.grad(
            lambda *x: jattn.attention(*x, mask=mask, implementation=implementation)[DEAD].sum(), (0, 1, 2)
        )(q, k, v)

    for gradient in only_the_dead_row(*qkv()):
        np.testing.assert_array_equal(gradient, 0)


def test_c2_a_key_value_length_of_zero():
    q, k, v = qkv(batch=(3,), V=5)
    lengths = jnp.asarray([0, 4, S], jnp.int32)

    def f(q, k, v):
        return jattn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)

    exact = reference.attention(q, k, v, keep=np.arange(S) < np.asarray(lengths)[:, None, None, None])[0]
    np.testing.assert_allclose(f(q, k, v), exact, **TOL)
    np.testing.assert_array_equal(f(q, k, v)[0], 0)
    for gradient in jax.jit(jax.grad(lambda *x: loss(f(*x)), (0, 1, 2)))(q, k, v):
        np.testing.assert_array_equal(gradient[0], 0)
        assert np.isfinite(gradient).all()


@both
@pytest.mark.parametrize("how", ["mask", "bias"])
def test_c3_a_row_without_keys_does_not_poison_the_others(implementation, how, x64):
    dead = np.broadcast_to(DEAD[:, None], (T, S))
    option = {
        "mask": dict(mask=masks.Dense(~dead)),
        "bias": dict(scores=(scores.Bias(np.where(dead, -np.inf, 0.0)),)),
    }[how]

    def ours(x):
        return loss(jattn.attention(*x, **option, implementation=implementation)[~DEAD])

    def wanted(x):
        return loss(plain.attend(*x, ~dead)[0][~DEAD])

    assert_close(derivatives(ours, qkv()), once(lambda: derivatives(wanted, qkv()), "c3"))


POISONED = {
    "lengths": (masks.Lengths(q=5, kv=7), [5, 6], [7, 8, 9, 10]),
    "traced lengths": (masks.Lengths(q=i32(5), kv=i32(7)), [5, 6], [7, 8, 9, 10]),
    "prefix": (masks.Prefix(6), [], [6, 7, 8, 9, 10]),
    "causal": (masks.Causal(), [], [9, 10]),
    "window": (masks.Window(1, 0), [], [0, 9, 10]),
    "segments": (
        masks.Segments(i32(0, 0, 1, 1, 4, -1, -1), i32(0, 0, 0, 1, 1, 1, 3, 3, -1, -1, -1)),
        [4, 5, 6],
        [6, 7, 8, 9, 10],
    ),
    "dense column": (masks.Dense(np.arange(S) % 4 != 1), [], [1, 5, 9]),
    "dense row": (masks.Dense(np.arange(T)[:, None] % 3 != 1), [1, 4], []),
    "combination": (masks.Causal() & ~masks.Prefix(2) & masks.Lengths(kv=i32(6)), [], [0, 1, 6, 7, 8, 9, 10]),
    "empty": (masks.Empty(), list(range(T)), list(range(S))),
}


@both
@pytest.mark.parametrize("name", POISONED)
def test_c4_nan_and_inf_where_nothing_looks_are_not_seen(implementation, name, x64):
    """Queries with no key, keys and values with no query: neither values nor any derivative change."""
    mask, queries, keys = POISONED[name]

    def f(x):
        return loss(*jattn.attention_with_lse(*x, mask=mask, q_offset=2, implementation=implementation))

    def poison(array, where, seed):
        bad = np.random.default_rng(seed).choice([np.nan, np.inf, -np.inf], array.shape)
        return array.at[jnp.asarray(where, int)].set(bad[where])

    q, k, v = qkv()
    clean, again = derivatives(f, (q, k, v), (poison(q, queries, 0), poison(k, keys, 1), poison(v, keys, 2)))
    chex.assert_tree_all_finite(again)
    assert_close(again, clean, 1e-13)
    for part in ("gradient", "hvp"):
        dq, dk, dv = again[part]
        for gradient, where in ((dq, queries), (dk, keys), (dv, keys)):
            np.testing.assert_array_equal(gradient[np.asarray(where, int)], 0)


@both
@pytest.mark.parametrize("given", ["bias", "cap", "alibi", "relative", "function", "sink"])
def test_c4_nan_stays_unseen_under_every_score(implementation, given):
    modifier = {
        "bias": scores.Bias(jnp.linspace(-1, 1, T * S).reshape(T, S)),
        "cap": scores.SoftCap(3.0),
        "alibi": scores.ALiBi(jnp.linspace(0.1, 0.6, N)),
        "relative": scores.RelativePosition(jnp.linspace(-1, 1, 32 * N).reshape(32, N)),
        "function": scores.Function(lambda s, i, j, p: s * p, jnp.asarray(0.5)),
        "sink": scores.Sink(jnp.linspace(-1, 1, N)),
    }[given]

    def f(x):
        args = dict(mask=masks.Lengths(kv=i32(8)), q_offset=0, implementation=implementation)
        return loss(*jattn.attention_with_lse(*x[:3], scores=(x[3],), **args))

    q, k, v = qkv()
    poisoned = q, k.at[8:].set(jnp.nan), v.at[8:].set(jnp.inf), modifier
    clean, again = derivatives(f, (q, k, v, modifier), poisoned)
    assert_close(again, clean, 1e-6)


def test_c4_a_key_that_one_head_of_the_group_sees_is_not_a_secret():
    """The guard hides what nothing sees and no more: NaN reaches the head of the group that does attend to the key."""
    q, k, v = qkv()
    allowed = np.ones((N, T, S), bool)
    allowed[[0, 1], :, 4] = False
    v = v.at[4, 0].set(jnp.nan)
    for implementation in ("dense", SMALL):
        out = quick(jattn.attention, q, k, v, mask=masks.Dense(allowed), implementation=implementation)
        assert np.isnan(out[:, 2]).all() and not np.isnan(out[:, 3:]).any()


@both
def test_c5_merge_with_an_empty_part_is_the_other_part(implementation, x64):
    q, k, v = qkv()

    def some(x):
        return jattn.attention_with_lse(*x, implementation=implementation)

    def empty(x):
        return jattn.attention_with_lse(*x, mask=masks.Empty(), implementation=implementation)

    alone = some((q, k, v))
    assert_close(jattn.merge([empty((q, k, v)), alone]), alone, 1e-14)
    assert_close(jattn.merge([alone, empty((q, k, v))]), alone, 1e-14)
    want = derivatives(lambda x: loss(*some(x)), (q, k, v))
    got = derivatives(lambda x: loss(*jattn.merge([empty(x), some(x), empty(x)])), (q, k, v))
    assert_close(got, want)


def test_c5_merge_of_empty_parts_is_empty(x64):
    nothing = jnp.zeros((T, N, 3)), jnp.full((T, N), -jnp.inf)
    out, lse = jattn.merge([nothing, nothing])
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)
    got = derivatives(lambda parts: loss(*jattn.merge(parts)), [nothing, nothing])
    chex.assert_tree_all_finite((got["gradient"], got["tangent"]))


@both
@pytest.mark.parametrize("level", [-1e6, 1e6])
def test_c6_rows_whose_logits_are_all_far_from_zero(implementation, level, x64):
    """A running maximum that starts at a finite constant would hide these."""
    q, k, v = qkv()
    x = q.at[..., 0].set(np.sqrt(5) * level), k.at[..., 0].set(1.0), v
    got = quick(jattn.attention_with_lse, *x, mask=masks.Causal(), q_offset=4, implementation=implementation)
    exact = reference.attention(*x, keep=draw(T, S, lambda i, j: j <= i + 4))
    assert_close(got, exact[:2], 1e-8)


@both
def test_c7_logits_up_to_the_largest_float32_stay_finite(implementation):
    """Such a softmax is a choice of the largest; its values and gradients are finite."""
    q, k, v = qkv(dtype=jnp.float32)
    x = q * 3e18, k * 3e18, v

    def f(*x):
        out, lse = jattn.attention_with_lse(*x, implementation=implementation)
        return loss(out), (out, lse)

    (_, (out, lse)), gradients = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(*x)
    best = np.asarray(plain.logits(q, k)).argmax(-1)  # [N, T]
    chosen = np.stack([np.asarray(v)[best[n], n // 3] for n in range(N)], 1)
    np.testing.assert_allclose(out, chosen, rtol=1e-6)
    chex.assert_tree_all_finite((lse, gradients))


@both
def test_c8_float64_stays_float64(implementation, x64):
    x = qkv(T=37, S=53)
    given = scores.ALiBi(jnp.linspace(0.01, 0.2, N)), scores.SoftCap(4.0)
    out, lse = quick(
        jattn.attention_with_lse, *x, mask=masks.Causal(), q_offset=16, scores=given, implementation=implementation
    )
    assert out.dtype == lse.dtype == jnp.float64
    slopes, distance = np.linspace(0.01, 0.2, N), np.abs(np.arange(37)[:, None] + 16 - np.arange(53))
    wanted = [lambda s, head: s - slopes[head[-1]] * distance, lambda s, head: 4 * np.tanh(s / 4)]
    exact = reference.attention(*x, keep=draw(37, 53, lambda i, j: j <= i + 16), scores=wanted)
    np.testing.assert_allclose(out, exact[0], rtol=0, atol=1e-13)
    np.testing.assert_allclose(lse, exact[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("implementation", ["dense", jattn.Blockwise(32, 16)], ids=["dense", "blockwise"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_c9_narrow_inputs_are_summed_in_float32(implementation, dtype):
    """A thousand equal weights: sums in bfloat16 would stall at 256, in float16 at 2048."""
    S = 3001
    q, k, v = qkv(T=5, S=S, N=2, K=1, dtype=dtype)
    v = jnp.abs(v) + jnp.asarray(1, dtype)
    out, lse = jax.jit(lambda *x: jattn.attention_with_lse(*x, implementation=implementation))(q * 0, k, v)
    exact = np.asarray(v, np.float64)[:, 0].mean(0)
    assert np.abs(np.asarray(out, np.float64) - exact).max() <= 1.01 * float(jnp.finfo(dtype).eps) * exact.max()
    np.testing.assert_allclose(lse, np.log(S), rtol=1e-6)


def test_c9_gradients_of_narrow_arrays_are_summed_in_float32():
    """That of a bias is a sum over heads and blocks of rows; here it is rounded about once, as it must be."""
    q, k, v, bias = (
        jax.random.normal(key, shape).astype(jnp.bfloat16)
        for key, shape in zip(jax.random.split(jax.random.key(0), 4), ((256, 64, 8),) * 3 + ((256,),), strict=True)
    )

    def slope(bias):
        scores = (jattn.scores.Bias(bias),)
        out = jattn.attention(q, k, v, scores=scores, implementation=jattn.Blockwise(8, 64)).astype(jnp.float32)
        return (out * jnp.sin(8 * out)).sum()

    exact = np.asarray(jax.jit(jax.grad(slope))(bias.astype(jnp.float32)))
    error = np.asarray(jax.jit(jax.grad(slope))(bias), np.float32) - exact
    rounding = exact.astype(jnp.bfloat16).astype(np.float32) - exact
    assert np.linalg.norm(error) <= 2 * np.linalg.norm(rounding)


@both
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_c10_output_has_the_dtype_of_the_query(implementation, dtype, x64):
    x = qkv(dtype=dtype)
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    for given in ((), (scores.Bias(jnp.ones((T, S), jnp.float32)),), (scores.Sink(jnp.ones(N, jnp.float32)),)):
        out, lse = quick(jattn.attention_with_lse, *x, scores=given, implementation=implementation)
        assert (out.dtype, lse.dtype) == (dtype, wide)
    assert jattn.attention_weights(*x[:2]).dtype == wide
    assert jattn.merge([(out, lse), (out, lse)])[0].dtype == dtype


def check_lengths(T, S, implementation):
    """No padded tail is seen: not past the queries, not past the keys, nor past a length within them."""
    x = qkv(T=T, S=S, N=2, K=1, batch=(2,))
    lengths = jnp.asarray([S, S // 2], jnp.int32)
    live = np.arange(S) < np.asarray(lengths)[:, None]
    poisoned = x[0], *(jnp.where(live[..., None, None], a, jnp.nan) for a in x[1:])
    clean = x[0], *(jnp.where(live[..., None, None], a, 0) for a in x[1:])

    @jax.jit
    def run(*x):
        def f(*x):
            out, lse = jattn.attention_with_lse(*x, mask=masks.Lengths(kv=lengths), implementation=implementation)
            return loss(out, lse), (out, lse)

        return jax.value_and_grad(f, (0, 1, 2), has_aux=True)(*x)

    (_, got), gradients = run(*poisoned)
    keep = live[:, None, None]
    exact = reference.attention(*clean, keep=keep)
    np.testing.assert_allclose(got[0], exact[0], **TOL)
    np.testing.assert_allclose(got[1], exact[1], **TOL)
    want = quick(jax.grad(lambda *x: loss(*plain.attend(*x, keep)), (0, 1, 2)), *clean)
    chex.assert_trees_all_close(gradients, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (2, 5), (3, 4), (4, 3), (5, 9), (7, 8), (6, 2), (1, 7)])
def test_c11_lengths_that_are_no_multiple_of_a_block(T, S):
    check_lengths(T, S, SMALL)


@pytest.mark.sweep
@pytest.mark.parametrize("T", range(1, 8))
@pytest.mark.parametrize("S", range(1, 10))
def test_c11_every_length_around_the_block_sizes(T, S):
    check_lengths(T, S, SMALL)


@both
@pytest.mark.parametrize(("T", "S"), [(1, 13), (13, 1), (5, 12), (12, 5), (2, 3)])
def test_c12_unequal_lengths_without_any_mask(implementation, T, S):
    x = qkv(T=T, S=S)
    got = quick(jattn.attention_with_lse, *x, implementation=implementation)
    exact = reference.attention(*x)
    np.testing.assert_allclose(got[0], exact[0], **TOL)
    np.testing.assert_allclose(got[1], exact[1], **TOL)


@both
def test_c13_lse_is_the_natural_logarithm(implementation):
    x = qkv()
    _, lse = quick(jattn.attention_with_lse, *x, implementation=implementation)
    wanted = jax.scipy.special.logsumexp(plain.logits(*x[:2]), axis=-1).T
    np.testing.assert_allclose(lse, wanted, **TOL)
    for function in (jattn.attention_with_lse, jattn.merge):
        assert "natural" in function.__doc__


def test_c14_more_keys_than_sixteen_bits_can_count():
    S = 70_001
    q, k, v = qkv(T=1, S=S, N=1, K=1, H=2)
    mask = masks.Causal() & ~masks.Prefix(3)
    out, lse = quick(jattn.attention_with_lse, q, k, v, mask=mask, q_offset=S - 1, implementation="blockwise")
    exact = reference.attention(q, k, v, keep=np.arange(S) >= 3)
    np.testing.assert_allclose(out, exact[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lse, exact[1], rtol=1e-5)


@both
@pytest.mark.parametrize(("T", "S"), [(0, 11), (7, 0), (0, 0)])
@pytest.mark.parametrize("mask", [None, masks.Causal(), masks.Lengths(kv=i32(0))], ids=str)
def test_c15_nothing_to_ask_or_nothing_to_answer(implementation, T, S, mask):
    x = qkv(T=T, S=S, batch=(2,))
    at = {} if mask is None else dict(q_offset=0)
    given = (scores.ALiBi(jnp.ones(N)), scores.SoftCap(2.0)) if mask is not None else ()

    @jax.jit
    def run(*x):
        def f(*x):
            out, lse = jattn.attention_with_lse(*x, mask=mask, scores=given, **at, implementation=implementation)
            return loss(out, lse), (out, lse)

        return jax.value_and_grad(f, (0, 1, 2), has_aux=True)(*x)

    (_, (out, lse)), gradients = run(*x)
    assert out.shape == (2, T, N, 3) and lse.shape == (2, T, N)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)
    for gradient, array in zip(gradients, x, strict=True):
        np.testing.assert_array_equal(gradient, jnp.zeros_like(array))
    assert jattn.attention_weights(*x[:2], mask=mask, **at).shape == (2, N, T, S)


@both
@pytest.mark.parametrize("sink", [False, True])
def test_c1_whatever_the_cotangent_of_a_row_without_keys_holds(implementation, sink):
    q, k, v = qkv(T=5, S=5)
    logits = jnp.linspace(-1, 1, 6)
    mask = masks.Dense(jnp.asarray(np.tril(np.ones((5, 5), bool), -1)))  # the first row has none

    def pulled(cotangent):
        def f(q, k, v, logits):
            scored = (scores.Sink(logits),) if sink else ()
            return jattn.attention(q, k, v, mask=mask, scores=scored, implementation=implementation)

        _, pull = jax.vjp(f, q, k, v, logits)
        return pull(cotangent)

    clean = jnp.ones((5, 6, 3)).at[0].set(0)
    chex.assert_trees_all_equal(quick(pulled, clean.at[0].set(jnp.nan)), quick(pulled, clean))


@both
@pytest.mark.parametrize(
    ("of_q", "of_kv", "tol"),
    [
        (jnp.float32, jnp.bfloat16, 1e-5),
        (jnp.bfloat16, jnp.float32, 1e-2),
        (jnp.bfloat16, jnp.float8_e4m3fn, 1e-2),
        (jnp.float16, jnp.bfloat16, 2e-3),
    ],
    ids=str,
)
def test_dtypes_that_differ_are_widened_to_the_widest(implementation, of_q, of_kv, tol):
    """As if all had been float32 from the start; results and gradients come back in the dtypes of their arguments."""
    q, k, v = (a.astype(dtype) for a, dtype in zip(qkv(), (of_q, of_kv, of_kv), strict=True))

    def run(implementation, *x):
        def loss(*x):
            return jnp.sin(jattn.attention(*x, implementation=implementation).astype(jnp.float32)).sum()

        return jattn.attention(*x, implementation=implementation), jax.grad(loss, (0, 1, 2))(*x)

    out, gradients = quick(functools.partial(run, implementation), q, k, v)
    wanted, exact = quick(functools.partial(run, "dense"), *(a.astype(jnp.float32) for a in (q, k, v)))
    assert [a.dtype for a in (out, *gradients)] == [of_q, of_q, of_kv, of_kv]
    for got, right in zip((out, *gradients), (wanted, *exact), strict=True):
        places = max(tol, 2.0 ** -jnp.finfo(got.dtype).nmant)
        np.testing.assert_allclose(got.astype(jnp.float32), right, rtol=places, atol=places)


@both
@pytest.mark.parametrize("name", ["alone", "dropped", "capped", "cached"])
def test_c1_a_query_of_one_key_moves_with_nothing(implementation, name):
    """Its weight is 1, whatever the score: exactly, in both modes and to second order. Its lse moves with the score."""
    rng = np.random.default_rng(5)
    T = 1 if name == "cached" else S
    q, k, v = (rng.normal(size=(2, n, h, 16)).astype(np.float32) for n, h in ((T, N), (S, 2), (S, 2)))
    direction, ct = (rng.normal(size=(2, T, N, 16)).astype(np.float32) for _ in range(2))
    options = {
        "alone": dict(mask=masks.Window(0, 0)),
        "dropped": dict(
            mask=masks.Segments(np.arange(S, dtype=np.int32)), dropout=jattn.Dropout(0.5, jax.random.key(1))
        ),
        "capped": dict(mask=masks.Causal() & masks.Chunks(1), scores=scores.SoftCap(2.0)),
        "cached": dict(mask=masks.Lengths(kv=i32(1))),
    }[name]

    @jax.jit
    def run(q, k):
        def f(q, k):
            out, lse = jattn.attention_with_lse(q, k, v, implementation=implementation, **options)
            return (out * ct).sum(), lse

        gradient = jax.grad(lambda q, k: f(q, k)[0], (0, 1))
        out = lambda q: f(q, k)[0]  # noqa: E731
        moved = jax.jvp(out, (q,), (direction,))[1]
        return (
            gradient(q, k),
            moved,
            jax.jvp(lambda q: gradient(q, k), (q,), (direction,))[1],
            jax.grad(lambda q: f(q, k)[1].sum())(q),
        )

    *zeros, of_lse = run(q, k)
    for leaf in jax.tree.leaves(zeros):
        np.testing.assert_array_equal(leaf, 0)
    if name != "capped":
        np.testing.assert_allclose(of_lse, np.repeat(k[:, :T], N // 2, 2) / 4, rtol=1e-5, atol=1e-6)
