"""Masks: their pictures, their algebra, their life as pytrees, and that blocks tell the truth."""

import copy
import functools
import itertools
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, scores
from jattn.intervals import Interval
from jattn.masks import Causal, Dense, Empty, Full, Function, Lengths, Prefix, Segments, SlidingWindow, Window
from jattn.problem import lay_out
from tests.pictures import catalogue, draw, striped
from tests.plain import quick

SMALL = jattn.Blockwise(block_q=3, block_kv=4)
T = 11


def ints(*values):
    return np.asarray(values, np.int32)


DRAWN = [
    (Full(), "##### ##### ##### ##### #####"),
    (Empty(), "..... ..... ..... ..... ....."),
    (Causal(), "#.... ##... ###.. ####. #####"),
    (~Causal(), ".#### ..### ...## ....# ....."),
    (Window(0, 0), "#.... .#... ..#.. ...#. ....#"),
    (Window(1, 0), "#.... ##... .##.. ..##. ...##"),
    (Window(0, 1), "##... .##.. ..##. ...## ....#"),
    (Window(2, 1), "##... ###.. ####. .#### ..###"),
    (Window(None, 1), "##... ###.. ####. ##### #####"),
    (Window(1, None), "##### ##### .#### ..### ...##"),
    (Window(None, None), "##### ##### ##### ##### #####"),
    (SlidingWindow(1), "#.... .#... ..#.. ...#. ....#"),
    (SlidingWindow(3), "#.... ##... ###.. .###. ..###"),
    (Prefix(0), "..... ..... ..... ..... ....."),
    (Prefix(2), "##... ##... ##... ##... ##..."),
    (Prefix(9), "##### ##### ##### ##### #####"),
    (Prefix(2) | Causal(), "##... ##... ###.. ####. #####"),
    (Lengths(3, 2), "##... ##... ##... ..... ....."),
    (Lengths(q=2), "##### ##### ..... ..... ....."),
    (Lengths(kv=4), "####. ####. ####. ####. ####."),
    (Segments(ints(0, 0, 4, 4, -1)), "##... ##... ..##. ..##. ....."),
    (Segments(ints(1, 0, 1, -2, 2), ints(1, 1, 0, 2, -2)), "##... ..#.. ##... ..... ...#."),
    (Causal() & Segments(ints(0, 0, 4, 4, -1)), "#.... ##... ..#.. ..##. ....."),
    (Dense(np.array([True, False, True, True, False])), "#.##. #.##. #.##. #.##. #.##."),
    (Function(lambda q, kv: (q + kv) % 2 == 0), "#.#.# .#.#. #.#.# .#.#. #.#.#"),
]


@pytest.mark.parametrize(("mask", "drawn"), DRAWN, ids=[str(mask) for mask, _ in DRAWN])
def test_a_mask_is_as_drawn(mask, drawn):
    array = mask.to_array(5, 5)
    assert array.shape == (5, 5) and array.dtype == bool
    assert " ".join("".join(".#"[cell] for cell in row) for row in np.asarray(array, int)) == drawn


DOCUMENTED = [
    (masks, Causal(), 4),
    (Causal, Causal(), 4),
    (Window, Window(1, 0), 4),
    (Window, Window(0, 0), 4),
    (SlidingWindow, SlidingWindow(2), 4),
    (Prefix, Prefix(2), 4),
    (Prefix, Prefix(2) | Causal(), 4),
    (Lengths, Lengths(3, 2), 4),
    (Segments, Segments(ints(0, 0, 1, -1)), 4),
]


@pytest.mark.parametrize(("owner", "mask", "size"), DOCUMENTED, ids=[str(mask) for _, mask, _ in DOCUMENTED])
def test_docstrings_draw_what_the_masks_are(owner, mask, size):
    """The picture stands in the docstring, line under line."""
    lines, rows = owner.__doc__.splitlines(), mask.picture(size, size).splitlines()
    windows = (lines[start : start + size] for start in range(len(lines) - size + 1))
    assert any(all(row in line for row, line in zip(rows, window, strict=True)) for window in windows)


@pytest.mark.parametrize(("T", "S", "offset"), [(5, 13, 0), (5, 13, 8), (13, 5, -8), (1, 13, 12), (13, 1, 3)])
def test_to_array_with_unequal_lengths_and_an_offset(T, S, offset):
    for name, (mask, allowed) in catalogue(T, S, offset).items():
        np.testing.assert_array_equal(mask.to_array(T, S, q_offset=offset), allowed, err_msg=name)


@pytest.mark.parametrize("name", catalogue())
def test_to_array_is_the_picture(name):
    mask, allowed = catalogue()[name]
    rows = mask.picture(T, T).splitlines()
    assert len(rows) == T and {len(row) for row in rows} == {T}
    np.testing.assert_array_equal([[cell == "█" for cell in row] for row in rows], allowed)


