"""Values as pytrees: what is static is settled when a value is made, and stays so with leaves of any kind."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jattn
from jattn import masks, scores
from jattn.values import Value
from tests.plain import assert_close, quick


def temperature(s, i, j, t):
    return s * t


def near(i, j, n):
    return abs(i - j) < n


IDS = np.array([0, 0, 1, 1], np.int32)
VALUES = {
    "Full": masks.Full(),
    "Empty": masks.Empty(),
    "Causal": masks.Causal(),
    "Window of ints": masks.Window(2, None),
    "Window": masks.Window(jnp.int32(2), 1),
    "Prefix": masks.Prefix(jnp.array([2, 3])),
    "Lengths": masks.Lengths(kv=jnp.array([3, 4])),
    "Segments": masks.Segments(IDS),
    "Segments of both": masks.Segments(IDS, IDS),
    "Dense": masks.Dense(np.ones((4, 4), bool)),
    "Chunks": masks.Chunks(2, (3, 4)),
    "Neighborhood": masks.Neighborhood((3, 4), (1, None), 2),
    "Function of masks": masks.Function(near, jnp.int32(2)),
    "And": masks.Causal() & masks.Segments(IDS),
    "Or": masks.Prefix(jnp.int32(1)) | masks.Causal(),
    "Not": ~masks.Segments(IDS),
    "Bias": scores.Bias(jnp.ones((4, 4))),
    "SoftCap of a number": scores.SoftCap(3.0),
    "SoftCap": scores.SoftCap(jnp.float32(3)),
    "ALiBi": scores.ALiBi(jnp.ones(2)),
    "RelativePosition": scores.RelativePosition(jnp.ones((8, 2)), max_distance=16),
    "Function of scores": scores.Function(temperature, jnp.float32(0.5)),
    "Function of a number": scores.Function(temperature, 0.5),
    "Sink": scores.Sink(jnp.zeros(2)),
    "Dropout": scores.Dropout(0.5, jax.random.key(0)),
}
LEAVES = {
    "object": object(),
    "bool": True,
    "int": 0,
    "float": 0.5,
    "string": "decay",
    "function": len,
    "description": jax.ShapeDtypeStruct((2,), jnp.float32),
    "NumPy": np.ones(3),
}
every_value = pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
every_leaf = pytest.mark.parametrize("leaf", LEAVES.values(), ids=LEAVES)


def test_every_public_value_is_here():
    kinds = {
        name
        for module in (masks, scores)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, Value) and not name.startswith("_")
    }
    assert kinds - {"Value", "Mask", "Modifier"} == {type(value).__name__ for value in VALUES.values()}


@every_value
@every_leaf
def test_leaves_of_any_kind_change_nothing_of_the_structure(value, leaf):
    leaves, tree = jax.tree.flatten(value)
    labelled = jax.tree.map(lambda _: leaf, value)
    assert jax.tree.structure(labelled) == tree
    assert all(found is leaf for found in jax.tree.leaves(labelled))
    back = jax.tree.map(lambda _, array: array, labelled, value)
    assert back == value and hash(back) == hash(value) and repr(back) == repr(value)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), leaves, strict=True))


@every_value
def test_none_in_place_of_leaves(value):
    """As libraries part a tree into what is learned and what is not: None counts as a leaf there."""

    def is_none(x):
        return x is None

    floats = jax.tree.map(lambda a: a if jnp.issubdtype(jnp.result_type(a), jnp.floating) else None, value)
    others = jax.tree.map(lambda a: None if jnp.issubdtype(jnp.result_type(a), jnp.floating) else a, value)
    joined = jax.tree.map(lambda a, b: b if a is None else a, floats, others, is_leaf=is_none)
    assert joined == value
    assert jax.tree.structure(floats, is_leaf=is_none) == jax.tree.structure(value, is_leaf=is_none)


@every_value
def test_copies_are_equal(value):
    for other in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert other == value and jax.tree.structure(other) == jax.tree.structure(value)
    labelled = jax.tree.map(lambda _: "label", value)
    assert jax.tree.structure(pickle.loads(pickle.dumps(labelled))) == jax.tree.structure(value)


@every_value
def test_through_eval_shape_vmap_and_scan(value):
    described = jax.eval_shape(lambda v: v, value)
    assert jax.tree.structure(described) == jax.tree.structure(value)
    if not jax.tree.leaves(value):
        return
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), value)
    _, scanned = jax.lax.scan(lambda carry, v: (carry, v), None, stacked)
    assert scanned == stacked
    mapped = jax.vmap(lambda v: v, in_axes=(jax.tree.map(lambda _: 0, value),))(stacked)
    assert mapped == stacked


@every_value
def test_key_paths_are_the_names_of_fields(value):
    for path, leaf in jax.tree_util.tree_leaves_with_path({"value": value}):
        here = {"value": value}
        for key in path:
            by_name = isinstance(key, jax.tree_util.GetAttrKey)
            here = getattr(here, key.name) if by_name else here[key.idx if hasattr(key, "idx") else key.key]
        assert here is leaf


def test_key_paths_as_they_are_printed():
    tree = {"sink": scores.Sink(jnp.zeros(2)), "mask": masks.Causal() & masks.Lengths(kv=jnp.int32(3))}
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert paths == ["['mask'].masks[1].kv", "['sink'].logits"]


def test_numbers_in_the_places_of_arrays_are_arrays():
    x = jax.random.normal(jax.random.key(1), (4, 2, 3))
    sink = jax.tree.map(lambda _: 0.5, scores.SoftCap(jnp.float32(0.5)))
    wanted = jattn.attention(x, x, x, scores=(scores.SoftCap(0.5),))
    assert_close(jattn.attention(x, x, x, scores=(sink,)), wanted, 1e-6)


def test_optimizers_of_what_scores_carry():
    """Weight decay by a mask of booleans, another rule by labels, and a rule by names."""
    x = jax.random.normal(jax.random.key(2), (4, 2, 3))
    table = scores.RelativePosition(jnp.ones((8, 2)), max_distance=16)
    tree = {"sink": scores.Sink(jnp.zeros(2)), "scores": (table, scores.SoftCap(3.0))}

    def loss(tree):
        return jattn.attention(x, x, x, scores=(*tree["scores"], tree["sink"])).sum()

    def named(path, _):
        return "still" if jax.tree_util.keystr(path).endswith(".table") else "moves"

    labels = jax.tree_util.tree_map_with_path(named, tree)
    decayed = jax.tree.map(lambda a: a.ndim > 1, tree)
    for optimizer, still in (
        (optax.adamw(1e-2, mask=decayed), False),
        (optax.multi_transform({"still": optax.set_to_zero(), "moves": optax.adam(1e-2)}, labels), True),
    ):
        gradient = quick(jax.grad(loss), tree)
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = optimizer.update(gradient, optimizer.init(tree), tree)
        moved = optax.apply_updates(tree, updates)
        assert jax.tree.structure(moved) == jax.tree.structure(tree)
        assert (moved["scores"][0] == table) is still
        assert moved["sink"] != tree["sink"]
