"""What is decided otherwise than on a CPU: all heads go together, and narrow operands stay narrow. Run on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, sweep
from jattn.blockwise import choose_blocks
from jattn.problem import lay_out
from tests import modes, plain, problems


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """One device that calls itself a GPU. What was traced before and is traced here must not be mixed up."""
    jax.clear_caches()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    yield
    jax.clear_caches()


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


def test_narrow_operands_are_multiplied_as_they_are():
    q, k, v = plain.qkv(dtype=jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda *x: jattn.attention(*x, implementation="blockwise"))(q, k, v))
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("f32" in line.split("=")[0] for line in products)  # summed wide
    assert "convert_element_type[new_dtype=float32" not in "".join(text.split("dot_general")[0].split())
    out = jattn.attention(q, k, v, implementation="blockwise")
    exact = plain.attend(*(a.astype(float) for a in (q, k, v)))[0]
    np.testing.assert_allclose(out.astype(float), exact, atol=0.05)


def test_the_bands_of_a_window_go_together():
    q, k, v = plain.qkv(T=520, S=520, N=4, K=2, dtype=jnp.float32)
    problem = lay_out(q, k, v, masks.Window(31, 0))
    blocks = choose_blocks(problem, jattn.Blockwise())
    visits = sweep.visits_of(sweep.plan(problem, blocks), problem)
    assert blocks[0] == 2  # the key/value heads
    assert sweep.rows_at_once(visits, blocks) == len(visits.order) > 1
    out = plain.quick(jattn.attention, q, k, v, mask=masks.Window(31, 0), implementation="blockwise")
    i, j = np.arange(520)[:, None], np.arange(520)
    np.testing.assert_allclose(out, plain.attend(q, k, v, (j <= i) & (j >= i - 31))[0], atol=1e-5)


@pytest.mark.parametrize("heads", [1, 8, 64, 4096])
def test_visits_stay_within_bounds_however_many_heads(heads):
    def scores_of(T):
        def look(q):
            problem = lay_out(q, q, q, masks.Causal())
            found.append(np.prod(choose_blocks(problem, jattn.Blockwise()), dtype=float))

        found = []
        jax.eval_shape(look, jax.ShapeDtypeStruct((T, heads, 64), jnp.float32))
        return found[0]

    assert scores_of(8192) == scores_of(16384) <= max(sweep.SCORES_ON_DEVICE, heads * 2**17)


def test_a_batch_of_none_whose_mask_is_an_array():
    q, k, v = plain.qkv(batch=(0,))
    mask = masks.Segments(jnp.zeros((0, 7), jnp.int32), jnp.zeros((0, 11), jnp.int32))
    assert jattn.attention(q, k, v, mask=mask, implementation="blockwise").shape == (0, 7, 6, 3)
