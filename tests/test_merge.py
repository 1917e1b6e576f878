"""merge: attention over disjoint keys joins to attention over all of them, with every derivative, and -inf is safe."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, scores
from tests import cases, modes, plain, problems, reference

DERIVATIVES = (
    "forward",
    "grad",
    "jvp",
    "vmap_grad",
    "hvp_forward_over_reverse",
    "hvp_reverse_over_reverse",
    "hvp_reverse_over_forward",
    "hvp_forward_over_forward",
    "third_order",
    "scan_grad",
)


def in_parts(p, *cuts):
    """The problem over runs of keys that are then joined; it is causal, so that early rows see no key of late runs."""

    def attention(q, k, v, arrays):
        positions = np.arange(p.case.S, dtype=np.int32)
        runs = np.split(positions, cuts)
        slopes = arrays["alibi"]["slopes"]
        return jattn.merge(
            [
                jattn.attention_with_lse(
                    q,
                    k[..., run, :, :],
                    v[..., run, :, :],
                    mask=masks.Causal(),
                    scores=(scores.ALiBi(slopes),),
                    q_offset=p.case.q_offset or 0,
                    kv_positions=run,
                    implementation=p.implementation,
                )
                for run in runs
            ]
        )

    return attention


@pytest.mark.parametrize(
    ("mode", "implementation"),
    [(mode, "dense") for mode in DERIVATIVES] + [(mode, None) for mode in ("grad", "hvp_reverse_over_reverse")],
)
def test_halves_are_the_whole_in_every_mode(mode, implementation):
    """With None it is blockwise."""
    p = problems.problem("causal", "alibi", "gqa", "float64", "square", "batch")
    p = p._replace(implementation=implementation or p.implementation)
    actual = problems.run(modes.MODES[mode], in_parts(p, 7), p)
    exact = plain.once(lambda: problems.run(modes.MODES[mode], p.naive, p), "halves", mode)
    problems.assert_close(actual, exact, tol=1e-12)


@pytest.mark.parametrize("shape", ["wide", "tall"])
def test_rows_without_keys_in_one_part_or_in_all(shape):
    p = problems.problem("causal", "alibi", "gqa", "float64", shape)._replace(implementation="dense")
    assert problems.idle(p)[0].any() == (shape == "tall")
    for mode in (modes.grad, modes.hvp_reverse_over_reverse):
        actual = problems.run(mode, in_parts(p, 2, 5), p)
        problems.assert_close(actual, problems.run(mode, p.naive, p), tol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sixteen_parts_stay_within_the_precision_of_one(dtype):
    p = problems.problem("causal", "alibi", "gqa", dtype, "square")._replace(implementation="dense")
    p = p._replace(case=p.case._replace(S=32, q_offset=19))
    p = p._replace(args=(*cases.inputs(p.case), cases.score_arrays(p.case)))
    f = in_parts(p, *range(2, 32, 2))
    out, lse = problems.run(modes.forward, f, p)
    exact = problems.run(modes.forward, p.wide().naive, p.wide())
    plain = problems.run(modes.forward, p.naive, p)
    assert lse.dtype == np.float32
    for a, e, x in zip((out, lse), exact, plain, strict=True):
        # Each part is rounded to the dtype of the output before it is joined: one rounding more than plain code makes.
        reference.assert_within_budget(a, e, x, slack=4)


def some(*, T=5, N=3, V=2, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(T, N, V)), jnp.float32), jnp.asarray(rng.normal(size=(T, N)), jnp.float32)


def nothing(like):
    out, lse = like
    return jnp.zeros_like(out), jnp.full_like(lse, -jnp.inf)


def test_nothing_is_neutral():
    x = some()
    for parts in ([x], [x, nothing(x)], [nothing(x), x], [nothing(x), x, nothing(x)]):
        for merged, whole in zip(jattn.merge(parts), x, strict=True):
            np.testing.assert_array_equal(merged, whole)
    void = (x[0] * np.nan, nothing(x)[1])
    for merged, whole in zip(jattn.merge([void, x]), x, strict=True):
        np.testing.assert_array_equal(merged, whole)
    for merged, empty in zip(jattn.merge([nothing(x)] * 3), nothing(x), strict=True):
        np.testing.assert_array_equal(merged, empty)


def test_nothing_sends_and_receives_no_nan():
    x = some()

    def total(parts):
        out, lse = jattn.merge(parts)
        return jnp.sin(out).sum() + jnp.sin(jnp.where(jnp.isneginf(lse), 0, lse)).sum()

    def slope(parts):
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(jax.grad(total)(parts)))

    first, second = jax.jit(jax.grad(total)), jax.jit(jax.grad(slope))
    d_void = first([x, (x[0] * np.nan, nothing(x)[1])])[1]
    assert all((leaf == 0).all() for leaf in d_void)
    for parts in ([x, nothing(x)], [nothing(x), x], [nothing(x), nothing(x)]):
        with jax.debug_nans(True), jax.debug_infs(True):
            for derivative in (first(parts), second(parts)):
                assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(derivative))
    (d_out, d_lse), (d_nothing, d_neginf) = first([x, nothing(x)])
    np.testing.assert_allclose(d_out, jnp.cos(x[0]), rtol=1e-6)
    np.testing.assert_allclose(d_lse, jnp.cos(x[1]), rtol=1e-6)
    np.testing.assert_array_equal(d_nothing, 0)
    np.testing.assert_array_equal(d_neginf, 0)


@pytest.mark.parametrize("shift", [-1e4, 1e4, 1e30])
def test_size_of_the_lse_does_not_matter(shift):
    (a, lse_a), (b, lse_b) = some(seed=1), some(seed=2)
    shifted = jattn.merge([(a, jnp.full_like(lse_a, shift)), (b, jnp.full_like(lse_b, shift))])
    np.testing.assert_allclose(shifted[0], (a + b) / 2, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(shifted[1], shift + np.log(2), rtol=1e-6)
    out, lse = jattn.merge([(a, lse_a), (b, lse_b + shift)])
    np.testing.assert_array_equal(out, b if shift > 0 else a)
    np.testing.assert_array_equal(lse, lse_b + shift if shift > 0 else lse_a)


def test_known_answer():
    out, lse = (np.array(x, np.float32).reshape(1, 1, -1) for x in (4.0, 0.0))
    with_weight_3 = (out, np.log(np.float32(3)).reshape(1, 1))
    merged, total = jattn.merge([(out * 0, lse[..., 0]), with_weight_3])
    np.testing.assert_allclose(merged, [[[3.0]]], rtol=1e-6)
    np.testing.assert_allclose(total, [[np.log(4.0)]], rtol=1e-6)


def test_derivatives_by_finite_differences():
    with jax.enable_x64(True):
        parts = [jax.tree.map(lambda x: x.astype(float), some(seed=i)) for i in range(3)]
        plain.assert_differentiable(lambda parts: jattn.merge([*parts, nothing(parts[0])]), (parts,), tol=1e-5)


def test_parts_are_merged_in_any_order_and_grouping():
    a, b, c = (some(seed=i) for i in range(3))
    whole = jattn.merge([a, b, c])
    for other in (jattn.merge([c, a, b]), jattn.merge([jattn.merge([a, b]), c]), jattn.merge([a, jattn.merge((b, c))])):
        for x, y in zip(other, whole, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_running_merge_in_a_scan_is_the_merge_of_all():
    parts = [some(seed=i) for i in range(5)]

    def running(parts):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
        return jax.lax.scan(lambda so_far, part: (jattn.merge([so_far, part]), None), nothing(parts[0]), stacked)[0]

    def gradient(f):
        return jax.jit(jax.grad(lambda parts: sum(jnp.sin(x).sum() for x in f(parts))))(parts)

    for a, b in zip(jax.tree.leaves(gradient(running)), jax.tree.leaves(gradient(jattn.merge)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_vmap_and_numpy():
    parts = [some(T=4, seed=i) for i in range(2)]
    whole = jattn.merge(parts)
    for result in (jax.jit(jax.vmap(jattn.merge))(parts), jattn.merge(jax.tree.map(np.asarray, parts))):
        for x, y in zip(result, whole, strict=True):
            assert isinstance(x, jax.Array)
            np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes(dtype):
    parts = [(out.astype(dtype), lse) for out, lse in (some(), some(seed=1))]
    out, lse = jattn.merge(parts)
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)


def test_errors():
    out, lse = some()
    wrong_values = [
        [],
        [(out, lse, lse)],
        [(out, lse), (out[:-1], lse[:-1])],
        [(out, lse[..., None])],
        [(out, lse), (out, lse[:, :1])],
    ]
    for parts in wrong_values:
        with pytest.raises(ValueError, match=r"merge|out|lse|parts"):
            jattn.merge(parts)
    for parts in ([(out.astype(int), lse)], [(out, lse.astype(int))]):
        with pytest.raises(TypeError, match=r"out|lse"):
            jattn.merge(parts)


def test_many_parts_agree_with_functools_reduce():
    parts = [some(seed=i) for i in range(16)]
    folded = functools.reduce(lambda a, b: jattn.merge([a, b]), parts)
    for x, y in zip(jattn.merge(parts), folded, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_an_lse_of_nan_is_not_taken_for_nothing():
    out, lse = np.ones((1, 1, 1), np.float32), np.zeros((1, 1), np.float32)
    assert np.isnan(jattn.merge([(out, lse), (out, lse * np.nan)])[1]).all()
