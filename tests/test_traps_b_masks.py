"""Traps B1-B20: masks and positions. A leak is shown by perturbing what must not be seen: the rest stays bit-equal."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, scores
from tests import plain, reference
from tests.pictures import catalogue, draw, striped
from tests.plain import loss, once, qkv, quick

SMALL = jattn.Blockwise(block_q=3, block_kv=4)
both = pytest.mark.parametrize("implementation", ["dense", SMALL], ids=["dense", "blockwise"])
TOL = dict(rtol=2e-5, atol=2e-5)


def bias(*shape, seed=5):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


ORDERED = {
    "Causal": dict(mask=masks.Causal()),
    "Window": dict(mask=masks.Window(2, 0)),
    "SlidingWindow": dict(mask=masks.SlidingWindow(2)),
    "Function": dict(mask=masks.Function(striped, 3)),
    "inside a combination": dict(mask=masks.Prefix(3) | (masks.Prefix(5) & ~masks.Causal())),
    "ALiBi": dict(scores=(scores.ALiBi(jnp.ones(6)),)),
    "RelativePosition": dict(scores=(scores.RelativePosition(jnp.ones((32, 6))),)),
    "scores.Function": dict(scores=(scores.Bias(jnp.ones(())), scores.Function(lambda s, i, j, p: s, ()))),
}


@both
@pytest.mark.parametrize("name", ORDERED)
@pytest.mark.parametrize(("T", "S"), [(7, 11), (11, 7), (1, 11)])
def test_b1_order_without_positions_is_refused_when_lengths_differ(implementation, name, T, S):
    with pytest.raises(ValueError, match=rf"q_offset(?s:.*){S - T}"):
        jattn.attention(*qkv(T=T, S=S), **ORDERED[name], implementation=implementation)


@both
@pytest.mark.parametrize("unordered", [masks.Prefix(3), masks.Lengths(2, 3), masks.Full(), masks.Empty()], ids=str)
def test_b1_masks_without_order_need_no_positions(implementation, unordered):
    x = qkv()
    out = quick(jattn.attention, *x, mask=unordered, implementation=implementation)
    keep = draw(7, 11, lambda i, j: {"P": j < 3, "L": i < 2 and j < 3, "F": True, "E": False}[str(unordered)[0]])
    np.testing.assert_allclose(out, reference.attention(*x, keep=keep)[0], **TOL)


@both
@pytest.mark.parametrize(("T", "S"), [(7, 11), (11, 7), (1, 11), (11, 1), (7, 7)])
def test_b1_causal_follows_the_positions_given(implementation, T, S):
    x = qkv(T=T, S=S)
    attend = jax.jit(lambda *x, **at: jattn.attention(*x, mask=masks.Causal(), implementation=implementation, **at))
    for offset in {0, S - T}:
        exact = reference.attention(*x, keep=np.arange(S) <= np.arange(T)[:, None] + offset)[0]
        np.testing.assert_allclose(attend(*x, q_offset=jnp.int32(offset)), exact, **TOL)
        np.testing.assert_allclose(attend(*x, q_positions=jnp.arange(T) + offset), exact, **TOL)
        first = max(offset, 0)  # at negative positions is nothing
        shifted = dict(q_positions=jnp.arange(T) + first, kv_positions=jnp.arange(S) + first - offset)
        np.testing.assert_allclose(attend(*x, **shifted), exact, **TOL)


@both
def test_b2_step_by_step_decoding_is_the_full_forward(implementation):
    q, k, v = qkv(T=11)
    full = quick(jattn.attention, q, k, v, mask=masks.Causal(), implementation=implementation)

    @jax.jit
    def step(t):
        one = jax.lax.dynamic_slice_in_dim(q, t, 1)
        return jattn.attention(one, k, v, mask=masks.Causal(), q_offset=t, implementation=implementation)[0]

    np.testing.assert_allclose(jnp.stack([step(t) for t in range(11)]), full, **TOL)
    decoded = [
        quick(
            jattn.attention,
            q[t : t + 1],
            k[: t + 1],
            v[: t + 1],
            mask=masks.Causal(),
            q_offset=t,
            implementation="dense",
        )[0]
        for t in range(11)
    ]
    np.testing.assert_allclose(jnp.stack(decoded), full, **TOL)


@both
def test_b3_early_rows_of_many_queries_on_few_keys_are_exactly_zero(implementation):
    T, S = 23, 5
    q, k, v = qkv(T=T, S=S)

    @jax.jit
    def run(q, k, v):
        def f(q, k, v):
            out, lse = jattn.attention_with_lse(
                q, k, v, mask=masks.Causal(), q_offset=S - T, implementation=implementation
            )
            return loss(out, lse), (out, lse)

        return jax.value_and_grad(f, (0, 1, 2), has_aux=True)(q, k, v)

    (_, (out, lse)), (dq, dk, dv) = run(q, k, v)
    np.testing.assert_array_equal(out[: T - S], 0)
    np.testing.assert_array_equal(lse[: T - S], -np.inf)
    np.testing.assert_array_equal(dq[: T - S], 0)
    exact_out, exact_lse, _ = reference.attention(q, k, v, keep=draw(T, S, lambda i, j: j <= i + S - T))
    np.testing.assert_allclose(out, exact_out, **TOL)
    np.testing.assert_allclose(lse, exact_lse, **TOL)
    chex.assert_tree_all_finite((dq, dk, dv))


@both
def test_b4_chunked_prefill_is_the_unchunked_one_for_every_split(implementation):
    """Whether a chunk is given the keys so far, or a cache with slots beyond, which causality hides."""
    T = 11
    q, k, v = qkv(T=T)

    def attend(q, k, v, **at):
        return jattn.attention(q, k, v, mask=masks.Causal(), implementation=implementation, **at)

    @functools.partial(jax.jit, static_argnames="split")
    def chunked(q, k, v, split):
        first = attend(q[:split], k[:split], v[:split])
        cached = attend(q[:split], k, v, q_offset=0)
        rest = attend(q[split:], k, v, q_offset=split)
        return jnp.concatenate([first, rest]), jnp.concatenate([cached, rest])

    full = attend(q, k, v)
    for split in range(1, T) if implementation == "dense" else (1, 4, 6, 10):
        for chunks in chunked(q, k, v, split=split):
            np.testing.assert_allclose(chunks, full, **TOL)


@both
@pytest.mark.parametrize(
    ("left", "right"), [*itertools.product((0, 1, 4), repeat=2), (None, 1), (1, None), (None, None)]
)
def test_b5_window_counts_its_keys(implementation, left, right):
    """With equal logits and one-hot values every attended key gets 1 / count."""
    T = 11
    out = quick(
        jattn.attention,
        jnp.zeros((T, 1, 3)),
        jnp.zeros((T, 1, 3)),
        jnp.eye(T)[:, None],
        mask=masks.Window(left, right),
        implementation=implementation,
    )
    low = [0 if left is None else max(0, i - left) for i in range(T)]
    high = [T - 1 if right is None else min(T - 1, i + right) for i in range(T)]
    wanted = draw(T, T, lambda i, j: low[i] <= j <= high[i])
    np.testing.assert_allclose(out[:, 0], wanted / wanted.sum(1, keepdims=True), rtol=1e-6)


@both
def test_b5_window_of_nothing_on_either_side_is_the_identity(implementation):
    q, k, v = qkv(T=11, K=6)
    out, lse = quick(jattn.attention_with_lse, q, k, v, mask=masks.Window(0, 0), implementation=implementation)
    np.testing.assert_allclose(out, v, rtol=1e-6)
    np.testing.assert_allclose(lse, (q * k).sum(-1) / np.sqrt(5), **TOL)


def test_b5_sliding_window_counts_itself():
    for n in (1, 2, 5):
        assert masks.SlidingWindow(n).to_array(11, 11).sum(1).tolist() == [min(i + 1, n) for i in range(11)]


@both
@pytest.mark.parametrize("name", catalogue())
def test_b6_each_mask_alone_and_no_other_option(implementation, name):
    mask, allowed = catalogue()[name]
    x = qkv(T=11)
    out, lse = jax.jit(lambda *x: jattn.attention_with_lse(*x, mask=mask, implementation=implementation))(*x)
    exact_out, exact_lse, _ = reference.attention(*x, keep=allowed)
    np.testing.assert_allclose(out, exact_out, **TOL)
    np.testing.assert_allclose(lse, exact_lse, **TOL)


def test_b6_local_window_alone():
    q, k, v = qkv(T=11, batch=(2,), V=5)
    exact = reference.attention(q, k, v, keep=draw(11, 11, lambda i, j: i - 2 <= j <= i + 1))[0]
    np.testing.assert_allclose(jattn.dot_product_attention(q, k, v, local_window_size=(2, 1)), exact, **TOL)


def rows_before(f, t, q, k, v):
    """The first t rows of f, before and after everything from key t on is replaced."""
    change = jnp.where(jnp.arange(k.shape[0])[:, None, None] < t, 1, -17)
    return f(q, k, v)[:t], f(q, k * change.astype(k.dtype), v * change.astype(v.dtype))[:t]


@both
def test_b7_left_window_does_not_see_the_future(implementation):
    def f(q, k, v):
        return jattn.attention(q, k, v, mask=masks.Window(3, 0), implementation=implementation)

    f = jax.jit(f)
    for t in (1, 5, 10):
        np.testing.assert_array_equal(*rows_before(f, t, *qkv(T=11)))


def test_b7_local_left_window_does_not_see_the_future():
    def f(q, k, v):
        return jattn.dot_product_attention(q, k, v, local_window_size=(3, 0))

    f = jax.jit(f)
    for t in (1, 5, 10):
        np.testing.assert_array_equal(*rows_before(f, t, *qkv(T=11, V=5)))


@both
@pytest.mark.parametrize("unwritten", [jnp.iinfo(jnp.int32).max, jnp.iinfo(jnp.int32).min, -100], ids=str)
def test_b8_ring_buffer_decoding_is_the_full_forward(implementation, unwritten):
    """A cache of exactly the window's size, overwritten in place: positions, not slots, decide.

    A slot not yet written stands beyond the window, however far: no difference of positions may overflow.
    """
    T, window = 17, 5
    q, k, v = qkv(T=T, S=T)
    mask = masks.SlidingWindow(window)
    full = quick(jattn.attention, q, k, v, mask=mask, implementation=implementation)

    def step(cache, t):
        keys, values, positions = cache
        slot = t % window
        keys, values, positions = keys.at[slot].set(k[t]), values.at[slot].set(v[t]), positions.at[slot].set(t)
        out = jattn.attention(
            q[t][None], keys, values, mask=mask, q_offset=t, kv_positions=positions, implementation=implementation
        )
        return (keys, values, positions), out[0]

    garbage = jnp.full((window, *k.shape[1:]), jnp.nan), jnp.full((window, *v.shape[1:]), jnp.nan)
    decoded = jax.jit(lambda cache: jax.lax.scan(step, cache, jnp.arange(T, dtype=jnp.int32))[1])(
        (*garbage, jnp.full(window, unwritten, jnp.int32))
    )
    np.testing.assert_allclose(decoded, full, **TOL)


@both
def test_b8_prefill_longer_than_the_window_then_decode(implementation):
    T, window, prompt = 17, 5, 12
    q, k, v = qkv(T=T, S=T)
    args = dict(mask=masks.SlidingWindow(window), implementation=implementation)
    full = quick(jattn.attention, q, k, v, **args)
    first = quick(jattn.attention, q[:prompt], k[:prompt], v[:prompt], **args)
    kept = slice(prompt - window + 1, None)
    rest = quick(
        jattn.attention,
        q[prompt:],
        k[kept],
        v[kept],
        q_offset=prompt,
        kv_positions=jnp.arange(T)[kept].astype(jnp.int32),
        **args,
    )
    np.testing.assert_allclose(jnp.concatenate([first, rest]), full, **TOL)


@both
@pytest.mark.parametrize("name", catalogue())
@pytest.mark.parametrize(("T", "S"), [(5, 13), (13, 5)])
def test_b9_every_mask_with_unequal_lengths(implementation, name, T, S):
    mask, allowed = catalogue(T, S, S - T)[name]
    x = qkv(T=T, S=S)
    out = jax.jit(lambda *x: jattn.attention(*x, mask=mask, q_offset=S - T, implementation=implementation))(*x)
    np.testing.assert_allclose(out, reference.attention(*x, keep=allowed)[0], **TOL)


@both
def test_b10_causal_has_effect(implementation):
    @jax.jit
    def f(q, k, v):
        return jattn.attention(q, k, v, mask=masks.Causal(), implementation=implementation)

    q, k, v = qkv(T=11)
    for t in (1, 4, 10):
        np.testing.assert_array_equal(*rows_before(f, t, q, k, v))
    assert np.abs(f(q, k, v)[:5] - quick(jattn.attention, q, k, v)[:5]).max() > 0.1


@both
def test_b11_boolean_mask_is_the_additive_mask(implementation):
    x = qkv(batch=(2,))
    mask = np.random.default_rng(3).random((2, 6, 7, 11)) < 0.5
    boolean = quick(jattn.attention_with_lse, *x, mask=mask, implementation=implementation)
    additive = np.where(mask, 0, -np.inf).astype(np.float32)
    chex.assert_trees_all_close(
        boolean,
        quick(jattn.attention_with_lse, *x, scores=(scores.Bias(additive),), implementation=implementation),
        rtol=1e-6,
    )
    exact = reference.attention(*x, keep=mask)
    np.testing.assert_allclose(boolean[0], exact[0], **TOL)


@both
@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float32])
def test_b11_a_mask_that_is_not_boolean_is_refused(implementation, dtype):
    q, k, v = qkv(V=5)
    ones = np.ones((7, 11), dtype)
    with pytest.raises(TypeError, match="mask"):
        jattn.attention(q, k, v, mask=ones, implementation=implementation)
    with pytest.raises(TypeError, match=r"(?i)mask|dense"):
        masks.Dense(ones)
    with pytest.raises(TypeError, match="mask"):
        jattn.dot_product_attention(q, k, v, mask=ones[None])


LOWEST = float(np.finfo(np.float32).min)


@both
def test_b12_infinite_and_lowest_bias(implementation):
    """-inf, and finfo.min twice (which overflows), are as good as a mask; finfo.min is a number like others.

    None of it makes a NaN or an infinity that debug_nans and debug_infs would find.
    """
    q, k, v = qkv()
    some = np.random.default_rng(3).random((6, 7, 11)) < 0.5
    some[2, 3], some[:, :, 4] = False, False
    hidden = np.where(some, 0, LOWEST).astype(np.float32)
    forms = {
        "-inf": (scores.Bias(np.where(some, 0, -np.inf).astype(np.float32)),),
        "both": (scores.Bias(hidden), scores.Bias(hidden)),
    }
    live = some.any(-1).T

    exact = once(lambda: quick(jax.grad(lambda *x: loss(plain.attend(*x, some)[0][live]), (0, 1, 2)), q, k, v), "b12")
    with jax.debug_nans(True), jax.debug_infs(True):
        for given in forms.values():

            def f(q, k, v, given=given):
                out = jattn.attention(q, k, v, scores=given, implementation=implementation)
                return loss(out[live]), out

            (_, out), gradients = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(q, k, v)
            np.testing.assert_allclose(out, reference.attention(q, k, v, keep=some)[0], **TOL)
            chex.assert_trees_all_close(gradients, exact, **TOL)

        lowest = quick(
            jattn.attention, q, k, v, scores=(scores.Bias(jnp.full((), LOWEST)),), implementation=implementation
        )
    everywhere = np.repeat(np.mean(v, 0)[None].repeat(3, 1), 7, 0)
    np.testing.assert_allclose(lowest, everywhere, **TOL)


@both
@pytest.mark.parametrize("shift", [-1e5, -1e10, -1e30, -3e38, 1e30])
def test_b13_very_negative_logits_are_valid(implementation, shift):
    """Equal logits, however low, weigh the same; and a masked key weighs nothing beside them."""
    _, k, v = qkv()
    out, lse = quick(
        jattn.attention_with_lse,
        jnp.zeros((7, 6, 5)),
        k,
        v,
        mask=masks.Prefix(9),
        scores=(scores.Bias(jnp.full((1, 1), shift)),),
        implementation=implementation,
    )
    np.testing.assert_allclose(out, np.repeat(np.mean(v[:9], 0)[None].repeat(3, 1), 7, 0), **TOL)
    np.testing.assert_allclose(lse, shift + np.log(9), rtol=1e-6)


@both
@pytest.mark.parametrize("shift", [-1e5, -1e30, 1e30])
def test_b13_gradients_do_not_feel_how_low_the_logits_are(implementation, shift):
    """An lse of -1e30 has no room left for log 9: weights must not be computed from it."""
    _, k, v = qkv()

    def f(q, k, v, shift):
        given = (scores.Bias(shift),)
        return loss(jattn.attention(q, k, v, mask=masks.Prefix(9), scores=given, implementation=implementation))

    gradient = jax.jit(jax.grad(f, (0, 1, 2)))
    x = jnp.zeros((7, 6, 5)), k, v
    chex.assert_trees_all_close(
        gradient(*x, jnp.full((1, 1), shift)), gradient(*x, jnp.zeros((1, 1))), rtol=1e-5, atol=1e-6
    )


@both
def test_b13_a_shift_of_all_logits_changes_nothing_in_float64(implementation):
    with jax.enable_x64(True):
        q, k, v = qkv()
        args = dict(mask=masks.Causal(), q_offset=4, implementation=implementation)
        shifted = quick(jattn.attention, q, k, v, scores=(scores.Bias(jnp.full((1, 1), -1e5)),), **args)
        np.testing.assert_allclose(shifted, quick(jattn.attention, q, k, v, **args), atol=1e-9)


MASK_SHAPES = [*itertools.product((1, 2), (1, 6), (1, 7), (1, 11)), (11,), (7, 1), (7, 11), (6, 1, 11), (1, 7, 11), ()]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_b14_mask_of_every_broadcast_shape_and_no_bias(shape):
    x = qkv(batch=(2,))
    mask = np.random.default_rng(len(shape)).random(shape) < 0.6
    out = quick(jattn.attention, *x, mask=mask, implementation="dense")
    np.testing.assert_allclose(out, reference.attention(*x, keep=mask)[0], **TOL)


def test_b14_masks_of_all_broadcast_shapes_together_blockwise():
    rng = np.random.default_rng(0)
    arrays = [rng.random(shape) < 0.5 + 0.5 * (np.prod(shape) < 99) for shape in MASK_SHAPES]
    mask, keep = masks.Full(), np.ones((), bool)
    for array in arrays:
        mask, keep = mask & masks.Dense(array), keep & array
    assert 0.01 < keep.mean() < 0.5
    x = qkv(batch=(2,))
    np.testing.assert_allclose(
        quick(jattn.attention, *x, mask=mask, implementation=SMALL), reference.attention(*x, keep=keep)[0], **TOL
    )


@both
def test_b15_other_segments_are_not_seen(implementation):
    """Neither by the output nor by any gradient."""
    ids = np.array([5, 5, 5, 0, 0, 0, 0, 2, 2, 2, 2], np.int32)
    q, k, v = qkv(T=11)
    mask = masks.Segments(ids)

    @jax.jit
    def run(q, k, v):
        def f(q, k, v):
            out = jattn.attention(q, k, v, mask=mask, implementation=implementation)
            return loss(out[3:7]), out[3:7]

        return jax.value_and_grad(f, (0, 1, 2), has_aux=True)(q, k, v)

    (_, out), gradients = run(q, k, v)
    change = jnp.where(jnp.asarray(ids)[:, None, None] == 0, 1.0, -19.0)
    (_, again), again_gradients = run(q * change, k * change, v * change)
    np.testing.assert_array_equal(out, again)
    for g, h in zip(gradients, again_gradients, strict=True):
        np.testing.assert_array_equal(g[3:7], h[3:7])
        np.testing.assert_array_equal(np.delete(g, np.s_[3:7], 0), 0)


@both
def test_b16_padding_is_not_a_segment_and_zero_is(implementation):
    q_ids = np.array([0, 0, 0, 1, 1, -1, -1], np.int32)
    kv_ids = np.array([0, 0, 1, 1, 1, 1, -1, -1, -2, 3, -1], np.int32)
    x = qkv()
    mask = masks.Segments(q_ids, kv_ids)

    @jax.jit
    def run(*x):
        def f(*x):
            out, lse = jattn.attention_with_lse(*x, mask=mask, implementation=implementation)
            return loss(out, lse), (out, lse)

        return jax.value_and_grad(f, (0, 1, 2), has_aux=True)(*x)

    (_, (out, lse)), (dq, dk, dv) = run(*x)
    exact = reference.attention(*x, keep=draw(7, 11, lambda i, j: q_ids[i] == kv_ids[j] >= 0))
    np.testing.assert_allclose(out, exact[0], **TOL)
    np.testing.assert_allclose(lse, exact[1], **TOL)
    np.testing.assert_array_equal(out[5:], 0)
    np.testing.assert_array_equal(dq[5:], 0)
    np.testing.assert_array_equal(dk[6:], 0)
    np.testing.assert_array_equal(dv[6:], 0)


@both
@pytest.mark.parametrize("constant", [0, 3, -1])
def test_b16_constant_ids_are_kept(implementation, constant):
    x = qkv(T=11)
    out = quick(
        jattn.attention, *x, mask=masks.Segments(np.full(11, constant, np.int32)), implementation=implementation
    )
    np.testing.assert_allclose(out, reference.attention(*x, keep=constant >= 0)[0], **TOL)


@both
def test_b17_packed_keys_split_over_parts_merge_to_the_whole(implementation):
    """What a ring needs: each part knows its own ids and positions, not its index in the ring."""
    q, k, v = qkv(T=12, S=12)
    ids = jnp.asarray([0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, -1], jnp.int32)
    positions = jnp.arange(12, dtype=jnp.int32)
    whole = quick(
        jattn.attention_with_lse, q, k, v, mask=masks.Causal() & masks.Segments(ids), implementation=implementation
    )

    @jax.jit
    def part(k, v, kv_ids, kv_positions):
        mask = masks.Causal() & masks.Segments(ids, kv_ids)
        at = dict(q_positions=positions, kv_positions=kv_positions)
        return jattn.attention_with_lse(q, k, v, mask=mask, implementation=implementation, **at)

    parts = [part(*(x[i : i + 4] for x in (k, v, ids, positions))) for i in (4, 0, 8)]
    chex.assert_trees_all_close(jattn.merge(parts), whole, **TOL)


@both
def test_b18_no_option_is_dropped_on_any_path(implementation):
    """Dropout, any rank and the weights keep causality; tests/test_options.py walks the products of all options."""
    q, k, v = qkv(T=11)
    args = dict(mask=masks.Causal(), dropout=jattn.Dropout(0.3, jax.random.key(0)))

    @jax.jit
    def alone(q, k, v):
        return jattn.attention(q, k, v, implementation=implementation, **args)

    @jax.jit
    def in_batches(q, k, v):
        return jattn.attention(*(x[None, None] for x in (q, k, v)), implementation=implementation, **args)[0, 0]

    for t in (1, 6):
        for f in (alone, in_batches):
            np.testing.assert_array_equal(*rows_before(f, t, q, k, v))
    weights = quick(jattn.attention_weights, q, k, **args)
    np.testing.assert_array_equal(np.triu(weights, 1), 0)


@both
def test_b19_mask_as_an_argument_of_jit_and_inside_loops(implementation):
    q, k, v = qkv(T=11)

    def f(mask):
        return jattn.attention(q, k, v, mask=mask, implementation=implementation)

    ids = jnp.asarray(np.random.default_rng(0).integers(-1, 3, 11), jnp.int32)
    dense = jnp.asarray(np.random.default_rng(1).random((11, 11)) < 0.5)
    mask = masks.Causal() & (masks.Segments(ids) | masks.Dense(dense)) & masks.Lengths(kv=jnp.int32(8))
    same = np.asarray(ids)[:, None] == np.where(ids < 0, -9, ids)
    keep = draw(11, 11, lambda i, j: j <= i and j < 8) & (same | dense)
    exact = reference.attention(q, k, v, keep=keep)[0]

    np.testing.assert_allclose(jax.jit(f)(mask), exact, **TOL)
    _, scanned = jax.lax.scan(lambda mask, _: (mask, f(mask)), mask, length=2)
    np.testing.assert_allclose(scanned, np.stack([exact, exact]), **TOL)
    _, _, looped = jax.lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1], f(c[1])), (0, mask, jnp.zeros((11, 6, 3)))
    )
    np.testing.assert_allclose(looped, exact, **TOL)


@both
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S"), [(11, 11), (7, 11), (11, 7), (1, 11)])
def test_b20_alibi_is_the_explicit_bias(implementation, causal, T, S):
    x = qkv(T=T, S=S)
    slopes = jnp.asarray([0.5, 0.25, 0.1, 1.0, 0.0, -0.3])
    distance = np.abs(np.arange(T)[:, None] + S - T - np.arange(S)) * 1.0
    args = dict(scores=(scores.ALiBi(slopes),), q_offset=S - T, implementation=implementation)
    out = jax.jit(lambda *x: jattn.attention(*x, mask=masks.Causal() if causal else None, **args))(*x)
    keep = draw(T, S, lambda i, j: not causal or j <= i + S - T)
    exact = reference.attention(*x, keep=keep, scores=[lambda s, head: s - float(slopes[head[-1]]) * distance])[0]
    np.testing.assert_allclose(out, exact, **TOL)
