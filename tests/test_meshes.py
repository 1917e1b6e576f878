"""Meshes with explicit axes: right values and gradients, laid out as the queries, or as the caller says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jattn
from jattn import masks, scores
from tests.plain import assert_close
from tests.test_transforms import COLLECTIVE

MESH = jax.make_mesh((4,), ("m",), axis_types=(AxisType.Explicit,))
B, T, N, K, H = 4, 8, 4, 2, 6
HEADS, ROWS, BATCH, NOWHERE = jax.P(None, None, "m"), jax.P(None, "m"), jax.P("m"), jax.P()


def put(array, spec=NOWHERE):
    return jax.device_put(array, jax.NamedSharding(MESH, spec))


def draw():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K))
    return q, k, v, np.sort(rng.integers(0, 3, (B, T)), -1).astype(np.int32)


def loss(y):
    return jnp.sin(y).sum()


OPTIONS = {
    "full": lambda ids: {},
    "causal": lambda ids: dict(mask=masks.Causal()),
    "segments": lambda ids: dict(
        mask=masks.Segments(ids), scores=(scores.ALiBi(jnp.ones(N)), scores.Sink(jnp.ones(N)))
    ),
    "function": lambda ids: dict(scores=(scores.Function(lambda s, i, j, t: s * t, jnp.float32(0.5)),)),
    "dropout": lambda ids: dict(dropout=jattn.Dropout(0.5, jax.random.key(3))),
    "positions": lambda ids: dict(mask=masks.Causal(), q_positions=ids, kv_positions=ids),
}
LAYOUTS = {
    "more devices on the heads than key heads": (HEADS, NOWHERE, NOWHERE),
    "keys along the sequence": (NOWHERE, ROWS, ROWS),
    "all along the sequence": (ROWS, ROWS, ROWS),
    "batch": (BATCH, BATCH, BATCH),
}


@pytest.mark.parametrize("implementation", [None, "dense", jattn.Blockwise(4, 4)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout(layout, options, implementation):
    *x, ids = draw()

    def run(q, k, v, ids):
        def f(*x):
            return jattn.attention(*x, **options(ids), implementation=implementation)

        out, pull = jax.vjp(f, q, k, v)
        return out, pull(jnp.cos(out))

    wanted = jax.jit(run)(*x, ids)
    with jax.set_mesh(MESH):
        placed = [put(a, spec) for a, spec in zip(x, layout, strict=True)]
        along = layout[1] if layout[1] != NOWHERE and implementation is None else NOWHERE
        got = jax.jit(run)(*placed, put(ids, along))
        for array, spec in zip((got[0], *got[1]), (layout[0], *layout), strict=True):
            assert array.sharding.is_equivalent_to(jax.NamedSharding(MESH, spec), array.ndim)
    assert_close(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, wanted), 1e-4)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("differentiated", [False, True])
def test_more_devices_on_the_heads_than_key_heads_share_nothing(differentiated, scaled):
    """Each has the keys of its own heads, with their scales, and asks no other."""
    q, k, v, _ = draw()
    scales = dict(key_scale=jnp.array([0.5, 2.0]), value_scale=jnp.ones((B, T, K)) * 3) if scaled else {}

    def f(q, k, v):
        return jattn.attention(q, k, v, mask=masks.Causal(), implementation=jattn.Blockwise(4, 4), **scales)

    run = jax.grad(lambda *x: loss(f(*x))) if differentiated else f
    wanted = jax.jit(run)(q, k, v)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    for over, names, of_keys in ((MESH, "m", None), (mesh, ("a", "b"), None), (mesh, ("a", "b"), "a")):
        with jax.set_mesh(over):
            specs = [jax.P(None, None, name) for name in (names, of_keys, of_keys)]
            placed = [
                jax.device_put(a, jax.NamedSharding(over, spec)) for a, spec in zip((q, k, v), specs, strict=True)
            ]
            compiled = jax.jit(run).lower(*placed).compile()
            assert not COLLECTIVE.findall(compiled.as_text())
            assert_close(np.asarray(compiled(*placed)), np.asarray(wanted), 1e-5)


def test_explain_tells_of_the_program_for_the_mesh():
    """For arrays that lie on it, for descriptions of these, and for such as lie nowhere."""
    q, k, v, _ = draw()
    blocks = jattn.Blockwise(4, 4)
    assert jattn.explain(q, k, v, implementation=blocks).block_sizes[:2] == (1, 1)
    with jax.set_mesh(MESH):
        placed = [put(a, BATCH) for a in (q, k, v)]
        described = jax.eval_shape(lambda *x: x, *placed)
        for x in (placed, described, [np.asarray(a) for a in (q, k, v)]):
            assert jattn.explain(*x, implementation=blocks).block_sizes[:2] == (B, K)


def test_heads_and_keys_along_one_axis_of_the_mesh():
    q, k, v, _ = draw()
    wanted = jattn.attention(q, k, v)
    with jax.set_mesh(MESH):
        got = jax.jit(jattn.attention)(put(q, HEADS), put(k, ROWS), put(v, ROWS))
    assert_close(np.asarray(got), np.asarray(wanted), 1e-5)


def test_without_jit_and_weights_and_lse():
    q, k, v, _ = draw()
    wanted = (
        jattn.attention_with_lse(q, k, v),
        jattn.attention_weights(q, k),
        jattn.attention_weights(q, k, rows=[2, 5]),
    )
    with jax.set_mesh(MESH):
        q, k, v = put(q, HEADS), put(k), put(v)
        rows = put(jnp.array([2, 5]))
        got = jattn.attention_with_lse(q, k, v), jattn.attention_weights(q, k), jattn.attention_weights(q, k, rows=rows)
    assert_close(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, wanted), 1e-5)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("how", ["heads", "width", "rows"])
def test_the_layer(how, use_bias):
    """Parameters over heads, or over widths with examples on devices; and the caller's choice."""
    x = draw()[0][:, :, 0]
    params = jattn.init(
        jax.random.key(0), H, num_heads=N, num_kv_heads=4, qk_dim=3, v_dim=5, out_dim=8, use_bias=use_bias
    )

    def run(params, x, **given):
        return jax.value_and_grad(lambda params: loss(jattn.attend(params, x, **given)))(params)

    wanted = run(params, x)
    over_heads = dict(wq=ROWS, wk=ROWS, wv=ROWS, wo=BATCH, bq=BATCH, bk=BATCH, bv=BATCH)
    over_width = dict(wo=HEADS, bo=BATCH)
    specs = over_width if how == "width" else over_heads
    with jax.set_mesh(MESH):
        params = jattn.Params(
            **{n: put(a, specs.get(n, NOWHERE)) for n, a in params._asdict().items() if a is not None}
        )
        x = put(x, BATCH if how == "width" else NOWHERE)
        given = dict(out_sharding=ROWS) if how == "rows" else {}
        out = jax.jit(lambda *args: jattn.attend(*args, **given))(params, x)
        lies = {"heads": NOWHERE, "width": BATCH, "rows": ROWS}[how]
        assert out.sharding.is_equivalent_to(jax.NamedSharding(MESH, lies), out.ndim)
        got = jax.jit(lambda *args: run(*args, **given))(params, x)
    assert_close(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, wanted), 1e-4)
