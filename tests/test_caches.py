"""Keys and values kept narrow: int8 and float8 with scales for each head, token or block of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, scores
from tests.plain import quick

B, T, S, N, K, H, V = 2, 5, 12, 4, 2, 8, 6
both = pytest.mark.parametrize("implementation", ["dense", jattn.Blockwise(3, 4)], ids=["dense", "blockwise"])
DTYPES = {"int8": jnp.int8, "e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2, "bfloat16": jnp.bfloat16}
SHAPES = {"one": (), "head": (K,), "token": (B, S, 1), "both": (B, S, K), "example": (B, 1, 1), "shared": (S, K)}


def stored(dtype, seed=0):
    """Query, and keys and values as a cache of this dtype holds them."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, T, N, H)).astype(np.float32)
    return q, *(
        jnp.asarray(rng.integers(-100, 100, (B, S, K, width)).astype(np.float32)).astype(dtype) for width in (H, V)
    )


def scale(shape, seed=1):
    return np.random.default_rng(seed).uniform(0.005, 0.03, shape).astype(np.float32)


def opened(array, scale):
    """What a cache stands for, all of it at once."""
    return array.astype(jnp.float32) * jnp.broadcast_to(scale, array.shape[:-1])[..., None]


OPTIONS = {
    "causal": dict(mask=masks.Causal(), q_offset=S - T),
    "lengths": dict(mask=masks.Lengths(kv=np.asarray([3, 9], np.int32)), scores=scores.Sink(np.ones(N, np.float32))),
    "dropped": dict(dropout=jattn.Dropout(0.4, jax.random.key(2)), scores=scores.SoftCap(3.0)),
}


@both
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", ["int8", "e4m3"])
def test_scales_of_every_kind(dtype, kind, implementation):
    """Values and derivatives, to second order, against the cache opened before."""
    q, k, v = stored(DTYPES[dtype])
    scales = scale(SHAPES[kind]), scale(SHAPES[kind], 3)
    options = OPTIONS[list(OPTIONS)[list(SHAPES).index(kind) % 3]]

    def ours(q, k_scale, v_scale):
        both = dict(key_scale=k_scale, value_scale=v_scale)
        return jattn.attention_with_lse(q, k, v, **both, implementation=implementation, **options)

    def plain(q, k_scale, v_scale):
        return jattn.attention_with_lse(q, opened(k, k_scale), opened(v, v_scale), implementation="dense", **options)

    def run(f, *args):
        def loss(*args):
            out, lse = f(*args)
            return jnp.sin(10 * out).sum() + jnp.cos(lse).sum()

        gradient = jax.grad(loss, (0, 1, 2))
        moved = jax.jvp(gradient, args, jax.tree.map(jnp.ones_like, args))
        return f(*args), moved

    got, wanted = (quick(functools.partial(run, f), q, *scales) for f in (ours, plain))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * max(1, np.abs(b).max()))


