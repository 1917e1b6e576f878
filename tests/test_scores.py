"""Score modifiers: each against NumPy, in order, with gradients in the small arrays that they carry."""

import copy
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, scores
from jattn.scores import ALiBi, Bias, Dropout, Function, RelativePosition, Sink, SoftCap, alibi_slopes
from tests import plain
from tests.pictures import draw
from tests.plain import assert_close, derivatives, loss, once, qkv, quick

SMALL = jattn.Blockwise(block_q=3, block_kv=4)
both = pytest.mark.parametrize("implementation", ["dense", SMALL], ids=["dense", "blockwise"])
T, S, N, OFFSET = 7, 11, 6, 2
Q_POS, KV_POS = np.arange(T)[:, None] + OFFSET, np.arange(S)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def random(*shape, seed=7):
    return np.random.default_rng(seed).normal(size=shape)


def numpy_logits(q, k):
    q, k = np.asarray(q), np.repeat(np.asarray(k), 3, axis=1)
    return np.stack([q[:, n] @ k[:, n].T / math.sqrt(q.shape[-1]) for n in range(N)])


def modified(*given, implementation, q_offset=OFFSET, **options):
    """The logits [N, T, S] that attention uses: with one-hot values its output is the weights, and log w + lse is s."""
    q, k, _ = qkv()
    v = jnp.broadcast_to(jnp.eye(S)[:, None], (S, 2, S))

    @jax.jit
    def run(given):
        return jattn.attention_with_lse(
            q, k, v, scores=given, q_offset=q_offset, implementation=implementation, **options
        )

    out, lse = run(given)
    with np.errstate(divide="ignore"):
        return np.moveaxis(np.log(out) + lse[..., None], 0, 1)


def power(score, q_pos, kv_pos, params):
    """A learned scale and a learned push along the distance."""
    return score * params["scale"] + params["push"] * (kv_pos - q_pos).astype(score.dtype)


def bucket(relative, bidirectional, num_buckets, max_distance):
    """T5's bucket of one relative position (key minus query), transcribed from Raffel et al.'s code to a single int."""
    result, n = 0, -relative
    if bidirectional:
        num_buckets //= 2
        result += num_buckets if n < 0 else 0
        n = abs(n)
    else:
        n = max(n, 0)
    max_exact = num_buckets // 2
    if n < max_exact:
        return result + n
    large = math.log(n / max_exact) / math.log(max_distance / max_exact) * (num_buckets - max_exact)
    return result + min(max_exact + math.floor(large + 1e-9), num_buckets - 1)


SLOPES, CAP, TABLE = random(N) / 4, 1.3, random(8, N)
RELATIVE = np.vectorize(lambda r: bucket(r, True, 8, 20))(KV_POS - Q_POS)
PAST = np.vectorize(lambda r: bucket(r, False, 8, 20))(KV_POS - Q_POS)
PARAMS = {"scale": np.asarray(0.7), "push": np.asarray(0.1)}
BIAS = random(N, T, S)

# name -> (modifier, the same in NumPy on logits [N, T, S])
MODIFIERS = {
    "bias": (Bias(BIAS), lambda s: s + BIAS),
    "bias of keys": (Bias(BIAS[0, 0]), lambda s: s + BIAS[0, 0]),
    "bias of heads and queries": (Bias(BIAS[:, :, :1]), lambda s: s + BIAS[:, :, :1]),
    "scalar bias": (Bias(np.asarray(0.3)), lambda s: s + 0.3),
    "float32 bias": (Bias(BIAS.astype(np.float32)), lambda s: s + BIAS.astype(np.float32)),
    "cap": (SoftCap(CAP), lambda s: CAP * np.tanh(s / CAP)),
    "integer cap": (SoftCap(2), lambda s: 2 * np.tanh(s / 2)),
    "learned cap": (SoftCap(np.asarray(CAP)), lambda s: CAP * np.tanh(s / CAP)),
    "cap per head": (
        SoftCap(np.linspace(0.5, 3, N)),
        lambda s: np.linspace(0.5, 3, N)[:, None, None] * np.tanh(s / np.linspace(0.5, 3, N)[:, None, None]),
    ),
    "alibi": (ALiBi(SLOPES), lambda s: s - SLOPES[:, None, None] * np.abs(Q_POS - KV_POS)),
    "relative": (RelativePosition(TABLE, max_distance=20), lambda s: s + np.moveaxis(TABLE[RELATIVE], -1, 0)),
    "relative, past": (
        RelativePosition(TABLE, bidirectional=False, max_distance=20),
        lambda s: s + np.moveaxis(TABLE[PAST], -1, 0),
    ),
    "function": (Function(power, PARAMS), lambda s: 0.7 * s + 0.1 * (KV_POS - Q_POS)),
}


