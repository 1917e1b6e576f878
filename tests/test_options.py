"""No silent anything: in every combination of options, changing any one of them changes the result or raises."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, scores
from tests import reference
from tests.plain import once, qkv

T, S, N = 5, 7, 6
SMALL = jattn.Blockwise(block_q=3, block_kv=4)
TOL = dict(rtol=2e-5, atol=2e-5)
KEY = jax.random.key(5)
RNG = np.random.default_rng(1)
BIAS = RNG.normal(size=(N, T, S)).astype(np.float32)
SLOPES = np.linspace(0.1, 0.6, N).astype(np.float32)
SINK = RNG.normal(size=N).astype(np.float32)
ALLOWED = RNG.random((N, T, S)) < 0.7
Q_IDS, KV_IDS = np.asarray([0, 0, 1, 1, 1], np.int32), np.asarray([0, 0, 1, 1, 1, 0, -1], np.int32)
Q_POS, KV_POS = np.asarray([2, 9, 3, 4, 8], np.int32), np.asarray([5, 0, 4, 3, 8, 1, 2], np.int32)

# What each option may be, and what it means: every mask and every score looks at positions, so that those matter.
MASKS = {
    "causal": (masks.Causal(), lambda i, j: j <= i),
    "window": (masks.Window(3, 1), lambda i, j: (i - 3 <= j) & (j <= i + 1)),
    "packed": (
        masks.Causal() & masks.Segments(Q_IDS, KV_IDS),
        lambda i, j: (j <= i) & (Q_IDS[:, None] == KV_IDS),
    ),
    "dense": (masks.Causal() & masks.Dense(ALLOWED), lambda i, j: (j <= i) & ALLOWED),
}
SCORES = {
    "none": ((), []),
    "bias": ((scores.Bias(BIAS),), [lambda s, n, d: s + BIAS[n]]),
    "cap": ((scores.SoftCap(0.5),), [lambda s, n, d: 0.5 * np.tanh(s / 0.5)]),
    "cap, bias": (
        (scores.SoftCap(0.5), scores.Bias(BIAS)),
        [lambda s, n, d: 0.5 * np.tanh(s / 0.5), lambda s, n, d: s + BIAS[n]],
    ),
    "alibi": ((scores.ALiBi(SLOPES),), [lambda s, n, d: s - SLOPES[n] * d]),
    "sink": ((scores.Sink(SINK),), []),
}
PLACES = {
    "offset 2": (dict(q_offset=2), np.arange(T) + 2, np.arange(S)),
    "offset 4": (dict(q_offset=4), np.arange(T) + 4, np.arange(S)),
    "queries": (dict(q_positions=Q_POS), Q_POS, np.arange(S)),
    "both": (dict(q_positions=Q_POS, kv_positions=KV_POS), Q_POS, KV_POS),
    "keys": (dict(q_offset=2, kv_positions=KV_POS), np.arange(T) + 2, KV_POS),
}
STORED = [RNG.uniform(0.5, 2, shape).astype(np.float32) for shape in ((S, 2), (S, 1))]
SCALES = {"default": {}, "given": dict(scale=1.7), "stored": dict(key_scale=STORED[0], value_scale=STORED[1])}
DROPOUTS = {"none": None, "some": jattn.Dropout(0.4, KEY)}
CHOICES = dict(mask=MASKS, scores=SCORES, place=PLACES, scale=SCALES, dropout=DROPOUTS)


def options(mask, scores, place, scale, dropout):
    return dict(
        mask=MASKS[mask][0],
        scores=SCORES[scores][0],
        **SCALES[scale],
        dropout=DROPOUTS[dropout],
        **PLACES[place][0],
    )


def exact(x, mask, scores, place, scale):
    """The oracle's (out, lse), without dropout."""
    _, q_pos, kv_pos = PLACES[place]
    keep = MASKS[mask][1](q_pos[:, None], kv_pos)
    distance = np.abs(q_pos[:, None] - kv_pos)
    given = [lambda s, head, f=f: f(s, head[-1], distance) for f in SCORES[scores][1]]
    stands_for = [SCALES[scale].get(name, np.ones((1, 1))) for name in ("key_scale", "value_scale")]
    stored = (x[0], *(a * one[..., None] for a, one in zip(x[1:], stands_for, strict=True)))
    return reference.attention(
        *stored, keep=keep, scores=given, scale=SCALES[scale].get("scale"), sink=SINK if scores == "sink" else None
    )[:2]