@pytest.mark.parametrize(
    "mask",
    [
        Causal() & Window(100, 0),
        Prefix(7) | Causal(),
        Segments(np.arange(100_000, dtype=np.int32) // 1000),
        Lengths(kv=np.int32(77)),
        Function(striped, 3),
        Function(lambda q, kv, table: q < kv, np.zeros(100_000, np.float32)),
    ],
    ids=str,
)
def test_large_masks_are_shown_small(mask):
    """Nothing of T x S is built: 10^10 cells would not fit."""
    drawn = mask.picture(100_000, 100_000)
    assert max(map(len, drawn.splitlines())) <= 80 and len(drawn.splitlines()) <= 64
    assert len(set(drawn)) > 1 and len(str(mask)) < 80


def test_str_says_what_the_mask_is():
    assert str(Causal()) == "Causal()"
    assert str(Window(3, None)) == "Window(3, None)"
    for part in ("Causal()", "Window(3, 0)", "~", "&", "|"):
        assert part in str(~(Causal() & Window(3, 0)) | Prefix(2))
    ids = Segments(np.zeros(10_000, np.int32))
    assert "Segments" in str(ids) and "10000" in str(ids).replace("_", "").replace(",", "") and len(str(ids)) < 60
    assert str((Causal() | Prefix(1)) & Prefix(2)) != str(Causal() | Prefix(1) & Prefix(2))
    assert str(~(Causal() & Prefix(2))) != str(~Causal() & Prefix(2))


ALGEBRA = {name: mask for name, (mask, _) in catalogue().items()}


@pytest.mark.parametrize("name", ALGEBRA)
def test_simplifications(name):
    m = ALGEBRA[name]
    assert Full() & m == m == m & Full()
    assert Empty() | m == m == m | Empty()
    assert Full() | m == Full() == m | Full()
    assert Empty() & m == Empty() == m & Empty()
    assert ~~m == m
    assert m & m == m == m | m
    assert m & copy.deepcopy(m) == m
    assert ~Full() == Empty() and ~Empty() == Full()


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(list(catalogue()), 2)), ids="-".join)
def test_algebra_is_elementwise(a, b):
    (m, allowed), (n, admitted) = catalogue()[a], catalogue()[b]
    for got, wanted in (
        (m & n, allowed & admitted),
        (n | m, allowed | admitted),
        (~(m | n), ~(allowed | admitted)),
        (~m & ~n, ~allowed & ~admitted),
    ):
        np.testing.assert_array_equal(got.to_array(T, T), wanted, err_msg=str(got))


def test_longer_combinations():
    m = (Causal() & Window(3, 3) & ~Prefix(1)) | (Prefix(2) & Lengths(q=9) & ~Window(0, 0))
    wanted = draw(T, T, lambda i, j: (j <= i and abs(i - j) <= 3 and j >= 1) or (j < 2 and i < 9 and i != j))
    np.testing.assert_array_equal(m.to_array(T, T), wanted)
    assert (Causal() & Prefix(2)) & Full() & Prefix(2) == Causal() & Prefix(2)


def test_equal_and_hash_by_value():
    first, second = catalogue(), catalogue()
    for name, (mask, _) in first.items():
        assert mask == second[name][0] and hash(mask) == hash(second[name][0]), name
    different = [mask for name, (mask, _) in first.items() if name not in ("moving", "prompt")]
    assert all(a != b for a, b in itertools.combinations(different, 2))
    assert len(set(different)) == len(different)
    assert Window(1, 0) != Window(0, 1) and Window(1, 0) != Window(1, None) and Causal() != 3 and Causal() != "Causal()"
    assert Segments(ints(0, 1)) != Segments(ints(0, 2)) and Segments(ints(0, 1)) != Segments(ints(0, 1), ints(0, 1))
    assert Dense(np.array([True])) != Dense(np.array([False])) and Dense(np.array([True])) != Dense(np.array([[True]]))
    assert SlidingWindow(3) == SlidingWindow(3) != SlidingWindow(4)
    assert Function(striped, 3) == Function(striped, 3) != Function(striped, 4)


