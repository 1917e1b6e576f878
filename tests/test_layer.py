"""attend and context_vector: the whole way from rows to rows."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, scores
from tests import naive, reference
from tests.reference import assert_within_budget

D, C, H, V, E = 11, 17, 7, 5, 13
T, S = 13, 19

CONFIGS = {
    "one_head": {},
    "heads": {"num_heads": 3},
    "gqa": {"num_heads": 6, "num_kv_heads": 3},
    "mqa": {"num_heads": 5, "num_kv_heads": 1, "use_bias": True},
    "output": {"num_heads": 3, "out_dim": E},
    "output_bias": {"num_heads": 6, "num_kv_heads": 3, "out_dim": E, "use_bias": True},
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
some_configs = pytest.mark.parametrize("config", [CONFIGS["one_head"], CONFIGS["output_bias"]], ids=["one", "all"])
with_context = pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def parameters(config, cross=False, seed=0):
    """Parameters of the shapes that init gives them, as NumPy arrays; the biases are not zero."""
    sizes = {"qk_dim": H, "v_dim": V, "context_dim": C if cross else None}
    shapes = jax.eval_shape(lambda: jattn.init(jax.random.key(0), D, **sizes, **config))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


def rows(cross=False, batch=(), seed=0):
    """The arguments x, or x and context."""
    return (draw(*batch, T, D, seed=seed), draw(*batch, S, C, seed=seed)) if cross else (draw(*batch, T, D, seed=seed),)


def affine(x, w, b):
    """x `[..., I]`, w `[I, ...]`, b `[...]`"""
    y = (x @ w.reshape(len(w), -1)).reshape(*x.shape[:-1], *w.shape[1:])
    return y if b is None else y + b.reshape((1,) * (y.ndim - b.ndim) + b.shape)


def layer(attention, params, x, context=None):
    """The layer around a given attention, for NumPy and jax.numpy."""
    context = x if context is None else context
    q = affine(x, params.wq, params.bq)
    k = affine(context, params.wk, params.bk)
    v = affine(context, params.wv, params.bv)
    out = attention(q, k, v)[0]
    out = out.reshape(*out.shape[:-2], -1)
    return out if params.wo is None else affine(out, params.wo.reshape(-1, params.wo.shape[-1]), params.bo)


def double(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def check(got, params, *x):
    exact = layer(reference.attention, *double((params, *x)))
    assert_within_budget(got, exact, jax.jit(functools.partial(layer, naive.attention))(params, *x))


@every_config
@with_context
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_attend(config, cross, transform):
    params, x = parameters(config, cross), rows(cross)
    got = transform(jattn.attend)(params, *x)
    assert got.shape == (T, E if "out_dim" in config else config.get("num_heads", 1) * V)
    check(got, params, *x)


def test_the_heads_lie_side_by_side():
    params, (x,) = parameters(CONFIGS["gqa"]), rows()
    out = jattn.attention(*jattn.project(params, x))
    np.testing.assert_array_equal(jattn.attend(params, x), np.concatenate([out[:, n] for n in range(6)], axis=-1))


@some_configs
@with_context
def test_leading_batch_dims_and_vmap_over_any_axis_give_the_same_numbers(config, cross):
    params, x = parameters(config, cross), rows(cross, (2, 3))
    together = jattn.attend(params, *x)
    check(together, params, *x)
    nested = jax.vmap(jax.vmap(jattn.attend, (None, 0, *[0] * cross)), (None, 0, *[0] * cross))(params, *x)
    np.testing.assert_allclose(nested, together, rtol=1e-5, atol=1e-6)
    for axis in (0, 1, 2, -1):
        moved = [np.moveaxis(a[1], 0, axis) for a in x]
        got = jax.vmap(jattn.attend, (None, axis, *[axis] * cross))(params, *moved)
        np.testing.assert_allclose(got, together[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [jattn.attend, jattn.context_vector], ids=lambda f: f.__name__)
def test_vmap_over_any_axis_of_any_argument(function):
    arguments = [(parameters(CONFIGS["output_bias"], True, seed), *rows(True, seed=seed)) for seed in (0, 1)]
    leaves, tree = zip(*(jax.tree.flatten(one) for one in arguments), strict=True)
    first, names = leaves[0], [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(arguments[0])]

    @functools.cache
    def mapped(index, axis):
        in_axes = [axis if i == index else None for i in range(len(first))]
        return jax.vmap(lambda *leaves: function(*tree[0].unflatten(leaves)), in_axes)

    for index, name in enumerate(names):
        variants = [leaves[0][index], leaves[1][index] + np.float32(0.1)]
        right = [function(*tree[0].unflatten([*first[:index], one, *first[index + 1 :]])) for one in variants]
        for axis in (*range(variants[0].ndim + 1), -1):
            got = mapped(index, axis)(*first[:index], np.stack(variants, axis), *first[index + 1 :])
            np.testing.assert_allclose(got, np.stack(right), rtol=1e-5, atol=2e-6, err_msg=f"{name} along {axis}")


@some_configs
@with_context
def test_context_vector_is_the_sum_of_the_attended_rows(config, cross):
    params, x = parameters(config, cross), rows(cross, (2,))
    expected = np.asarray(jattn.attend(params, *x), np.float64).sum(axis=-2)
    got = jattn.context_vector(params, *x)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(jattn.context_vector)(params, *x), expected, rtol=1e-5, atol=1e-5)
    mapped = jax.vmap(jattn.context_vector, (None, 0, *[0] * cross))(params, *x)
    np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["dense", jattn.Blockwise(4, 3)], ids=str)
@pytest.mark.parametrize("name", ["one_head", "output_bias"])
@with_context
def test_derivatives_with_respect_to_everything(name, cross, implementation):
    arguments = (parameters(CONFIGS[name], cross), *rows(cross))
    cotangent = draw(*jattn.attend(*arguments).shape, seed=1)
    tangents = jax.tree.map(lambda a: draw(*a.shape, seed=2), arguments)

    def derivatives(function, arguments, cotangent, tangents):
        @jax.jit
        def both(arguments, cotangent, tangents):
            out, back = jax.vjp(function, *arguments)
            return jax.jvp(function, arguments, tangents)[1], jnp.sum(out, -2), back(cotangent)

        return both(arguments, cotangent, tangents)

    operands = (arguments, cotangent, tangents)
    got = derivatives(functools.partial(jattn.attend, implementation=implementation), *operands)
    plain = derivatives(functools.partial(layer, naive.attention), *operands)
    with jax.enable_x64(True):
        exact = derivatives(functools.partial(layer, naive.attention), *double(operands))
    jax.tree.map(assert_within_budget, got, exact, plain)


def test_gradient_of_context_vector():
    params, (x,) = parameters(CONFIGS["output"]), rows()
    cotangent = draw(E, seed=1)
    got = jax.jit(jax.grad(lambda p, x: jnp.sum(jattn.context_vector(p, x) * cotangent), (0, 1)))(params, x)
    exact = jax.grad(lambda p, x: jnp.sum(jattn.attend(p, x) * jnp.tile(cotangent, (T, 1))), (0, 1))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, exact)


OPTIONS = {
    "mask": {"mask": masks.Causal()},
    "mask_array": {"mask": np.tri(T, dtype=bool)},
    "scores": {"scores": (scores.SoftCap(0.5),)},
    "scale": {"scale": 2.0},
    "q_offset": {"q_offset": 3, "mask": masks.Window(2, 0)},
    "q_positions": {"q_positions": np.arange(T)[::-1].astype(np.int32), "mask": masks.Causal()},
    "kv_positions": {"kv_positions": np.arange(T)[::-1].astype(np.int32), "mask": masks.Causal()},
    "dropout": {"dropout": jattn.Dropout(0.5, jax.random.key(0))},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_reaches_attention(options):
    params, (x,) = parameters(CONFIGS["output"]), rows()
    got = jattn.attend(params, x, **options)
    heads = jattn.attention(*jattn.project(params, x), **options)
    np.testing.assert_allclose(got, np.einsum("tnv,nve->te", heads, params.wo), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jattn.context_vector(params, x, **options), np.sum(got, axis=0), rtol=1e-5, atol=1e-5)
    assert not np.allclose(got, jattn.attend(params, x), atol=1e-3)


def test_implementation_reaches_attention():
    params, (x,) = parameters(CONFIGS["output"]), rows()
    for implementation in ("dense", "blockwise", jattn.Blockwise(4, 3)):
        check(jattn.attend(params, x, implementation=implementation), params, x)
    for function in (jattn.attend, jattn.context_vector):
        with pytest.raises(ValueError, match="implementation"):
            function(params, x, implementation="fast")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_the_result_has_the_dtype_of_the_rows(dtype):
    with jax.enable_x64(dtype == "float64"):
        params, x, context = jax.tree.map(
            lambda a: jnp.asarray(a, dtype), (parameters(CONFIGS["output_bias"], True), *rows(True))
        )
        got = jattn.attend(params, x, context)
        assert got.dtype == jnp.dtype(dtype)
        assert jattn.context_vector(params, x, context).dtype == jnp.dtype(dtype)
        exact = layer(reference.attention, *double((params, x, context)))
        error = np.abs(np.asarray(got, np.float64) - exact).max() / np.abs(exact).max()
        assert error < 8 * float(jnp.finfo(dtype).eps)


def test_equal_shapes_trace_once():
    attend = jax.jit(chex.assert_max_traces(jattn.attend, n=1))
    for seed in range(3):
        attend(parameters(CONFIGS["gqa"], seed=seed), *rows(seed=seed), mask=masks.Causal())


def test_layers_in_a_scan():
    layers = [parameters({"num_heads": 3, "out_dim": D}, seed=seed) for seed in range(3)]
    (x,) = rows()
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    got, _ = jax.lax.scan(lambda x, params: (x + jattn.attend(params, x), None), x, stacked)
    exact = x.astype(np.float64)
    for params in layers:
        exact = exact + layer(reference.attention, double(params), exact)
    np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-5)


def test_training_is_a_tree_map():
    params, (x,) = parameters(CONFIGS["output_bias"]), rows()
    target = draw(T, E, seed=3)

    @jax.jit
    def step(params):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((jattn.attend(p, x) - target) ** 2))(params)
        return loss, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    losses = []
    for _ in range(20):
        loss, params = step(params)
        losses.append(float(loss))
    assert isinstance(params, jattn.Params)
    assert losses[-1] < 0.9 * losses[0]
    assert losses == sorted(losses, reverse=True)
