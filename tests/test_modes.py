"""Every derivative and transform of attention against dense float64, over masks, scores, heads, dtypes and lengths."""

import itertools
import random

import jax
import numpy as np
import pytest

from tests import cases, modes, plain, problems, reference
from tests.modes import FAMILIES, MODES
from tests.problems import AXES

EVERY = {"mode": tuple(MODES)} | AXES | {"mask": tuple(cases.MASKS), "score": tuple(problems.SCORES)}
SELECTION = problems.cover({"family": tuple(FAMILIES)} | AXES)
OTHERWISE = dict(xla_backend_optimization_level=3)  # where the other tests have 0


def judge(mode: str, p: problems.Setup):
    """The mode's result errs no more than a few times as much as plain code does at the same precision."""
    actual, wide = problems.run(MODES[mode], p.attention, p), p.wide()
    exact = problems.run(MODES[mode], wide.naive, wide)
    if p.case.dtype == "float64":
        return problems.assert_close(actual, exact, tol=1e-12)
    rounded = problems.run(MODES[mode], p.naive, p)
    again = rounded
    if any(np.ndim(e) == 0 for e in jax.tree.leaves(exact)):
        again = problems.run(MODES[mode], p.naive, p, **OTHERWISE)

    def compare(actual):
        for leaves in zip(*map(jax.tree.leaves, (actual, exact, rounded, again)), strict=True):
            # Two layers and two derivatives magnify rounding, in plain code as in ours: either may be off by chance.
            reference.assert_within_budget(*leaves, slack=8 if mode in FAMILIES["further"] else 4)

    try:
        compare(actual)
    except AssertionError:  # a fault is there however it is compiled, bad luck with rounding is not
        compare(problems.run(MODES[mode], p.attention, p, **OTHERWISE))


def with_modes(points):
    """Each family's modes take turns."""
    turns = {family: itertools.cycle(members) for family, members in FAMILIES.items()}
    return [{"mode": next(turns[point["family"]])} | {axis: point[axis] for axis in AXES} for point in points]


def judge_at(point):
    judge(point["mode"], problems.problem(**{axis: choice for axis, choice in point.items() if axis != "mode"}))


@pytest.mark.parametrize("point", with_modes(SELECTION), ids=problems.name_of)
def test_every_pair_of_choices(point):
    judge_at(point)


def test_the_selection_has_every_pair_and_every_mode():
    met = {pair for point in SELECTION for pair in itertools.combinations(point.items(), 2)}
    axes = {"family": tuple(FAMILIES)} | AXES
    for a, b in itertools.combinations(axes, 2):
        for pair in itertools.product(((a, x) for x in axes[a]), ((b, y) for y in axes[b])):
            assert (pair in met) == problems.possible(dict(pair)), pair
    assert {point["mode"] for point in with_modes(SELECTION)} == set(MODES)


def oracle_points():
    return problems.cover({axis: EVERY[axis] for axis in ("mask", "score")}, seed=1)


def judge_by_the_oracle(point):
    p = problems.problem(**point, heads="gqa", batch="batch", dtype="float64")
    out, lse, _ = reference.attention(*p.args[:3], **cases.oracle(p.case))
    problems.assert_close(problems.run(modes.forward, p.attention, p), (out, lse), tol=1e-13)


@pytest.mark.parametrize("point", oracle_points()[::12], ids=problems.name_of)
def test_forward_agrees_with_the_oracle(point):
    judge_by_the_oracle(point)


@pytest.mark.parametrize("mode", MODES)
def test_dense_in_every_mode(mode):
    p = problems.problem("segments_causal", "chain", "gqa", "float64", "square", "batch")
    judge(mode, p._replace(implementation="dense"))


