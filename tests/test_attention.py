"""attention: every implementation on every case, plain and under jit, vmap, grad and jvp, against the oracle."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks
from tests import cases, naive, reference
from tests.cases import CASES
from tests.plain import quick
from tests.reference import assert_within_budget

# Blocks that divide nothing and are smaller than everything, so that there are several of them, and ragged ones.
IMPLEMENTATIONS = {"dense": "dense", "blockwise": jattn.Blockwise(block_q=4, block_kv=3)}

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def arguments(case):
    """All that can be differentiated: query, key, value and the arrays of the scores."""
    return (*cases.inputs(case), cases.score_arrays(case))


def directions(case):
    """A tangent for the arguments and a cotangent for (out, lse)."""
    args = arguments(case)
    rng = np.random.default_rng(case.seed + 1)
    tangents = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), args)
    lse_dtype = np.float64 if case.dtype == "float64" else np.float32
    out = rng.normal(size=(*case.B, case.T, case.N, case.V)).astype(args[0].dtype)
    return tangents, (out, rng.normal(size=out.shape[:-1]).astype(lse_dtype))


@functools.cache
def exact(case):
    """(out, lse, weights) from NumPy."""
    return reference.attention(*cases.inputs(case), **cases.oracle(case))


@functools.cache
def plain(case):
    """(out, lse) from naive code at the precision of the case."""
    with cases.precision(case):
        return jax.jit(lambda *args: naive.attention(*args, **cases.oracle(case, xp=jnp)))(*cases.inputs(case))


@functools.cache
def plain_derivatives(case):
    """Tangents of (out, lse), and gradients, from naive code: in float64, and at the precision of the case twice."""

    def derivatives(args, tangents, cotangents):
        def attention(q, k, v, arrays):
            return naive.attention(q, k, v, **cases.oracle(case, arrays, jnp))

        return jax.jvp(attention, args, tangents)[1], jax.vjp(attention, *args)[1](cotangents)

    operands = (arguments(case), *directions(case))
    with jax.enable_x64(True):
        right = jax.jit(derivatives)(*jax.tree.map(lambda a: a.astype(np.float64), operands))
    with cases.precision(case):
        rounded = again = jax.jit(derivatives)(*operands)
        if any(np.ndim(a) == 0 for a in jax.tree.leaves(right)):
            again = jax.jit(derivatives, compiler_options={"xla_backend_optimization_level": 3})(*operands)
    return right, rounded, again


def assert_outputs(got, case):
    for one, right, rounded in zip(got, exact(case), plain(case), strict=False):
        assert_within_budget(one, right, rounded)


def assert_derivatives(got, case, which):
    # Plain code in float64 is its own truth, without any error.
    compare = functools.partial(assert_within_budget, slack=10 if case.dtype == "float64" else 3)
    jax.tree.map(compare, got, *(derivatives[which] for derivatives in plain_derivatives(case)))


def attention_of(case, implementation):
    def attention(q, k, v, arrays):
        return jattn.attention_with_lse(q, k, v, **cases.options(case, arrays), implementation=implementation)

    return attention


@every_case
@every_implementation
def test_plain(case, implementation):
    with cases.precision(case):
        out, lse = attention_of(case, implementation)(*arguments(case))
        assert_outputs((out, lse), case)
    assert out.dtype == jnp.dtype(case.dtype)
    assert lse.dtype == (jnp.float64 if case.dtype == "float64" else jnp.float32)


@every_case
@every_implementation
def test_jit_with_every_option_an_argument(case, implementation):
    attention = jax.jit(functools.partial(jattn.attention_with_lse, implementation=implementation))
    with cases.precision(case):
        assert_outputs(attention(*cases.inputs(case), **cases.options(case)), case)


@every_case
@every_implementation
def test_vmap_over_every_array(case, implementation):
    several = [case._replace(seed=seed) for seed in (0, 1)]
    with cases.precision(case):
        args = [(cases.inputs(one), cases.options(one)) for one in several]
        args, options = jax.tree.map(lambda *a: (np if isinstance(a[0], np.ndarray | int) else jnp).stack(a), *args)
        attention = functools.partial(jattn.attention_with_lse, implementation=implementation)
        got = jax.jit(jax.vmap(lambda args, options: attention(*args, **options)))(args, options)
        for i, one in enumerate(several):
            assert_outputs([a[i] for a in got], one)


@every_case
@every_implementation
def test_grad_and_jvp(case, implementation):
    f = attention_of(case, implementation)

    @jax.jit
    def run(args, tangents, cotangents):
        return jax.jvp(f, args, tangents), jax.vjp(f, *args)[1](cotangents)

    with cases.precision(case):
        (got, tangents), gradients = run(arguments(case), *directions(case))
        assert_outputs(got, case)
        assert_derivatives(tangents, case, which=0)
        assert_derivatives(gradients, case, which=1)


@every_case
def test_weights(case):
    q, k, _ = cases.inputs(case)
    right = exact(case)[2]
    with cases.precision(case):
        got = jattn.attention_weights(q, k, **cases.options(case))
        assert got.dtype == (jnp.float64 if case.dtype == "float64" else jnp.float32)
        eps = float(jnp.finfo(got.dtype).eps)
        np.testing.assert_allclose(got, right, rtol=32 * eps, atol=4 * eps)
        if case.T > 1:
            rows = [case.T - 1, 0, 2]
            got = jattn.attention_weights(q, k, **cases.options(case), rows=rows)
            np.testing.assert_allclose(got, right[..., rows, :], rtol=32 * eps, atol=4 * eps)


def test_weights_under_jit_vmap_and_grad():
    case = CASES["alibi"]
    q, k, _ = cases.inputs(case)
    right = exact(case)[2]

    def weights(q, k, rows=None):
        return jattn.attention_weights(q, k, rows=rows, **cases.options(case))

    np.testing.assert_allclose(jax.jit(weights)(q, k), right, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jax.jit(weights)(q, k, jnp.array([2, 5])), right[:, [2, 5]], rtol=1e-5, atol=1e-7)
    for axis in (0, 1, 2, -1):
        got = jax.vmap(weights, in_axes=(axis, None))(np.stack([q, q], axis), k)
        np.testing.assert_allclose(got, np.stack([right, right]), rtol=1e-5, atol=1e-7)
        got = jax.vmap(weights, in_axes=(None, axis))(q, np.stack([k, k], axis))
        np.testing.assert_allclose(got, np.stack([right, right]), rtol=1e-5, atol=1e-7)
    _, _, v = cases.inputs(case)
    values = np.repeat(v, case.N // case.K, axis=1)
    through_weights = jax.grad(lambda q: jnp.sum(jnp.einsum("nts,snv->tnv", weights(q, k), values) ** 2))(q)
    directly = jax.grad(lambda q: jnp.sum(jattn.attention(q, k, v, **cases.options(case)) ** 2))(q)
    np.testing.assert_allclose(through_weights, directly, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gqa", "causal", "segments", "bias", "dropout", "bfloat16"])
def test_the_choice_of_implementation_does_not_change_the_answer(name):
    case = CASES[name]
    args, options = cases.inputs(case), cases.options(case)
    assert_outputs(jattn.attention_with_lse(*args, **options), case)
    for implementation in ("dense", "blockwise", None):
        out = jattn.attention(*args, **options, implementation=implementation)
        assert_within_budget(out, exact(case)[0], plain(case)[0])


def test_known_answer():
    q, k = np.ones((1, 1, 1), np.float32), np.log(np.float32([1.0, 3.0])).reshape(2, 1, 1)
    v = np.float32([0.0, 4.0]).reshape(2, 1, 1)  # logits log 1, log 3: weights 1/4, 3/4
    for implementation in IMPLEMENTATIONS.values():
        out, lse = jattn.attention_with_lse(q, k, v, scale=1.0, implementation=implementation)
        np.testing.assert_allclose(out, [[[3.0]]], rtol=1e-6)
        np.testing.assert_allclose(lse, [[np.log(4.0)]], rtol=1e-6)
    np.testing.assert_allclose(jattn.attention_weights(q, k, scale=1.0), [[[0.25, 0.75]]], rtol=1e-6)


def test_large_logits_do_not_overflow():
    q, k = np.full((1, 1, 1), 1e4, np.float32), np.float32([1e4, 1e4, -1e4]).reshape(3, 1, 1)
    v = np.float32([2.0, 4.0, 8.0]).reshape(3, 1, 1)
    for implementation in IMPLEMENTATIONS.values():
        out = jattn.attention(q, k, v, implementation=implementation)
        np.testing.assert_allclose(out, [[[3.0]]], rtol=1e-6)
    np.testing.assert_array_equal(jattn.attention_weights(q, k), [[[0.5, 0.5, 0.0]]])


@pytest.mark.parametrize("shape", ["S", "1S", "T1", "TS", "1TS", "NTS", "N1S", "B11S", "BNTS", "B1T1", "1111"])
def test_a_boolean_mask_broadcasts_to_the_logits(shape):
    case = CASES["bias"]._replace(scores=())
    sizes = {"B": 2, "T": case.T, "S": case.S, "N": case.N, "1": 1}
    mask = np.random.default_rng(0).random([sizes[letter] for letter in shape]) < 0.6
    q, k, v = cases.inputs(case)
    right = reference.attention(q, k, v, keep=mask)
    rounded = naive.attention(q, k, v, keep=mask)
    for implementation in IMPLEMENTATIONS.values():
        for one in (mask, masks.Dense(mask)):
            got = jattn.attention_with_lse(q, k, v, mask=one, implementation=implementation)
            assert_within_budget(got[0], right[0], rounded[0])
            assert_within_budget(got[1], right[1], rounded[1])


@every_implementation
def test_leading_batch_dims_and_vmap_give_the_same_numbers(implementation):
    case = CASES["two_batch_dims"]._replace(scores=("bias_full",))
    bias = cases.score_arrays(case)["bias_full"]["array"]

    def attention(q, k, v, keep, bias):
        scores = (jattn.scores.Bias(bias), jattn.scores.SoftCap(2.0))
        return jattn.attention_with_lse(q, k, v, mask=keep, scores=scores, implementation=implementation)

    operands = (*cases.inputs(case), cases.keep(case), bias)
    batched = quick(attention, *operands)
    for mapped in (jax.vmap(attention), jax.vmap(jax.vmap(attention)), jax.vmap(attention, 1, 1)):
        for a, b in zip(batched, quick(mapped, *operands), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("index", range(4), ids=["query", "key", "value", "scores"])
def test_grad_with_respect_to_one_argument_alone(index):
    case = CASES["packed"]
    args, cotangents = arguments(case), directions(case)[1]
    attention = attention_of(case, IMPLEMENTATIONS["blockwise"])

    def loss(one):
        out, lse = attention(*args[:index], one, *args[index + 1 :])
        return jnp.sum(out * cotangents[0]) + jnp.sum(jnp.where(jnp.isinf(lse), 0, lse) * cotangents[1])

    judges = [derivatives[1][index] for derivatives in plain_derivatives(case)]
    jax.tree.map(assert_within_budget, jax.jit(jax.grad(loss))(args[index]), *judges)


def test_same_inputs_same_bits():
    case = CASES["packed"]
    for implementation in IMPLEMENTATIONS.values():
        attention = attention_of(case, implementation)

        @jax.jit
        def pull(*args, attention=attention):
            out, back = jax.vjp(attention, *args)
            return out, back(directions(case)[1])

        first, again = pull(*arguments(case)), pull(*arguments(case))
        jax.tree.map(np.testing.assert_array_equal, first, again)


def few(T, S, heads=1):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(n, heads, 4)), jnp.float32) for n in (T, S, S))


@pytest.mark.parametrize(
    ("T", "blocks", "unseen", "options"),
    [
        (3, (2, 5), slice(3, 5), dict(mask=masks.Segments(np.int32([1, 1, 2]), np.int32([1, 1, 2, 0, 0, 1, 1, 1])))),
        (3, (2, 8), slice(0, 1), dict(mask=masks.Window(1, 0), q_offset=4)),
        (3, (2, 8), slice(3, 5), dict(mask=masks.Dense(np.arange(8) % 8 // 2 != 2) & ~masks.Prefix(4), q_offset=4)),
    ],
)
def test_rows_that_fill_up_the_last_block_let_no_nan_in(T, blocks, unseen, options):
    q, k, v = few(T, 8)
    k, v = (x.at[unseen].set(jnp.nan) for x in (k, v))

    def everything(implementation):
        def total(*x):
            out = jattn.attention(*x, implementation=implementation, **options)
            return jnp.sin(out).sum(), out

        return quick(jax.grad(total, (0, 1, 2), has_aux=True), q, k, v)

    blockwise = everything(jattn.Blockwise(*blocks))
    chex.assert_tree_all_finite(blockwise)
    chex.assert_trees_all_close(blockwise, everything("dense"), rtol=1e-5, atol=1e-5)


def test_rows_that_fill_up_the_last_block_let_no_nan_of_a_bias_in():
    """A [T, S] bias may hold anything where the mask hides it."""
    q, k, v = few(5, 5)

    def everything(bias, implementation):
        def total(*x):
            chosen = dict(mask=masks.Causal(), scores=(jattn.scores.Bias(bias),), implementation=implementation)
            return jnp.sin(jattn.attention(*x, **chosen)).sum()

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)

    hidden = everything(jnp.where(jnp.tri(5) > 0, 0, jnp.nan), jattn.Blockwise(4, 4))
    chex.assert_trees_all_close(hidden, everything(jnp.zeros((5, 5)), "dense"), rtol=1e-5, atol=1e-6)


@every_implementation
def test_a_sink_of_minus_infinity_is_none(implementation):
    q, k, v = few(4, 4)

    def f(logits):
        chosen = dict(mask=masks.Lengths(q=2), scores=(jattn.scores.Sink(logits),), implementation=implementation)
        return jattn.attention(q, k, v, **chosen)

    none = jnp.array([-jnp.inf])
    without = jattn.attention(q, k, v, mask=masks.Lengths(q=2), implementation=implementation)
    np.testing.assert_allclose(f(none), without, rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda s: jnp.sin(f(s)).sum())(none), [0.0])


def test_positions_of_keys_do_not_say_where_the_queries_stand():
    q, k, v = few(1, 4)
    with pytest.raises(ValueError, match="q_offset"):
        jattn.attention(q, k, v, mask=masks.Causal(), kv_positions=np.arange(4))


def test_a_symbolic_batch_of_short_sequences():
    b, *_ = jax.export.symbolic_shape("b")
    spec = jax.ShapeDtypeStruct((b, 256, 1, 8), jnp.float32)
    exported = jax.export.export(jax.jit(jattn.attention))(spec, spec, spec)
    q = np.random.default_rng(0).normal(size=(3, 256, 1, 8)).astype(np.float32)
    np.testing.assert_allclose(exported.call(q, q, q), jattn.attention(q, q, q), rtol=1e-5, atol=1e-6)


@every_implementation
def test_a_batch_of_none(implementation):
    x = jnp.ones((0, 4, 1, 8))
    mask = masks.Lengths(kv=np.zeros(0, np.int32))
    assert jattn.attention(x, x, x, mask=mask, implementation=implementation).shape == (0, 4, 1, 8)


@pytest.mark.parametrize("T", [1, 3, 9])
@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_few_queries_of_many_keys(implementation, T):
    """Products of up to 16 rows are taken in another form, and their sums over multiples of 512 keys in pieces."""
    rng = np.random.default_rng(T)
    shapes = (2, T, 6, 5), (2, 1024, 3, 5), (2, 1024, 3, 7)
    args = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
    keep = np.arange(1024) <= np.arange(1024 - T, 1024)[:, None]

    def ours(q, k, v):
        options = dict(mask=masks.Causal(), q_offset=1024 - T, implementation=implementation)
        return jattn.attention_with_lse(q, k, v, **options)

    def results(attention, args):
        return jax.jit(lambda *args: (attention(*args), jax.grad(lambda *a: attention(*a)[0].sum(), (0, 1, 2))(*args)))(
            *args
        )

    rounded = results(functools.partial(naive.attention, keep=keep), args)
    with jax.enable_x64(True):
        exact = results(functools.partial(naive.attention, keep=keep), [a.astype(np.float64) for a in args])
    jax.tree.map(assert_within_budget, results(ours, args), exact, rounded)
