"""Params is a NamedTuple of arrays; init draws it, from_matrices rearranges it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn

KEY = 0
D, N, K, H, V, E, C = 11, 6, 3, 7, 5, 13, 17


def init(**options):
    return jattn.init(jax.random.key(KEY), **({"embed_dim": D} | options))


def shapes_of(**options):
    """The shapes that init gives, without drawing a number."""
    return shapes(jax.eval_shape(lambda: init(**options)))


def shapes(params):
    return {name: None if leaf is None else leaf.shape for name, leaf in params._asdict().items()}


ABSENT = dict.fromkeys(("wo", "bq", "bk", "bv", "bo"))
EVERYTHING = {
    "wq": (D, N, H),
    "wk": (C, K, H),
    "wv": (C, K, V),
    "wo": (N, V, E),
    "bq": (N, H),
    "bk": (K, H),
    "bv": (K, V),
    "bo": (E,),
}


def test_shapes():
    assert shapes_of() == {"wq": (D, 1, D), "wk": (D, 1, D), "wv": (D, 1, D)} | ABSENT
    square = {"wq": (12, 3, 4), "wk": (12, 3, 4), "wv": (12, 3, 4)} | ABSENT
    assert shapes_of(embed_dim=12, num_heads=3) == square
    notebook = {"wq": (10, 1, 20), "wk": (10, 1, 20), "wv": (10, 1, 25)} | ABSENT
    assert shapes_of(embed_dim=10, qk_dim=20, v_dim=25) == notebook
    sizes = {"num_heads": N, "num_kv_heads": K, "qk_dim": H, "v_dim": V, "out_dim": E, "context_dim": C}
    assert shapes_of(**sizes, use_bias=True) == EVERYTHING
    assert shapes_of(use_bias=True)["bo"] is None
    assert shapes_of(embed_dim=12, num_heads=6, num_kv_heads=1)["wk"] == (12, 1, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtype(dtype):
    with jax.enable_x64(dtype == "float64"):
        params = init(out_dim=E, use_bias=True, dtype=dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


def test_it_is_a_pytree_of_arrays_and_a_named_tuple():
    params = init(out_dim=E, use_bias=True)
    assert isinstance(params, tuple)
    assert params._fields == ("wq", "wk", "wv", "wo", "bq", "bk", "bv", "bo")
    assert len(jax.tree.leaves(params)) == 8
    assert len(jax.tree.leaves(init())) == 3
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    halved = jax.tree.map(lambda leaf: leaf / 2, params)
    assert isinstance(halved, jattn.Params)
    np.testing.assert_array_equal(halved.wq * 2, params.wq)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(init())]
    assert paths == [".wq", ".wk", ".wv"]


def test_glorot_uniform_over_the_matrix_of_each_projection():
    params = init(
        embed_dim=40, num_heads=8, num_kv_heads=4, qk_dim=7, v_dim=11, out_dim=29, context_dim=31, use_bias=True
    )
    fans = {"wq": (40, 8 * 7), "wk": (31, 4 * 7), "wv": (31, 4 * 11), "wo": (8 * 11, 29)}
    for name, (fan_in, fan_out) in fans.items():
        limit = math.sqrt(6 / (fan_in + fan_out))
        w = np.asarray(getattr(params, name), np.float64)
        assert w.size == fan_in * fan_out
        assert 0.98 * limit < np.abs(w).max() <= limit * (1 + 1e-6)
        assert abs(w.std() / (limit / math.sqrt(3)) - 1) < 0.05
        assert abs(w.mean()) < 5 * w.std() / math.sqrt(w.size)
    for name in ("bq", "bk", "bv", "bo"):
        np.testing.assert_array_equal(getattr(params, name), 0.0)


def test_the_key_decides_and_each_projection_draws_its_own():
    first, again, other = init(), init(), jattn.init(jax.random.key(KEY + 1), D)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first.wq, other.wq)
    for a, b in (("wq", "wk"), ("wk", "wv"), ("wq", "wv")):
        assert not np.isin(getattr(first, a), getattr(first, b)).any()
    with_output = init(out_dim=E, use_bias=True)  # options that add an array leave the others as they were
    for name in ("wq", "wk", "wv"):
        np.testing.assert_array_equal(getattr(first, name), getattr(with_output, name))


def test_init_under_jit_and_vmap_draws_the_same():
    expected = init(num_heads=1, use_bias=True)
    jitted = jax.jit(lambda key: jattn.init(key, D, use_bias=True))(jax.random.key(KEY))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jitted, expected)
    layers = jax.vmap(lambda key: jattn.init(key, D))(jax.random.split(jax.random.key(KEY), 3))
    assert layers.wq.shape == (3, D, 1, D)
    raw = jattn.init(jax.random.PRNGKey(KEY), D, use_bias=True)
    jax.tree.map(np.testing.assert_array_equal, raw, expected)


def matrices(seed=0, bias=True):
    rng = np.random.default_rng(seed)
    shape = {"wq": (N * H, D), "wk": (K * H, C), "wv": (K * V, C), "wo": (E, N * V)}
    shape |= {"bq": (N * H,), "bk": (K * H,), "bv": (K * V,), "bo": (E,)} if bias else {}
    return {name: rng.normal(size=size).astype(np.float32) for name, size in shape.items()}


def test_from_matrices_places_every_element():
    m = matrices()
    params = jattn.from_matrices(**m, num_heads=N, num_kv_heads=K)
    assert shapes(params) == EVERYTHING
    params = jax.tree.map(np.asarray, params)
    for n, h, d in np.ndindex(N, H, D):  # row n*H + h makes element h of head n
        assert params.wq[d, n, h] == m["wq"][n * H + h, d]
    for k, h in np.ndindex(K, H):
        np.testing.assert_array_equal(params.wk[:, k, h], m["wk"][k * H + h])
        assert params.bk[k, h] == m["bk"][k * H + h]
    for k, v in np.ndindex(K, V):
        np.testing.assert_array_equal(params.wv[:, k, v], m["wv"][k * V + v])
        assert params.bv[k, v] == m["bv"][k * V + v]
    for n, v in np.ndindex(N, V):
        np.testing.assert_array_equal(params.wo[n, v], m["wo"][:, n * V + v])
    np.testing.assert_array_equal(params.bq, m["bq"].reshape(N, H))
    np.testing.assert_array_equal(params.bo, m["bo"])


def test_from_matrices_without_options_is_one_head():
    wq, wk, wv = (np.ones(shape, np.float32) for shape in ((20, 10), (20, 10), (25, 10)))
    params = jattn.from_matrices(wq, wk, wv)
    assert shapes(params) == {"wq": (10, 1, 20), "wk": (10, 1, 20), "wv": (10, 1, 25)} | ABSENT
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert shapes(jattn.from_matrices(wq, wk, wv, num_heads=5))["wk"] == (10, 5, 4)


def test_from_matrices_under_jit_vmap_and_grad():
    m = matrices()

    def build(m):
        return jattn.from_matrices(**m, num_heads=N, num_kv_heads=K)

    expected = jax.tree.map(np.asarray, jax.jit(build)(m))
    jax.tree.map(np.testing.assert_array_equal, build(m), expected)
    stacked = jax.tree.map(lambda a: np.stack([a, -a], axis=1), m)
    both = jax.jit(jax.vmap(build, in_axes=1))(stacked)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.stack([b, -b])), both, expected)
    squares = jax.jit(jax.grad(lambda m: sum(jnp.vdot(leaf, leaf) / 2 for leaf in jax.tree.leaves(build(m)))))
    jax.tree.map(np.testing.assert_array_equal, squares(m), m)


def test_from_matrices_is_pytorch_s_convention():
    torch = pytest.importorskip("torch")
    embed, heads = 12, 3
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(embed, heads, kdim=D, vdim=D, batch_first=True)
    torch.nn.init.normal_(theirs.in_proj_bias)
    torch.nn.init.normal_(theirs.out_proj.bias)
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=(2, 5, embed)).astype(np.float32), rng.normal(size=(2, 7, D)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(*(torch.from_numpy(a) for a in (x, context, context)))[0].numpy()
        weights = (theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight, theirs.out_proj.weight)
        biases = zip(("bq", "bk", "bv"), theirs.in_proj_bias.chunk(3), strict=True)
        params = jattn.from_matrices(
            *(w.numpy() for w in weights),
            num_heads=heads,
            bo=theirs.out_proj.bias.numpy(),
            **{name: b.numpy() for name, b in biases},
        )
    np.testing.assert_allclose(jattn.attend(params, x, context), expected, rtol=1e-5, atol=1e-5)
