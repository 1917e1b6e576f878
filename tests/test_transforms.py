"""What JAX does to a function around attention, and the caller's settings: nothing changes, nothing is gathered."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify, jet

import jattn
from jattn import masks, scores
from tests import cases, modes
from tests.cases import CASES
from tests.plain import quick

SMALL = jattn.Blockwise(block_q=4, block_kv=5)
both = pytest.mark.parametrize("implementation", ["dense", SMALL], ids=["dense", "blockwise"])
B, T, S, N, K, H, V = 2, 13, 11, 6, 3, 5, 7
I32 = np.int32


def draw(*batch, T=T, S=S, N=N, K=K, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (*batch, T, N, H), (*batch, S, K, H), (*batch, S, K, V)
    return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


def close(x, y, tol=1e-5):
    chex.assert_trees_all_close(x, y, rtol=tol, atol=tol)


def gradient(f):
    return lambda *args: value_and_gradient(f)(*args)[1]


def value_and_gradient(f):
    """Of a loss of f, with what f gives in place of the loss."""

    def total(*args):
        out = f(*args)
        return jnp.sin(out.astype(jnp.float32)).sum(), out

    def run(*args):
        grads, out = jax.grad(total, (0, 1, 2), has_aux=True)(*args)
        return out, grads

    return run


# export ------------------------------------------------------------------------------------------------------------


some_implementations = pytest.mark.parametrize("implementation", [None, "dense", "blockwise", SMALL], ids=str)


@some_implementations
def test_export_with_symbolic_batch_and_length(implementation):
    def f(q, k, v, ids, implementation=implementation):
        mask = masks.Causal() & masks.Segments(ids)
        return jattn.attention(q, k, v, mask=mask, scores=(scores.SoftCap(3.0),), implementation=implementation)

    def everything(q, k, v, ids, implementation=implementation):
        return value_and_gradient(lambda q, k, v: f(q, k, v, ids, implementation))(q, k, v)

    b, t = jax.export.symbolic_shape("b, t")
    specs = [jax.ShapeDtypeStruct((b, t, *x.shape[2:]), x.dtype) for x in (*draw(1), np.zeros((1, 1), np.int32))]
    exported = jax.export.export(jax.jit(everything))(*specs)
    dense = jax.jit(functools.partial(everything, implementation="dense"))
    for batch, length in ((1, 3), (3, 14)):
        args = (*draw(batch, T=length, S=length), np.arange(batch * length, dtype=np.int32).reshape(batch, length) // 4)
        close(exported.call(*args), dense(*args))


@pytest.mark.parametrize("mask", [None, masks.Empty(), masks.Causal()], ids=str)
def test_export_with_symbolic_lengths_and_no_arrays(mask):
    def f(q, k, v, implementation=SMALL):
        return jattn.attention(q, k, v, mask=mask, q_offset=0, implementation=implementation)

    t, s = jax.export.symbolic_shape("t, s")
    args = draw()
    specs = [jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype) for n, x in zip((t, s, s), args, strict=True)]
    close(jax.export.export(jax.jit(f))(*specs).call(*args), quick(f, *args, implementation="dense"))


@some_implementations
def test_export_with_a_mask_and_a_bias_of_symbolic_lengths(implementation):
    def f(q, k, v, keep, bias, implementation=implementation):
        return jattn.attention(q, k, v, mask=keep, scores=(scores.Bias(bias),), implementation=implementation)

    t, s = jax.export.symbolic_shape("t, s")
    x = draw()
    specs = [jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype) for n, a in zip((t, s, s), x, strict=True)]
    pairs = [jax.ShapeDtypeStruct((t, s), dtype) for dtype in (jnp.bool_, jnp.float32)]
    exported = jax.export.export(jax.jit(f))(*specs, *pairs)
    rng = np.random.default_rng(0)
    for T, S in ((1, 2), (5, 9), (14, 14)):
        q, k, v = draw(T=T, S=S)
        args = (q, k, v, rng.random((T, S)) < 0.6, rng.normal(size=(T, S)).astype(np.float32))
        close(exported.call(*args), quick(f, *args, implementation="dense"))


@pytest.mark.parametrize("implementation", ["blockwise", SMALL], ids=str)
def test_export_with_a_symbolic_vmapped_batch_and_symbolic_widths(implementation):
    def f(q, k, v, implementation=implementation):
        return jax.vmap(lambda *x: jattn.attention(*x, scale=0.5, implementation=implementation))(q, k, v)

    b, h, w = jax.export.symbolic_shape("b, h, w")
    args = draw(3)
    specs = [jax.ShapeDtypeStruct((b, *x.shape[1:-1], n), x.dtype) for n, x in zip((h, h, w), args, strict=True)]
    close(jax.export.export(jax.jit(f))(*specs).call(*args), quick(f, *args, implementation="dense"))


@pytest.mark.parametrize("implementation", [None, SMALL], ids=str)
def test_export_with_two_symbolic_lengths(implementation):
    def f(q, k, v, lengths, offset, implementation=implementation):
        mask = masks.Causal() & masks.Lengths(kv=lengths)
        return jattn.attention(q, k, v, mask=mask, q_offset=offset, implementation=implementation)

    t, s = jax.export.symbolic_shape("t, s")
    q, k, v = draw()
    lengths, offset = np.int32(9), np.int32(3)
    specs = [jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype) for n, x in ((t, q), (s, k), (s, v))]
    scalar = jax.ShapeDtypeStruct((), np.int32)
    exported = jax.export.export(jax.jit(f))(*specs, scalar, scalar)
    close(exported.call(q, k, v, lengths, offset), quick(f, q, k, v, lengths, offset, implementation="dense"))


def test_an_exported_function_has_a_derivative_and_other_platforms():
    def f(q, k, v, implementation=SMALL):
        return jattn.attention(q, k, v, mask=masks.Window(2, 1), q_offset=1, implementation=implementation)

    def dense(q, k, v):
        return f(q, k, v, "dense")

    exported = jax.export.export(jax.jit(f), platforms=("cpu", "cuda", "tpu"))(*draw())
    close(quick(gradient(exported.call), *draw()), quick(gradient(dense), *draw()))


def test_jet_is_given_dense_attention():
    q, k, v = draw()
    along = jnp.cos(q)

    def f(implementation):
        return lambda q: jattn.attention(q, k, v, mask=masks.Causal(), q_offset=1, implementation=implementation)

    line = lambda t: f("dense")(q + t * along)  # noqa: E731
    first = lambda t: jax.jvp(line, (t,), (jnp.ones_like(t),))[1]  # noqa: E731
    wanted = first(jnp.float32(0)), jax.jvp(first, (jnp.float32(0),), (jnp.float32(1),))[1]
    for implementation in (None, "dense"):
        _, series = jet.jet(f(implementation), (q,), ((along, jnp.zeros_like(q)),))
        close(tuple(series), wanted, 1e-4)
    with pytest.raises(NotImplementedError, match="implementation='dense'"):
        jet.jet(f("blockwise"), (q,), ((along,),))


def test_checkify_reports_a_nan_at_its_first_use():
    q, k, v = draw()
    error, _ = checkify.checkify(lambda q: 2 * jattn.attention(q, k, v, q_offset=1), errors=checkify.nan_checks)(
        q * jnp.nan
    )
    assert "nan generated by primitive: mul" in str(error.get())


# devices -----------------------------------------------------------------------------------------------------------

COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter|ragged-all-to-all)\b")


def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("batch", "heads"))


def test_the_check_for_collectives_sees_one():
    x = jax.device_put(jnp.ones((4, 2)), jax.NamedSharding(mesh(), jax.P("batch", "heads")))
    assert COLLECTIVE.search(jax.jit(lambda x: x.sum()).lower(x).compile().as_text())


def hvp(f):
    return lambda *args: jax.jvp(gradient(f), args, args)[1]


DERIVATIVES = {"forward": lambda f: f, "grad": gradient, "hvp": hvp}


@pytest.mark.parametrize("how", ["automatic", "shard_map"])
@pytest.mark.parametrize(
    ("implementation", "derivative"),
    [
        ("dense", "forward"),
        ("dense", "grad"),
        (SMALL, "forward"),
        (SMALL, "grad"),
        (SMALL, "hvp"),
        ("blockwise", "grad"),
    ],
    ids=str,
)
def test_batch_and_heads_over_devices_need_no_collective(implementation, derivative, how):
    q, k, v = draw(8, N=4, K=2)
    ids = np.sort(np.random.default_rng(0).integers(-1, 3, (8, T)), axis=-1).astype(np.int32)
    args = (q, k, v, ids, np.asarray(scores.alibi_slopes(4)))
    heads = jax.P("batch", None, "heads")
    specs = (heads, heads, heads, jax.P("batch"), jax.P("heads"))

    def f(q, k, v, ids, slopes, implementation=implementation):
        def attention(q, k, v):
            mask = masks.Window(4, 0) & masks.Segments(ids, ids[:, :S])
            options = dict(mask=mask, scores=(scores.ALiBi(slopes),), q_offset=1)
            return jattn.attention(q, k, v, implementation=implementation, **options)

        return DERIVATIVES[derivative](attention)(q, k, v)

    out_specs = jax.tree.map(lambda _: heads, jax.eval_shape(f, *args))
    over_devices = jax.shard_map(f, mesh=mesh(), in_specs=specs, out_specs=out_specs) if how == "shard_map" else f
    placed = [jax.device_put(x, jax.NamedSharding(mesh(), spec)) for x, spec in zip(args, specs, strict=True)]
    executable = jax.jit(over_devices).lower(*placed).compile()
    found = COLLECTIVE.findall(executable.as_text())
    assert not found, found
    result = executable(*placed)
    for leaf in jax.tree.leaves(result):
        assert leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh(), heads), leaf.ndim)
    expected = quick(f, *args, implementation="dense")
    close(*(jax.tree.map(np.asarray, x) for x in (result, expected)), 1e-4)


# loops -------------------------------------------------------------------------------------------------------------


def layers(count=3):
    """A mask and scores for each layer, stacked: values are pytrees."""
    rng = np.random.default_rng(1)
    each = [
        (
            masks.Causal() & masks.Segments(rng.integers(0, 2, T).astype(np.int32)),
            (
                scores.ALiBi(jnp.asarray(rng.uniform(0, 1, N), jnp.float32)),
                scores.Bias(jnp.full((1, T), i, jnp.float32)),
            ),
        )
        for i in range(count)
    ]
    return each, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


@both
def test_masks_and_scores_run_through_scan(implementation):
    each, stacked = layers()
    q, k, v = draw(S=T)

    def layer(q, mask, scores):
        out = jattn.attention(q, k, v, mask=mask, scores=scores, implementation=implementation)
        return q + out.sum(-1, keepdims=True)

    def scanned(q, stacked):
        return jax.lax.scan(lambda q, options: (layer(q, *options), None), q, stacked)[0]

    def unrolled(q, each):
        for options in each:
            q = layer(q, *options)
        return q

    def differentiated(f, q, options):
        def total(q, options):
            out = f(q, options)
            return jnp.sin(out).sum(), out

        return jax.jit(jax.grad(total, (0, 1), allow_int=True, has_aux=True))(q, options)

    (dq, dstacked), out = differentiated(scanned, q, stacked)
    (expected_dq, deach), expected = differentiated(unrolled, q, each)
    close((out, dq), (expected, expected_dq), 1e-4)
    for i, (_, (alibi, bias)) in enumerate(deach):
        close((dstacked[1][0].slopes[i], dstacked[1][1].array[i]), (alibi.slopes, bias.array), 1e-4)


@both
def test_masks_and_scores_run_through_while_loop_and_cond(implementation):
    each, _ = layers()
    q, k, v = draw(S=T)

    def f(options, implementation=implementation):
        mask, modifiers = options
        return jattn.attention(q, k, v, mask=mask, scores=modifiers, implementation=implementation)

    @jax.jit
    def loop(options):
        def step(state):
            i, options, total = state
            return i + 1, options, total + f(options)

        return jax.lax.while_loop(lambda state: state[0] < 2, step, (0, options, jnp.zeros((T, N, V))))[2]

    one = jax.jit(functools.partial(f, implementation="dense"))
    close(loop(each[0]), 2 * one(each[0]))
    chosen = jax.jit(lambda first: f(jax.lax.cond(first, lambda: each[0], lambda: each[1])))
    close(chosen(True), one(each[0]))
    close(chosen(False), one(each[1]))


# the caller's settings ---------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("how", ["jit", "eager", "disable_jit"])
def test_debug_nans_and_infs_and_disable_jit(how, implementation):
    """A row without keys, keys that nothing sees: no NaN and no infinity is ever made, and the numbers are the same."""
    q, k, v = draw(T=5, S=7, N=2, K=1)
    mask = masks.Causal() & masks.Dense(np.arange(5)[:, None] + np.zeros((1, 7), int) != 4) & masks.Lengths(kv=I32(6))

    def f(q, k, v, implementation=implementation):
        chosen = dict(mask=mask, q_offset=-1, scores=(scores.SoftCap(2.0),), implementation=implementation)
        return jattn.attention(q, k, v, **chosen)

    def everything(f):
        return lambda *x: (value_and_gradient(f)(*x), jax.jvp(f, x, x)[1])

    run = jax.jit(everything(f)) if how == "jit" else everything(f)
    with jax.debug_nans(True), jax.debug_infs(True), jax.disable_jit(how == "disable_jit"):
        got = run(q, k, v)
    chex.assert_tree_all_finite(got)
    close(got, quick(everything(functools.partial(f, implementation="dense")), q, k, v))


@both
@pytest.mark.parametrize("name", ["packed", "relative", "dropout", "bfloat16"])
def test_x64_changes_no_dtype_and_no_number(name, implementation):
    case = CASES[name]

    def run():
        chosen = cases.options(case)
        args = cases.inputs(case)

        def f(*args):
            return jattn.attention_with_lse(*args, implementation=implementation, **chosen)

        def total(*args):
            result = f(*args)
            return modes.loss(lambda: result)(), result

        grads, result = quick(jax.grad(total, (0, 1, 2), has_aux=True), *args)
        return result, grads

    narrow = run()
    with jax.enable_x64(True):
        wide = run()
    chex.assert_trees_all_equal_dtypes(narrow, wide)
    assert narrow[0][1].dtype == np.float32
    as_float = [jax.tree.map(lambda x: np.asarray(x, np.float32), x) for x in (narrow, wide)]
    tol = 2e-2 if case.dtype == "bfloat16" else 1e-5
    close(*as_float, tol)


@both
def test_float16_under_jit(implementation):
    args = draw(dtype=np.float16)

    def f(q, k, v):
        return jattn.attention(q, k, v, mask=masks.Causal(), q_offset=-2, implementation=implementation)

    f = value_and_gradient(f)
    narrow, wide = quick(f, *args), quick(f, *(x.astype(np.float32) for x in args))
    for half, single in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert half.dtype == np.float16
        close(half.astype(np.float32), single, 1e-2)


def test_numpy_is_accepted_everywhere():
    q, k, v = draw(B)
    keep = np.random.default_rng(0).random((B, 1, T, S)) < 0.7
    bias = np.random.default_rng(2).normal(size=(N, T, S)).astype(np.float32)
    options = dict(mask=keep, scores=[scores.Bias(bias)], q_offset=np.int32(2))
    arrays = jax.tree.map(jnp.asarray, (q, k, v))
    for f in (jattn.attention, jattn.attention_with_lse):
        close(f(q, k, v, **options), f(*arrays, **options))
    close(jattn.attention_weights(q, k, **options), jattn.attention_weights(*arrays[:2], **options))
    v = v[..., :H]
    lengths = np.array([4, 11], np.int32)
    for chosen in (
        dict(bias=bias[None], mask=keep, scale=0.3),
        dict(mask=keep),
        dict(is_causal=True, local_window_size=(2, 1)),
        dict(key_value_seq_lengths=lengths, query_seq_lengths=lengths),
    ):
        close(jattn.dot_product_attention(q, k, v, **chosen), jax.nn.dot_product_attention(q, k, v, **chosen))


# tracing -----------------------------------------------------------------------------------------------------------


def values(seed):
    """Equal structure, new arrays."""
    rng = np.random.default_rng(seed)
    ids = jnp.asarray(rng.integers(0, 3, T), jnp.int32)
    mask = (masks.Window(3, 0) & masks.Segments(ids, ids[:S])) | ~masks.Dense(jnp.asarray(rng.random((T, S)) < 0.5))
    mask = mask | masks.Function(cases.strided, jnp.int32(seed + 2)) | masks.Prefix(jnp.int32(seed))
    modifiers = (
        scores.Bias(jnp.asarray(rng.normal(size=(N, 1, S)), jnp.float32)),
        scores.SoftCap(2.0),
        scores.ALiBi(jnp.asarray(rng.uniform(size=N), jnp.float32)),
        scores.RelativePosition(jnp.asarray(rng.normal(size=(8, N)), jnp.float32), max_distance=11),
        scores.Function(cases.wave, {"height": jnp.float32(seed), "frequency": jnp.float32(1)}),
        scores.Sink(jnp.asarray(rng.normal(size=N), jnp.float32)),
    )
    return mask, modifiers, jattn.Dropout(0.1, jax.random.key(seed))


def test_new_arrays_in_equal_values_do_not_retrace():
    """Every mask and score, and a key: both implementations give the same numbers for the new arrays."""

    def attention(args, mask, modifiers, dropout, offset, implementation):
        return jattn.attention(
            *args, mask=mask, scores=modifiers, dropout=dropout, q_offset=offset, implementation=implementation
        )

    def once(implementation):
        def f(*args):
            traces.append(implementation)
            return attention(*args, implementation)

        return jax.jit(f)

    traces = []
    dense, blockwise = once("dense"), once(SMALL)
    results = []
    for seed in range(3):
        args = draw(), *values(seed), jnp.int32(seed)
        results.append(dense(*args))
        close(blockwise(*args), results[-1])
    assert not np.allclose(results[0], results[1], atol=0.1)
    assert traces == ["dense", SMALL]


def test_equal_values_are_equal_static_arguments():
    @chex.assert_max_traces(n=2)
    def traced(args, mask, implementation):
        return jattn.attention(*args, mask=mask, implementation=implementation, q_offset=0)

    chex.clear_trace_counter()
    f = jax.jit(traced, static_argnames=("mask", "implementation"))
    for _ in range(3):
        f(draw(), ~masks.Causal() & masks.Window(3, 0), jattn.Blockwise(block_q=4, block_kv=5))
        f(draw(), masks.SlidingWindow(3) | masks.Prefix(2), jattn.Blockwise(block_q=4, block_kv=5))


@both
@pytest.mark.parametrize("derivative", [lambda f: f, gradient], ids=["forward", "grad"])
def test_without_jit_a_second_call_compiles_nothing(derivative, implementation):
    compiled = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def call(seed):
        mask, modifiers, dropout = values(seed)
        arrays = [jnp.asarray(x + np.float32(seed)) for x in draw()]
        compiled.clear()

        def f(*args):
            return jattn.attention(
                *args, mask=mask, scores=modifiers, dropout=dropout, q_offset=1, implementation=implementation
            )

        return derivative(f)(*arrays)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        call(0)
        assert compiled
        call(1)
        assert not compiled, len(compiled)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_what_the_table_of_modes_cannot_show():
    """linear_transpose and jacfwd of the whole jacobian: attention is linear in its values."""
    q, k, v = draw(T=5, S=6, N=2, K=1)

    def f(v):
        return jattn.attention(q, k, v, mask=masks.Lengths(kv=np.int32(5)), implementation=SMALL)

    jacobian = quick(jax.jacfwd(f), v)
    close(jacobian, quick(jax.jacrev(f), v))
    close(jnp.einsum("tnvskw,skw->tnv", jacobian, v), f(v))
    ones = jnp.ones((5, 2, V))
    close(quick(lambda v: jax.vjp(f, v)[1](ones)[0], v), jnp.einsum("tnvskw,tnv->skw", jacobian, ones))


@both
def test_linear_transpose_along_the_values(implementation):
    q, k, v = draw()
    ct = np.ones((T, N, V), np.float32)

    def f(v):
        return jattn.attention(q, k, v, mask=masks.Window(3, 2), q_offset=0, implementation=implementation)

    close(jax.linear_transpose(f, v)(ct), jax.vjp(f, v)[1](ct))
    with pytest.raises(NotImplementedError, match="linear in the values alone"):
        jax.linear_transpose(lambda q: jattn.attention(q, k, v, q_offset=0, implementation=implementation), q)(ct)


@both
def test_without_jit_in_a_mesh_with_explicit_axes(implementation):
    explicit = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Explicit,))
    args = draw(2)

    def loss(q, k, v):
        return jnp.sin(jattn.attention(q, k, v, implementation=implementation)).sum()

    wanted = jax.grad(loss, (0, 1, 2))(*args)
    with jax.set_mesh(explicit):
        placed = [jax.device_put(x, jax.NamedSharding(explicit, jax.P("batch"))) for x in args]
        close(jax.tree.map(np.asarray, jax.grad(loss, (0, 1, 2))(*placed)), jax.tree.map(np.asarray, wanted))
        close(np.asarray(jax.vmap(jax.grad(loss))(*placed)), np.asarray(wanted[0]))


@both
def test_many_vmaps(implementation):
    def nested(depth, f):
        return f if depth == 0 else jax.vmap(nested(depth - 1, f))

    x = jnp.ones((*[1] * 30, 3, 1, 2))
    assert nested(30, lambda x: jattn.attention(x, x, x, implementation=implementation))(x).shape == x.shape
