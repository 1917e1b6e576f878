"""Traps A1-A14: derivatives that attention libraries got wrong. Float64, against tests/plain.py."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jattn
from jattn import masks, scores
from tests import plain
from tests.pictures import catalogue, draw
from tests.plain import assert_close, derivatives, loss, once, qkv, quick

SMALL = jattn.Blockwise(block_q=3, block_kv=4)
both = pytest.mark.parametrize("implementation", ["dense", SMALL], ids=["dense", "blockwise"])
T, S, N = 7, 11, 6
CAUSAL = draw(T, S, lambda i, j: j <= i + S - T)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def random(*shape, seed=7):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@both
def test_a1_lse_carries_a_gradient(implementation):
    def ours(x):
        _, lse = jattn.attention_with_lse(*x, mask=masks.Causal(), q_offset=S - T, implementation=implementation)
        return (lse**3).sum()

    def wanted(x):
        return (plain.attend(*x, CAUSAL)[1] ** 3).sum()

    assert_close(derivatives(ours, qkv()), once(lambda: derivatives(wanted, qkv()), "a1"))


@both
def test_a1_gradient_through_a_merge_is_the_unsplit_gradient(implementation):
    def part(q, k, v, keys):
        return jattn.attention_with_lse(
            q,
            k[keys],
            v[keys],
            mask=masks.Causal(),
            q_offset=S - T,
            kv_positions=jnp.arange(S)[keys],
            implementation=implementation,
        )

    def merged(x):
        return loss(*jattn.merge([part(*x, slice(0, 5)), part(*x, slice(5, 6)), part(*x, slice(6, S))]))

    def unsplit(x):
        return loss(*plain.attend(*x, CAUSAL))

    assert_close(derivatives(merged, qkv()), once(lambda: derivatives(unsplit, qkv()), "a1 unsplit"))


@both
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_a2_lse_is_float32_or_wider(implementation, dtype):
    q, k, v = qkv(S=97, dtype=dtype)
    attend = jax.jit(lambda q, k, v: jattn.attention_with_lse(q, k, v, implementation=implementation))
    out, lse = attend(q, k, v)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    exact = plain.attend(*(x.astype(jnp.float64) for x in (q, k, v)))[1]
    np.testing.assert_allclose(lse, exact, rtol=2e-6, atol=2e-6)


def test_a2_lse_of_sixteen_merged_chunks_keeps_float32():
    q, k, v = qkv(S=16 * 13, dtype=jnp.bfloat16)
    parts = [
        jattn.attention_with_lse(q, k[i : i + 13], v[i : i + 13], implementation="dense") for i in range(0, len(k), 13)
    ]
    out, lse = jattn.merge(parts)
    assert lse.dtype == jnp.float32 and out.dtype == jnp.bfloat16
    exact_out, exact_lse = plain.attend(*(x.astype(jnp.float64) for x in (q, k, v)))
    np.testing.assert_allclose(lse, exact_lse, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(out.astype(float), exact_out, atol=2 * float(jnp.finfo(jnp.bfloat16).eps))


BIAS_SHAPES = [
    *itertools.product((1, 2), (1, N), (1, T), (1, S)),
    *[(), (1,), (S,), (T, 1), (T, S), (N, 1, 1), (N, 1, S), (1, T, S)],
]


@both
def test_a3_bias_gradient_lands_in_every_broadcast_shape(implementation):
    """All the shapes at once: the gradient of each bias of a sum is the gradient of that bias."""
    biases = {str(shape): random(*shape, seed=i) / 4 for i, shape in enumerate(BIAS_SHAPES)}
    x = qkv(batch=(2,))

    def ours(biases):
        return loss(
            *jattn.attention_with_lse(
                *x, scores=tuple(map(scores.Bias, biases.values())), implementation=implementation
            )
        )

    def wanted(biases):
        full = sum(jnp.broadcast_to(bias, (2, N, T, S)) for bias in biases.values())
        return loss(*plain.attend(*x, score=lambda s: s + full))

    assert_close(derivatives(ours, biases), once(lambda: derivatives(wanted, biases), "a3"))


@both
@pytest.mark.parametrize("shape", [(2, N, T, S), (2, 1, 1, S), (1, N, T, 1), (N, 1, S), (T, S), (S,), ()], ids=str)
def test_a3_bias_gradient_alone_with_a_mask(implementation, shape):
    x, bias = qkv(batch=(2,)), random(*shape)
    mask = masks.Window(4, 2)

    def ours(bias):
        return loss(
            jattn.attention(*x, mask=mask, scores=(scores.Bias(bias),), q_offset=2, implementation=implementation)
        )

    def wanted(bias):
        allowed = draw(T, S, lambda i, j: i + 2 - 4 <= j <= i + 2 + 2)
        return loss(plain.attend(*x, allowed, lambda s: s + jnp.broadcast_to(bias, s.shape))[0])

    assert_close(quick(jax.grad(ours), bias), once(lambda: quick(jax.grad(wanted), bias), "a3 alone", shape))


@both
@pytest.mark.parametrize("axes", [(1,), (2,), (3,), (0, 1), (1, 2), (0, 1, 2, 3)], ids=str)
def test_a4_broadcast_bias_gradient_is_the_sum_of_the_full_one(implementation, axes):
    """The size-1 axis runs over several blocks, heads of a group and batches: each must be added, none written last."""
    x, full = qkv(batch=(2,)), random(2, N, T, S) * 0 + 0.3

    @jax.jit
    def gradient(bias):
        return jax.grad(
            lambda bias: loss(jattn.attention(*x, scores=(scores.Bias(bias),), implementation=implementation))
        )(bias)

    small = full.max(axes, keepdims=True)
    whole = once(lambda: gradient(full), "a4", implementation)
    assert_close(gradient(small), whole.sum(axes, keepdims=True))


@both
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a5_float32_bias_with_narrow_inputs(implementation, dtype):
    x, bias = qkv(dtype=dtype), random(N, T, S).astype(jnp.float32)

    def ours(q, k, v, bias):
        out = jattn.attention(q, k, v, scores=(scores.Bias(bias),), implementation=implementation)
        return loss(out.astype(jnp.float32))

    gradients = jax.jit(jax.grad(ours, argnums=(0, 1, 2, 3)))(*x, bias)
    assert [g.dtype for g in gradients] == [dtype, dtype, dtype, jnp.float32]

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2, 3))
    def wanted(q, k, v, bias):
        return loss(plain.attend(q, k, v, score=lambda s: s + bias)[0])

    exact = once(lambda: wanted(*(a.astype(jnp.float64) for a in (*x, bias))), "a5", dtype)
    for got, want in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(got.astype(float), want, atol=8 * float(jnp.finfo(dtype).eps))


@both
def test_a5_zero_cotangent_gives_exactly_zero(implementation):
    bias = random(N, T, S).at[1, 2].set(-jnp.inf).at[:, :, 3].set(-jnp.inf)

    def ours(q, k, v, bias):
        return jattn.attention_with_lse(
            q, k, v, mask=masks.Prefix(9), scores=(scores.Bias(bias),), implementation=implementation
        )

    @jax.jit
    def pull(*args):
        primal, vjp = jax.vjp(ours, *args)
        return vjp(jax.tree.map(jnp.zeros_like, primal))

    for gradient in pull(*qkv(), bias):
        np.testing.assert_array_equal(gradient, 0)


@both
def test_a6_soft_cap_far_beyond_the_cap_and_with_masked_entries(implementation):
    q, k, v = qkv()
    x = q * 40, k * jnp.array([1, 3, 0.01, 100, 2] + 6 * [1.0])[:, None, None], v

    def ours(x):
        args = dict(mask=masks.Causal(), q_offset=S - T, scores=(scores.SoftCap(5.0),), implementation=implementation)
        return loss(*jattn.attention_with_lse(*x, **args))

    def wanted(x):
        return loss(*plain.attend(*x, CAUSAL, lambda s: 5 * jnp.tanh(s / 5)))

    assert_close(derivatives(ours, x), derivatives(wanted, x))


@both
def test_a6_soft_cap_gradient_of_huge_float32_logits_is_finite(implementation):
    q, k, v = qkv(dtype=jnp.float32)
    mask = masks.Prefix(9)

    def ours(q, k, v):
        return loss(jattn.attention(q, k, v, mask=mask, scores=(scores.SoftCap(30.0),), implementation=implementation))

    chex.assert_tree_all_finite(jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(q * 1e18, k * 1e18, v))


@both
def test_a7_masked_keys_weigh_exactly_nothing_under_a_soft_cap(implementation):
    q, k, v = qkv(V=S)
    v = jnp.broadcast_to(jnp.eye(S)[:, None], v.shape)  # so that the output is the weights
    mask = masks.Causal() & masks.Prefix(8)
    weights = jattn.attention(
        q, k, v, mask=mask, q_offset=S - T, scores=(scores.SoftCap(0.5),), implementation=implementation
    )
    allowed = CAUSAL & (np.arange(S) < 8)
    np.testing.assert_array_equal(np.swapaxes(weights, 0, 1) > 0, np.broadcast_to(allowed, (N, T, S)))


@both
def test_a7_soft_cap_and_bias_apply_in_the_order_given(implementation):
    x, bias = qkv(), 3 * random(N, T, S)

    def ours(*given):
        return jax.jit(lambda *x: jattn.attention_with_lse(*x, scores=given, implementation=implementation))(*x)

    cap_last = plain.attend(*x, score=lambda s: 2 * jnp.tanh((s + bias) / 2))
    bias_last = plain.attend(*x, score=lambda s: 2 * jnp.tanh(s / 2) + bias)
    assert_close(ours(scores.Bias(bias), scores.SoftCap(2.0)), cap_last)
    assert_close(ours(scores.SoftCap(2.0), scores.Bias(bias)), bias_last)
    assert np.abs(cap_last[0] - bias_last[0]).max() > 0.1


MODES = {
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (jnp.cos(x),))[1],
    "linearize": lambda f: lambda x: jax.linearize(f, x)[1](jnp.cos(x)),
    "grad": jax.grad,
    "forward over reverse": lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (jnp.cos(x),))[1],
    "reverse over reverse": lambda f: jax.grad(lambda x: jax.grad(f)(x) @ jnp.cos(jax.lax.stop_gradient(x))),
    "reverse over forward": lambda f: jax.grad(lambda x: jax.jvp(f, (x,), (jnp.cos(jax.lax.stop_gradient(x)),))[1]),
    "forward over forward": lambda f: (
        lambda x: jax.jvp(lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1], (x,), (jnp.cos(x),))[1]
    ),
    "jacfwd": jax.jacfwd,
    "hessian": jax.hessian,
}


@both
@pytest.mark.parametrize("mode", MODES)
def test_a8_every_order_and_mode(implementation, mode):
    q, k, v = qkv(T=3, S=5, N=2, K=1, H=3, V=2)
    x, unravel = ravel_pytree((q, k, v))

    def ours(x):
        return loss(
            *jattn.attention_with_lse(*unravel(x), mask=masks.Causal(), q_offset=1, implementation=implementation)
        )

    def wanted(x):
        return loss(*plain.attend(*unravel(x), draw(3, 5, lambda i, j: j <= i + 1)))

    transform = MODES[mode]
    assert_close(quick(transform(ours), x), once(lambda: quick(transform(wanted), x), "a8", mode))


@both
@pytest.mark.parametrize("name", catalogue(T, S, S - T))
def test_a9_derivatives_under_every_mask(implementation, name):
    mask, allowed = catalogue(T, S, S - T)[name]

    def ours(x):
        return loss(*jattn.attention_with_lse(*x, mask=mask, q_offset=S - T, implementation=implementation))

    def wanted(x):
        return loss(*plain.attend(*x, allowed))

    assert_close(derivatives(ours, qkv()), once(lambda: derivatives(wanted, qkv()), "a9", name))


@both
def test_a10_sink_has_a_gradient(implementation):
    """Grouped heads, and rows (here all those of head 1) that see nothing but the sink."""
    allowed = draw(T, S, lambda i, j: j <= i - 2) & (np.arange(N) != 1)[:, None, None]

    def ours(x):
        *x, sink = x
        args = dict(mask=jnp.asarray(allowed), scores=(scores.Sink(sink),), implementation=implementation)
        return loss(*jattn.attention_with_lse(*x, **args))

    def wanted(x):
        *x, sink = x
        return loss(*plain.attend(*x, allowed, sink=sink))

    x = (*qkv(), random(N))
    got = derivatives(ours, x)
    assert_close(got, once(lambda: derivatives(wanted, x), "a10"))
    assert (np.abs(got["gradient"][-1]) > 1e-3).all()


BLOCKS = [(1, 1), (2, 3), (5, 2), (7, 11), (8, 3), (3, 12), (64, 64), (1, 3), (13, 1), (1, 64), (5, None)]


def of_many_parts(implementation):
    """A loss with every kind of array that blocks cut: by rows, by columns, by both or not at all."""
    rng = np.random.default_rng(3)
    ids = rng.integers(-1, 3, (2, S)).astype(np.int32)
    mask = (masks.Causal() & masks.Segments(ids[:, -T:], ids)) | masks.Dense(rng.random((T, S)) < 0.4)
    mask = mask & masks.Dense(rng.random((2, 1, 1, S)) < 0.8)

    def f(x):
        q, k, v, own, full, keys, slopes, cap, table = x
        given = scores.Bias(own), scores.Bias(full), scores.ALiBi(slopes), scores.SoftCap(cap)
        given += scores.Bias(keys), scores.RelativePosition(table, max_distance=11)
        args = dict(mask=mask, q_offset=S - T, scores=given, implementation=implementation)
        return loss(*jattn.attention_with_lse(q, k, v, **args))

    arrays = (random(T, S), random(2, N, T, S), random(N, 1, S), random(N) / 4, jnp.asarray(2.0), random(8, N))
    return derivatives(f, (*qkv(batch=(2,)), *arrays))


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_a11_gradients_do_not_depend_on_block_sizes(blocks):
    assert_close(of_many_parts(jattn.Blockwise(*blocks)), once(lambda: of_many_parts("dense"), "a11"))


def distance_power(score, q_pos, kv_pos, params):
    """SSMax-like: the score is scaled by a learned power of the distance, plus a learned constant."""
    distance = jnp.abs(q_pos - kv_pos).astype(score.dtype) + 1
    return score * distance ** params["power"] + params["shift"]


@both
def test_a12_learned_score_function_with_scalar_vector_and_table(implementation):
    """One trace serves all values of the parameters."""
    traces = []

    @jax.jit
    def ours(params, x):
        traces.append(1)

        def value(params):
            given = (
                scores.Function(distance_power, params["function"]),
                scores.ALiBi(params["slopes"]),
                scores.RelativePosition(params["table"], max_distance=8),
            )
            return loss(jattn.attention(*x, scores=given, q_offset=2, implementation=implementation))

        return jax.grad(value)(params)

    relative = np.arange(S) - np.arange(T)[:, None] - 2
    small = np.minimum(np.abs(relative), 1)
    large = 2 + np.minimum((np.log(np.maximum(np.abs(relative), 2) / 2) / np.log(8 / 2) * 2).astype(int), 1)
    bucket = np.where(np.abs(relative) < 2, small, large) + 4 * (relative > 0)

    def wanted(params, x):
        def value(params):
            def score(s):
                s = s * (np.abs(relative) + 1.0) ** params["function"]["power"] + params["function"]["shift"]
                s = s - params["slopes"][:, None, None] * np.abs(relative)
                return s + jnp.moveaxis(params["table"][bucket], -1, 0)

            return loss(plain.attend(*x, score=score)[0])

        return jax.grad(value)(params)

    for seed in range(3):
        params = {
            "function": {"power": random(seed=seed) / 4, "shift": random(seed=seed + 3)},
            "slopes": random(N, seed=seed + 6),
            "table": random(8, N, seed=seed + 9),
        }
        x = qkv(seed=seed)
        assert_close(ours(params, x), once(lambda params=params, x=x: quick(wanted, params, x), "a12", seed))
    assert len(traces) == 1


@both
@pytest.mark.parametrize("K", [1, 2, 6])
@pytest.mark.parametrize(("T", "S"), [(1, 5), (7, 11), (13, 4)])
def test_a13_key_and_value_gradients_sum_over_their_group(implementation, K, T, S):
    x = qkv(T=T, S=S, K=K, batch=(2,))

    def ours(q, k, v):
        return loss(jattn.attention(q, k, v, implementation=implementation))

    def wanted(q, k, v):
        return loss(plain.attend(q, k, v)[0])

    exact = once(lambda: quick(jax.grad(wanted, (0, 1, 2)), *x), "a13", K, T, S)
    assert_close(quick(jax.grad(ours, (0, 1, 2)), *x), exact)


@both
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a14_narrow_gradients_stay_within_the_error_of_plain_code(implementation, dtype):
    """The budget is measured: twice the error of the plain code run in the narrow dtype itself."""
    x = qkv(T=37, S=53, dtype=dtype)

    def gradients(f, x):
        return [g.astype(float) for g in jax.jit(jax.grad(lambda *x: loss(f(*x)), (0, 1, 2)))(*x)]

    ours = gradients(lambda *x: jattn.attention(*x, implementation=implementation).astype(jnp.float32), x)
    narrow = once(lambda: gradients(lambda *x: plain.attend(*x)[0].astype(jnp.float32), x), "a14 narrow", dtype)
    exact = once(lambda: gradients(lambda *x: plain.attend(*x)[0], [a.astype(float) for a in x]), "a14", dtype)
    for got, near, true in zip(ours, narrow, exact, strict=True):
        budget = 2 * (np.abs(near - true).max() + float(jnp.finfo(dtype).eps) * np.abs(true).max())
        assert np.abs(got - true).max() <= budget


@both
def test_a1_second_order_through_the_lse_alone(implementation, x64):
    x = qkv(T=5, S=5)

    def cubed(f):
        return lambda q: (f(q) ** 3).sum()

    ours = cubed(lambda q: jattn.attention_with_lse(q, *x[1:], mask=masks.Causal(), implementation=implementation)[1])
    wanted = cubed(lambda q: plain.attend(q, *x[1:], np.tril(np.ones((5, 5), bool)))[1])

    def twice(f):
        return jax.grad(lambda q: (jax.grad(f)(q) ** 2).sum())

    assert_close(quick(twice(ours), x[0]), quick(twice(wanted), x[0]))
