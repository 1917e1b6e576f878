"""Traps D1-D16: transformations, dropout, the system around. More modes: test_modes.py; memory: test_memory.py."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from jattn import masks, scores
from tests import cases, plain, reference, written
from tests.pictures import catalogue, draw
from tests.plain import assert_close, loss, once, qkv, quick

SMALL = jattn.Blockwise(block_q=3, block_kv=4)
both = pytest.mark.parametrize("implementation", ["dense", SMALL], ids=["dense", "blockwise"])
TOL = dict(rtol=2e-5, atol=2e-5)
T, S, N = 7, 11, 6
B = 3


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def random(*shape, seed=7):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def everything(implementation, *, query, key, value, bias, dense, ids, length, left, slopes, offset):
    """Each argument that can be an array, by name."""
    mask = (masks.Window(left, None) & masks.Segments(ids[:T], ids)) | masks.Dense(dense) & masks.Prefix(length)
    args = dict(mask=mask, scores=(scores.Bias(bias), scores.ALiBi(slopes)), q_offset=offset)
    return jattn.attention_with_lse(query, key, value, **args, implementation=implementation)


def arguments(seed):
    rng = np.random.default_rng(seed)
    query, key, value = qkv(seed=seed)
    return dict(
        query=query,
        key=key,
        value=value,
        bias=jnp.asarray(random(1, S, seed=seed)),
        dense=jnp.asarray(rng.random((N, T, 1)) < 0.5),
        ids=jnp.asarray(rng.integers(-1, 2, S), jnp.int32),
        length=jnp.asarray(rng.integers(2, S), jnp.int32),
        left=jnp.asarray(rng.integers(0, 4), jnp.int32),
        slopes=jnp.asarray(random(N, seed=seed)),
        offset=jnp.asarray(rng.integers(0, 5), jnp.int32),
    )


def floats(rng, *shape):
    return (rng.normal(size=shape),)


def ints(rng, low, high, *shape):
    return (rng.integers(low, high, shape, dtype=np.int32),)


def booleans(rng, *shape):
    return (rng.random(shape) < 0.7,)


KV_IDS = np.arange(S, dtype=np.int32) % 3
# Whatever can be an array, alone: a draw of it, and the arguments of attention that it makes.
ALONE = {
    "query": (lambda rng: floats(rng, T, N, 5), lambda x: dict(query=x)),
    "key": (lambda rng: floats(rng, S, 2, 5), lambda x: dict(key=x)),
    "value": (lambda rng: floats(rng, S, 2, 3), lambda x: dict(value=x)),
    "scale": (lambda rng: floats(rng), lambda x: dict(scale=x)),
    "segments": (
        lambda rng: (*ints(rng, 0, 3, T), *ints(rng, -1, 3, S)),
        lambda q, kv: dict(mask=masks.Segments(q, kv)),
    ),
    "segments_q": (lambda rng: ints(rng, 0, 3, N, T), lambda q: dict(mask=masks.Segments(q, KV_IDS))),
    "dense": (lambda rng: booleans(rng, N, T, S), lambda x: dict(mask=x)),
    "dense_of_rows": (lambda rng: booleans(rng, N, T, 1), lambda x: dict(mask=masks.Dense(x))),
    "dense_of_keys": (lambda rng: booleans(rng, 1, S), lambda x: dict(mask=masks.Dense(x))),
    "lengths": (
        lambda rng: (*ints(rng, 2, T), *ints(rng, 2, S)),
        lambda q, kv: dict(mask=masks.Lengths(q, kv), q_offset=0),
    ),
    "prefix": (lambda rng: ints(rng, 0, 6, N), lambda x: dict(mask=masks.Prefix(x) | masks.Causal())),
    "prompt": (lambda rng: ints(rng, 2, S), lambda x: dict(mask=masks.Prefix(x))),
    "window": (lambda rng: ints(rng, 0, 6), lambda left: dict(mask=masks.Window(left, 1))),
    "function_mask": (lambda rng: ints(rng, 2, 6), lambda n: dict(mask=masks.Function(cases.strided, n))),
    "bias": (lambda rng: floats(rng, N, T, S), lambda x: dict(scores=(scores.Bias(x),))),
    "bias_of_keys": (lambda rng: floats(rng, 1, S), lambda x: dict(scores=(scores.Bias(x),))),
    "cap": (lambda rng: (np.abs(*floats(rng)) + np.float32(1),), lambda x: dict(scores=(scores.SoftCap(x),))),
    "cap_per_head": (
        lambda rng: (np.abs(*floats(rng, N)) + np.float32(1),),
        lambda x: dict(scores=(scores.SoftCap(x),)),
    ),
    "slopes": (lambda rng: floats(rng, N), lambda x: dict(scores=(scores.ALiBi(x),))),
    "table": (
        lambda rng: floats(rng, 8, N),
        lambda x: dict(scores=(scores.RelativePosition(x, max_distance=11),)),
    ),
    "function": (
        lambda rng: (*floats(rng), *floats(rng)),
        lambda a, b: dict(scores=(scores.Function(cases.wave, {"height": a, "frequency": b}),)),
    ),
    "sink": (lambda rng: floats(rng, N), lambda x: dict(scores=(scores.Sink(x),))),
    "offset": (lambda rng: ints(rng, 0, 6), lambda n: dict(mask=masks.Causal(), q_offset=n)),
    "positions": (
        lambda rng: (*ints(rng, 0, 20, T), *ints(rng, 0, 20, S)),
        lambda q, kv: dict(mask=masks.Window(3, 3), q_positions=q, kv_positions=kv),
    ),
}


def out_lse_and_gradient(name, implementation, *arrays):
    """The gradient is the query's."""
    chosen = dict(zip(("query", "key", "value"), qkv(), strict=True)) | dict(q_offset=2) | ALONE[name][1](*arrays)
    if "q_positions" in chosen:
        del chosen["q_offset"]
    query = chosen.pop("query")

    def f(query):
        out, lse = jattn.attention_with_lse(query, **chosen, implementation=implementation)
        return loss(out, lse), (out, lse)

    gradient, (out, lse) = jax.grad(f, has_aux=True)(query)
    return out, lse, gradient


