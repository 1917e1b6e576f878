"""What is decided otherwise than on a CPU: all heads go together, and narrow operands stay narrow. Run on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, target, visits
from jattn.problem import lay_out
from jattn.target import Target
from jattn.visits import choose_blocks
from tests import modes, plain, problems, written

GPU = Target("cuda", 1)


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """One device that is taken for a GPU. The target is part of every program, so no cache mixes it up with others."""
    monkeypatch.setattr(target, "now", lambda: GPU)
    monkeypatch.setattr(Target, "on", lambda self, platform, devices: self)


MODES = {
    "forward": modes.forward,
    "grad": modes.grad,
    "vmap_nested": modes.vmap_nested,
    "hvp": modes.hvp_forward_over_reverse,
}
MASKS = ("none", "empty", "causal", "lengths_per_head", "segments_cross", "outside_window")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mode", MODES)
def test_all_heads_together(mode, mask):
    p = problems.problem(mask, "chain", "gqa", "float64", "square", "batch")
    wide = problems.run(MODES[mode], p.naive, p)
    problems.assert_close(problems.run(MODES[mode], p.attention, p), wide, tol=1e-12)


@pytest.mark.parametrize("mode", ["forward", "grad", "hvp"])
def test_what_takes_no_part_may_be_anything(mode):
    p = problems.problem("lengths", "bias_keys", "gqa", "float64", "square", "batch")
    clean = problems.fill_idle(p, 0, 0, 0)
    poisoned = problems.fill_idle(p, np.nan, np.inf, np.nan)
    exact = problems.run(MODES[mode], clean.naive, clean)
    problems.assert_close(problems.run(MODES[mode], p.attention, poisoned), exact, tol=1e-12)


def test_the_platform_is_asked_for_and_lowered_for(monkeypatch):
    """A program for two platforms has the loops of each."""
    monkeypatch.undo()
    q = jax.ShapeDtypeStruct((2, 512, 4, 8), jnp.float32)

    def f(q):
        return jattn.attention(q, q, q, implementation=jattn.Blockwise(64, 64))

    def loops(*platforms):
        text = jax.export.export(jax.jit(f), platforms=platforms)(q).mlir_module()
        return text.count("stablehlo.while"), "stablehlo.case" in text

    (cpu, _), (cuda, _), (both, chosen) = loops("cpu"), loops("cuda"), loops("cpu", "cuda")
    assert cuda < cpu  # all heads and examples go together there
    assert chosen and both == cpu + cuda


def test_the_default_device_decides_where_there_are_several(monkeypatch):
    monkeypatch.undo()
    assert target.now().platform == "cpu"
    with jax.default_device("gpu"):
        assert target.now().platform == "cuda"
    with jax.default_device(jax.devices("cpu")[1]):
        assert target.now().platform == "cpu"


def test_narrow_operands_are_multiplied_as_they_are():
    q, k, v = plain.qkv(dtype=jnp.bfloat16)
    equations = written.equations(lambda *x: jattn.attention(*x, implementation="blockwise"), q, k, v)
    products = [
        eqn for eqn in equations if eqn.primitive.name == "dot_general" and eqn.params["dimension_numbers"][0][0]
    ]
    assert products and all(eqn.outvars[0].aval.dtype == jnp.float32 for eqn in products)  # summed wide
    assert all(v.aval.dtype == jnp.bfloat16 for eqn in products for v in eqn.invars)
    out = jattn.attention(q, k, v, implementation="blockwise")
    exact = plain.attend(*(a.astype(float) for a in (q, k, v)))[0]
    np.testing.assert_allclose(out.astype(float), exact, atol=0.05)


def test_the_bands_of_a_window_go_together():
    q, k, v = plain.qkv(T=520, S=520, N=4, K=2, dtype=jnp.float32)
    problem = lay_out(q, k, v, dict(mask=masks.Window(31, 0)))
    plan = visits.Plan.of(problem, choose_blocks(problem, GPU), GPU)
    bands = visits.visits_of(plan, problem)
    assert plan.blocks["K"] == 2  # the key/value heads
    assert visits.rows_at_once(bands, plan) == len(bands.order) > 1
    out = plain.quick(jattn.attention, q, k, v, mask=masks.Window(31, 0), implementation="blockwise")
    i, j = np.arange(520)[:, None], np.arange(520)
    np.testing.assert_allclose(out, plain.attend(q, k, v, (j <= i) & (j >= i - 31))[0], atol=1e-5)


@pytest.mark.parametrize("heads", [1, 8, 64, 4096])
def test_visits_stay_within_bounds_however_many_heads(heads):
    def scores_of(T):
        def look(q):
            problem = lay_out(q, q, q, dict(mask=masks.Causal()))
            found.append(np.prod(choose_blocks(problem, GPU).sizes, dtype=float))

        found = []
        jax.eval_shape(look, jax.ShapeDtypeStruct((T, heads, 64), jnp.float32))
        return found[0]

    assert scores_of(8192) == scores_of(16384) <= max(visits.SCORES_ON_DEVICE, heads * 2**17)


def test_a_batch_of_none_whose_mask_is_an_array():
    q, k, v = plain.qkv(batch=(0,))
    mask = masks.Segments(jnp.zeros((0, 7), jnp.int32), jnp.zeros((0, 11), jnp.int32))
    assert jattn.attention(q, k, v, mask=mask, implementation="blockwise").shape == (0, 7, 6, 3)
