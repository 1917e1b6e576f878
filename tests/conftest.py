"""Every test under strict JAX: no implicit promotion, no rank broadcasting, 8 CPU devices; warnings are errors.

A test with many cases that compile runs on a few of them, evenly spread; `-m sweep` runs the others.
"""

import itertools

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

CASES_AT_MOST = 6
CHEAP = {
    "test_errors",
    "test_house",
    "test_params",
    "test_projection",
    "test_readme",
    "test_reference",
    "test_retrieval",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leaves to the sweep what a plain run does not need."""
    groups = itertools.groupby(items, key=lambda item: (item.path.stem, getattr(item, "originalname", item.name)))
    for (file, _), group in groups:
        cases = list(group)
        if file in CHEAP or len(cases) <= CASES_AT_MOST:
            continue
        kept = {round(i * (len(cases) - 1) / (CASES_AT_MOST - 1)) for i in range(CASES_AT_MOST)}
        for i, case in enumerate(cases):
            if i not in kept:
                case.add_marker(pytest.mark.sweep)