@functools.cache
def each_alone(name):
    """Every combination of two draws for each axis along which they will lie, and what each gives by itself."""
    rng = np.random.default_rng(0)
    levels = 1 + max(array.ndim for array in ALONE[name][0](rng))
    draws = {which: ALONE[name][0](rng) for which in np.ndindex(*levels * (2,))}
    dense = jax.jit(functools.partial(out_lse_and_gradient, name, "dense"))
    results = [dense(*arrays) for arrays in draws.values()]
    return levels, draws, jax.tree.map(lambda *x: np.stack(x).reshape((*levels * (2,), *x[0].shape)), *results)


@both
@pytest.mark.parametrize("name", ALONE)
def test_d1_vmap_over_each_argument_alone(implementation, name, x64):
    """Along every axis from the first to the last, -1, one vmap within another; None for all the others."""
    levels, draws, wanted = each_alone(name)
    ndims = [array.ndim for array in draws[levels * (0,)]]
    in_axes = [tuple(min(level, ndim) if level + 1 < levels else -1 for ndim in ndims) for level in range(levels)]

    def lay(index, which):
        level = len(which)
        if level == levels:
            return draws[which][index]
        return np.stack([lay(index, (*which, i)) for i in range(2)], in_axes[level][index])

    f = functools.partial(out_lse_and_gradient, name, implementation)
    for axes in reversed(in_axes):
        f = jax.vmap(f, axes)
    got = quick(f, *(lay(index, ()) for index in range(len(ndims))))
    chex.assert_trees_all_close(got, wanted, rtol=1e-10, atol=1e-10)


@both
def test_d1_vmap_over_all_arguments_and_batch_dims_agree(implementation):
    f = functools.partial(everything, implementation)
    several = [arguments(seed) for seed in range(B)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)
    dense = jax.jit(functools.partial(everything, "dense"))
    wanted = jax.tree.map(lambda *x: jnp.stack(x), *[dense(**given) for given in several])
    chex.assert_trees_all_close(jax.jit(jax.vmap(lambda given: f(**given)))(stacked), wanted, rtol=1e-5, atol=1e-5)


