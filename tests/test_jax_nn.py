"""`dot_product_attention` is jax.nn's, argument for argument, except where jax.nn is wrong."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests import plain, reference
from tests.pictures import draw
from tests.plain import loss

B, T, S, N, K, H = 3, 7, 11, 6, 2, 5
TOL = dict(rtol=2e-5, atol=2e-5)
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def boolean(*shape):
    """Never without a key: there jax.nn gives the mean of the values."""
    mask = RNG.random(shape) < 0.6
    mask[..., :1] = True
    return mask


Q, KEY, V = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, H)

# Everything that jax.nn does right. Positional arguments after value, then options.
SAME = {
    "defaults": ((), {}),
    "scale": ((), dict(scale=0.3)),
    "scale zero": ((), dict(scale=0.0)),
    "causal, top-left": ((), dict(is_causal=True)),
    "bias in full": ((normal(B, N, T, S),), {}),
    "bias of heads": ((normal(1, N, 1, 1),), {}),
    "bias of queries and keys": ((normal(1, 1, T, S),), {}),
    "bias of the batch": ((normal(B, 1, 1, S),), {}),
    "bias of three axes": ((normal(N, T, S),), {}),
    "bias of two axes": ((normal(T, S),), {}),
    "bias of keys": ((normal(S),), {}),
    "mask in full": ((None, boolean(B, N, T, S)), {}),
    "mask of the batch": ((None, boolean(B, 1, 1, S)), {}),
    "mask of queries and keys": ((None, boolean(1, 1, T, S)), {}),
    "mask of heads": ((None, boolean(1, N, 1, S)), {}),
    "mask of three axes": ((None, boolean(N, T, S)), {}),
    "mask of two axes": ((None, boolean(T, S)), {}),
    "bias and mask": ((normal(1, N, T, S), boolean(B, 1, T, S)), dict(scale=0.9)),
    "query lengths": ((), dict(query_seq_lengths=np.array([7, 3, 0], np.int32))),
    "key lengths": ((), dict(key_value_seq_lengths=np.array([11, 1, 6], np.int32))),
    "both lengths": (
        (),
        dict(query_seq_lengths=np.array([1, 7, 4], np.int32), key_value_seq_lengths=np.array([2, 11, 6], np.int32)),
    ),
    "window of one size": ((), dict(local_window_size=2)),
    "window of zero": ((), dict(local_window_size=0)),
    "window to the left": ((), dict(local_window_size=(3, 0))),
    "window to the right": ((), dict(local_window_size=(0, 4))),
    "window and causal": ((), dict(local_window_size=(2, 2), is_causal=True)),
    "all of it": (
        (normal(1, N, T, S), boolean(B, 1, 1, S) | True),
        dict(
            scale=0.7,
            is_causal=True,
            query_seq_lengths=np.array([7, 3, 5], np.int32),
            key_value_seq_lengths=np.array([11, 8, 9], np.int32),
            local_window_size=(5, 1),
        ),
    ),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_same_as_jax_nn(name, implementation):
    """Values and gradients."""
    args, options = SAME[name]

    def run(attend, **more):
        @jax.jit
        def values_and_gradients(q, k, v):
            f = functools.partial(attend, **options, **more)
            return f(q, k, v, *args), jax.grad(lambda q, k, v: loss(f(q, k, v, *args)), (0, 1, 2))(q, k, v)

        return values_and_gradients(Q, KEY, V)

    ours = run(jattn.dot_product_attention, implementation=implementation)
    chex.assert_trees_all_close(ours, run(jax.nn.dot_product_attention), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["defaults", "bias and mask", "all of it"])
def test_numpy_arrays_are_taken_as_jax_nn_takes_them(name):
    args, options = SAME[name]
    ours = jattn.dot_product_attention(Q, KEY, V, *args, **options)
    assert isinstance(ours, jax.Array)
    np.testing.assert_allclose(ours, jax.nn.dot_product_attention(Q, KEY, V, *args, **options), **TOL)


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("name", ["bias and mask", "both lengths", "window and causal"])
def test_same_as_jax_nn_by_every_path(name, implementation):
    args, options = SAME[name]
    ours = jattn.dot_product_attention(Q, KEY, V, *args, **options, implementation=implementation)
    np.testing.assert_allclose(ours, jax.nn.dot_product_attention(Q, KEY, V, *args, **options), **TOL)


def test_same_signature():
    """In name, order, kind and default, so that replacing the import is the whole migration."""
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (jattn.dot_product_attention, jax.nn.dot_product_attention)
    )
    assert ours == theirs


@pytest.mark.parametrize("options", [{}, dict(is_causal=True), dict(local_window_size=1)], ids=str)
def test_inputs_of_three_axes(options):
    got = jattn.dot_product_attention(Q[0], KEY[0], V[0], **options)
    np.testing.assert_allclose(got, jax.nn.dot_product_attention(Q[0], KEY[0], V[0], **options), **TOL)
    bias, mask = normal(N, T, S), boolean(1, T, S)
    got = jattn.dot_product_attention(Q[0], KEY[0], V[0], bias, mask, **options)
    keep = mask & draw(
        T,
        S,
        lambda i, j: (
            ("is_causal" not in options or j <= i) and (not options.get("local_window_size") or abs(i - j) <= 1)
        ),
    )
    exact = reference.attention(Q[0], KEY[0], V[0], keep=keep, scores=[lambda s, head: s + bias[head[-1]]])
    np.testing.assert_allclose(got, exact[0], **TOL)


def test_three_axes_are_a_batch_of_one():
    """So a bias and a mask of four axes fit them, and the inputs may differ in having it."""
    bias, mask = normal(1, N, T, S), boolean(1, 1, T, S)
    for inputs in ((Q[0], KEY[0], V[0]), (Q[0], KEY[:1], V[:1]), (Q[:1], KEY[0], V[0])):
        got = jattn.dot_product_attention(*inputs, bias, mask, return_residual=True)
        wanted = jax.nn.dot_product_attention(*inputs, bias, mask, return_residual=True)
        np.testing.assert_allclose(got[0], wanted[0], **TOL)
        assert got[0].shape == inputs[0].shape and got[1].shape == inputs[0].shape[:-1]


def test_lengths_with_inputs_of_three_axes():
    """jax.nn wants lengths of shape (1,) there, the batch that it adds."""
    lengths = dict(query_seq_lengths=np.array([5], np.int32), key_value_seq_lengths=np.array([4], np.int32))
    got = jattn.dot_product_attention(Q[0], KEY[0], V[0], **lengths)
    np.testing.assert_allclose(got, jax.nn.dot_product_attention(Q[0], KEY[0], V[0], **lengths), **TOL)


@pytest.mark.parametrize("options", [{}, dict(is_causal=True), dict(scale=0.2)], ids=str)
def test_residual(options):
    got = jattn.dot_product_attention(Q, KEY, V, **options, return_residual=True)
    wanted = jax.nn.dot_product_attention(Q, KEY, V, **options, return_residual=True)
    assert [x.shape for x in got] == [x.shape for x in wanted] == [(B, T, N, H), (B, T, N)]
    chex.assert_trees_all_close(got, wanted, **TOL)
    unbatched = jattn.dot_product_attention(Q[0], KEY[0], V[0], **options, return_residual=True)
    assert [x.shape for x in unbatched] == [(T, N, H), (T, N)]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_under_jit(dtype):
    """float16 works under jit on CPU too, where jax.nn does not."""
    q, k, v = (jnp.asarray(x, dtype) for x in (Q, KEY, V))
    out, lse = jax.jit(lambda *x: jattn.dot_product_attention(*x, is_causal=True, return_residual=True))(q, k, v)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    exact = reference.attention(q, k, v, keep=draw(T, S, lambda i, j: j <= i))
    np.testing.assert_allclose(out.astype(np.float32), exact[0], atol=4 * float(jnp.finfo(dtype).eps))
    np.testing.assert_allclose(lse, exact[1], **TOL)


def test_float32_bias_with_narrow_inputs():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (Q, KEY, V))
    bias = normal(1, N, T, S)
    out = jattn.dot_product_attention(q, k, v, bias)
    exact = reference.attention(q, k, v, scores=[lambda s, head: s + bias[0, head[-1]]])
    np.testing.assert_allclose(out.astype(np.float32), exact[0], atol=4 * float(jnp.finfo(jnp.bfloat16).eps))


# Where the two differ, jax.nn is wrong. Each of these is named in the docstring.


def test_differs_where_a_row_has_no_key():
    mask = np.ones((1, 1, T, S), bool)
    mask[..., 2, :] = False
    assert np.abs(jax.nn.dot_product_attention(Q, KEY, V, mask=mask)[:, 2]).min() > 0
    np.testing.assert_array_equal(jattn.dot_product_attention(Q, KEY, V, mask=mask)[:, 2], 0)
    _, lse = jattn.dot_product_attention(Q, KEY, V, mask=mask, return_residual=True)
    np.testing.assert_array_equal(lse[:, 2], -np.inf)


def test_differs_where_masked_keys_hold_nan():
    lengths = np.array([8, 9, 10], np.int32)
    past = (np.arange(S) >= lengths[:, None])[..., None, None]
    k, v = (np.where(past, np.nan, x).astype(np.float32) for x in (KEY, V))

    def gradients(attend, k, v):
        return jax.grad(lambda q, k, v: loss(attend(q, k, v, key_value_seq_lengths=lengths)), (0, 1, 2))(Q, k, v)

    assert np.isnan(jax.nn.dot_product_attention(Q, k, v, key_value_seq_lengths=lengths)).any()
    clean = jattn.dot_product_attention(Q, KEY, V, key_value_seq_lengths=lengths)
    np.testing.assert_allclose(jattn.dot_product_attention(Q, k, v, key_value_seq_lengths=lengths), clean, rtol=1e-6)
    chex.assert_trees_all_close(
        gradients(jattn.dot_product_attention, k, v),
        gradients(jattn.dot_product_attention, KEY, V),
        rtol=1e-5,
        atol=1e-6,
    )


def test_differs_where_a_row_of_bias_is_infinite():
    bias = np.zeros((1, 1, T, S), np.float32)
    bias[..., 4, :] = -np.inf
    assert np.isnan(jax.nn.dot_product_attention(Q, KEY, V, bias)[:, 4]).all()
    np.testing.assert_array_equal(jattn.dot_product_attention(Q, KEY, V, bias)[:, 4], 0)


def test_differs_in_the_gradient_of_the_residual():
    def f(attend):
        return jax.grad(lambda q: (attend(q, KEY, V, return_residual=True)[1] ** 2).sum())(Q)

    np.testing.assert_array_equal(f(jax.nn.dot_product_attention), 0)
    wanted = jax.grad(lambda q: (plain.attend(q, KEY, V)[1] ** 2).sum())(jnp.asarray(Q))
    np.testing.assert_allclose(f(jattn.dot_product_attention), wanted, rtol=1e-4, atol=1e-5)


def test_differs_in_float64():
    with jax.enable_x64(True):
        x = [a.astype(np.float64) for a in (Q, KEY, V)]
        exact = reference.attention(*x)[0]
        with jax.numpy_dtype_promotion("standard"):
            assert np.abs(jax.nn.dot_product_attention(*x) - exact).max() > 1e-9
        np.testing.assert_allclose(jattn.dot_product_attention(*x), exact, rtol=0, atol=1e-13)


def test_differs_in_what_the_docstring_lists():
    text = jattn.dot_product_attention.__doc__
    for word in ("jax.nn", "top left", "NaN", "float64", "residual", "gradient"):
        assert word.lower() in text.lower(), word


@pytest.mark.parametrize("window", [-1, (1, -1), 1.5, (None, 2.0)], ids=str)
def test_the_error_names_the_argument_that_was_used(window):
    x = normal(B, T, 2, 4)
    with pytest.raises((ValueError, TypeError), match="local_window_size must be"):
        jattn.dot_product_attention(x, x, x, local_window_size=window)
