"""Dropout is a pure function of (key, batch, head, query position, key position), whoever computes it and however."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import Dropout, masks, scores
from tests import modes, naive, plain

B, T, S, N, K, H, V = 2, 13, 11, 6, 3, 5, 7
KEY = jax.random.key(3)
HALF = Dropout(0.5, KEY)
IMPLEMENTATIONS = {
    "dense": "dense",
    "blockwise": "blockwise",
    "4x5": jattn.Blockwise(block_q=4, block_kv=5),
    "13x1": jattn.Blockwise(block_q=13, block_kv=1),
    "1x64": jattn.Blockwise(block_q=1, block_kv=64),
}
SMALL = IMPLEMENTATIONS["4x5"]
both = pytest.mark.parametrize("implementation", ["dense", SMALL], ids=["dense", "blockwise"])
every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


def draw(*batch, dtype=np.float32, T=T, S=S):
    rng = np.random.default_rng(0)
    shapes = (*batch, T, N, H), (*batch, S, K, H), (*batch, S, K, V)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def kept(*batch, dropout=HALF, T=T, S=S, **options):
    """Which weights survive, bool [*batch, N, T, S]: the equal weights of zero queries, where they are not zero."""
    q, k, _ = draw(*batch, T=T, S=S)
    return np.asarray(jattn.attention_weights(0 * q, k, dropout=dropout, **options)) != 0


def close(x, y, tol=1e-5):
    np.testing.assert_allclose(x, y, rtol=tol, atol=tol)


@every
def test_every_implementation_drops_the_same(implementation):
    q, k, v = draw(B)
    options = dict(mask=masks.Causal(), scores=(scores.SoftCap(2.0),), q_offset=2, dropout=HALF)
    weights = jattn.attention_weights(q, k, **options)
    out, lse = jattn.attention_with_lse(q, k, v, implementation=implementation, **options)
    close(out, jnp.einsum("bnts,bsnv->btnv", weights, jnp.repeat(v, N // K, axis=2)))
    close(lse, jattn.attention_with_lse(q, k, v, **options | {"dropout": None})[1])


@both
def test_gradients_use_the_same_mask(implementation):
    args = draw(B, dtype=np.float32)
    multiplier = 2.0 * kept(B)

    def gradient(f):
        return jax.jit(jax.grad(modes.loss(f), (0, 1, 2)))(*args)

    ours = gradient(lambda *a: jattn.attention_with_lse(*a, dropout=HALF, implementation=implementation))
    theirs = gradient(lambda *a: naive.attention(*a, dropout=multiplier))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)


def test_derivatives_by_finite_differences():
    with jax.enable_x64(True):
        args = draw(dtype=np.float64)
        f = modes.features(lambda *a: jattn.attention_with_lse(*a, dropout=HALF, implementation=SMALL))
        plain.assert_differentiable(f, args, tol=1e-5)


@both
def test_a_scan_over_keys_changes_nothing(implementation):
    args = draw(B)

    def f(q, k, v, key):
        return jattn.attention(q, k, v, dropout=Dropout(0.5, key), implementation=implementation)

    keys = jnp.stack([KEY, jax.random.key(4)])
    scanned = jax.lax.scan(lambda _, key: (None, f(*args, key)), None, keys)[1]
    for out, key in zip(scanned, keys, strict=True):
        close(out, f(*args, key))
        close(out, jax.jit(f)(*args, key))


@both
def test_vmap_is_a_loop(implementation):
    qs, ks, vs = draw(B)
    keys = jax.random.split(KEY, B)

    def f(q, k, v, key):
        return jattn.attention(q, k, v, dropout=Dropout(0.5, key), implementation=implementation)

    shared = jax.jit(jax.vmap(f, (0, 0, 0, None)))(qs, ks, vs, KEY)
    split = jax.jit(jax.vmap(f))(qs, ks, vs, keys)
    over_keys = jax.jit(jax.vmap(f, (None, None, None, 0)))(qs[0], ks[0], vs[0], keys)
    alone = jax.jit(f)
    for i in range(B):
        close(shared[i], alone(qs[i], ks[i], vs[i], KEY))
        close(split[i], alone(qs[i], ks[i], vs[i], keys[i]))
        close(over_keys[i], alone(qs[0], ks[0], vs[0], keys[i]))


def test_without_a_batch_dim_it_is_that_of_the_first_example():
    np.testing.assert_array_equal(kept(), kept(B)[0])
    np.testing.assert_array_equal(kept(1)[0], kept(B)[0])


@both
def test_it_belongs_to_positions_and_not_to_places(implementation):
    q, k, v = draw()
    options = dict(dropout=HALF, implementation=implementation)
    whole = jattn.attention(q, k, v, q_offset=0, **options)
    close(jattn.attention(q[4:9], k, v, q_offset=4, **options), whole[4:9])
    positions = jnp.array([12, 0, 7])
    close(jattn.attention(q[positions], k, v, q_positions=positions, **options), whole[positions])
    shuffled = jnp.array(np.random.default_rng(0).permutation(S))
    close(jattn.attention(q, k[shuffled], v[shuffled], q_offset=0, kv_positions=shuffled, **options), whole)


@both
def test_parts_merge_to_the_whole(implementation):
    q, k, v = draw(B)
    options = dict(dropout=HALF, implementation=implementation, q_offset=0)
    whole = jattn.attention_with_lse(q, k, v, **options)
    runs = np.split(np.arange(S, dtype=np.int32), (4, 5))
    parts = [jattn.attention_with_lse(q, k[:, run], v[:, run], kv_positions=run, **options) for run in runs]
    for a, b in zip(jattn.merge(parts), whole, strict=True):
        close(a, b)


def test_everything_else_draws_anew():
    mask = kept(B, T=40, S=40)
    share = mask.mean()
    deviation = np.sqrt(0.25 / mask.size)
    assert abs(share - 0.5) < 5 * deviation
    for a, b in (
        (mask[0], mask[1]),  # examples
        (mask[:, :-1], mask[:, 1:]),  # heads
        (mask[..., :-1, :], mask[..., 1:, :]),  # queries
        (mask[..., :-1], mask[..., 1:]),  # keys
        (mask, np.swapaxes(mask, -1, -2)),
        (mask, kept(B, T=40, S=40, dropout=Dropout(0.5, jax.random.key(4)))),
    ):
        off_diagonal = (
            np.ones(a.shape, bool) if a.shape[-1] != a.shape[-2] else ~np.broadcast_to(np.eye(40, dtype=bool), a.shape)
        )
        agree = (a == b)[off_diagonal]
        assert abs(agree.mean() - 0.5) < 5 * np.sqrt(0.5 / agree.size)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.9])
def test_share_of_what_is_dropped(rate):
    mask = kept(B, T=50, S=50, dropout=Dropout(rate, KEY))
    per_head = mask.mean((0, 2, 3))
    assert np.all(abs(per_head - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / (mask.size / N)))


def test_mean_is_preserved():
    q, k, v = draw()
    many = jax.jit(jax.vmap(lambda key: jattn.attention(q, k, v, dropout=Dropout(0.3, key))))(
        jax.random.split(KEY, 2000)
    )
    without = jattn.attention(q, k, v)
    error = (many.mean(0) - without) / (many.std(0) / np.sqrt(len(many)))
    assert abs(error).max() < 6
    assert abs(np.square(error).mean() - 1) < 0.3


def test_rate_zero_is_no_dropout():
    q, k, v = draw(B)
    for implementation in ("dense", SMALL):
        without = jattn.attention_with_lse(q, k, v, implementation=implementation)
        chex.assert_trees_all_equal(
            jattn.attention_with_lse(q, k, v, implementation=implementation, dropout=Dropout(0.0, KEY)), without
        )


def test_same_key_same_bits_and_another_key_other_bits():
    q, k, v = draw(B)
    f = jax.jit(
        jax.value_and_grad(lambda q, d: jnp.sin(jattn.attention(q, k, v, dropout=d, implementation=SMALL)).sum())
    )
    chex.assert_trees_all_equal(f(q, HALF), f(q, Dropout(0.5, jax.random.key(3))))
    assert not np.array_equal(f(q, HALF)[1], f(q, Dropout(0.5, jax.random.key(4)))[1])


def test_typed_and_raw_keys():
    np.testing.assert_array_equal(kept(dropout=Dropout(0.5, jax.random.PRNGKey(3))), kept(dropout=HALF))
    np.testing.assert_array_equal(kept(dropout=Dropout(0.5, np.asarray(jax.random.PRNGKey(3)))), kept(dropout=HALF))
    q, k, v = draw()
    raw = jax.random.split(jax.random.PRNGKey(3), 2)
    outs = jax.vmap(lambda key: jattn.attention(q, k, v, dropout=Dropout(0.5, key), implementation=SMALL))(raw)
    close(outs[1], jattn.attention(q, k, v, dropout=Dropout(0.5, raw[1])))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_other_generators_work_or_are_refused(impl):
    try:
        mask = kept(B, dropout=Dropout(0.5, jax.random.key(3, impl=impl)), T=40, S=40)
    except (TypeError, ValueError) as error:
        assert "key" in str(error)
    else:
        assert abs(mask.mean() - 0.5) < 5 * np.sqrt(0.25 / mask.size)


@pytest.mark.parametrize(
    ("rate", "key", "error"),
    [
        (1.0, KEY, ValueError),
        (-0.1, KEY, ValueError),
        (float("nan"), KEY, ValueError),
        ("0.5", KEY, TypeError),
        (0.5, 3, TypeError),
        (0.5, np.zeros(2, np.float32), TypeError),
        (0.5, jax.random.split(KEY, 2), ValueError),
    ],
)
def test_wrong_arguments_are_refused(rate, key, error):
    with pytest.raises(error, match=r"Dropout|rate|key"):
        jattn.attention(*draw(), dropout=Dropout(rate, key))
    with pytest.raises(TypeError, match="dropout"):
        jattn.attention(*draw(), dropout=0.5)


def test_dropped_rows_of_nothing_stay_empty():
    q, k, v = draw()
    mask = masks.Dense(np.arange(T)[:, None] + np.zeros((1, S), int) != 4)
    for implementation in ("dense", SMALL):
        out, lse = jattn.attention_with_lse(q, k, v, mask=mask, dropout=HALF, implementation=implementation)
        np.testing.assert_array_equal(out[4], 0)
        np.testing.assert_array_equal(lse[4], -np.inf)
        assert np.isfinite(lse[5:]).all()


def test_sharded_over_devices_it_is_the_same():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:6]).reshape(2, 3), ("batch", "heads"))
    spec = jax.P("batch", None, "heads")
    args = draw(B)

    def f(q, k, v, key):
        return jattn.attention(q, k, v, dropout=Dropout(0.5, key), implementation=SMALL)

    sharded = jax.device_put(args, jax.NamedSharding(mesh, spec))
    close(jax.jit(f)(*sharded, KEY), f(*args, KEY))