@both
@pytest.mark.parametrize("name", MODIFIERS)
def test_each_modifier_against_numpy(implementation, name):
    modifier, wanted = MODIFIERS[name]
    q, k, _ = qkv()
    assert_close(modified(modifier, implementation=implementation), wanted(numpy_logits(q, k)), 1e-12)


@both
def test_a_chain_is_applied_in_the_order_given(implementation):
    q, k, _ = qkv()
    names = ["bias", "cap", "alibi", "function", "relative"]
    for order in (names, names[::-1], ["cap", "bias", "cap", "cap"]):
        wanted = numpy_logits(q, k)
        for name in order:
            wanted = MODIFIERS[name][1](wanted)
        got = modified(*(MODIFIERS[name][0] for name in order), implementation=implementation)
        assert_close(got, wanted, 1e-11)


@both
def test_the_scale_comes_first(implementation):
    q, k, _ = qkv()
    got = modified(SoftCap(CAP), implementation=implementation, scale=3.0)
    assert_close(got, CAP * np.tanh(3 * math.sqrt(5) * numpy_logits(q, k) / CAP), 1e-12)


@both
def test_the_mask_comes_last(implementation):
    """No modifier brings a masked key back, not even one that replaces all scores."""
    for modifier in (*(m for m, _ in MODIFIERS.values()), Function(lambda s, i, j, p: s * 0 + 9.0, ())):
        out = modified(modifier, implementation=implementation, mask=masks.Causal())
        np.testing.assert_array_equal(np.isneginf(out), np.broadcast_to(KV_POS > Q_POS, out.shape))


@both
@pytest.mark.parametrize("name", [name for name in MODIFIERS if not name.startswith(("bias", "float32"))])
def test_positions_are_those_given(implementation, name):
    """Shuffled queries and keys with their positions give shuffled logits (a bias belongs to indices)."""
    modifier, wanted = MODIFIERS[name]
    rng = np.random.default_rng(0)
    i, j = rng.permutation(T), rng.permutation(S)
    q, k, _ = qkv()
    v = jnp.broadcast_to(jnp.eye(S)[:, None], (S, 2, S))
    at = dict(q_positions=(Q_POS[:, 0][i]).astype(np.int32), kv_positions=KV_POS[j].astype(np.int32))
    out, lse = jattn.attention_with_lse(q[i], k[j], v, scores=(modifier,), **at, implementation=implementation)
    assert_close(np.moveaxis(np.log(out) + lse[..., None], 0, 1), wanted(numpy_logits(q, k))[:, i][:, :, j], 1e-12)


# name -> (params -> modifier, params -> (logits -> logits), params): what can be learned

LEARNED = {
    "cap": (SoftCap, lambda p: lambda s: p * jnp.tanh(s / p), np.asarray(CAP)),
    "cap per head": (
        SoftCap,
        lambda p: lambda s: p[:, None, None] * jnp.tanh(s / p[:, None, None]),
        np.linspace(0.5, 3, N),
    ),
    "slopes": (ALiBi, lambda p: lambda s: s - p[:, None, None] * np.abs(Q_POS - KV_POS), SLOPES),
    "table": (
        lambda p: RelativePosition(p, max_distance=20),
        lambda p: lambda s: s + jnp.moveaxis(p[RELATIVE], -1, 0),
        TABLE,
    ),
    "table, past": (
        lambda p: RelativePosition(p, bidirectional=False, max_distance=20),
        lambda p: lambda s: s + jnp.moveaxis(p[PAST], -1, 0),
        TABLE,
    ),
    "function": (
        lambda p: Function(power, p),
        lambda p: lambda s: s * p["scale"] + p["push"] * (KV_POS - Q_POS),
        PARAMS,
    ),
} | {
    f"bias {shape}": (Bias, lambda p: lambda s: s + jnp.broadcast_to(p, s.shape), random(*shape))
    for shape in [(), (S,), (T, 1), (T, S), (N, 1, 1), (1, 1, S), (N, T, S)]
}


