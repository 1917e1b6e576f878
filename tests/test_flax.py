"""`flax_attention_fn` in the layers of flax, linen and nnx: flax's own numbers, in training and decoding."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jattn
from tests.plain import quick

TOL = dict(rtol=1e-5, atol=1e-5)
B, T, D = 2, 6, 12


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def loss(y):
    return jnp.sin(y).sum()


def linen(**given):
    return nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=D, **given)


def both_nnx(**given):
    """Theirs and ours, with equal parameters."""
    fns = ({}, dict(attention_fn=jattn.flax_attention_fn))
    return [nnx.MultiHeadAttention(4, D, rngs=nnx.Rngs(0), **({"decode": False} | given | fn)) for fn in fns]


@pytest.fixture(autouse=True)
def promotion():
    """As flax needs it: its masks are float32, and its indices meet numbers."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_every_argument_of_flax_is_named():
    ours = set(inspect.signature(jattn.flax_attention_fn).parameters)
    for theirs in (nn.dot_product_attention, nnx.dot_product_attention):
        assert set(inspect.signature(theirs).parameters) <= ours


MASKS = {
    "none": lambda x: None,
    "causal, float32": lambda x: nn.make_causal_mask(x[..., 0]),
    "causal, bool": lambda x: nn.make_causal_mask(x[..., 0], dtype=bool),
    "padding, int": lambda x: nn.make_attention_mask(x[..., 0] > -9, jnp.arange(T) < 4, dtype=jnp.int32),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_linen(mask):
    x = normal(B, T, D)
    theirs, ours = linen(), linen(attention_fn=jattn.flax_attention_fn)
    params = theirs.init(jax.random.key(0), x)
    run = [jax.value_and_grad(lambda p, m=m: loss(m.apply(p, x, mask=mask(x)))) for m in (ours, theirs)]
    chex.assert_trees_all_close(*(quick(f, params) for f in run), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_nnx(mask, is_causal):
    x = normal(B, T, D)
    run = [nnx.value_and_grad(lambda m: loss(m(x, mask=mask(x), is_causal=is_causal))) for _ in range(2)]
    theirs, ours = (f(m) for f, m in zip(run, both_nnx(), strict=True))
    np.testing.assert_allclose(ours[0], theirs[0], **TOL)
    chex.assert_trees_all_close(*(nnx.to_pure_dict(nnx.state(g[1])) for g in (ours, theirs)), rtol=1e-4, atol=1e-4)


def test_linen_decodes():
    x = normal(B, T, D)
    outs = []
    for given in ({}, dict(attention_fn=jattn.flax_attention_fn)):
        layer = linen(decode=True, **given)
        variables = layer.init(jax.random.key(0), x)
        cache, steps = variables["cache"], []
        for t in range(3):
            y, moved = layer.apply(variables | {"cache": cache}, x[:, t : t + 1], mutable=["cache"])
            cache = moved["cache"]
            steps.append(y)
        outs.append(jnp.concatenate(steps, axis=1))
    np.testing.assert_allclose(outs[1], outs[0], **TOL)


def test_nnx_decodes():
    x = normal(B, T, D)
    outs = []
    for layer in both_nnx(decode=True):
        layer.init_cache(x.shape)
        outs.append(jnp.concatenate([layer(x[:, t : t + 1]) for t in range(3)], axis=1))
    np.testing.assert_allclose(outs[1], outs[0], **TOL)


def test_dropout_of_linen_drops():
    x = normal(B, T, D)
    layer = linen(attention_fn=jattn.flax_attention_fn, dropout_rate=0.5)
    params = layer.init(jax.random.key(0), x, deterministic=True)

    def run(seed, deterministic=False):
        return layer.apply(params, x, deterministic=deterministic, rngs={"dropout": jax.random.key(seed)})

    assert np.abs(run(0) - run(1)).max() > 0.01
    np.testing.assert_array_equal(run(0), run(0))
    np.testing.assert_allclose(run(0, deterministic=True), linen().apply(params, x), **TOL)
    gradient = jax.grad(lambda p: loss(layer.apply(p, x, deterministic=False, rngs={"dropout": jax.random.key(0)})))
    chex.assert_tree_all_finite(quick(gradient, params))


def test_dropout_of_nnx_drops():
    x = normal(B, T, D)
    _, ours = both_nnx(dropout_rate=0.5)
    first, second = (ours(x, rngs=nnx.Rngs(seed), deterministic=False) for seed in (0, 1))
    assert np.abs(first - second).max() > 0.01


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("implementation", ["dense", jattn.Blockwise(3, 4)], ids=str)
def test_what_is_dropped_is_shared_between_examples_and_heads(shared, implementation):
    """Seen through values that are a unit matrix: the output is what is left of the weights."""
    q, k = jnp.zeros((B, T, 4, 3)), jnp.zeros((B, T, 2, 3))
    v = jnp.broadcast_to(jnp.eye(T)[:, None], (B, T, 2, T))
    dropout = jattn.Dropout(0.5, jax.random.key(3), shared=shared)
    out = np.asarray(quick(lambda *x: jattn.attention(*x, dropout=dropout, implementation=implementation), q, k, v))
    alike = [np.array_equal(out[0, :, 0], out[b, :, n]) for b in range(B) for n in range(4)]
    assert all(alike) if shared else sum(alike) == 1
    kept = (out > 0).mean()
    assert 0.2 < kept < 0.8
    np.testing.assert_allclose(out[out > 0], 2 / T, rtol=1e-6)


def test_flax_shares_by_default():
    q = jnp.zeros((B, T, 4, 3))
    v = jnp.broadcast_to(jnp.eye(T)[:, None], (B, T, 4, T))
    for shared in (True, False):
        given = {} if shared else dict(broadcast_dropout=False)
        out = jattn.flax_attention_fn(q, q, v, dropout_rate=0.5, dropout_rng=jax.random.key(0), **given)
        wanted = jattn.attention(q, q, v, dropout=jattn.Dropout(0.5, jax.random.key(0), shared=shared))
        np.testing.assert_array_equal(out, wanted)


def test_bias_and_dtype():
    q, bias = normal(B, T, 4, 3), normal(1, 4, T, T, seed=1)
    given = dict(bias=bias, deterministic=True)
    theirs = nnx.dot_product_attention(q, q, q, **given)
    np.testing.assert_allclose(jattn.flax_attention_fn(q, q, q, **given), theirs, **TOL)
    assert jattn.flax_attention_fn(q, q, q, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert jattn.flax_attention_fn(q.astype(jnp.bfloat16), q, q).dtype == jnp.float32


def test_weights_are_sown():
    x = normal(B, T, D)
    found = []
    for given in ({}, dict(attention_fn=jattn.flax_attention_fn)):
        layer = linen(**given)
        params = layer.init(jax.random.key(0), x)
        _, kept = layer.apply(params, x, sow_weights=True, mutable=["intermediates"])
        found.append(jax.tree.leaves(kept["intermediates"])[0])
    np.testing.assert_allclose(found[1], found[0], **TOL)
    _, ours = both_nnx()
    _, kept = nnx.capture(ours, nnx.Intermediate)(x, sow_weights=True)
    np.testing.assert_allclose(jax.tree.leaves(kept)[0].sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(precision="highest"), r"jax.default_matmul_precision\('highest'\)"),
        (dict(qk_attn_weights_einsum=jnp.einsum), "qk_attn_weights_einsum must be None"),
        (dict(attn_weights_value_einsum=jnp.einsum), "attn_weights_value_einsum must be None"),
        (dict(einsum_dot_general=jax.lax.dot_general), "einsum_dot_general must be None"),
        (dict(dropout_rate=0.5), "dropout_rng"),
        (dict(bias=jnp.ones((T, T), jnp.int32)), "bias"),
    ],
    ids=lambda given: str(given)[:20],
)
def test_what_cannot_be_honoured_raises(given, says):
    q = normal(B, T, 4, 3)
    with pytest.raises((NotImplementedError, ValueError, TypeError), match=says):
        jattn.flax_attention_fn(q, q, q, **given)
