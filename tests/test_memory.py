"""Memory linear in the sequence length, in every mode, for every mask and score; only compiled, never run."""

import functools
import itertools
import operator
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, scores
from jattn.autodiff import attention_p
from jattn.operations import Attend
from tests import cases, modes, problems, written
from tests.cases import Case

MIB = 2**20
MODES = ("forward", "grad", "jvp", "hvp_forward_over_reverse", "hvp_reverse_over_reverse", "scan_grad")
MARK = 13  # the length at which a case is built, to see which axes of its arrays grow
CASE = Case("long", (), T=MARK, S=MARK, N=2, K=1, H=32, V=16)
AS_LONG_AS_BOTH = {"bias", "bias_full"}  # [T, S] arrays: the caller's, and so would be their gradient
KINDS = {"function_mask" if name == "function" else name: {"mask": name} for name in cases.MASKS}
KINDS |= {name: {"scores": score} for name, score in problems.SCORES.items() if score}
KINDS |= {"dropout": {"dropout": 0.1}}


def grown(tree, T):
    """The arrays of a case of length MARK as they are at length T."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct([T if n == MARK else n for n in a.shape], a.dtype), tree)


# What decides about buffers is as it is by default; only LLVM, which comes after, is spared.
OPTIONS = {"xla_backend_optimization_level": 0}
if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
    OPTIONS["xla_cpu_use_fusion_emitters"] = True


def temp_bytes(f, *args):
    return jax.jit(f).lower(*args).compile(compiler_options=OPTIONS).memory_analysis().temp_size_in_bytes


def temp_of(mode, kind, T):
    case = CASE._replace(**kind)
    arrays = cases.score_arrays(case)
    fixed = {name: a for name, a in arrays.items() if name in AS_LONG_AS_BOTH}
    args = (*cases.inputs(case), {name: a for name, a in arrays.items() if name not in fixed})

    def f(args, tangents, fixed, mask_arrays):
        def attention(q, k, v, arrays):
            return jattn.attention_with_lse(
                q,
                k,
                v,
                mask=cases.build_mask(case, mask_arrays),
                scores=cases.build_scores(case, arrays | fixed),
                dropout=jattn.Dropout(case.dropout, jax.random.key(0)) if case.dropout else None,
                implementation="blockwise",
            )

        return modes.MODES[mode](attention, args, tangents)

    return temp_bytes(f, *grown((args, args, fixed, cases.mask_arrays(case)), T))


def assert_linear(mode, kind, lengths):
    temps = [temp_of(mode, kind, T) for T in lengths]
    print(mode, kind, *(f"{x / MIB:.2f}" for x in temps))
    for (T, small), (longer, large) in itertools.pairwise(zip(lengths, temps, strict=True)):
        assert large <= 1.02 * small * longer / T, f"{small / MIB:.2f} MiB at {T}, {large / MIB:.2f} MiB at {longer}"


# A mask and a score go together: whatever either makes quadratic shows.
SELECTION = [
    ("grad", "causal", "bias_keys"),
    ("hvp_reverse_over_reverse", "window_256", "relative"),
    ("jvp", "window_array", "dropout"),
    ("scan_grad", "prefix_lm", "chain"),
    ("hvp_forward_over_reverse", "lengths", "bias_full"),
    ("scan_grad", "segments_causal"),
    ("grad", "dense"),
    ("forward", "dense_heads", "function"),
    ("hvp_reverse_over_reverse", "function_mask"),
]


@pytest.mark.parametrize(("mode", "kinds"), [(mode, kinds) for mode, *kinds in SELECTION], ids=map(" ".join, SELECTION))
def test_memory_is_linear(mode, kinds):
    assert_linear(mode, functools.reduce(operator.or_, (KINDS[kind] for kind in kinds)), (4096, 16384))


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_memory_is_linear_everywhere(mode, kind):
    assert_linear(mode, KINDS[kind], (4096, 8192, 16384, 32768))


def spec(T, heads, width, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((T, heads, width), dtype)


def causal(q, k, v):
    return jattn.attention(q, k, v, mask=masks.Causal())


def test_absolute_memory():
    args = [spec(16384, 4, 64)] * 3
    forward = temp_bytes(causal, *args)
    grad = temp_bytes(jax.grad(lambda *a: jnp.sin(causal(*a)).sum(), (0, 1, 2)), *args)
    print(f"forward {forward / MIB:.1f} MiB, grad {grad / MIB:.1f} MiB")
    assert forward <= 60 * MIB
    assert grad <= 120 * MIB


@pytest.mark.parametrize("derivative", ["forward", "grad"])
def test_keys_and_values_are_not_repeated(derivative):
    T, N, H = 16384, 16, 64
    one_copy = T * N * H * 4

    def expanded(q, k, v):
        return causal(q, *(jnp.repeat(x, N, axis=1) for x in (k, v)))

    def temp(f, K):
        wrapped = f if derivative == "forward" else jax.grad(lambda *a: jnp.sin(f(*a)).sum(), (0, 1, 2))
        return temp_bytes(wrapped, spec(T, N, H), spec(T, K, H), spec(T, K, H))

    shared, own, repeated = temp(causal, 1), temp(causal, N), temp(expanded, 1)
    print(*(f"{x / MIB:.1f}" for x in (shared, own, repeated)))
    assert shared <= 1.02 * own  # and not a copy of the keys more, which would be 1.2
    assert shared <= repeated - one_copy


def test_gradient_of_65536_tokens_compiles():
    grad = jax.grad(lambda *a: jnp.sin(causal(*a)).sum(), (0, 1, 2))
    assert temp_bytes(grad, *[spec(65536, 2, 64)] * 3) < 65536**2


@pytest.mark.parametrize("derivative", ["forward", "grad"])
def test_a_vmapped_batch_takes_about_as_much_as_a_batch(derivative):
    several = [jax.ShapeDtypeStruct((32, *spec(256, 8, 64).shape), jnp.float32)] * 3

    def temp(f):
        wrapped = f if derivative == "forward" else jax.grad(lambda *a: jnp.sin(f(*a)).sum(), (0, 1, 2))
        return temp_bytes(wrapped, *several)

    batch, mapped = temp(causal), temp(jax.vmap(causal))
    print(f"{batch / MIB:.1f} {mapped / MIB:.1f}")
    assert mapped <= 2 * batch  # and not ten times, as with all heads of all examples at once


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("B", "T", "S", "N", "K"), [(1, 1, 8192, 32, 8), (1, 4096, 4096, 8, 8), (8, 512, 512, 8, 8)])
def test_narrow_operands_are_never_widened_as_a_whole(B, T, S, N, K, dtype):
    def temp(dtype):
        arrays = [jax.ShapeDtypeStruct((B, length, heads, 64), dtype) for length, heads in ((T, N), (S, K), (S, K))]
        return temp_bytes(jattn.attention, *arrays)

    narrow, own, sums = temp(dtype), temp(jnp.float32), 4 * B * T * N * 64
    print(f"{narrow / MIB:.2f} {own / MIB:.2f}")
    # The sums are float32, and of float32 they are the result. One operand as float32 would be as much again.
    assert narrow <= 1.02 * own + 0.6 * sums


@pytest.mark.parametrize(("wide", "narrow"), [(jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float8_e4m3fn)], ids=str)
@pytest.mark.parametrize(("T", "S"), [(1, 16384), (256, 4096)])
def test_a_narrow_cache_under_wide_queries_is_never_widened_as_a_whole(T, S, wide, narrow):
    def temp(of_cache):
        arrays = [jax.ShapeDtypeStruct((1, length, 8, 64), dtype) for length, dtype in ((T, wide), (S, of_cache))]
        return temp_bytes(
            lambda q, cache: jattn.attention(q, cache, cache, q_offset=S - T, mask=masks.Causal()), *arrays
        )

    mixed, alike = temp(narrow), temp(wide)
    print(f"{mixed / MIB:.2f} {alike / MIB:.2f}")
    assert mixed <= 1.02 * alike


def test_a_narrow_bias_is_never_widened_as_a_whole():
    T, N, H = 4096, 2, 64

    def f(q, k, v, bias):
        return jattn.attention(q, k, v, scores=jattn.scores.Bias(bias), implementation="blockwise")

    bias = jax.ShapeDtypeStruct((N, T, T), jnp.bfloat16)
    assert temp_bytes(f, *[spec(T, N, H, jnp.bfloat16)] * 3, bias) < N * T * T * 4 / 2


@pytest.mark.parametrize(
    ("T", "S", "N", "K", "keys"),
    [(1, 8192, 32, 8, 8192), (16, 8192, 32, 8, 8192), (16, 32768, 64, 1, 1024), (256, 32768, 8, 1, 1024)],
)
def test_few_queries_take_all_keys_at_once_but_not_more_scores_than_others(T, S, N, K, keys):
    *_, G, block_q, block_kv = jattn.explain(spec(T, N, 64), spec(S, K, 64), spec(S, K, 64)).block_sizes
    assert block_kv == keys
    assert G * block_q * block_kv <= 2**20


def test_decoding_copies_no_head_major_keys():
    T, S, N, K, H = 4, 8192, 32, 8, 128

    def f(q, k, v):
        k, v = jnp.swapaxes(k, 0, 1), jnp.swapaxes(v, 0, 1)
        return jattn.attention(q, k, v, mask=masks.Causal(), q_offset=S - T, implementation="dense")

    cache = jax.ShapeDtypeStruct((K, S, H), jnp.float32)
    assert temp_bytes(f, spec(T, N, H), cache, cache) < S * K * H * 4 / 2


def test_rows_of_weights_are_all_that_is_built():
    T, rows = 16384, jax.ShapeDtypeStruct((2,), jnp.int32)

    def f(q, k, rows):
        return jattn.attention_weights(q, k, rows=rows, mask=masks.Causal() & masks.Window(255, 0))

    assert temp_bytes(f, spec(T, 1, 64), spec(T, 1, 64), rows) < T * T * 4 / 64


POLICIES = {
    "default": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_without_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "named": jax.checkpoint_policies.save_only_these_names("jattn_out", "jattn_lse"),
}


def checkpointed_layers(policy, count):
    """The gradient of some layers under a policy, in a scan where there are several."""

    def layer(x, w):
        q, k, v = (jnp.tanh(jnp.einsum("tnh,hk->tnk", x, w[i])) for i in range(3))
        return x + jattn.attention(q, k, v, mask=masks.Causal(), implementation=jattn.Blockwise(256, 256))

    def loss(x, w):
        each = jax.checkpoint(layer, policy=policy)
        x = each(x, w[0]) if count == 1 else jax.lax.scan(lambda x, w: (each(x, w), None), x, w)[0]
        return jnp.sum(x**2)

    return jax.grad(loss, (0, 1))


@pytest.mark.parametrize("count", [1, 4], ids=["layer", "layers"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_no_policy_of_checkpoint_keeps_scores(policy, count):
    T, N, H = 2048, 2, 32
    args = spec(T, N, H), jax.ShapeDtypeStruct((count, 3, H, H), jnp.float32)
    kept, least = (
        temp_bytes(checkpointed_layers(p, count), *args) for p in (policy, jax.checkpoint_policies.nothing_saveable)
    )
    print(f"{kept / MIB:.1f} {least / MIB:.1f}")
    assert kept <= least + 12 * count * T * N * H * 4  # some copies of rows, but no scores
    assert kept < N * T * T * 4


def test_a_policy_that_names_the_residuals_attends_once():
    def attends(policy):
        args = spec(64, 2, 8), jax.ShapeDtypeStruct((1, 3, 8, 8), jnp.float32)
        operations = [
            eqn.params["operation"]
            for eqn in written.equations(checkpointed_layers(policy, 1), *args)
            if eqn.primitive is attention_p
        ]
        return sum(isinstance(operation, Attend) for operation in operations)

    assert attends(POLICIES["named"]) == 1
    assert attends(jax.checkpoint_policies.nothing_saveable) == 2


@pytest.mark.parametrize("name", ["float32", "bfloat16", "narrow cache", "lengths", "offsets"])
def test_decoding_a_batch_takes_what_one_example_takes(name):
    """Of several examples none is copied for the loop over its heads; nor are all, because there are other devices."""
    dtype = jnp.float32 if name in ("float32", "narrow cache") else jnp.bfloat16

    def temp(B):
        q = jax.ShapeDtypeStruct((B, 1, 8, 64), dtype)
        cache = jax.ShapeDtypeStruct((B, 8192, 8, 64), jnp.bfloat16 if name == "narrow cache" else dtype)
        number = jax.ShapeDtypeStruct((B,), jnp.int32)

        def f(q, k, v, n):
            options = {"lengths": dict(mask=masks.Lengths(kv=n)), "offsets": dict(mask=masks.Causal(), q_offset=n)}
            return jattn.attention(q, k, v, **options.get(name, {}))

        return temp_bytes(f, q, cache, cache, number)

    one = temp(1)
    assert one < 5 * 2**20  # the keys and values of one head, as wide as sums
    assert temp(4) < one + 2**17


def test_each_device_of_a_shard_map_is_alone():
    """Heads are looped over in it: its devices share nothing that a loop could gather."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    q, k = (jax.ShapeDtypeStruct((8, n, 8, 64), jnp.float32) for n in (1, 8192))

    def f(q, k, v):
        each = jax.shard_map(jattn.attention, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"))
        return each(q, k, v)

    assert temp_bytes(f, q, k, k) < 5 * 2**20


def test_batch_and_heads_in_one_loop():
    """Several batch dims and heads, and axes that operands lack."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 3, 40, 6, 8)).astype(np.float32)
    k, v = (rng.normal(size=(2, 3, 40, 2, 8)).astype(np.float32) for _ in range(2))
    bias, slopes = rng.normal(size=(3, 6, 1, 40)).astype(np.float32), rng.normal(size=6).astype(np.float32)
    options = dict(
        mask=masks.Lengths(kv=np.asarray([[7], [40]], np.int32)), scores=(scores.Bias(bias), scores.ALiBi(slopes))
    )
    got, wanted = (
        jax.jit(lambda *x, i=i: jattn.attention(*x, **options, implementation=i))(q, k, v)
        for i in (jattn.Blockwise(16, 16), "dense")
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_blocks_of_several_examples_in_one_loop():
    q = np.random.default_rng(0).normal(size=(100, 64, 2, 8)).astype(np.float32)
    whole = jattn.Blockwise(64, 64)
    assert jattn.explain(q, q, q, implementation=whole).block_sizes[:2] == (50, 2)
    got, wanted = (jax.jit(lambda q, i=i: jattn.attention(q, q, q, implementation=i))(q) for i in (whole, "dense"))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