def judge_poisoned(mode, mask, implementation=None):
    """NaN and infinities where nothing may look change nothing."""
    p = problems.problem(mask, "bias_keys", "gqa", "float64", "square", "batch")
    p = p._replace(implementation=implementation or p.implementation)
    assert any(places.any() for places in problems.idle(p))
    clean = problems.fill_idle(p, 0, 0, 0)
    exact = plain.once(lambda: problems.run(mode, clean.naive, clean), "poisoned", mode, mask)
    f = problems.compiled(mode, p.attention, p)
    for numbers in ((np.nan, np.nan, np.inf), (np.inf, -np.inf, np.nan)):
        problems.assert_close(f(problems.fill_idle(p, *numbers)), exact, tol=1e-12)


POISONED = {
    "forward": "lengths",
    "grad": "segments_cross",
    "jvp": "dense_heads",
    "vmap_nested": "lengths",
    "remat": "segments_cross",
    "hvp_reverse_over_reverse": "dense_heads",
    "hvp_reverse_over_forward": "lengths",
}


@pytest.mark.parametrize("implementation", ["dense", None], ids=["dense", "blockwise"])
@pytest.mark.parametrize(("mode", "mask"), list(POISONED.items()), ids=POISONED)
def test_what_takes_no_part_may_be_anything(mode, mask, implementation):
    judge_poisoned(MODES[mode], mask, implementation)


@pytest.mark.parametrize("implementation", ["dense", None], ids=["dense", "blockwise"])
def test_what_takes_no_part_may_be_anything_in_a_scan(implementation):
    judge_poisoned(modes.hvp_of_scan, "segments_cross", implementation)


def judge_by_finite_differences(mask, score):
    p = problems.problem(mask, score, "gqa", "float64", "wide")
    with jax.enable_x64(True):
        # A step of 1e-4, the default, errs by 1.1e-5 itself.
        plain.assert_differentiable(modes.features(p.attention), p.args, tol=1e-5, eps=1e-5)


def test_finite_differences_to_second_order():
    judge_by_finite_differences("segments_causal", "chain")


# The sweep: the products that take hours, and what the tests above select from ---------------------------------------


def completed(seed, *chosen):
    """Every point of the product of the chosen axes; the rest is drawn at random."""
    rng = random.Random(seed)
    for choice in itertools.product(*(EVERY[axis] for axis in chosen)):
        fixed = dict(zip(chosen, choice, strict=True))
        if not problems.possible(fixed):
            continue
        point = {"mask": "lengths", "shape": "no_key"}
        while not problems.possible(point):
            point = {axis: fixed.get(axis, rng.choice(choices)) for axis, choices in EVERY.items()}
        yield point


def sweep():
    yield from problems.cover(EVERY)
    yield from completed(0, "mode", "mask", "score")
    yield from completed(1, "mode", "heads", "dtype", "shape")


def failures_of(points, check):
    failures = []
    for point in points:
        try:
            check(point)
        except Exception as error:
            failures.append(f"{problems.name_of(point)}: {type(error).__name__}: {error}".splitlines()[0])
    assert points
    assert not failures, f"{len(failures)} of {len(points)} failed\n" + "\n".join(failures)


@pytest.mark.sweep
@pytest.mark.parametrize("part", range(16))
@pytest.mark.parametrize("mode", MODES)
def test_sweep(mode, part):
    failures_of([point for point in sweep() if point["mode"] == mode][part::16], judge_at)


@pytest.mark.sweep
@pytest.mark.parametrize("part", range(16))
def test_sweep_of_the_oracle(part):
    failures_of(oracle_points()[part::16], judge_by_the_oracle)


@pytest.mark.sweep
@pytest.mark.parametrize("mask", cases.MASKS)
def test_sweep_of_finite_differences(mask):
    for score in ("function", "relative", "sink"):
        judge_by_finite_differences(mask, score)


# A layer hands the query on beside the attention, and so would hand on what is poisoned.
@pytest.mark.sweep
@pytest.mark.parametrize("mask", ["lengths", "segments_cross", "dense_heads"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("scan_grad", "scan_remat_hvp", "while_jvp")])
def test_sweep_of_what_takes_no_part(mode, mask):
    judge_poisoned(MODES[mode], mask)