def neighbours(choices):
    """Pairs of points of the product that differ in one option only."""
    for point in itertools.product(*choices.values()):
        for i, values in enumerate(choices.values()):
            for value in values:
                if list(values).index(value) > list(values).index(point[i]):
                    yield point, (*point[:i], value, *point[i + 1 :])


def assert_all_differ(results, choices):
    for a, b in neighbours(choices):
        difference = max(
            np.abs(np.asarray(x) - np.asarray(y)).max() for x, y in zip(results[a], results[b], strict=True)
        )
        assert difference > 1e-3, f"the same result: {a} and {b}"


def test_b18_every_change_of_an_option_of_attention_changes_the_result():
    """The full product, dense, each point also against the oracle (where dropout does not forbid)."""
    x = qkv(T, S, V=3)
    results = {}
    for point in itertools.product(*CHOICES.values()):
        with jax.disable_jit():  # much is called once: compiling it would take longer
            out, lse = jattn.attention_with_lse(*x, **options(*point), implementation="dense")
        out, lse = np.asarray(out), np.where(np.isneginf(lse), -99, lse)
        results[point] = out, lse
        if point[-1] == "none":
            wanted = exact(x, *point[:-1])
            np.testing.assert_allclose(out, wanted[0], **TOL, err_msg=str(point))
            np.testing.assert_allclose(lse, np.where(np.isneginf(wanted[1]), -99, wanted[1]), **TOL, err_msg=str(point))
    assert_all_differ(results, CHOICES)


def pairwise(choices):
    """Few points that hold every pair of values of two options (greedy)."""
    names = list(choices)
    wanted = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(choices[a], choices[b])
    }
    product = list(itertools.product(*choices.values()))
    while wanted:
        best = max(product, key=lambda p: len(wanted & set(itertools.combinations(zip(names, p, strict=True), 2))))
        wanted -= set(itertools.combinations(zip(names, best, strict=True), 2))
        yield best


def check_implementations(point):
    """Blockwise gives what dense gives, and so do attention, its lse and its weights."""
    x = qkv(T, S, V=3)
    given = options(*point)
    with jax.disable_jit():
        dense = jattn.attention_with_lse(*x, **given, implementation="dense")
    blocks = jax.jit(lambda *x: jattn.attention_with_lse(*x, **given, implementation=SMALL))(*x)
    for a, b in zip(blocks, dense, strict=True):
        np.testing.assert_allclose(a, b, **TOL)
    of_values = given.pop("value_scale", np.ones((1, 1), np.float32))
    with jax.disable_jit():
        weights = jattn.attention_weights(*x[:2], **given)
        rows = jattn.attention_weights(*x[:2], **given, rows=jnp.asarray([3, 0]))
    values = np.repeat(x[2] * of_values[..., None], 3, axis=1)
    np.testing.assert_allclose(np.einsum("nts,snv->tnv", weights, values), dense[0], **TOL)
    np.testing.assert_allclose(rows, weights[:, np.array([3, 0])], **TOL)


@pytest.mark.parametrize("point", list(pairwise(CHOICES)), ids=", ".join)
def test_b18_no_path_drops_an_option(point):
    check_implementations(point)


@pytest.mark.sweep
@pytest.mark.parametrize("point", list(itertools.product(*CHOICES.values())), ids=", ".join)
def test_b18_no_path_drops_an_option_full_product(point):
    check_implementations(point)