TRANSFORMS = {
    "vmap(grad)": lambda f: jax.vmap(jax.grad(f)),
    "vmap(vmap(grad))": lambda f: lambda x: jax.vmap(jax.vmap(jax.grad(f)))(jnp.stack([x, x + 1])),
    "vmap(jvp)": lambda f: jax.vmap(lambda x: jax.jvp(f, (x,), (jnp.cos(x),))),
    "jacobian of vmap": lambda f: jax.jacrev(jax.vmap(f)),
    "vmap(jacfwd(grad))": lambda f: jax.vmap(jax.jacfwd(jax.grad(f))),
    "vmap(hessian)": lambda f: jax.vmap(jax.hessian(f)),
    "jacrev(jacrev)": lambda f: lambda x: jax.jacrev(jax.jacrev(f))(x[0]),
    "jacfwd(jacfwd)": lambda f: lambda x: jax.jacfwd(jax.jacfwd(f))(x[0]),
}


@both
@pytest.mark.parametrize("name", TRANSFORMS)
def test_d2_nested_transforms(implementation, name, x64):
    x, unravel = ravel_pytree(qkv(T=2, S=3, N=2, K=1, H=3, V=2))
    xs = jnp.stack([x, jnp.sin(3 * x)])

    def ours(x):
        return loss(
            *jattn.attention_with_lse(*unravel(x), mask=masks.Causal(), q_offset=1, implementation=implementation)
        )

    def wanted(x):
        return loss(*plain.attend(*unravel(x), draw(2, 3, lambda i, j: j <= i + 1)))

    transform = TRANSFORMS[name]
    assert_close(quick(transform(ours), xs), once(lambda: quick(transform(wanted), xs), "d2", name))


@both
@pytest.mark.parametrize("through", ["attention", "dot_product_attention"])
def test_d3_vmap_of_vjp_with_a_broadcast_mask_and_bias(implementation, through):
    """jax#23701: vmap over the vjp, mask and bias with broadcast axes, batch of one."""
    q, k, v = qkv(batch=(2, 1), V=5)
    mask, bias = jnp.asarray(draw(1, S, lambda i, j: j < 8))[None, None], jnp.asarray(random(1, N, 1, S))

    def f(q, k, v, bias):
        if through == "attention":
            return jattn.attention(q, k, v, mask=mask, scores=(scores.Bias(bias),), implementation=implementation)
        name = implementation if implementation == "dense" else "blockwise"
        return jattn.dot_product_attention(q, k, v, bias, mask, implementation=name)

    @jax.jit
    def pull(q, k, v):
        def one(q, k, v):
            out, vjp = jax.vjp(f, q, k, v, bias)
            return vjp(jnp.cos(out))

        return jax.vmap(one)(q, k, v)

    @jax.jit
    def wanted(q, k, v):
        out, vjp = jax.vjp(lambda q, k, v, b: plain.attend(q, k, v, mask, lambda s: s + b)[0], q, k, v, bias)
        return vjp(jnp.cos(out))

    for i in range(2):
        got = jax.tree.map(lambda x, i=i: x[i], pull(q, k, v))
        exact = once(lambda i=i: wanted(q[i], k[i], v[i]), "d3", i)
        chex.assert_trees_all_close(got, exact, rtol=1e-4, atol=1e-4)