@pytest.mark.parametrize("name", ALGEBRA)
def test_values_are_frozen(name):
    mask = ALGEBRA[name]
    before = repr(mask)
    for attribute in ("left", "length", "array", "anything"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(mask, attribute, 1)
    assert repr(mask) == before


def test_values_can_be_copied_and_pickled():
    for name, mask in ALGEBRA.items():
        assert copy.deepcopy(mask) == mask == pickle.loads(pickle.dumps(mask)), name


@pytest.mark.parametrize("name", ALGEBRA)
def test_pytree_round_trip(name):
    mask = ALGEBRA[name]
    leaves, tree = jax.tree.flatten(mask)
    assert jax.tree.unflatten(tree, leaves) == mask
    assert jax.tree.map(lambda x: x, mask) == mask
    jax.tree.unflatten(tree, [object() for _ in leaves])  # as JAX does; nothing may be checked then
    jax.tree.unflatten(tree, [None for _ in leaves])


def test_ints_are_static_and_arrays_dynamic():
    assert jax.tree.leaves((Causal() & Window(3, None) | ~Prefix(2), Lengths(1, 2), SlidingWindow(3))) == []
    for mask, count in [
        (Prefix(jnp.int32(2)), 1),
        (Lengths(kv=ints(1, 2)), 1),
        (Lengths(jnp.int32(1), 2), 1),
        (Window(np.int32(1), jnp.int32(2)), 2),
        (Segments(ints(0, 1)), 1),
        (Segments(ints(0, 1), ints(0, 1)), 2),
        (Dense(np.ones((2, 2), bool)), 1),
        (Causal() & (Segments(ints(0, 1)) | ~Dense(np.ones((2, 2), bool))), 2),
        (Function(striped, np.int32(3)), 1),
    ]:
        assert len(jax.tree.leaves(mask)) == count, str(mask)


@functools.partial(jax.jit, static_argnames=("implementation", "T", "S"))
def one_hot(mask, implementation, T=T, S=T, **options):
    """With equal logits and one-hot values attention gives 1 / count where it may look."""
    q, k, v = jnp.zeros((T, 1, 1)), jnp.zeros((S, 1, 1)), jnp.eye(S)[:, None]
    return jattn.attention(q, k, v, mask=mask, implementation=implementation, **options)[:, 0]


def seen(mask, implementation, **options):
    """What attention sees of a mask."""
    out = np.asarray(one_hot(mask, implementation, **options))
    sees = out > 0
    np.testing.assert_allclose(out, sees / np.maximum(sees.sum(-1, keepdims=True), 1), rtol=1e-5)
    return sees


implementations = pytest.mark.parametrize("implementation", ["dense", SMALL], ids=["dense", "blockwise"])


@implementations
@pytest.mark.parametrize("widest", [2**31 - 1, np.int32(2**31 - 1)], ids=["int", "array"])
def test_the_widest_window_overflows_no_position(widest, implementation):
    for mask in (Window(widest, None), Window(None, widest), Window(widest, widest)):
        np.testing.assert_array_equal(mask.to_array(3, 4, q_offset=5), True)
        np.testing.assert_array_equal(seen(mask, implementation, q_offset=5), True)


def check_pair(a, b):
    """Every combination of two masks, blockwise, in positions that are not even sorted."""
    (m, allowed), (n, admitted) = catalogue()[a], catalogue()[b]
    np.testing.assert_array_equal(seen(m & n, SMALL), allowed & admitted)
    np.testing.assert_array_equal(seen(~m | n, SMALL), ~allowed | admitted)


NAMES = list(catalogue())


@pytest.mark.parametrize("i", range(len(NAMES)))
def test_blocks_of_a_pair_tell_the_truth(i):
    check_pair(NAMES[i], NAMES[(7 * i + 3) % len(NAMES)])


@pytest.mark.sweep
@pytest.mark.parametrize(("a", "b"), list(itertools.product(NAMES, NAMES)), ids="-".join)
def test_blocks_of_every_pair_tell_the_truth(a, b):
    check_pair(a, b)


BY_POSITION = [
    "causal",
    "window",
    "left",
    "right",
    "self",
    "moving",
    "sliding",
    "prefix",
    "lengths",
    "function",
    "outside",
    "chunks",
    "tiles",
    "neighbors",
    "dilated",
]


@pytest.mark.parametrize("name", BY_POSITION)
def test_blocks_of_scattered_positions_tell_the_truth(name):
    """The bounds of a block are those of its positions, in whatever order these come."""
    rng = np.random.default_rng(3)
    q_pos, kv_pos = (rng.permutation(20)[:T].astype(np.int32) for _ in range(2))
    mask, _ = catalogue()[name]
    allowed = np.asarray(mask.to_array(20, 20))[q_pos][:, kv_pos]
    np.testing.assert_array_equal(seen(mask, SMALL, q_positions=q_pos, kv_positions=kv_pos), allowed)

    np.testing.assert_array_equal(
        seen(mask, SMALL, q_offset=jnp.int32(3)), np.asarray(mask.to_array(T, T, q_offset=3))
    )  # an offset that is known only when it runs


@pytest.mark.parametrize("name", ["full", "empty", "causal", "window", "prefix_lm", "outside", "prompt", "dense"])
def test_explain_counts_blocks_honestly(name):
    """Shares of 5 x 3 blocks: exact for these masks, whether known while tracing or decided by arrays."""
    T, S = 13, 12
    mask, allowed = catalogue(T, S)[name]
    q, k = jax.ShapeDtypeStruct((T, 1, 1), jnp.float32), jax.ShapeDtypeStruct((S, 1, 1), jnp.float32)
    told = jattn.explain(q, k, k, mask=mask, q_offset=0, implementation=SMALL)
    np.testing.assert_allclose((told.empty, told.partial, told.full), shares(allowed), atol=1e-6)
    assert f"{told.partial:.1%} partial" in str(told)


def shares(allowed):
    """Of the blocks of SMALL, `[..., T, S]`: empty, partial, full."""
    *_, T, S = allowed.shape
    blocks = [allowed[..., i : i + 3, j : j + 4] for i in range(0, T, 3) for j in range(0, S, 4)]
    empty = np.mean([~block.any((-1, -2)) for block in blocks])
    full = np.mean([block.all((-1, -2)) for block in blocks])
    return empty, 1 - empty - full, full


def test_explain_counts_the_blocks_of_every_example():
    """Segments differ between examples, each of which is gone through by itself; padding makes no block full."""
    ids = jnp.array([[0] * 12, [0] * 3 + [1] * 6 + [-1] * 3, [0, 1, 2] + [3] * 8 + [-1]], jnp.int32)
    q, none = jnp.full((3, 12, 4, 2), np.nan), jax.ShapeDtypeStruct((3, 12, 1, 2), jnp.float32)
    allowed = np.asarray((ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, None, :])
    told = jattn.explain(q, none, none, mask=Segments(ids), implementation=SMALL)
    np.testing.assert_allclose((told.empty, told.partial, told.full), shares(allowed), atol=1e-6)
    assert told.flops == pytest.approx(2 * 4 * 3 * 4 * 12 * 12 * (1 - told.empty))
    unknown = Segments(jax.ShapeDtypeStruct(ids.shape, ids.dtype))
    told = jattn.explain(q, none, none, mask=unknown, implementation=SMALL)
    assert told.empty is told.partial is told.full is None and "decided by arrays" in str(told)
    assert jattn.explain(q, none, none, mask=Segments(ids), implementation="dense").empty == 0


@implementations
def test_batched_arrays_are_right_aligned(implementation):
    B = 3
    zeros, eye = jnp.zeros((B, T, 2, 1)), jnp.broadcast_to(jnp.eye(T)[:, None], (B, T, 2, T))

    @jax.jit
    def see(mask):
        out = jattn.attention(zeros, zeros, eye, mask=mask, implementation=implementation)
        return jnp.moveaxis(out > 0, 2, 1)  # [B, N, T, S]

    lengths, ids = ints(0, 4, 11), np.random.default_rng(0).integers(-1, 2, (B, T)).astype(np.int32)
    short = np.arange(T) < lengths[:, None, None, None]
    same = (ids[:, None, :, None] == ids[:, None, None, :]) & (ids >= 0)[:, None, :, None]
    left = np.arange(T)[:, None] - np.arange(T) <= lengths[:, None, None, None]
    whole = (B, 2, T, T)
    np.testing.assert_array_equal(see(Prefix(lengths)), np.broadcast_to(short, whole))
    np.testing.assert_array_equal(see(Lengths(kv=lengths)), np.broadcast_to(short, whole))
    np.testing.assert_array_equal(see(Lengths(q=lengths)), np.broadcast_to(np.swapaxes(short, 2, 3), whole))
    np.testing.assert_array_equal(see(Window(lengths, None)), np.broadcast_to(left, whole))
    np.testing.assert_array_equal(see(Segments(ids)), np.broadcast_to(same, whole))
    np.testing.assert_array_equal(see(Segments(ids[:1])), np.broadcast_to(same[:1], whole))
    np.testing.assert_array_equal(see(Segments(ids) & ~Prefix(lengths)), np.broadcast_to(same & ~short, whole))
    assert Prefix(lengths).to_array(T, T).shape == Segments(ids).to_array(T, T).shape == (B, T, T)
    np.testing.assert_array_equal(Segments(ids).to_array(T, T), same[:, 0])


@implementations
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_one_leading_dim_more_is_the_heads(implementation, batch):
    """Also where query heads share a key head: each has a mask of its own."""
    N = 4
    q, k = jnp.zeros((*batch, T, N, 1)), jnp.zeros((*batch, T, 2, 1))
    eye = jnp.broadcast_to(jnp.eye(T)[:, None], (*batch, T, 2, T))

    @jax.jit
    def see(mask):
        out = jattn.attention(q, k, eye, mask=mask, implementation=implementation)
        return jnp.moveaxis(out > 0, -2, -3)  # [*batch, N, T, S]

    rng = np.random.default_rng(0)
    counts = rng.integers(0, T, (*batch, N)).astype(np.int32)
    ids = rng.integers(-1, 2, (*batch, N, T)).astype(np.int32)
    j = np.arange(T)
    wide = counts[..., None, None]
    whole = (*batch, N, T, T)
    same = (ids[..., None] == ids[..., None, :]) & (ids >= 0)[..., None]
    np.testing.assert_array_equal(see(Prefix(counts)), np.broadcast_to(j < wide, whole))
    np.testing.assert_array_equal(see(Lengths(q=counts)), np.broadcast_to(j[:, None] < wide, whole))
    np.testing.assert_array_equal(see(Window(counts, 0)), (j <= j[:, None]) & (j[:, None] - j <= wide))
    np.testing.assert_array_equal(see(Segments(ids)), same)
    np.testing.assert_array_equal(see(Causal() & Segments(ids)), same & (j <= j[:, None]))
    np.testing.assert_array_equal(see(Segments(ids[..., :1, :])), np.broadcast_to(same[..., :1, :, :], whole))


@implementations
def test_arguments_of_jit_vmap_and_scan(implementation):
    ids = np.sort(np.random.default_rng(2).integers(-1, 3, (3, T))).astype(np.int32)
    mask = (Causal() | Prefix(ints(1, 5, 9))) & Segments(ids)
    one = [jax.tree.map(lambda a, i=i: jnp.asarray(a)[i], mask) for i in range(3)]
    wanted = np.stack([m.to_array(T, T) for m in one])
    zeros, eye = jnp.zeros((T, 1, 1)), jnp.eye(T)[:, None]

    def see(mask):
        return jattn.attention(zeros, zeros, eye, mask=mask, implementation=implementation)[:, 0] > 0

    np.testing.assert_array_equal(jax.jit(see)(one[1]), wanted[1])
    np.testing.assert_array_equal(jax.jit(jax.vmap(see))(mask), wanted)
    np.testing.assert_array_equal(jax.jit(lambda mask: jax.lax.map(see, mask))(mask), wanted)

    @jax.jit
    def scanned(first, mask):
        return jax.lax.scan(lambda carry, m: (carry, see(m) & see(carry)), first, mask)

    carried, stacked = scanned(Causal() & Window(4, 0), mask)
    assert carried == Causal() & Window(4, 0)
    np.testing.assert_array_equal(stacked, wanted & draw(T, T, lambda i, j: i - 4 <= j <= i))
    chosen = jax.jit(lambda here, mask: jax.lax.cond(here, see, lambda m: ~see(m), mask))(True, one[2])
    np.testing.assert_array_equal(chosen, wanted[2])


def test_static_arguments_and_retracing():
    """Equal ints share a trace, new ints do not; new arrays do."""
    traces = []

    @jax.jit
    def f(mask):
        traces.append(mask)
        return jnp.asarray(mask.to_array(3, 3))

    f(Window(1, 0)), f(Window(1, 0)), f(Window(2, 0))
    assert len(traces) == 2
    f(Prefix(jnp.int32(1))), f(Prefix(jnp.int32(2)))
    assert len(traces) == 3
    np.testing.assert_array_equal(jax.jit(lambda m: m.to_array(3, 3), static_argnums=0)(Causal()), np.tri(3) > 0)


@implementations
def test_function_takes_arrays_and_pytrees(implementation):
    def fn(q_pos, kv_pos, stride, tables):
        return ((q_pos + stride * kv_pos) % 4 == tables["rest"]) | (kv_pos == tables["also"][1])

    mask = Function(fn, np.int32(3), {"rest": jnp.int32(1), "also": ints(7, 2)})
    wanted = draw(T, T, lambda i, j: (i + 3 * j) % 4 == 1 or j == 2)
    np.testing.assert_array_equal(mask.to_array(T, T), wanted)
    np.testing.assert_array_equal(seen(mask, implementation), wanted)
    several = jax.vmap(lambda stride: one_hot(Function(striped, stride), implementation) > 0)(jnp.asarray(ints(2, 3)))
    for stride, got in zip((2, 3), several, strict=True):
        np.testing.assert_array_equal(got, draw(T, T, lambda i, j, s=stride: (i + 2 * j) % s != 0))


def test_bare_booleans_are_dense():
    array = np.random.default_rng(0).random((T, T)) < 0.5
    for mask in (array, jnp.asarray(array), Dense(array), Dense(jnp.asarray(array))):
        np.testing.assert_array_equal(seen(mask, "dense"), array)


WRONG = {
    "negative left": (lambda: Window(-1, 0), ValueError, "left.*-1"),
    "negative right": (lambda: Window(0, -2), ValueError, "right.*-2"),
    "negative left in an array": (lambda: Window(np.int32(-1), 0), ValueError, "left.*-1"),
    "negative right in an array": (lambda: Window(0, jnp.array([3, -2])), ValueError, "right.*-2"),
    "fractional window": (lambda: Window(1.5, 0), TypeError, "left"),
    "float window array": (lambda: Window(np.ones(3, np.float32), 0), TypeError, "left"),
    "boolean window": (lambda: Window(True, 0), TypeError, "left"),
    "window by name": (lambda: Window("2", 0), TypeError, "left"),
    "sliding window of nothing": (lambda: SlidingWindow(0), ValueError, "SlidingWindow"),
    "sliding window of 2.5": (lambda: SlidingWindow(2.5), (TypeError, ValueError), "SlidingWindow"),
    "no chunk": (lambda: masks.Chunks(0), ValueError, "Chunks size.*from 1.*0"),
    "fractional chunk": (lambda: masks.Chunks(2.5), TypeError, "Chunks size.*2.5"),
    "a tile of two axes on a line": (lambda: masks.Chunks((2, 2)), ValueError, "Chunks size.*1 axes"),
    "a tile of one axis": (lambda: masks.Chunks((2,), (4, 4)), ValueError, "Chunks size.*2 axes"),
    "no axis": (lambda: masks.Neighborhood((), 1), ValueError, "Neighborhood shape"),
    "more positions than there are": (
        lambda: masks.Neighborhood((2**15, 2**15, 2), 1),
        ValueError,
        "Neighborhood shape must have at most 2147483647 positions",
    ),
    "more tiles than there are": (lambda: masks.Chunks((2, 2), (2**20, 2**20)), ValueError, "Chunks shape.*at most"),
    "an empty axis": (lambda: masks.Neighborhood((4, 0), 1), ValueError, "Neighborhood shape.*from 1"),
    "negative radius": (lambda: masks.Neighborhood((4, 4), -1), ValueError, "Neighborhood radius.*from 0.*-1"),
    "three radii": (lambda: masks.Neighborhood((4, 4), (1, 1, 1)), ValueError, "Neighborhood radius.*2 axes"),
    "radius of an array": (lambda: masks.Neighborhood((4, 4), np.ones(2, int)), TypeError, "Neighborhood radius"),
    "no dilation": (lambda: masks.Neighborhood((4, 4), 1, 0), ValueError, "Neighborhood dilation.*from 1"),
    "dilation of None": (lambda: masks.Neighborhood((4, 4), 1, None), TypeError, "Neighborhood dilation"),
    "negative prefix": (lambda: Prefix(-1), ValueError, "length.*-1"),
    "fractional prefix": (lambda: Prefix(1.0), TypeError, "length"),
    "no prefix": (lambda: Prefix(None), TypeError, "length"),
    "negative length": (lambda: Lengths(kv=-1), ValueError, "kv.*-1"),
    "fractional length": (lambda: Lengths(q=2.5), TypeError, "q"),
    "float lengths": (lambda: Lengths(q=np.ones(2, np.float32)), TypeError, "q"),
    "float ids": (lambda: Segments(np.ones(3, np.float32)), TypeError, "Segments q"),
    "boolean ids": (lambda: Segments(np.ones(3, bool)), TypeError, "Segments q"),
    "float key ids": (lambda: Segments(ints(1, 2), np.ones(2, np.float32)), TypeError, "Segments kv"),
    "one id": (lambda: Segments(np.int32(3)), (TypeError, ValueError), "Segments q"),
    "a list of ids": (lambda: Segments("abc"), TypeError, "Segments q"),
    "ints for booleans": (lambda: Dense(np.ones((3, 3), np.int32)), TypeError, "Dense"),
    "floats for booleans": (lambda: Dense(np.zeros((3, 3), np.float32)), TypeError, "Dense"),
    "no array": (lambda: Dense(None), TypeError, "Dense"),
    "not a function": (lambda: Function(3), TypeError, "fn"),
    "and an int": (lambda: Causal() & 3, TypeError, "mask"),
    "or a name": (lambda: Causal() | "window", TypeError, "mask"),
    "ids of another length": (lambda: Segments(ints(0, 1, 2)).to_array(5, 5), ValueError, "Segments"),
    "ids of one length for two": (lambda: Segments(ints(0, 1, 2)).to_array(3, 5), ValueError, "Segments"),
    "array of another size": (lambda: Dense(np.ones((3, 4), bool)).to_array(3, 5), ValueError, "Dense"),
    "a function of numbers": (lambda: Function(lambda q, kv: q - kv).to_array(3, 3), TypeError, "Function"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    build, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("mask", "T", "q_offset", "all_do"),
    [
        (None, 5, 0, True),
        (Causal(), 5, 0, True),
        (Causal(), 2, 3, True),  # decoding
        (Causal(), 2, 0, False),  # the last keys are in the future
        (Causal(), 5, -1, False),  # the first query comes before all keys
        (~Causal(), 5, 0, False),
        (Prefix(2), 5, 0, False),
        (Prefix(2) | Causal(), 5, 0, True),
        (Causal() & Lengths(kv=4), 5, 0, False),
        (Window(1, 0), 5, 0, True),
        (Window(1, 1) & Lengths(kv=4), 5, 0, False),
        (Window(2, 2) & ~Window(1, 1), 5, 0, False),  # all do, but nothing is known
        (Function(jnp.greater_equal), 5, 0, False),
        (Lengths(kv=np.int32(5)), 5, 0, False),  # an array decides
        (Causal(), 0, 0, False),
        (Empty(), 5, 0, False),
    ],
    ids=str,
)
def test_what_is_known_to_take_part_does(mask, T, q_offset, all_do):
    q, k = np.zeros((T, 2, 3), np.float32), np.zeros((5, 1, 3), np.float32)
    assert lay_out(q, k, k, dict(mask=mask, q_offset=q_offset)).all_take_part() == all_do
    if all_do and mask is not None:
        allowed = np.asarray(mask.to_array(T, 5, q_offset=q_offset))
        assert allowed.any(0).all() and allowed.any(1).all()


@pytest.mark.parametrize("mask", [m for m in ALGEBRA.values() if not jax.tree.leaves(m)], ids=str)
def test_nothing_takes_part_that_is_only_said_to(mask):
    for T, S, q_offset in itertools.product((1, 2, 5), (1, 3, 5), (-2, 0, 1, 3, 9)):
        q, k = np.zeros((T, 2, 3), np.float32), np.zeros((S, 1, 3), np.float32)
        allowed = np.asarray(mask.to_array(T, S, q_offset=q_offset))
        known = lay_out(q, k, k, dict(mask=mask, q_offset=q_offset)).all_take_part()
        assert not known or (allowed.any(-1).all() and allowed.any(-2).all()), (T, S, q_offset)


def test_every_mask_is_in_the_catalogue():
    """So that a new mask is tested by all of the above."""
    kinds = {name for name, value in vars(masks).items() if isinstance(value, type) and issubclass(value, masks.Mask)}
    public = {name for name in kinds if not name.startswith("_")} - {"Mask"}
    used = {type(part).__name__ for mask in ALGEBRA.values() for part in parts(mask)}
    assert public <= used


def parts(mask):
    yield mask
    for value in vars(mask).values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, masks.Mask):
                yield from parts(part)


GRIDS = {  # each with the share of its blocks of 128 x 128 that can be left out, at least
    "a plane": (masks.Neighborhood((64, 64), 3), 0.82),  # of the window around it
    "dilated": (masks.Neighborhood((64, 64), 3, 2), 0.65),
    "rows": (masks.Neighborhood((64, 64), (0, None)), 0.96),
    "wide rows": (masks.Neighborhood((8, 512), (1, 30)), 0.78),
    "space": (masks.Neighborhood((16, 16, 16), 2), 0.7),
    "windows": (masks.Chunks((8, 8), (64, 64)), 0.87),
    "chunks": (masks.Chunks(512) & masks.Causal(), 0.92),
}


@pytest.mark.parametrize("name", GRIDS)
def test_blocks_of_a_grid_that_are_far_apart_are_left_out(name):
    mask, share = GRIDS[name]
    x = jax.ShapeDtypeStruct((4096, 2, 8), jnp.float32)
    assert jattn.explain(x, x, x, mask=mask, implementation=jattn.Blockwise(128, 128)).empty >= share


def test_a_grid_among_other_tokens():
    """Registers behind an image see all and are seen by all; what is placed on the grid by positions may come mixed."""
    image = masks.Neighborhood((2, 3), 1)
    both = image | ~masks.Prefix(6) | masks.Function(lambda q_pos, kv_pos: q_pos >= 6)
    wanted = np.ones((8, 8), bool)
    wanted[:6, :6] = image.to_array(6, 6)
    np.testing.assert_array_equal(both.to_array(8, 8), wanted)
    np.testing.assert_array_equal(np.asarray(image.to_array(8, 8))[6:], False)


def test_the_largest_grid_at_the_last_positions():
    """2^31 - 1 positions in one row; positions that are known only when it runs."""
    mask, last = masks.Neighborhood((1, 2**31 - 1), 1), 2**31 - 4
    x = jax.random.normal(jax.random.key(0), (3, 1, 4))
    at = jnp.arange(3, dtype=jnp.int32) + last
    got = jax.jit(lambda at: jattn.attention(x, x, x, mask=mask, q_positions=at, kv_positions=at))(at)
    wanted = jattn.attention(x, x, x, mask=masks.Window(1, 1))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("xp", [np, jnp], ids=["known", "traced"])
def test_quotients_and_remainders_of_an_interval(xp):
    """Of each number in it, and no looser where it lies within one turn."""
    for lo, hi, divisor in itertools.product(range(-5, 9), range(-5, 9), (1, 3, 4)):
        if lo <= hi:
            interval = Interval(xp.int32(lo), xp.int32(hi))
            numbers = np.arange(lo, hi + 1)
            for got, each in ((interval // divisor, numbers // divisor), (interval % divisor, numbers % divisor)):
                assert got.lo <= each.min() and each.max() <= got.hi
            assert (interval // divisor).lo == (numbers // divisor).min()
            if lo // divisor == hi // divisor:
                assert ((interval % divisor).lo, (interval % divisor).hi) == (lo % divisor, hi % divisor)
    for wrong in (0, -2, 1.5, Interval(1, 2)):
        with pytest.raises(TypeError):
            interval // wrong
        with pytest.raises(TypeError):
            interval % wrong


def test_the_opposite_of_a_function_that_says_true_is_false():
    assert not np.any((~masks.Function(lambda q_pos, kv_pos: True)).to_array(2, 2))


@pytest.mark.parametrize(
    ("mask", "visits"),
    [
        (masks.Window(5, 0), 16),  # one for each block of rows
        (masks.Window(5, 0) & masks.Lengths(jnp.int32(4), jnp.int32(4)), 1),
        (masks.Lengths(jnp.int32(4), jnp.int32(9)), 3),
        (Causal(), 16 * 17 // 2),
    ],
    ids=["window", "window_lengths", "lengths", "causal"],
)
def test_only_blocks_that_may_hold_something_are_visited(mask, visits):
    """Of 16 x 16. The gradient goes through the scores of what it visits up to five times."""
    assert visits_made(mask) == visits
    assert visits_made(mask, jax.grad) <= 5 * visits


def visits_made(mask, transform=lambda f: f):
    visited = []

    def count(score, q_pos, kv_pos, _):
        jax.debug.callback(lambda _: visited.append(1), q_pos)  # of each, where `vmap` makes several one
        return score

    def f(q):
        options = dict(scores=(scores.Function(count, ()),), implementation=jattn.Blockwise(4, 4))
        return jattn.attention(q, k, v, mask=mask, **options).sum()

    q, k, v = jax.random.normal(jax.random.key(0), (3, 64, 1, 3))
    jax.block_until_ready(jax.jit(transform(f))(q))
    jax.effects_barrier()
    return len(visited)


@pytest.mark.parametrize("mask", [Window(255, 0), Segments(np.arange(8192) // 512)], ids=["window", "segments"])
def test_a_window_and_packed_segments_are_an_eighth_of_the_work(mask):
    x = jax.ShapeDtypeStruct((8192, 3, 64), jnp.float32)  # heads that are not shared out to 8 devices
    told, full = jattn.explain(x, x, x, mask=mask), jattn.explain(x, x, x)
    assert full.flops == 2 * 3 * (64 + 64) * 8192**2 and full.empty == 0
    assert told.flops == full.flops * (1 - told.empty) <= full.flops / 8
    compiled = jax.jit(lambda *x, mask: jattn.attention_with_lse(*x, mask=mask)).lower(x, x, x, mask=mask).compile()
    temp = compiled.memory_analysis()
    assert told.temp_bytes == temp.temp_size_in_bytes > 0
    assert "flops           " in str(told) and told.reasons["blockwise"].startswith("taken")
    assert told.reasons["dense"] == "not taken: it would hold 768.0 MiB of scores or more"


def test_what_is_full_asks_no_mask():
    asked = []

    class Asking(masks.Mask):
        def __call__(self, q_pos, kv_pos):
            if not isinstance(q_pos, Interval):
                jax.debug.callback(lambda _: asked.append(1), kv_pos)
            return kv_pos <= q_pos

    q = jax.random.normal(jax.random.key(0), (16, 1, 3))
    jattn.attention(q, q, q, mask=Asking(), implementation=jattn.Blockwise(4, 4)).block_until_ready()
    jax.effects_barrier()
    assert len(asked) == 4  # the blocks on the diagonal, and not the 6 below it


@implementations
@pytest.mark.parametrize("argument", [jax.random.key(3), jnp.zeros((0, 2, 2))], ids=["key", "empty"])
def test_the_arguments_of_a_function_may_be_anything(argument, implementation):
    mask = masks.Function(lambda i, j, _: (i + j) % 3 > 0, argument)
    q = jax.random.normal(jax.random.key(0), (12, 1, 3))
    wanted = jattn.attention(q, q, q, mask=np.add.outer(np.arange(12), np.arange(12)) % 3 > 0, implementation="dense")
    got = jattn.attention(q, q, q, mask=mask, implementation=implementation)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert set(mask.picture(100, 100)) == {"▒", "\n"}


@implementations
def test_vmap_over_no_examples(implementation):
    x, ids = jnp.zeros((0, 12, 1, 3)), jnp.zeros((0, 12), jnp.int32)
    attend = lambda x, ids: jattn.attention(x, x, x, mask=Segments(ids), implementation=implementation)  # noqa: E731
    assert jax.vmap(attend)(x, ids).shape == x.shape


def test_masks_are_not_joined_by_words():
    with pytest.raises(TypeError, match="join masks by"):
        Causal() and Window(3, 0)


SHORT = np.arange(64) // 6  # in blocks of 4, a row of blocks sees 3 of 16 at most
LONG = np.minimum(np.arange(64) // 30, 1)


@pytest.mark.parametrize(
    ("mask", "all_visits", "few_do"),
    [
        (Segments(SHORT), 16, True),
        (Segments(np.where(SHORT == 9, -1, SHORT)), 16, True),
        (Segments(LONG), 16, False),
        (Segments(LONG) & Window(8, 8), 5, False),  # what is known while tracing goes before
        (Segments(SHORT) & Window(8, 8), 5, True),
    ],
    ids=["short", "short_padded", "long", "long_window", "short_window"],
)
def test_no_more_blocks_are_gone_through_than_may_be_enough(mask, all_visits, few_do, monkeypatch):
    taken, lengths, cond = [], [], jax.lax.cond

    def watched(do, few, every, operands):
        jax.debug.callback(lambda do: taken.append(bool(do)), do)
        for branch in (few, every):
            found = map(int, re.findall(r"\blength=(\d+)", str(jax.make_jaxpr(branch)(operands))))
            lengths.append(sorted(set(found) - {16}) or [16])  # 16 blocks of rows
        return cond(do, few, every, operands)

    jax.clear_caches()
    monkeypatch.setattr(jax.lax, "cond", watched)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 64, 1, 3))
    jattn.attention(q, k, v, mask=mask, implementation=jattn.Blockwise(4, 4)).block_until_ready()
    jax.effects_barrier()
    jax.clear_caches()  # of what was watched
    assert taken == [few_do]
    assert lengths == [[4], [all_visits]]


@pytest.mark.parametrize("ids", [(SHORT, SHORT // 2), (SHORT, LONG), (LONG, LONG)], ids=["few", "mixed", "many"])
@pytest.mark.parametrize("mapped", [False, True], ids=["batch", "vmap"])
def test_few_visits_say_what_all_say(ids, mapped):
    q, k, v, ct = jax.random.normal(jax.random.key(0), (4, 2, 62, 2, 3))
    ids = np.stack(ids)[:, :62]

    def run(implementation, q, k, v, ids, ct):
        f = lambda *args: jattn.attention(*args, mask=Segments(ids) & Causal(), implementation=implementation)  # noqa: E731
        out, vjp = jax.vjp(f, q, k, v)
        return out, vjp(ct), jax.jvp(lambda *args: jax.vjp(f, *args)[1](ct), (q, k, v), (v, q, k))[1]

    wrap = jax.vmap if mapped else lambda f: f
    dense, blockwise = (
        jax.jit(wrap(lambda *args, chosen=chosen: run(chosen, *args)))(q, k, v, ids, ct)
        for chosen in ("dense", jattn.Blockwise(4, 4))
    )
    for expected, actual in zip(jax.tree.leaves(dense), jax.tree.leaves(blockwise), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5)


both = pytest.mark.parametrize("implementation", ["dense", jattn.Blockwise(2, 3)], ids=str)


@both
@pytest.mark.parametrize("mask", [masks.Full(), masks.Causal(), masks.Window(1, 0), ~masks.Causal()], ids=str)
def test_nothing_is_at_a_negative_position(mask, implementation):
    """It may hold NaN, it is not seen, and what it sees is nothing: values and gradients of the rest are theirs."""
    x = jax.random.normal(jax.random.key(0), (3, 7, 2, 5))
    there = np.array([0, 1, 0, 1, 1, 1, 0], bool)
    positions = jnp.asarray(np.where(there, np.cumsum(there) - 1, -3), jnp.int32)
    at = np.flatnonzero(there)

    def f(q, k, v, **options):
        return jattn.attention(q, k, v, mask=mask, implementation=implementation, **options)

    def padded(*x):
        spoiled = (jnp.where(there[:, None, None], a, jnp.nan) for a in x)
        return f(*spoiled, q_positions=positions, kv_positions=positions)

    def run(f, *x):
        out = f(*x)
        return out, jax.grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2))(*x)

    out, gradients = quick(lambda *x: run(padded, *x), x, x, x)
    wanted, of_rest = quick(lambda *x: run(f, *x), x[:, at], x[:, at], x[:, at])
    assert not np.delete(out, at, axis=1).any()
    np.testing.assert_allclose(out[:, at], wanted, rtol=1e-5, atol=1e-5)
    for got, rest in zip(gradients, of_rest, strict=True):
        np.testing.assert_allclose(got[:, at], rest, rtol=1e-5, atol=1e-5)


class Near(masks.Mask):
    """Does with positions what intervals cannot."""

    n: int

    def __call__(self, q_pos, kv_pos):
        return jnp.where(kv_pos > q_pos, False, abs(q_pos - kv_pos) < self.n)


class Before(masks.Mask):
    """Compares only, so that blocks are known."""

    def __call__(self, q_pos, kv_pos):
        return kv_pos < q_pos


@both
def test_masks_of_ones_own(implementation):
    x = jax.random.normal(jax.random.key(0), (9, 2, 5))
    for own, same in ((Near(3), masks.SlidingWindow(3)), (Before(), masks.Causal() & ~masks.Window(0, 0))):
        for joined in (lambda m: m, lambda m: m & masks.Window(2, 2), lambda m: ~(m | masks.Prefix(2))):

            def f(mask, *x):
                return jattn.attention(*x, mask=mask, implementation=implementation)

            got, wanted = (quick(functools.partial(f, joined(mask)), x, x, x) for mask in (own, same))
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="compares query positions"):
        jattn.attention(x[:2], x, x, mask=Near(3))


def test_blocks_of_a_mask_of_ones_own():
    assert Before().picture(8, 8, width=4) == masks.Causal().picture(8, 8, width=4)
    assert "█" not in Near(3).picture(8, 8, width=4) and "·" not in Near(3).picture(8, 8, width=4)


def test_a_modifier_of_ones_own_compares_positions_unless_it_says_no():
    class Own(scores.Modifier):
        def __call__(self, score, q_pos, kv_pos):
            return score * 2

    class Unordered(Own):
        ordered = False

    x = jax.random.normal(jax.random.key(0), (9, 2, 5))
    with pytest.raises(ValueError, match="compares query positions"):
        jattn.attention(x[:2], x, x, scores=(Own(),))
    assert jattn.attention(x[:2], x, x, scores=(Unordered(),)).shape == (2, 2, 5)


def test_integers_beyond_int32():
    """Ids are compared in their own dtype; positions that int32 cannot hold are refused where they are known."""
    x = jax.random.normal(jax.random.key(0), (4, 2, 5))

    def f(x64=False, implementation=None, **options):
        with jax.enable_x64(x64):
            return np.asarray(jattn.attention(x, x, x, implementation=implementation, **options))

    wanted = f(mask=Segments(np.array([3, 3, 5, 1], np.int32)))
    for implementation in ("dense", jattn.Blockwise(2, 3)):
        for ids, x64 in (
            (np.array([2**31, 2**31, 2**31 + 5, 7], np.uint32), False),
            (np.array([2**40, 2**40, 2**40 + 2**32, 7]), True),
            (np.array([200, 200, 201, 7], np.uint8), False),
            (np.array([3, 3, 5, 1]), False),
        ):
            np.testing.assert_allclose(f(x64, implementation, mask=Segments(ids)), wanted, rtol=1e-5, atol=1e-5)
    far = np.arange(4) + 2**31 - 2
    for options, name in (
        (dict(mask=Segments(np.array([2**40, 2**40, 1, 2]))), "Segments q"),
        (dict(mask=Lengths(kv=np.array(2**40))), "Lengths.kv"),
        (dict(mask=Causal(), q_positions=far), "q_positions"),
        (dict(mask=Causal(), kv_positions=far), "kv_positions"),
        (dict(mask=Causal(), q_offset=2**31 - 2), "q_offset"),
        (dict(mask=Causal(), q_offset=jnp.int32(2**31 - 2)), "q_offset"),
    ):
        with pytest.raises(ValueError, match=rf"{name} .*int32, got .*\d"):
            f(**options)
    with pytest.raises(TypeError, match="one dtype to be compared, got uint32 and int32"):
        f(mask=Segments(np.ones(4, np.uint32), np.ones(4, np.int32)))
    late = jax.jit(lambda at: jattn.attention(x, x, x, mask=Causal(), q_offset=at))(jnp.int32(2**31 - 2))
    np.testing.assert_allclose(late, f(mask=Causal(), q_offset=4), rtol=1e-5, atol=1e-5)  # all keys are before it


def test_what_allows_everything_or_nothing_is_simplified():
    causal, ids = Causal(), Segments(np.array([0, 1], np.int32))
    assert causal & ~causal == ~causal & causal == Empty()
    assert causal | ~causal == ~causal | causal == Full()
    assert causal & Window(None, None) == Window(None, None) & causal == causal
    assert isinstance(ids & ~ids, masks.And)  # arrays may be traced, and are not compared


def test_arrays_that_do_not_go_together_are_named():
    both = Lengths(kv=np.ones((2, 3), np.int32)) & Segments(np.ones((2, 4), np.int32))
    with pytest.raises(ValueError, match=r"do not broadcast: Lengths \(2, 3\), Segments \(2,\)"):
        both.to_array(4, 4)