@pytest.mark.parametrize("implementation", ["dense", SMALL], ids=["dense", "blockwise"])
@pytest.mark.parametrize(
    "name",
    ["mask", "scores", "scale", "key_scale", "value_scale", "q_offset", "q_positions", "kv_positions", "dropout"],
)
def test_each_option_alone_has_effect_in_every_function(implementation, name):
    """Without any other option; where positions alone could not matter, beside the mask that reads them."""
    q, k, v = qkv(T, T, V=3)
    params = jattn.init(jax.random.key(0), 11, num_heads=6, num_kv_heads=2, qk_dim=5, v_dim=3, out_dim=13)
    tokens = jax.random.normal(jax.random.key(1), (T, 11))
    value = dict(
        mask=masks.Causal(),
        scores=(scores.SoftCap(0.1),),
        scale=3.0,
        key_scale=STORED[0][:T],
        value_scale=STORED[1][:T],
        q_offset=1,
        q_positions=jnp.asarray(Q_POS),
        kv_positions=jnp.asarray(KV_POS[:T]),
        dropout=jattn.Dropout(0.5, KEY),
    )[name]
    beside = dict(mask=masks.Causal()) if "_" in name else {}
    calls = {
        "attention": lambda **o: jattn.attention(q, k, v, **o, implementation=implementation),
        "attention_with_lse": lambda **o: jattn.attention_with_lse(q, k, v, **o, implementation=implementation)[0],
        "attention_weights": lambda value_scale=None, **o: jattn.attention_weights(q, k, **o),
        "attend": lambda **o: jattn.attend(params, tokens, **o, implementation=implementation),
        "context_vector": lambda **o: jattn.context_vector(params, tokens, **o, implementation=implementation),
    }

    def results(**options):
        return jax.jit(lambda: {call: f(**options) for call, f in calls.items()})()

    without, given = (
        once(lambda: results(**beside), "options", implementation, *beside),
        results(**beside | {name: value}),
    )
    for call in set(calls) - ({"attention_weights"} if name == "value_scale" else set()):
        assert np.abs(without[call] - given[call]).max() > 1e-3, f"{call} dropped {name}"


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("rows", [[0], [0, 0], []], ids=str)
def test_weights_of_rows_that_repeat(T, rows):
    q, k, _ = qkv(T, S)
    rows = np.asarray(rows, np.int32)
    np.testing.assert_allclose(
        jattn.attention_weights(q, k, rows=rows), jattn.attention_weights(q, k)[:, rows], rtol=1e-6
    )


def test_the_layer_hands_every_option_to_attention():
    params = jattn.init(
        jax.random.key(0), 11, num_heads=6, num_kv_heads=2, qk_dim=5, v_dim=3, out_dim=13, context_dim=17
    )
    x, context = jax.random.normal(jax.random.key(1), (T, 11)), jax.random.normal(jax.random.key(2), (S, 17))
    for point in pairwise(CHOICES):
        with jax.disable_jit():
            heads = jattn.attention(*jattn.project(params, x, context), **options(*point))
            wanted = jnp.einsum("tnv,nve->te", heads, params.wo)
            attended = jattn.attend(params, x, context, **options(*point))
            vector = jattn.context_vector(params, x, context, **options(*point))
        np.testing.assert_allclose(attended, wanted, **TOL)
        np.testing.assert_allclose(vector, wanted.sum(0), rtol=1e-4, atol=1e-4)


def test_these_are_all_the_options():
    """A new option must be added to the walks above."""
    scales, places = ["scale", "key_scale", "value_scale"], ["q_offset", "q_positions", "kv_positions"]
    walked = ["mask", "scores", *scales, *places, "dropout", "implementation"]
    for function in (jattn.attention, jattn.attention_with_lse):
        assert list(inspect.signature(function).parameters)[3:] == walked
    assert set(inspect.signature(jattn.attention_weights).parameters) == {
        *("query", "key", "rows"),
        *(name for name in walked[:-1] if name != "value_scale"),  # it has no values
    }
    assert list(inspect.signature(jattn.explain).parameters)[:3] == ["query", "key", "value"]
    walked = [*COMPATIBLE, "implementation"]
    assert set(inspect.signature(jattn.dot_product_attention).parameters) == {"query", "key", "value", *walked}


def test_explain_takes_the_same_options():
    x = qkv(T, S, V=3)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in x]
    for point in list(pairwise(CHOICES))[::15]:
        told = [jattn.explain(*arrays, **options(*point), implementation="dense") for arrays in (x, shapes)]
        assert told[0] == told[1] and "dense" in str(told[0])


def test_explain_takes_descriptions_and_numbers_of_numpy():
    x = [jax.ShapeDtypeStruct((1, 2048, 2, 8), jnp.float32)] * 3
    shapes = [(scores.Bias, (2, 1, 2048)), (scores.ALiBi, (2,)), (scores.RelativePosition, (8, 2)), (scores.Sink, (2,))]
    for kind, shape in shapes:
        modifiers = (kind(jax.ShapeDtypeStruct(shape, jnp.float32)),)
        assert jattn.explain(*x, scores=modifiers).implementation == "blockwise"
    told = [jattn.explain(*x, mask=masks.Window(100, 0), q_offset=offset(0)) for offset in (int, np.int32)]
    assert told[0] == told[1] and told[0].empty > 0.8