policies = jax.checkpoint_policies
POLICIES = {
    "default": None,
    "everything": policies.everything_saveable,
    "nothing": policies.nothing_saveable,
    "dots": policies.dots_saveable,
    "dots_without_batch": policies.dots_with_no_batch_dims_saveable,
    "any_names_but_these": policies.save_any_names_but_these("nothing"),
    "only_these_names": policies.save_only_these_names("out"),
    "none_of_these_names": policies.save_only_these_names("nothing"),
    "anything_except_these_names": policies.save_anything_except_these_names("out"),
    "offload": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["out"],
        names_which_can_be_offloaded=[],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "offload what attention needs": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["jattn_out", "jattn_lse"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def remembered(q, k, v, implementation):
    """A loss with dropout, whose output has a name."""
    mask = masks.Prefix(9) & masks.Segments(np.arange(T, dtype=np.int32) // 4, np.arange(S, dtype=np.int32) // 4)
    options = dict(mask=mask, dropout=jattn.Dropout(0.2, jax.random.key(3)), implementation=implementation)
    out, lse = jattn.attention_with_lse(q, k, v, **options)
    return loss(checkpoint_name(out, "out"), lse)


@both
@pytest.mark.parametrize("policy", POLICIES)
def test_d4_gradient_of_a_checkpoint_under_every_policy(implementation, policy):
    f, dense = (functools.partial(remembered, implementation=chosen) for chosen in (implementation, "dense"))
    got = quick(jax.grad(jax.checkpoint(f, policy=POLICIES[policy]), (0, 1, 2)), *qkv())
    straight = once(lambda: quick(jax.grad(dense, (0, 1, 2)), *qkv()), "d4")
    chex.assert_trees_all_close(got, straight, rtol=1e-5, atol=1e-5)


LONG = 8195
LARGE = {
    name: mask
    for name, (mask, _) in catalogue(LONG, 1).items()
    if name not in ("segments", "packed", "dense", "tangle")
} | {"packed": masks.Causal() & masks.Segments(np.arange(LONG, dtype=np.int32) // 500)}
MODES = {
    "forward": lambda f: f,
    "grad": lambda f: jax.grad(f, (0, 1, 2)),
    "jvp": lambda f: lambda *x: jax.jvp(f, x, x),
    "forward over reverse": lambda f: lambda *x: jax.jvp(jax.grad(f, (0, 1, 2)), x, x),
    "reverse over reverse": lambda f: jax.grad(lambda *x: sum(map(loss, jax.grad(f, (0, 1, 2))(*x))), (0, 1, 2)),
    "grad of checkpoint": lambda f: jax.grad(jax.checkpoint(f), (0, 1, 2)),
}


def largest(f, length):
    """The largest array in the program of f at this length. Nothing is compiled."""
    x = [jax.ShapeDtypeStruct((length, heads, 2), jnp.float32) for heads in (2, 1, 1)]
    results = [v.aval for eqn in written.equations(f, *x) for v in eqn.outvars]
    return max(math.prod(aval.shape) for aval in results if hasattr(aval, "shape"))


def blockwise_loss(q, k, v, **options):
    """A loss of blocks of 64 x 64."""
    return loss(*jattn.attention_with_lse(q, k, v, **options, implementation=jattn.Blockwise(64, 64)))


@pytest.mark.parametrize("mode", MODES)
def test_d5_no_residual_and_no_intermediate_is_quadratic(mode):
    """Everything that the program computes is linear in T."""
    f = functools.partial(blockwise_loss, mask=masks.Causal(), scores=(scores.SoftCap(5.0), scores.ALiBi(jnp.ones(2))))
    assert largest(MODES[mode](f), LONG) < 40 * LONG


def test_d5_gradient_of_a_scan_over_layers_is_not_quadratic():
    def f(q, k, v):
        def layer(x, _):
            mask, blocks = masks.Window(9, 0), jattn.Blockwise(64, 64)
            return x + jattn.attention(x, k, v, mask=mask, implementation=blocks), None

        return loss(jax.lax.scan(layer, q, length=3)[0])

    assert largest(jax.grad(f, (0, 1, 2)), LONG) < 40 * LONG


@pytest.mark.parametrize("name", LARGE)
def test_d14_no_mask_makes_the_gradient_quadratic(name):
    """Compiled memory is measured in test_memory.py; this is the program itself."""
    f = functools.partial(blockwise_loss, mask=LARGE[name])
    assert largest(MODES["grad"](f), LONG) < 40 * LONG


def test_d5_the_ruler_sees_a_quadratic_program():
    dense = lambda *x: loss(*jattn.attention_with_lse(*x, implementation="dense"))  # noqa: E731
    assert largest(jax.grad(dense), LONG) >= LONG**2


def mesh(kind=AxisType.Auto):
    """Eight devices in a row; Explicit is what jax.make_mesh gives by default."""
    return jax.make_mesh((8,), ("x",), axis_types=(kind,))


KEY = jax.random.key(11)


def dropped(q, k, v, *, implementation="dense", key=KEY, rate=0.4, **options):
    return jattn.attention(q, k, v, dropout=jattn.Dropout(rate, key), implementation=implementation, **options)


@both
def test_d6_dropout_gradient_uses_the_mask_of_the_forward(implementation, x64):
    """Finite differences along one direction, at a fixed key."""
    x = qkv()
    dx = jax.tree.map(jnp.cos, x)

    def f(x):
        return loss(dropped(*x, implementation=implementation))

    @jax.jit
    def run(x, dx):
        along = sum((g * d).sum() for g, d in zip(jax.grad(f)(x), dx, strict=True))
        up, down = (f(jax.tree.map(lambda a, d, s=s: a + s * d, x, dx)) for s in (1e-5, -1e-5))
        return along, jax.jvp(f, (x,), (dx,))[1], (up - down) / 2e-5

    along, tangent, difference = run(x, dx)
    np.testing.assert_allclose(along, difference, rtol=1e-7)
    np.testing.assert_allclose(along, tangent, rtol=1e-10)


@pytest.mark.parametrize("blocks", [(3, 4), (2, 11), (7, 1), (64, 64)], ids=str)
def test_d6_dropout_is_the_same_at_every_block_size(blocks):
    x = qkv(batch=(2,))
    got = quick(dropped, *x, implementation=jattn.Blockwise(*blocks))
    np.testing.assert_allclose(got, once(lambda: quick(dropped, *x), "d6 blocks"), **TOL)


@both
def test_d6_dropout_is_the_same_under_remat_and_vmap(implementation):
    """Under vmap each example is on its own: what it gets is what it would get without."""
    x = qkv(batch=(2,))
    f = functools.partial(dropped, implementation=implementation)
    again = jax.jit(jax.grad(jax.checkpoint(lambda *x: loss(f(*x))), (0, 1, 2)))(*x)
    straight = once(lambda: quick(jax.grad(lambda *x: loss(dropped(*x)), (0, 1, 2)), *x), "d6")
    chex.assert_trees_all_close(again, straight, rtol=1e-4, atol=1e-4)
    mapped = quick(jax.vmap(f), *x)
    for i in range(2):
        np.testing.assert_allclose(mapped[i], quick(f, *(a[i] for a in x)), **TOL)
    together = quick(f, *x)
    np.testing.assert_allclose(together[0], mapped[0], **TOL)
    assert np.abs(together[1] - mapped[1]).max() > 0.1, "each example of a batch has a mask of its own"


@both
@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x")], ids=["batch", "heads"])
def test_d6_dropout_is_the_same_when_sharded(implementation, spec):
    x = qkv(T=3, S=5, N=8, K=8, batch=(8,))
    shards = jax.device_put(x, NamedSharding(mesh(), spec))
    np.testing.assert_allclose(quick(dropped, *shards, implementation=implementation), quick(dropped, *x), **TOL)


def test_d6_dropout_follows_positions_not_chunks():
    q, k, v = qkv()
    whole = quick(dropped, q, k, v, q_offset=4)
    chunks = [quick(dropped, q[i : i + 3], k, v, q_offset=4 + i, implementation=SMALL) for i in range(0, T, 3)]
    np.testing.assert_allclose(jnp.concatenate(chunks), whole, **TOL)


@both
def test_d7_each_key_drops_its_own_without_retracing(implementation):
    traces = []

    @jax.jit
    def f(key):
        traces.append(1)
        return dropped(*qkv(), implementation=implementation, key=key)

    outs = [f(jax.random.key(seed)) for seed in range(3)]
    assert all(np.abs(outs[i] - outs[j]).max() > 0.1 for i, j in [(0, 1), (0, 2), (1, 2)])
    np.testing.assert_array_equal(f(jax.random.key(0)), outs[0])
    assert len(traces) == 1


def test_d7_heads_batches_queries_and_keys_drop_independently():
    q, k = jnp.zeros((2, 64, 4, 1)), jnp.zeros((2, 64, 2, 1))
    kept = np.asarray(quick(jattn.attention_weights, q, k, dropout=jattn.Dropout(0.5, KEY)) > 0, float)
    assert abs(kept.mean() - 0.5) < 0.01
    for axis in range(4):
        rolled = np.roll(kept, 1, axis)
        assert abs(np.corrcoef(kept.ravel(), rolled.ravel())[0, 1]) < 0.02, f"{axis=}"


@both
def test_d8_dropout_is_used_and_keeps_the_mean(implementation):
    x = qkv()
    plain_out = quick(jattn.attention, *x, implementation=implementation)
    f = functools.partial(dropped, implementation=implementation)
    np.testing.assert_array_equal(quick(f, *x, rate=0.0), plain_out)
    assert (quick(f, *x, rate=0.999) == 0).mean() > 0.9
    many = jax.jit(jax.vmap(lambda key: f(*x, key=key, rate=0.3)))(jax.random.split(KEY, 2000))
    assert (np.abs(many.mean(0) - plain_out) <= 5 * many.std(0) / np.sqrt(2000) + 1e-6).all()


@both
def test_d8_what_is_kept_is_rescaled(implementation, x64):
    """Weights are 0 or exactly 1 / (1 - rate) times as large; the lse does not know of it."""
    q, k, _ = qkv()
    v = jnp.broadcast_to(jnp.eye(S)[:, None], (S, 2, S))
    weights, lse = quick(jattn.attention_with_lse, q, k, v, implementation=implementation)
    out, dropped_lse = quick(
        jattn.attention_with_lse, q, k, v, dropout=jattn.Dropout(0.3, KEY), implementation=implementation
    )
    kept = np.asarray(out) > 0
    assert 0.6 < kept.mean() < 0.8
    np.testing.assert_allclose(np.asarray(out)[kept], np.asarray(weights)[kept] / 0.7, rtol=1e-13)
    np.testing.assert_array_equal(lse, dropped_lse)


@both
def test_d9_the_same_inputs_give_the_same_bits(implementation):
    x = qkv(T=31, S=43, batch=(2,))

    def f(x):
        return loss(*jattn.attention_with_lse(*x, mask=masks.Causal(), q_offset=12, implementation=implementation))

    chex.assert_trees_all_equal(jax.jit(jax.value_and_grad(f))(x), jax.jit(jax.value_and_grad(f))(x))


def loops(f, *x):
    return any(eqn.primitive.name in ("scan", "while") for eqn in written.equations(f, *x))


def test_d10_the_implementation_that_is_named_is_the_one_that_runs():
    """Loops over blocks show it in the program, whatever the size; explain says the same."""
    small, large = qkv(), [jax.ShapeDtypeStruct((8192, heads, 8), jnp.float32) for heads in (4, 2, 2)]
    for x in (small, large):
        for name, looping in (("dense", False), ("blockwise", True)):
            f = functools.partial(jattn.attention, implementation=name)
            assert loops(f, *x) is looping
            assert jattn.explain(*x, implementation=name).implementation == name
    assert loops(functools.partial(jattn.attention, implementation=SMALL), *small)
    assert jattn.explain(*small, implementation=SMALL).block_sizes[-2:] == (3, 4)
    assert jattn.explain(*small).implementation == "dense" and not loops(jattn.attention, *small)
    assert jattn.explain(*large).implementation == "blockwise" and loops(jattn.attention, *large)
    with pytest.raises(ValueError, match="implementation"):
        jattn.attention(*small, implementation="flash")


COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@both
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("axis", ["batch", "heads"])
def test_d11_sharded_batch_or_heads_need_no_collective(implementation, axis, kind):
    """Neither the output nor its gradient, with a bias that has a batch of one and does not divide."""
    spec = P("x") if axis == "batch" else P(None, None, "x")
    x = qkv(T=5, S=7, N=16, K=8, batch=(8,))
    bias = jnp.asarray(random(1, 1, 5, 7))

    def f(q, k, v):
        args = dict(mask=masks.Prefix(5), scores=(scores.Bias(bias),), implementation=implementation)
        out, vjp = jax.vjp(lambda *x: jattn.attention(*x, **args), q, k, v)
        return out, vjp(jnp.cos(out))

    with jax.set_mesh(mesh(kind)):
        sharding = NamedSharding(mesh(kind), spec)
        shards = jax.device_put(x, sharding)
        compiled = jax.jit(f, out_shardings=sharding).lower(*shards).compile()
        got = jax.device_get(compiled(*shards))
    assert not [name for name in COLLECTIVES if name in compiled.as_text()]
    chex.assert_trees_all_close(got, jax.jit(f)(*x), rtol=1e-5, atol=1e-5)


@both
def test_d11_shard_map(implementation):
    x = qkv(T=5, S=7, N=4, K=2, batch=(8,))

    def f(q, k, v):
        return jattn.attention(q, k, v, mask=masks.Causal(), q_offset=2, implementation=implementation)

    mapped = jax.jit(jax.shard_map(f, mesh=mesh(), in_specs=P("x"), out_specs=P("x")))
    np.testing.assert_allclose(mapped(*x), jax.jit(f)(*x), **TOL)


def test_d11_gradients_under_shard_map_are_summed_outside_of_all_branches():
    """Not every device takes every branch: a sum over devices within one would wait for ever."""
    devices, S = 8, 24
    k, v = jax.random.normal(jax.random.key(0), (2, S, 1, 3))
    q, scale = jax.random.normal(jax.random.key(1), (devices * S, 1, 3)), jnp.float32(0.7)
    kv_ids = jnp.arange(S, dtype=jnp.int32) // 3
    q_ids = jnp.concatenate([jnp.minimum(kv_ids, device) for device in range(devices)])

    def attend(q, k, v, scale, q_ids, implementation=SMALL):
        mask = masks.Segments(q_ids, kv_ids)
        return jattn.attention(q, k, v, scale=scale, mask=mask, implementation=implementation)

    def loss(f, *x):
        return (f(*x, q_ids) ** 2).sum()

    mapped = jax.shard_map(attend, mesh=mesh(), in_specs=(P("x"), P(), P(), P(), P("x")), out_specs=P("x"))
    plain = functools.partial(attend, implementation="dense")
    compiled = jax.jit(jax.grad(functools.partial(loss, mapped), (0, 1, 2, 3))).lower(q, k, v, scale).compile()
    within, entry = compiled.as_text().split("\nENTRY ")
    assert "all-reduce(" in entry and "all-reduce(" not in within
    want = jax.jit(jax.grad(functools.partial(loss, plain), (0, 1, 2, 3)))(q, k, v, scale)
    chex.assert_trees_all_close(compiled(q, k, v, scale), want, rtol=1e-4, atol=1e-4)


@both
@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (2, 1, 3), (1, 1, 2, 3)], ids=str)
def test_d12_any_number_of_leading_dims(implementation, batch):
    x = qkv(batch=batch)
    kept = np.random.default_rng(0).random((*batch, 1, T, S)) < 0.7
    attend = jax.jit(lambda *x: jattn.attention_with_lse(*x, mask=jnp.asarray(kept), implementation=implementation))
    out, lse = attend(*x)
    exact = reference.attention(*x, keep=kept)
    np.testing.assert_allclose(out, exact[0], **TOL)
    np.testing.assert_allclose(lse, exact[1], **TOL)


def test_d12_dot_product_attention_takes_them_too():
    x = qkv(batch=(2, 1, 3), V=5)
    kept = np.random.default_rng(0).random((2, 1, 3, 1, T, S)) < 0.7
    np.testing.assert_allclose(jattn.dot_product_attention(*x, mask=kept), reference.attention(*x, keep=kept)[0], **TOL)


@both
def test_d13_the_x64_flag_changes_no_dtype(implementation, x64):
    """float32 stays float32; int64 ids, lengths, positions and offsets are welcome."""
    x = qkv(dtype=jnp.float32)
    ids = np.random.default_rng(0).integers(-1, 2, S)
    mask = masks.Segments(jnp.asarray(ids[:T]), jnp.asarray(ids)) & masks.Prefix(jnp.asarray(9)) & masks.Causal()
    assert mask is not None and jnp.asarray(ids).dtype == jnp.int64
    for at in (
        dict(q_offset=jnp.asarray(4)),
        dict(q_offset=4),
        dict(q_positions=jnp.arange(T) + 4, kv_positions=jnp.arange(S)),
    ):
        given = scores.ALiBi(jnp.ones(N, jnp.float32)), scores.RelativePosition(jnp.ones((32, N), jnp.float32))

        @jax.jit
        def f(*x, at=at, given=given):
            attend = functools.partial(
                jattn.attention_with_lse, mask=mask, scores=given, implementation=implementation, **at
            )

            def total(*x):
                result = attend(*x)
                return loss(*result), result

            return jax.grad(total, has_aux=True)(*x)

        gradient, (out, lse) = f(*x)
        assert out.dtype == lse.dtype == gradient.dtype == jnp.float32
        keep = draw(T, S, lambda i, j: ids[i] == ids[j] >= 0 and j < 9 and j <= i + 4)
        distance = np.abs(np.arange(T)[:, None] + 4 - np.arange(S))
        exact = reference.attention(*x, keep=keep, scores=[lambda s, head, d=distance: s - d + 1])
        np.testing.assert_allclose(out, exact[0], **TOL)


# What is wrong, and patterns of the message: the argument, its axes, what was wanted of it, and the shape that came.
WRONG = {
    "heads first": (dict(query=(2, 6, 7, 5)), ("key/value heads", "query heads", r"\bK=2\b", r"\bN=7\b")),
    "one head fewer": (dict(query=(2, 7, 5, 5)), ("key/value heads", "query heads", r"\bK=2\b", r"\bN=5\b")),
    "other width": (
        dict(key=(2, 11, 2, 3)),
        ("^key ", r"\[\.\.\., S, K, H\]", "= .2, 11, 2, 5.", "got shape .2, 11, 2, 3."),
    ),
    "other keys": (
        dict(value=(2, 13, 2, 3)),
        ("^value ", r"\[\.\.\., S, K, V\]", "= .2, 11, 2, 3.", "got shape .2, 13, 2, 3."),
    ),
    "other heads": (
        dict(value=(2, 11, 3, 3)),
        ("^value ", r"\[\.\.\., S, K, V\]", "= .2, 11, 2, 3.", "got shape .2, 11, 3, 3."),
    ),
    "other batch": (
        dict(key=(3, 11, 2, 5)),
        ("^key ", r"\[\.\.\., S, K, H\]", "= .2, 11, 2, 5.", "got shape .3, 11, 2, 5."),
    ),
    "no heads": (
        dict(query=(7, 5), key=(11, 5), value=(11, 3)),
        ("^query ", r"\[\.\.\., T, N, H\]", "got shape .7, 5."),
    ),
}


@both
@pytest.mark.parametrize("name", WRONG)
def test_d15_an_error_names_the_argument_its_axes_and_what_came(implementation, name):
    changed, says = WRONG[name]
    shapes = dict(query=(2, 7, 6, 5), key=(2, 11, 2, 5), value=(2, 11, 2, 3)) | changed
    with pytest.raises(ValueError) as error:
        jattn.attention(*(jnp.ones(shape) for shape in shapes.values()), implementation=implementation)
    for pattern in says:
        assert re.search(pattern, str(error.value)), f"{pattern!r} is not in: {error.value}"


@pytest.mark.parametrize("H", [1, 3, 5])
def test_d16_default_scale_is_the_same_in_every_implementation(H):
    x = qkv(H=H)
    exact = reference.attention(*x, scale=1 / np.sqrt(H))[0]
    for implementation in (None, "dense", "blockwise", SMALL):
        np.testing.assert_allclose(quick(jattn.attention, *x, implementation=implementation), exact, **TOL)
        explicit = quick(jattn.attention, *x, scale=H**-0.5, implementation=implementation)
        np.testing.assert_allclose(explicit, exact, **TOL)
    assert "1/sqrt(H)" in jattn.attention.__doc__.replace(" ", "").replace("√H", "sqrt(H)")