@both
@pytest.mark.parametrize("name", LEARNED)
def test_gradients_land_in_the_small_arrays(implementation, name):
    build, score, params = LEARNED[name]
    x = qkv()

    def ours(params):
        args = dict(mask=masks.Window(5, 4), q_offset=OFFSET, implementation=implementation)
        return loss(*jattn.attention_with_lse(*x, scores=(build(params),), **args))

    def wanted(params):
        return loss(*plain.attend(*x, (Q_POS - 5 <= KV_POS) & (KV_POS <= Q_POS + 4), score(params)))

    params = jax.tree.map(jnp.asarray, params)
    assert_close(derivatives(ours, params), once(lambda: derivatives(wanted, params), "learned", name))


@both
def test_gradients_of_a_batch_land_in_batched_and_in_shared_arrays(implementation):
    """Slopes [N], [B, N]; bias [B, 1, 1, S]; cap [B]."""
    B = 3
    x = qkv(batch=(B,))
    params = dict(
        shared=jnp.asarray(SLOPES),
        own=jnp.asarray(random(B, N)),
        bias=jnp.asarray(random(B, 1, 1, S)),
        cap=jnp.linspace(2, 4, B),
    )

    def ours(p):
        given = ALiBi(p["shared"]), Bias(p["bias"]), SoftCap(p["cap"]), ALiBi(p["own"])
        return loss(*jattn.attention_with_lse(*x, scores=given, q_offset=OFFSET, implementation=implementation))

    def wanted(p):
        distance, cap = np.abs(Q_POS - KV_POS)[None, None], p["cap"][:, None, None, None]

        def score(s):
            s = s - p["shared"][None, :, None, None] * distance + p["bias"]
            return cap * jnp.tanh(s / cap) - p["own"][..., None, None] * distance

        return loss(*plain.attend(*x, score=score))

    assert_close(derivatives(ours, params), once(lambda: derivatives(wanted, params), "batched"))


# ALiBi's slopes

PUBLISHED = {
    1: [2**-8],
    2: [2**-4, 2**-8],
    3: [2**-4, 2**-8, 2**-2],
    4: [2**-2, 2**-4, 2**-6, 2**-8],
    6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3],
    8: [2**-i for i in range(1, 9)],
    12: [2**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
    16: [2 ** (-i / 2) for i in range(1, 17)],
}


@pytest.mark.parametrize("num_heads", PUBLISHED)
def test_published_slopes(num_heads):
    slopes = alibi_slopes(num_heads)
    assert slopes.shape == (num_heads,)
    np.testing.assert_allclose(slopes, PUBLISHED[num_heads], rtol=1e-6)


@pytest.mark.parametrize("num_heads", [0, -1, 2.5, True, "8"])
def test_slopes_of_no_heads(num_heads):
    with pytest.raises((ValueError, TypeError)):
        alibi_slopes(num_heads)


# T5's buckets


@pytest.mark.parametrize(
    ("buckets", "max_distance", "bidirectional"),
    [
        *itertools.product([32, 64], [128, 1000], [True, False]),
        (8, 20, True),
        (4, 3, True),
        (6, 17, False),
        (2, 128, False),
    ],
)
def test_buckets_of_every_distance(bidirectional, buckets, max_distance):
    """From 300 keys before to 300 after. A table of its own row numbers shows the bucket."""
    at, near = 300, np.arange(601, dtype=np.int32)
    table = jnp.broadcast_to(jnp.arange(buckets, dtype=float)[:, None], (buckets, 1))
    modifier = RelativePosition(table, bidirectional=bidirectional, max_distance=max_distance)
    q, k = jnp.zeros((1, 1, 1)), jnp.zeros((601, 1, 1))
    weights = jattn.attention_weights(q, k, scores=(modifier,), q_offset=at)[0, 0]
    got = np.round(np.log(weights / weights[at])).astype(int)  # bucket(0) is 0
    assert got.tolist() == [bucket(int(j) - at, bidirectional, buckets, max_distance) for j in near]


def test_buckets_as_published():
    """Spelled out for T5's own 32 buckets and 128: exact to 7, then [8, 11], [12, 15], [16, 22], ... each way."""
    edges = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    wanted = [sum(n >= edge for edge in edges) - 1 for n in range(200)]
    assert [bucket(-n, True, 32, 128) for n in range(200)] == wanted
    assert [bucket(n, True, 32, 128) for n in range(1, 200)] == [16 + b for b in wanted[1:]]
    assert [bucket(n, False, 32, 128) for n in range(200)] == [0] * 200
    assert bucket(-15, False, 32, 128) == 15 and bucket(-128, False, 32, 128) == 31