@both
@pytest.mark.parametrize("q_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype, q_dtype, implementation):
    q, k, v = stored(DTYPES[dtype])
    q = jnp.asarray(q).astype(q_dtype)
    scales = dict(key_scale=scale((K,)), value_scale=scale((B, S, K)))
    f = functools.partial(jattn.attention, mask=masks.Causal(), q_offset=S - T)
    got = quick(lambda *x: f(*x, **scales, implementation=implementation), q, k, v)
    wide = q.astype(jnp.float32), opened(k, scales["key_scale"]), opened(v, scales["value_scale"])
    assert got.dtype == q_dtype
    np.testing.assert_allclose(got.astype(np.float32), quick(f, *wide), atol=2e-2 if q_dtype == jnp.bfloat16 else 1e-5)


def test_blocks_of_tokens_by_repeating_their_scales():
    q, k, v = stored(jnp.int8)
    of_blocks = scale((B, S // 4, K))
    repeated = jnp.repeat(of_blocks, 4, axis=-2)
    got = jattn.attention(q, k, v, key_scale=repeated, value_scale=repeated)
    wanted = jattn.attention(q, opened(k, np.repeat(of_blocks, 4, -2)), opened(v, np.repeat(of_blocks, 4, -2)))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@both
def test_scales_of_slots_that_nobody_sees_may_be_anything(implementation):
    q, k, v = stored(jnp.float8_e5m2)
    k, v = (x.at[:, 7:].set(jnp.nan) for x in (k, v))

    def f(q, k_scale, v_scale):
        scales = dict(key_scale=k_scale, value_scale=v_scale)
        return jattn.attention(q, k, v, **scales, mask=masks.Lengths(kv=7), implementation=implementation)

    given = scale((B, S, K)), scale((B, S, K), 3)
    spoiled = [x.copy() for x in given]
    for x in spoiled:
        x[:, 7:] = np.nan
    run = jax.jit(jax.value_and_grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2)))
    for a, b in zip(jax.tree.leaves(run(q, *spoiled)), jax.tree.leaves(run(q, *given)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_vmap_over_scales_and_weights():
    q, k, v = stored(jnp.int8)
    k_scale, v_scale = scale((B, S, K)), scale((B, 1, K))
    each = jax.vmap(lambda q, k, v, a, b: jattn.attention(q, k, v, key_scale=a, value_scale=b))
    wanted = jattn.attention(q, opened(k, k_scale), opened(v, v_scale))
    np.testing.assert_allclose(each(q, k, v, k_scale, v_scale), wanted, rtol=1e-5, atol=1e-5)
    weights = jattn.attention_weights(q, k, key_scale=k_scale, rows=jnp.array([1, 3]))
    wanted = jattn.attention_weights(q, opened(k, k_scale), rows=jnp.array([1, 3]))
    np.testing.assert_allclose(weights, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["head", "token"])
@pytest.mark.parametrize("dtype", ["int8", "e4m3"])
def test_a_cache_is_never_widened_as_a_whole(dtype, kind):
    q = jax.ShapeDtypeStruct((2, 1, 8, 64), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((2, 16384, 8, 64), DTYPES[dtype])
    numbers = jax.ShapeDtypeStruct({"head": (8,), "token": (2, 16384, 1)}[kind], jnp.float32)

    def f(q, k, v, k_scale, v_scale):
        return jattn.attention(q, k, v, key_scale=k_scale, value_scale=v_scale)

    compiled = jax.jit(f).lower(q, cache, cache, numbers, numbers).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 9 * 2**20  # 8 are one head's; all of it is 128 wide


WRONG = {
    "int8 keys alone": (dict(value_scale=np.float32(1)), TypeError, "key of int8 needs key_scale="),
    "int8 values alone": (dict(key_scale=np.float32(1)), TypeError, "value of int8 needs value_scale="),
    "an integer scale": (dict(key_scale=np.int32(1), value_scale=np.float32(1)), TypeError, "key_scale.*int32"),
    "a scale of other heads": (
        dict(key_scale=np.ones(3, np.float32), value_scale=np.float32(1)),
        ValueError,
        r"key_scale must be \[..., S=12 or 1, K=2 or 1\] with batch dims ...=\(2,\); got shape \(3,\)",
    ),
    "a scale with an axis of H": (
        dict(key_scale=np.float32(1), value_scale=np.ones((B, S, K, 1), np.float32)),
        ValueError,
        r"value_scale must be \[..., S, K\] with batch dims",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    options, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        jattn.attention(*stored(jnp.int8), **options)


def test_int8_is_no_query():
    q, k, v = stored(jnp.int8)
    with pytest.raises(TypeError, match="query must have a real floating dtype"):
        jattn.attention(jnp.zeros(q.shape, jnp.int8), k, v, key_scale=1.0, value_scale=1.0)
    with pytest.raises(TypeError, match=r"value must have a real floating dtype.*int32"):
        jattn.attention(q, k, v.astype(jnp.int32), key_scale=1.0, value_scale=1.0)
