"""Rotary positions: right at every position, in both layouts of pairs, scaled as models scale them."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import Rotary, masks
from tests.plain import quick

B, T, N, H = 2, 7, 3, 16
PI = np.longdouble("3.14159265358979323846264338327950288")


def draw(shape=(B, T, N, H), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain(width, theta=10000.0):
    return np.array([theta ** (-2 * i / width) for i in range(width // 2)])


def turned(x, positions, w, *, interleaved=False, factor=1.0):
    """The equation with complex numbers, in float64."""
    x, R = np.asarray(x, np.float64), 2 * len(w)
    a, b = (x[..., 0:R:2], x[..., 1:R:2]) if interleaved else (x[..., : R // 2], x[..., R // 2 : R])
    angle = np.mod(np.asarray(positions, np.longdouble)[..., None] * w.astype(np.longdouble), 2 * PI)
    z = (a + 1j * b) * np.exp(1j * angle.astype(float))[..., None, :] * factor
    y = (
        np.stack([z.real, z.imag], -1).reshape(*x.shape[:-1], R)
        if interleaved
        else np.concatenate([z.real, z.imag], -1)
    )
    return np.concatenate([y, x[..., R:]], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [H, 6])
@pytest.mark.parametrize("of_examples", [False, True])
def test_it_turns_pairs_by_their_positions(interleaved, width, of_examples):
    x, rng = draw(), np.random.default_rng(1)
    positions = rng.integers(-50, 1000, (B, T) if of_examples else T).astype(np.int32)
    rotary = Rotary(width, 500.0, interleaved)
    wanted = turned(x, np.broadcast_to(positions, (B, T)), plain(width, 500.0), interleaved=interleaved)
    np.testing.assert_allclose(quick(rotary, x, positions), wanted, atol=2e-6)
    np.testing.assert_array_equal(rotary(x)[..., width:], x[..., width:])
    np.testing.assert_array_equal(rotary(x), rotary(x, jnp.arange(T)))


@pytest.mark.parametrize("at", [0, 4096, 131_072, 10**6, 2**31 - 64, -(2**31), -70_000])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 1_000_000.0])
def test_angles_are_right_at_every_int32_position(at, theta):
    positions = np.arange(at, at + 64)
    x = np.zeros((64, 1, 128), np.float32)
    x[..., :64] = 1
    got = np.asarray(Rotary(128, theta)(x, jnp.asarray(positions.astype(np.int32))))
    np.testing.assert_allclose(got, turned(x, positions, plain(128, theta)), atol=1e-6)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = draw().astype(np.float64)
        for at in (0, 10**5, 2**31 - 100):
            positions = np.arange(at, at + T)
            got = Rotary(H)(jnp.asarray(x), jnp.asarray(positions, jnp.int32))
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, turned(x, np.broadcast_to(positions, (B, T)), plain(H)), atol=1e-9)


def test_scores_depend_on_distance_alone():
    q, k = draw((64, 1, 128)), draw((64, 1, 128), 1)
    rotary, steps = Rotary(128, 5e5), jnp.arange(64, dtype=jnp.int32)

    def scores(shift):
        return jnp.einsum("tnh,snh->ts", rotary(q, steps + shift), rotary(k, steps + shift))

    np.testing.assert_allclose(scores(1_000_000), scores(0), atol=2e-4 * 0.1)


def test_derivatives_and_transforms():
    """It is linear, keeps lengths, and its transpose is the turn back."""
    x, dx = draw(), draw(seed=2)
    rotary, positions = Rotary(H), np.arange(T, dtype=np.int32) + 5
    f = functools.partial(rotary, positions=positions)
    out, pull = jax.vjp(f, x)
    np.testing.assert_allclose(jax.jvp(f, (x,), (dx,))[1], f(dx), atol=1e-6)
    np.testing.assert_allclose(pull(out)[0], x, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(out, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(rotary(out, -positions), x, atol=1e-5)
    each = jax.vmap(rotary)(x, np.stack([positions, positions]))
    np.testing.assert_allclose(each, out, atol=1e-6)
    assert rotary(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    assert not jax.tree.leaves(rotary) and hash(rotary) == hash(Rotary(H)) and rotary == Rotary(H) != Rotary(H, 9.0)


def test_sections_of_positions():
    """Of each kind of position its own frequencies, one after the other."""
    x, rng = draw(), np.random.default_rng(3)
    positions = rng.integers(0, 99, (B, T, 3)).astype(np.int32)
    got = Rotary(H, sections=(2, 3, 3))(x, positions)
    w, at = plain(H), np.repeat([0, 1, 2], [2, 3, 3])
    for i in range(H // 2):
        angle = positions[..., at[i]] * w[i]
        a, b = x[..., i], x[..., i + H // 2]
        cos, sin = np.cos(angle)[..., None], np.sin(angle)[..., None]
        np.testing.assert_allclose(got[..., i], a * cos - b * sin, atol=2e-6)
        np.testing.assert_allclose(got[..., i + H // 2], a * sin + b * cos, atol=2e-6)
    np.testing.assert_allclose(Rotary(H, sections=(2, 3, 3))(x), Rotary(H)(x), atol=1e-6)


# What models' own code computes, branch by branch.
def yarn(dim, base, factor, original, fast=32, slow=1, truncate=True):
    find = lambda turns: dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))  # noqa: E731
    low, high = find(fast), find(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    out = []
    for i in range(dim // 2):
        ramp = min(max((i - low) / (high - low), 0), 1)
        frequency = base ** (-2 * i / dim)
        out.append(frequency / factor * ramp + frequency * (1 - ramp))
    return out


def llama3(dim, base, factor, low, high, original):
    out = []
    for frequency in plain(dim, base):
        length = 2 * math.pi / frequency
        smooth = (original / length - low) / (high - low)
        between = (1 - smooth) * frequency / factor + smooth * frequency
        out.append(
            frequency if length < original / high else frequency / factor if length > original / low else between
        )
    return out


HEAD = dict(model_type="llama", head_dim=64, rope_theta=5e5, max_position_embeddings=8192)
SCALED = {
    "none": (HEAD, plain(64, 5e5), 1),
    "fields of 5.x": (
        dict(model_type="llama", head_dim=64, rope_parameters=dict(rope_type="default", rope_theta=77.0)),
        plain(64, 77.0),
        1,
    ),
    "width of a head": (
        dict(model_type="gpt_neox", hidden_size=256, num_attention_heads=4, rotary_pct=0.25, rotary_emb_base=1e4),
        plain(16),
        1,
    ),
    "partial": (HEAD | dict(partial_rotary_factor=0.5), plain(32, 5e5), 1),
    "linear": (HEAD | dict(rope_scaling=dict(type="linear", factor=4.0)), plain(64, 5e5) / 4, 1),
    "dynamic, short": (HEAD | dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), plain(64, 5e5), 1),
    "yarn": (
        HEAD | dict(rope_scaling=dict(rope_type="yarn", factor=16.0, original_max_position_embeddings=4096)),
        yarn(64, 5e5, 16.0, 4096),
        0.1 * math.log(16) + 1,
    ),
    "yarn of gpt-oss": (
        dict(
            model_type="gpt_oss",
            head_dim=64,
            rope_theta=150000,
            rope_scaling=dict(
                rope_type="yarn",
                factor=32.0,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=False,
                original_max_position_embeddings=4096,
            ),
        ),
        yarn(64, 150000, 32.0, 4096, truncate=False),
        0.1 * math.log(32) + 1,
    ),
    "yarn of DeepSeek": (
        dict(
            model_type="deepseek_v3",
            qk_rope_head_dim=64,
            rope_theta=1e4,
            rope_scaling=dict(
                type="yarn", factor=40, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=4096
            ),
        ),
        yarn(64, 1e4, 40, 4096),
        1,
    ),
    "yarn with a factor of its own": (
        HEAD | dict(rope_scaling=dict(rope_type="yarn", factor=4.0, attention_factor=0.7, beta_fast=20, beta_slow=2)),
        yarn(64, 5e5, 4.0, 8192, 20, 2),
        0.7,
    ),
    "llama3": (
        HEAD
        | dict(
            rope_scaling=dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=4096,
            )
        ),
        llama3(64, 5e5, 8.0, 1.0, 4.0, 4096),
        1,
    ),
    "longrope of Phi-3": (
        dict(
            model_type="phi3",
            head_dim=64,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            partial_rotary_factor=0.75,
            rope_scaling=dict(type="longrope", short_factor=[1.0] * 24, long_factor=[1.0 + i for i in range(24)]),
        ),
        plain(48),
        math.sqrt(1 + math.log(32) / math.log(4096)),
    ),
}


@pytest.mark.parametrize("name", SCALED)
def test_configurations(name):
    config, w, factor = SCALED[name]
    rotary = Rotary.from_config(config, length=2048)
    x = draw((T, 1, 64))
    pairs = config["model_type"] == "deepseek_v3"
    wanted = turned(x, np.arange(T) + 900, np.asarray(w), interleaved=pairs, factor=factor)
    wanted[..., 2 * len(w) :] = x[..., 2 * len(w) :]
    np.testing.assert_allclose(rotary(x, jnp.arange(T) + 900), wanted, atol=3e-6)


ORIGINALS = json.loads((Path(__file__).parent / "goldens" / "rotary.json").read_text())["cases"]


@pytest.mark.parametrize("case", ORIGINALS, ids=lambda case: f"{case['name']}-{case['layer']}-{case['length']}")
def test_the_originals_have_the_same_frequencies(case):
    """Those of the modules of transformers, which are in float32; goldens/rotary.py made them."""
    rotary = Rotary.from_config(case["config"], layer=case["layer"], length=case["length"])
    w = plain(rotary.width, rotary.theta) if rotary.frequencies is None else rotary.frequencies
    np.testing.assert_allclose(w, case["w"], rtol=5e-7)
    assert rotary.factor == pytest.approx(case["factor"], rel=1e-12)
    assert rotary.interleaved == (case["config"]["model_type"] == "deepseek_v3")


def test_scalings_that_go_by_the_length():
    phi = SCALED["longrope of Phi-3"][0]
    long = Rotary.from_config(phi, length=5000)
    np.testing.assert_allclose(long.frequencies, plain(48) / (1.0 + np.arange(24)), rtol=1e-12)
    dynamic = HEAD | dict(rope_scaling=dict(rope_type="dynamic", factor=2.0))
    base = 5e5 * (2.0 * 16384 / 8192 - 1) ** (64 / 62)
    np.testing.assert_allclose(Rotary.from_config(dynamic, length=16384).frequencies, plain(64, base), rtol=1e-12)
    for config in (phi, dynamic):
        with pytest.raises(ValueError, match="say length="):
            Rotary.from_config(config)


def test_each_kind_of_layer_has_its_own():
    """Gemma 3, in the fields of 4.x and of 5.x."""
    old = dict(
        model_type="gemma3_text",
        head_dim=64,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling=dict(rope_type="linear", factor=8.0),
    )
    new = dict(
        model_type="gemma3_text",
        head_dim=64,
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
            sliding_attention=dict(rope_type="default", rope_theta=1e4),
        ),
    )
    wanted = {"full_attention": Rotary(64, 1e6).linear(8.0), "sliding_attention": Rotary(64, 1e4)}
    for config in (old, new):
        for layer, rotary in wanted.items():
            assert Rotary.from_config(config, layer=layer) == rotary
        with pytest.raises(ValueError, match="say layer="):
            Rotary.from_config(config)


def test_sections_of_a_configuration():
    config = HEAD | dict(model_type="qwen2_vl", rope_scaling=dict(type="mrope", mrope_section=[8, 12, 12]))
    assert Rotary.from_config(config) == Rotary(64, 5e5, sections=(8, 12, 12))


REFUSED = {
    "an unknown kind": (HEAD | dict(rope_scaling=dict(rope_type="spiral")), "rope_type must be one of.*spiral"),
    "an unknown field": (HEAD | dict(rope_scaling=dict(type="linear", factor=2.0, warp=1)), "not known.*warp"),
    "a missing field": (HEAD | dict(rope_scaling=dict(type="llama3", factor=2.0)), "lacks.*low_freq_factor"),
    "an unknown model": (HEAD | dict(model_type="nobody"), "model_type='nobody'.*interleaved="),
    "no width": (dict(model_type="llama", rope_theta=1e4), "head_dim"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_configurations_that_are_refused(name):
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        Rotary.from_config(config)
    Rotary.from_config(HEAD | dict(model_type="nobody"), interleaved=True)


WRONG = {
    "odd width": (lambda: Rotary(7), ValueError, "width must be an even int.*7"),
    "no theta": (lambda: Rotary(8, 0.0), ValueError, "theta must be positive"),
    "theta of text": (lambda: Rotary(8, "1e4"), TypeError, "theta must be a number"),
    "pairs of numbers": (lambda: Rotary(8, 1e4, 1), TypeError, "interleaved must be a bool"),
    "sections": (lambda: Rotary(8, sections=(1, 2)), ValueError, "sections must have width / 2 = 4"),
    "frequencies": (lambda: Rotary(8, frequencies=(1.0,)), ValueError, "frequencies must be width / 2 = 4, got 1"),
    "scaled twice": (lambda: Rotary(8).linear(2.0).linear(2.0), ValueError, "scale those of theta, and once"),
    "narrow heads": (lambda: Rotary(32)(draw()), ValueError, r"H at least the width 32.*\(2, 7, 3, 16\)"),
    "integers": (lambda: Rotary(8)(np.ones((T, 1, 8), int)), TypeError, "x must have a real floating"),
    "floating positions": (lambda: Rotary(8)(draw(), np.ones(T)), TypeError, "positions must have an integer"),
    "other positions": (
        lambda: Rotary(8)(draw(), np.ones(T - 1, int)),
        ValueError,
        r"positions must be \[..., T\] with T=7",
    ),
    "kinds": (lambda: Rotary(8, sections=(2, 2))(draw(), np.ones(T, int)), ValueError, r"\[..., T, 2\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


def test_in_the_layer():
    """Queries and keys are turned where they stand: at once, in decoding, with left padding, packed."""
    params = jattn.init(jax.random.key(0), 12, num_heads=4, num_kv_heads=2, qk_dim=8, v_dim=6, out_dim=12)
    x, rotary = draw((B, T, 12)), Rotary(8, 100.0)

    def plain(x, positions):
        q, k, v = jattn.project(params, x)
        heads = jattn.attention(rotary(q, positions), rotary(k, positions), v, mask=masks.Causal())
        return jnp.einsum("btnv,nve->bte", heads, params.wo)

    whole = quick(lambda x: jattn.attend(params, x, rotary=rotary, mask=masks.Causal()), x)
    np.testing.assert_allclose(whole, plain(x, np.arange(T)), atol=1e-5)
    vector = jattn.context_vector(params, x, rotary=rotary, mask=masks.Causal())
    np.testing.assert_allclose(vector, np.sum(whole, 1), atol=1e-5)
    shifted = jattn.attend(
        params, x, rotary=rotary, mask=masks.Causal(), q_positions=jnp.arange(T) + 90, kv_positions=jnp.arange(T) + 90
    )
    np.testing.assert_allclose(shifted, whole, atol=1e-5)
    last = jattn.attend(params, x[:, -1:], x, rotary=rotary, mask=masks.Causal(), q_offset=T - 1)
    np.testing.assert_allclose(last, whole[:, -1:], atol=1e-5)
    there = np.array([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    positions = jnp.where(there, jnp.cumsum(there, -1) - 1, -1)
    padded = jattn.attend(params, x, rotary=rotary, mask=masks.Causal(), q_positions=positions, kv_positions=positions)
    np.testing.assert_allclose(padded[:1, 2:], plain(x[:1, 2:], np.arange(T - 2)), atol=1e-5)
    with pytest.raises(TypeError, match=r"rotary must be a jattn.Rotary or None, got 3"):
        jattn.attend(params, x, rotary=3)