# Sink


@both
def test_sink_joins_the_denominator_and_the_lse(implementation):
    x, sink = qkv(), random(N)
    allowed = draw(T, S, lambda i, j: j <= i - 2)
    mask = jnp.asarray(allowed)
    out, lse = jattn.attention_with_lse(*x, mask=mask, implementation=implementation)
    got, got_lse = jattn.attention_with_lse(*x, mask=mask, scores=(Sink(sink),), implementation=implementation)
    wanted = np.logaddexp(lse, sink)
    assert_close(got_lse, wanted, 1e-13)
    assert_close(got, np.asarray(out) * np.exp(np.asarray(lse) - wanted)[..., None], 1e-13)
    np.testing.assert_array_equal(got[:2], 0)
    assert_close(got_lse[:2], np.broadcast_to(sink, (2, N)), 1e-14)


@both
def test_sink_is_untouched_by_the_other_modifiers(implementation):
    """In whatever place it stands: it is a logit as it is."""
    x, sink = qkv(), random(N)
    wanted = plain.attend(*x, score=lambda s: 0.5 * jnp.tanh(s / 0.5) + BIAS, sink=sink)
    for place in range(3):
        given = [SoftCap(0.5), Bias(BIAS)]
        given.insert(place, Sink(sink))
        assert_close(jattn.attention_with_lse(*x, scores=tuple(given), implementation=implementation), wanted, 1e-12)


@both
def test_sink_of_minus_infinity_is_none_and_a_huge_one_takes_all(implementation):
    x = qkv()
    without = jattn.attention_with_lse(*x, implementation=implementation)
    absent = jattn.attention_with_lse(*x, scores=(Sink(jnp.full(N, -1e300)),), implementation=implementation)
    assert_close(absent, without, 1e-14)
    out, lse = jattn.attention_with_lse(*x, scores=(Sink(jnp.full(N, 1e9)),), implementation=implementation)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, 1e9)


def test_weights_leave_room_for_the_sink():
    x, sink = qkv(), random(N)
    weights = jattn.attention_weights(*x[:2], scores=(Sink(sink),))
    _, lse = plain.attend(*x, sink=sink)
    assert_close(weights.sum(-1).T, 1 - np.exp(sink - np.asarray(lse)), 1e-13)


@both
def test_sink_and_dropout(implementation):
    """Dropout acts on the weights behind the softmax, so it does not know of the sink."""
    x, sink = qkv(), random(N)
    dropout = jattn.Dropout(0.5, jax.random.key(0))
    weights = jattn.attention_weights(*x[:2], scores=(Sink(sink),))
    dropped = jattn.attention_weights(*x[:2], scores=(Sink(sink),), dropout=dropout)
    kept = np.asarray(dropped) > 0
    assert_close(dropped, np.where(kept, 2 * np.asarray(weights), 0), 1e-13)
    out = jattn.attention(*x, scores=(Sink(sink),), dropout=dropout, implementation=implementation)
    assert_close(out, jnp.einsum("nts,snv->tnv", dropped, jnp.repeat(x[2], 3, axis=1)), 1e-12)


# Values


def values():
    return {name: modifier for name, (modifier, _) in MODIFIERS.items()} | {
        "sink": Sink(SLOPES),
        "relative, far": RelativePosition(TABLE, max_distance=64),
        "function without": Function(power),
    }


def test_equal_and_hash_by_value():
    mine = values()
    for name, value in mine.items():
        twin = copy.deepcopy(value)
        assert value == twin and hash(value) == hash(twin), name
    assert all(a != b for a, b in itertools.combinations(mine.values(), 2))
    key, other = jax.random.key(0), jax.random.key(1)
    assert Dropout(0.1, key) == Dropout(0.1, jax.random.key(0)) and hash(Dropout(0.1, key)) == hash(Dropout(0.1, other))
    assert Dropout(0.1, other) != Dropout(0.1, key) != Dropout(0.1, jax.random.key_data(key))
    assert ALiBi(SLOPES) != Sink(SLOPES) and Bias(SLOPES) != Bias(SLOPES + 1)