REFUSED = {
    "offset and positions": (
        dict(q_offset=2, q_positions=Q_POS),
        ValueError,
        "q_offset.*q_positions|q_positions.*q_offset",
    ),
    "no offset": (dict(mask=masks.Causal()), ValueError, "q_offset"),
    "float offset": (dict(q_offset=1.0), TypeError, "q_offset"),
    "float positions": (dict(q_positions=np.ones(T, np.float32)), TypeError, "q_positions"),
    "float key positions": (dict(q_offset=0, kv_positions=np.ones(S, np.float32)), TypeError, "kv_positions"),
    "positions of another length": (dict(q_positions=np.arange(S)), ValueError, "q_positions"),
    "key positions of another length": (dict(q_offset=0, kv_positions=np.arange(T)), ValueError, "kv_positions"),
    "offsets without a batch": (dict(q_offset=np.arange(3)), ValueError, "q_offset"),
    "mask by name": (dict(mask="causal"), TypeError, "mask"),
    "mask of ints": (dict(mask=np.ones((T, S), np.int32)), TypeError, "mask"),
    "mask of another size": (dict(mask=np.ones((T, T), bool)), ValueError, "mask|Dense"),
    "mask for other heads": (dict(mask=np.ones((4, T, S), bool)), ValueError, "mask|Dense"),
    "segments of another length": (dict(mask=masks.Segments(Q_IDS)), ValueError, "Segments"),
    "scores by name": (dict(scores="alibi"), TypeError, "scores"),
    "scores as a function": (dict(scores=(np.tanh,)), TypeError, "scores"),
    "two sinks": (dict(scores=(scores.Sink(SINK), scores.Sink(SINK))), ValueError, "Sink"),
    "bias of another size": (dict(scores=(scores.Bias(np.ones((T, T), np.float32)),)), ValueError, "Bias"),
    "slopes for other heads": (dict(scores=(scores.ALiBi(np.ones(4, np.float32)),), q_offset=0), ValueError, "ALiBi"),
    "sink for other heads": (dict(scores=(scores.Sink(np.ones(4, np.float32)),)), ValueError, "Sink"),
    "scale by name": (dict(scale="rsqrt"), TypeError, "scale"),
    "vector of scales": (dict(scale=np.ones(3, np.float32)), ValueError, "scale"),
    "dropout as a rate": (dict(dropout=0.1), TypeError, "dropout"),
    "implementation by another name": (dict(implementation="cudnn"), ValueError, "implementation"),
    "implementation of another type": (dict(implementation=3), (TypeError, ValueError), "implementation"),
    "unknown option": (dict(is_causal=True), TypeError, "is_causal"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused(name):
    given, error, message = REFUSED[name]
    x = qkv(T, S, V=3)
    functions = [jattn.attention, jattn.attention_with_lse, jattn.explain]
    if "implementation" not in given:
        functions.append(lambda q, k, v, **o: jattn.attention_weights(q, k, **o))
    for function in functions:
        with pytest.raises(error, match=message):
            function(*x, **given)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("dtype", [np.int32, bool, np.complex64])
def test_arrays_that_are_not_real_are_refused(name, dtype):
    x = dict(zip(("query", "key", "value"), qkv(T, S, V=3), strict=True))
    x[name] = np.ones(x[name].shape, dtype)
    for function in (jattn.attention, jattn.attention_with_lse, jattn.explain):
        with pytest.raises(TypeError, match=name):
            function(**x)


B = 2
COMPATIBLE = dict(
    bias=[None, BIAS],
    mask=[None, ALLOWED[None]],
    scale=[None, 0.9],
    is_causal=[False, True],
    query_seq_lengths=[None, np.asarray([3, 4], np.int32)],
    key_value_seq_lengths=[None, np.asarray([4, 3], np.int32)],
    local_window_size=[None, 1, (2, 0)],
    return_residual=[False, True],
)


def compatible_oracle(x, bias, mask, scale, is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size):
    i, j = np.arange(T)[:, None], np.arange(S)
    keep = np.ones((B, N, T, S), bool)
    if mask is not None:
        keep = keep & mask
    if is_causal:
        keep = keep & (j <= i)
    if query_seq_lengths is not None:
        keep = keep & (i < query_seq_lengths[:, None, None, None])
    if key_value_seq_lengths is not None:
        keep = keep & (j < key_value_seq_lengths[:, None, None, None])
    if local_window_size is not None:
        left, right = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
        keep = keep & (i - left <= j) & (j <= i + right)
    given = [] if bias is None else [lambda s, head: s + bias[head[-1]]]
    return reference.attention(*x, keep=keep, scores=given, scale=scale)


def test_b18_every_change_of_an_option_of_dot_product_attention_changes_the_result():
    """The full product against the oracle; (2, 0) is inside causal already, so those neighbours may agree."""
    x = qkv(T, S, H=5, V=5, batch=(B,))
    results, ranges = {}, {name: range(len(values)) for name, values in COMPATIBLE.items()}
    for point in itertools.product(*ranges.values()):
        given = {name: COMPATIBLE[name][i] for name, i in zip(COMPATIBLE, point, strict=True)}
        with jax.disable_jit():
            got = jattn.dot_product_attention(*x, **given)
        residual = given.pop("return_residual")
        out, lse, _ = compatible_oracle(x, **given)
        np.testing.assert_allclose(got[0] if residual else got, out, **TOL, err_msg=str(given))
        if residual:
            np.testing.assert_allclose(got[1], lse, **TOL, err_msg=str(given))
        results[point] = out
    causal, window = list(COMPATIBLE).index("is_causal"), list(COMPATIBLE).index("local_window_size")
    for a, b in neighbours(ranges):
        if a[:-1] == b[:-1]:
            continue  # return_residual changes what is returned, as just seen
        if {a[causal], b[causal]} == {0, 1} and a[window] == 2:
            continue
        assert np.abs(results[a] - results[b]).max() > 1e-3, f"the same result: {a} and {b}"


@pytest.mark.parametrize("implementation", ["blockwise", "xla"])
def test_b18_dot_product_attention_honours_every_option_in_every_implementation(implementation):
    x = qkv(T, S, H=5, V=5, batch=(B,))
    ranges = {name: range(len(values)) for name, values in COMPATIBLE.items()}
    for point in pairwise(ranges):
        given = {name: COMPATIBLE[name][i] for name, i in zip(COMPATIBLE, point, strict=True)}
        attend = jax.jit(functools.partial(jattn.dot_product_attention, **given, implementation=implementation))
        got = attend(*x)
        residual = given.pop("return_residual")
        np.testing.assert_allclose(
            got[0] if residual else got, compatible_oracle(x, **given)[0], **TOL, err_msg=str(given)
        )


REFUSED_COMPATIBLE = {
    "bias of another size": (dict(bias=np.ones((1, 1, T, T), np.float32)), ValueError, "(?i)bias"),
    "bias of ints": (dict(bias=np.ones((1, 1, T, S), np.int32)), TypeError, "(?i)bias"),
    "mask of floats": (dict(mask=np.ones((1, 1, T, S), np.float32)), TypeError, "mask"),
    "mask of another size": (dict(mask=np.ones((1, 1, S, S), bool)), ValueError, "(?i)mask|Dense"),
    "lengths for another batch": (
        dict(query_seq_lengths=np.ones(3, np.int32)),
        ValueError,
        "query_seq_lengths|Lengths",
    ),
    "float lengths": (dict(key_value_seq_lengths=np.ones(B, np.float32)), TypeError, "key_value_seq_lengths|Lengths"),
    "negative window": (dict(local_window_size=-1), ValueError, "local_window_size|Window"),
    "three windows": (dict(local_window_size=(1, 2, 3)), (ValueError, TypeError), "local_window_size"),
    "implementation": (dict(implementation="cudnn"), (ValueError, NotImplementedError), "implementation"),
}


@pytest.mark.parametrize("name", REFUSED_COMPATIBLE)
def test_what_dot_product_attention_cannot_honour_is_refused(name):
    given, error, message = REFUSED_COMPATIBLE[name]
    with pytest.raises(error, match=message):
        jattn.dot_product_attention(*qkv(T, S, H=5, V=5, batch=(B,)), **given)