@pytest.mark.parametrize("name", values())
def test_values_are_frozen_pytrees(name):
    value = values()[name]
    leaves, tree = jax.tree.flatten(value)
    assert jax.tree.unflatten(tree, leaves) == value
    jax.tree.unflatten(tree, [object() for _ in leaves])
    assert len(leaves) == {"cap": 0, "integer cap": 0, "function": 2, "function without": 0}.get(name, 1)
    for attribute in ("array", "cap", "slopes", "anything"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(value, attribute, 1)
    assert len(str(value)) < 80 and str(value).startswith(type(value).__name__)


def test_gradients_are_scores():
    x = qkv()

    @jax.jit
    def f(given):
        return jax.grad(lambda given: loss(jattn.attention(*x, scores=given, q_offset=0, implementation=SMALL)))(given)

    for c in (1.0, 2.0):
        given = Bias(c * BIAS), SoftCap(np.asarray(c)), ALiBi(c * SLOPES), RelativePosition(c * TABLE), Sink(c * SLOPES)
        gradient = f((*given, Function(power, jax.tree.map(lambda p, c=c: c * p, PARAMS))))
        assert jax.tree.structure(gradient) == jax.tree.structure((*given, Function(power, PARAMS)))
        assert all((np.abs(leaf) > 0).any() for leaf in jax.tree.leaves(gradient))


WRONG = {
    "bias of booleans": (lambda: Bias(np.ones((T, S), bool)), TypeError, "Bias"),
    "bias of ints": (lambda: Bias(np.ones((T, S), np.int32)), TypeError, "Bias"),
    "complex bias": (lambda: Bias(np.ones((T, S), np.complex64)), TypeError, "Bias"),
    "no bias": (lambda: Bias(None), TypeError, "Bias"),
    "bias by name": (lambda: Bias("alibi"), TypeError, "Bias"),
    "cap of zero": (lambda: SoftCap(0.0), ValueError, "cap.*0"),
    "negative cap": (lambda: SoftCap(-3), ValueError, "cap.*-3"),
    "nan cap": (lambda: SoftCap(float("nan")), ValueError, "cap"),
    "boolean cap": (lambda: SoftCap(True), TypeError, "cap"),
    "cap of ints": (lambda: SoftCap(np.asarray([3])), TypeError, "cap"),
    "cap by name": (lambda: SoftCap("gemma"), TypeError, "cap"),
    "slopes of ints": (lambda: ALiBi(np.ones(N, np.int32)), TypeError, "slopes"),
    "one slope": (lambda: ALiBi(0.5), (TypeError, ValueError), "slopes"),
    "flat table": (lambda: RelativePosition(np.ones(32)), ValueError, "table"),
    "table of ints": (lambda: RelativePosition(np.ones((32, N), np.int32)), TypeError, "table"),
    "odd table": (lambda: RelativePosition(np.ones((7, N))), ValueError, "table"),
    "empty table": (lambda: RelativePosition(np.ones((0, N))), ValueError, "table"),
    "direction by name": (lambda: RelativePosition(np.ones((8, N)), bidirectional="yes"), TypeError, "bidirectional"),
    "short max_distance": (lambda: RelativePosition(np.ones((32, N)), max_distance=4), ValueError, "max_distance"),
    "fractional max_distance": (
        lambda: RelativePosition(np.ones((32, N)), max_distance=99.5),
        TypeError,
        "max_distance",
    ),
    "not a function": (lambda: Function(3, ()), TypeError, "fn"),
    "sink of ints": (lambda: Sink(np.ones(N, np.int32)), TypeError, "Sink"),
    "one sink": (lambda: Sink(0.5), (TypeError, ValueError), "Sink"),
    "rate of one": (lambda: jattn.Dropout(1.0, jax.random.key(0)), ValueError, "rate.*1"),
    "negative rate": (lambda: jattn.Dropout(-0.1, jax.random.key(0)), ValueError, "rate"),
    "nan rate": (lambda: jattn.Dropout(float("nan"), jax.random.key(0)), ValueError, "rate"),
    "rate as an array": (lambda: jattn.Dropout(jnp.asarray(0.1), jax.random.key(0)), TypeError, "rate"),
    "seed for a key": (lambda: jattn.Dropout(0.1, 42), TypeError, "key"),
    "no key": (lambda: jattn.Dropout(0.1, None), TypeError, "key"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_when_built(name):
    build, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        build()


MISFITS = {
    "bias": (Bias(np.ones((T, S + 1))), ValueError, "Bias"),
    "bias of other heads": (Bias(np.ones((4, T, S))), ValueError, "Bias"),
    "bias of too many axes": (Bias(np.ones((2, N, T, S))), ValueError, "Bias"),
    "slopes": (ALiBi(np.ones(4)), ValueError, "ALiBi"),
    "sink": (Sink(np.ones(N + 1)), ValueError, "Sink"),
    "table": (RelativePosition(np.ones((8, 4))), ValueError, "RelativePosition"),
    "cap": (SoftCap(np.ones(4)), ValueError, "SoftCap"),
    "function that reduces": (Function(lambda s, i, j, p: s.sum(-1), ()), (ValueError, TypeError), "Function"),
    "function of another dtype": (Function(lambda s, i, j, p: s > 0, ()), (ValueError, TypeError), "Function"),
}


@both
@pytest.mark.parametrize("name", MISFITS)
def test_errors_when_used(implementation, name):
    given, error, message = MISFITS[name]
    with pytest.raises(error, match=message):
        jattn.attention(*qkv(), scores=(given,), q_offset=OFFSET, implementation=implementation)


def test_every_modifier_is_tested_here():
    """So that a new one is put through all of the above."""
    public = {
        name
        for name, value in vars(scores).items()
        if isinstance(value, type) and value.__module__ == "jattn.scores" and not name.startswith("_")
    }
    assert public - {"Modifier", "Dropout"} <= {type(value).__name__ for value in values().values()}


@both
def test_parameters_of_a_function_may_be_complex(implementation):
    q, k, v = qkv()
    weights = jnp.asarray(random(3) + 1j * random(3, seed=1))

    def waves(score, q_pos, kv_pos, weights):
        angle = jnp.multiply.outer(jnp.arange(1.0, 4.0), (q_pos - kv_pos).astype(float))
        return score + jnp.einsum("w,w...->...", weights, jnp.exp(jax.lax.complex(jnp.zeros_like(angle), angle))).real

    def ours(weights, q):
        scores = (Function(waves, weights),)
        return loss(jattn.attention(q, k, v, scores=scores, q_offset=0, implementation=implementation))

    def obvious(weights, q):
        return loss(
            plain.attend(q, k, v, score=lambda s: waves(s, np.arange(T)[:, None], np.arange(S)[None], weights))[0]
        )

    got, wanted = (jax.jit(jax.grad(f, (0, 1)))(weights, q) for f in (ours, obvious))
    np.testing.assert_allclose(got[0], wanted[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(got[1], wanted[1], rtol=0, atol=1e-12)


@both
@pytest.mark.parametrize("modifier", [Bias, Sink, ALiBi], ids=lambda modifier: modifier.__name__)
def test_narrow_arrays_are_not_left_to_promotion(implementation, modifier):
    """Which is strict in these tests: what is forgotten raises, in the derivatives too."""
    x = qkv(dtype=jnp.bfloat16)
    array = jnp.asarray(random(N), jnp.bfloat16).reshape((N, 1, 1) if modifier is Bias else N)

    def slope(array, *x):
        scores = (modifier(array),)
        return loss(jattn.attention(*x, scores=scores, q_offset=0, implementation=implementation).astype(float))

    gradients = derivatives(lambda args: slope(*args), (array, *x))
    assert all(np.isfinite(np.asarray(leaf, float)).all() for leaf in jax.tree.leaves(gradients))


@both
@pytest.mark.parametrize("lead", [(), (2,), (1,)], ids=str)
def test_a_scale_for_each_head(implementation, lead):
    """As if the queries had been scaled, in values and in both gradients."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 6, n, 3)), jnp.float32) for n in (4, 2, 2))
    scale = jnp.asarray(rng.uniform(0.1, 2, (*lead, 4)), jnp.float32)

    def ours(q, scale):
        return jattn.attention(q, k, v, scale=scale, implementation=implementation)

    def scaled(q, scale):
        every = jnp.broadcast_to(scale, (2, 4)) if lead else jnp.stack([scale, scale])
        return jattn.attention(q * every[:, None, :, None], k, v, scale=1.0, implementation="dense")

    def run(f, *x):
        return f(*x), jax.grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1))(*x)

    got, wanted = (quick(functools.partial(run, f), q, scale) for f in (ours, scaled))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
