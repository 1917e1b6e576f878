"""The library with one fault at a time: `python -m tests.mutants [words]`. Each must fail the tests named beside it.

Each fault is made in a copy of the repository. With words only those mutants run whose file or text has one of them.
The exit status is 1 if a mutant survives, if its tests cannot run, or if its old text is not found exactly once.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    file: str
    old: str  # found exactly once in the file
    new: str
    tests: tuple[str, ...]  # file or file::test, in tests/


A, B = "test_traps_a_derivatives.py", "test_traps_b_masks.py"
C, D = "test_traps_c_numerics.py", "test_traps_d_system.py"
MODES = "test_modes.py"
MASKS, SCORES, MERGE = "test_masks.py", "test_scores.py", "test_merge.py"

MUTANTS = [
    Mutant(
        "jattn/rotary.py",
        "carry = carry + _u32((high * last.astype(jnp.int32)) >> 16)",
        "carry = carry * 0",
        ("test_rotary.py::test_angles_are_right_at_every_int32_position",),
    ),
    Mutant(
        "jattn/rotary.py",
        "if given is None and all(scales):",
        "if False:",
        ("test_rotary.py::test_configurations",),
    ),
    Mutant(
        "jattn/layer.py",
        "if q_positions is None and offset is not None:",
        "if False:",
        ("test_rotary.py::test_in_the_layer",),
    ),
    Mutant(
        "jattn/dispatch.py",
        "if times == 1 or query",
        "if times or query",
        ("test_meshes.py::test_more_devices_on_the_heads_than_key_heads_share_nothing",),
    ),
    Mutant(
        "jattn/dispatch.py",
        " or taken & {*names}:",
        ":",
        ("test_meshes.py::test_heads_and_keys_along_one_axis_of_the_mesh",),
    ),
    Mutant(
        "jattn/rule.py",
        "dweights = dweights + e * _derivative(lambda block: block.factor(guarded), live, block, directions)[1]",
        "pass",
        ("test_caches.py::test_scales_of_every_kind",),
    ),
    Mutant(
        "jattn/problem.py",
        "return scale if keep is None else jnp.where(self._answers(keep, keepdims=True), scale, 0)",
        "return scale",
        ("test_caches.py::test_scales_of_slots_that_nobody_sees_may_be_anything",),
    ),
    Mutant(
        "jattn/autodiff.py",
        "where = operation.where.on(platform, _devices(context.module_context.axis_context))",
        "where = operation.where.on(platform, None)",
        ("test_memory.py::test_decoding_a_batch_takes_what_one_example_takes",),
    ),
    Mutant(
        "jattn/implementations/loops.py",
        "if not directions and problem.axes.are_known:",
        "if False:",
        ("test_memory.py::test_decoding_a_batch_takes_what_one_example_takes",),
    ),
    Mutant(
        "jattn/implementations/loops.py",
        "starts[axis] = i % count * blocks[axis]",
        "starts[axis] = i % count",
        ("test_memory.py::test_blocks_of_several_examples_in_one_loop",),
    ),
    Mutant(
        "jattn/rule.py",
        "moves = jnp.where(_is_all(e, total[..., None]), 0, de)",
        "moves = de",
        (f"{C}::test_c1_a_query_of_one_key_moves_with_nothing",),
    ),
    Mutant(
        "jattn/letters.py",
        'if _fits(shape, batch + rest, axes) and _fits(shape, batch[1:] + "N" + rest, axes):',
        "if False:",
        ("test_axes.py::test_what_fits_heads_and_examples_is_refused",),
    ),
    Mutant(
        "jattn/intervals.py",
        "return Interval(xp.where(turns, 0, self.lo % divisor), xp.where(turns, divisor - 1, self.hi % divisor))",
        "return Interval(self.lo % divisor, self.hi % divisor)",
        (f"{MASKS}::test_blocks_of_a_pair_tell_the_truth",),
    ),
    Mutant(
        "jattn/algebra.py",
        "return (q_pos >= 0) & (kv_pos >= 0)",
        "return kv_pos >= 0",
        (f"{MASKS}::test_nothing_is_at_a_negative_position",),
    ),
    Mutant(
        "jattn/rule.py",
        "shared + jnp.where(_is_all(e, total), 0, e * dsink)",
        "shared + e * dsink",
        (f"{C}::test_c1_whatever_the_cotangent_of_a_row_without_keys_holds",),
    ),
    Mutant(
        "jattn/checks.py",
        "if known.size and not (limits.min <= known.min() and known.max() <= limits.max):",
        "if False:",
        (f"{MASKS}::test_integers_beyond_int32",),
    ),
    Mutant(
        "jattn/closures.py",
        "return isinstance(value, jax.Array) and bool(jax.typeof(value).sharding.mesh.explicit_axes)",
        "return False",
        ("test_closures.py::test_a_score_that_closes_over_a_tracer_on_several_devices",),
    ),
    Mutant(
        "jattn/closures.py",
        "is_used = [id(v) in used for v in",
        "is_used = [True for v in",
        ("test_closures.py::test_only_what_a_function_computes_with_is_an_operand",),
    ),
    Mutant(
        "jattn/autodiff.py",
        "axis.name if isinstance(axis.name, str) and operation.calls_functions else None",
        "None",
        ("test_closures.py::test_a_function_may_ask_for_the_name_of_an_axis_of_vmap",),
    ),
    Mutant(
        "jattn/values.py",
        'dynamic = vars(self).get("_dynamic")',
        "dynamic = None",
        ("test_values.py::test_leaves_of_any_kind_change_nothing_of_the_structure",),
    ),
    Mutant(
        "jattn/masks.py",
        "return allowed & (np.True_ if self.right is None else kv_pos <= _later(q_pos, self.right))",
        "return allowed & (np.True_ if self.right is None else kv_pos < _later(q_pos, self.right))",
        (f"{MASKS}::test_a_mask_is_as_drawn",),
    ),
    Mutant(
        "jattn/masks.py",
        "return xp.minimum(pos, _INT32.max - count) + count",
        "return pos + count",
        (f"{MASKS}::test_the_widest_window_overflows_no_position",),
    ),
    Mutant(
        "jattn/masks.py",
        "return (self.q == self.kv) & (self.q >= 0)",
        "return self.q == self.kv",
        (f"{B}::test_b16_padding_is_not_a_segment_and_zero_is",),
    ),
    Mutant(
        "jattn/masks.py",
        "for other in (limits.max, max(limits.min, -1))",
        "for other in (0, max(limits.min, -1))",
        (f"{MASKS}::test_no_more_blocks_are_gone_through_than_may_be_enough",),
    ),
    Mutant(
        "jattn/masks.py",
        "return lambda q_pos, kv_pos: (q == kv) & interval(self.q >= 0) & interval(self.kv >= 0)",
        "return lambda q_pos, kv_pos: q == kv",
        (f"{MASKS}::test_explain_counts_the_blocks_of_every_example",),
    ),
    Mutant(
        "jattn/problem.py",
        "return keep.any(tuple(range(self.lead, keep.ndim - 1)), keepdims=keepdims)",
        "return keep.all(tuple(range(self.lead, keep.ndim - 1)), keepdims=keepdims)",
        (f"{C}::test_c4_a_key_that_one_head_of_the_group_sees_is_not_a_secret",),
    ),
    Mutant(
        "jattn/problem.py",
        "return jnp.where(asks[..., None], self.at.q, 0), answering(self.at.k), answering(self.at.v)",
        "return jnp.where(asks[..., None], self.at.q, 0), answering(self.at.k), self.at.v",
        (f"{C}::test_c4_nan_and_inf_where_nothing_looks_are_not_seen",),
    ),
    Mutant(
        "jattn/intervals.py",
        "return Interval(self.hi <= other.lo, self.lo <= other.hi)",
        "return Interval(self.lo <= other.lo, self.lo <= other.hi)",
        (f"{MASKS}::test_blocks_of_a_pair_tell_the_truth",),
    ),
    Mutant(
        "jattn/intervals.py",
        "return Interval(self.hi < other.lo, self.lo < other.hi)",
        "return Interval(self.hi <= other.lo, self.lo < other.hi)",
        (
            f"{MASKS}::test_blocks_of_scattered_positions_tell_the_truth",
            f"{MASKS}::test_blocks_of_a_pair_tell_the_truth",
        ),
    ),
    Mutant(
        "jattn/intervals.py",
        "return Interval(~self.hi, ~self.lo)",
        "return Interval(~self.lo, ~self.hi)",
        (f"{MASKS}::test_blocks_of_a_pair_tell_the_truth",),
    ),
    Mutant(
        "jattn/intervals.py",
        "return Interval((self.hi <= other.lo) & (self.lo >= other.hi), (self.lo <= other.hi) & (self.hi >= other.lo))",
        "return self <= other",
        (f"{MASKS}::test_blocks_of_a_pair_tell_the_truth", f"{MASKS}::test_explain_counts_the_blocks_of_every_example"),
    ),
    Mutant(
        "jattn/scores.py",
        "return cap * jnp.tanh(score / cap)",
        "return jnp.tanh(score / cap)",
        (f"{SCORES}::test_each_modifier_against_numpy",),
    ),
    Mutant(
        "jattn/scores.py",
        "stays: jax.Array = bits >= jnp.uint32(round(self.rate * 2**32))",
        "stays: jax.Array = bits < jnp.uint32(round(self.rate * 2**32))",
        ("test_dropout.py::test_share_of_what_is_dropped",),
    ),
    Mutant(
        "jattn/scores.py",
        "_threefry(self.key[0], self.key[1], q_pos.astype(jnp.uint32), kv_pos.astype(jnp.uint32))",
        "_threefry(self.key[0], self.key[0], q_pos.astype(jnp.uint32), kv_pos.astype(jnp.uint32) * 0)",
        (f"{D}::test_d7_heads_batches_queries_and_keys_drop_independently",),
    ),
    Mutant(
        "jattn/softmax.py",
        "holds = stacked != -jnp.inf",
        "holds = stacked > -jnp.inf",
        (f"{MERGE}::test_an_lse_of_nan_is_not_taken_for_nothing",),
    ),
    Mutant(
        "jattn/softmax.py",
        "held = jnp.where(holds[..., None], jnp.stack(outs).astype(dtype), 0)",
        "held = jnp.stack(outs).astype(dtype)",
        (f"{MERGE}::test_nothing_is_neutral",),
    ),
    Mutant(
        "jattn/softmax.py",
        "m = lax.stop_gradient(jnp.max(jnp.where(holds, stacked, least(dtype)), axis=0))",
        "m = lax.stop_gradient(jnp.min(jnp.where(holds, stacked, least(dtype)), axis=0))",
        (f"{MERGE}::test_size_of_the_lse_does_not_matter",),
    ),
    Mutant(
        "jattn/params.py",
        "return Params(**{name: array.T.reshape(by_head[name]) for name, array in arrays.items()})",
        "return Params(**{name: array.reshape(by_head[name]) for name, array in arrays.items()})",
        ("test_params.py::test_from_matrices_places_every_element",),
    ),
    Mutant(
        "jattn/params.py",
        "wk=glorot(key_k, C, K * H, (C, K, H))",
        "wk=glorot(key_q, C, K * H, (C, K, H))",
        ("test_params.py::test_the_key_decides_and_each_projection_draws_its_own",),
    ),
    Mutant(
        "jattn/projection.py",
        "y = jnp.einsum(equation, x, jnp.asarray(w), preferred_element_type=wide, out_sharding=out_sharding)",
        "y = jnp.einsum(equation, x, jnp.asarray(w), out_sharding=out_sharding).astype(wide)",
        ("test_projection.py::test_results_have_the_dtype_of_the_rows",),
    ),
    Mutant(
        "jattn/projection.py",
        "if context.shape != (*x.shape[:-2], context.shape[-2], C):",
        "if context.shape[-1] != C:",
        ("test_errors.py::test_the_error_says_what_is_wrong",),
    ),
    # The core: letters, problems, visits, loops, the derivative and its primitive.
    Mutant(
        "jattn/letters.py",
        "index = jnp.minimum(start + jnp.arange(block, dtype=jnp.int32), size - 1)",
        "index = jnp.minimum(start + jnp.arange(block, dtype=jnp.int32), size - 2)",
        (f"{C}::test_c11_lengths_that_are_no_multiple_of_a_block", f"{MODES}::test_every_pair_of_choices"),
    ),
    Mutant(
        "jattn/letters.py",
        "places = [order.index(letter) for letter in letters]",
        "places = list(range(len(letters)))",
        ("test_attention.py::test_plain",),
    ),
    Mutant(
        "jattn/letters.py",
        'return axes.batch + "N" + named if heads_are_left else None',
        "return axes.batch + named if heads_are_left else None",
        (
            f"{SCORES}::test_each_modifier_against_numpy",
            f"{MASKS}::test_a_mask_is_as_drawn",
            f"{D}::test_d1_vmap_over_each_argument_alone",
        ),
    ),
    Mutant(
        "jattn/problem.py",
        "s = s if q.dtype == wide else s * scale",
        "s = s",
        ("test_accelerators.py::test_narrow_operands_are_multiplied_as_they_are",),
    ),
    Mutant(
        "jattn/problem.py",
        "return asks and surely([(query, kv_pos) for query in three(kv_pos, q_pos)])",
        "return asks",
        (f"{MASKS}::test_what_is_known_to_take_part_does",),
    ),
    Mutant(
        "jattn/visits.py",
        "full = full & (xp.arange(full.shape[1])[None, :] < S // block_kv)",
        "pass",
        ("test_attention.py::test_plain",),
    ),
    Mutant(
        "jattn/implementations/loops.py",
        "return index < S if keep is None else keep & (index < S)",
        "return keep",
        (f"{C}::test_c11_lengths_that_are_no_multiple_of_a_block",),
    ),
    Mutant(
        "jattn/implementations/loops.py",
        "will_do = ((kinds != EMPTY).sum(1) <= few).all()",
        "will_do = ((kinds != EMPTY).sum(1) <= few).any()",
        (
            f"{MASKS}::test_no_more_blocks_are_gone_through_than_may_be_enough",
            f"{MASKS}::test_few_visits_say_what_all_say",
        ),
    ),
    Mutant(
        "jattn/implementations/loops.py",
        "again: Callable[..., Any] = jax.checkpoint(f, prevent_cse=False)",
        "again: Callable[..., Any] = f",
        ("test_memory.py::test_memory_is_linear", "test_memory.py::test_absolute_memory"),
    ),
    Mutant(
        "jattn/implementations/loops.py",
        "every = frozenset().union(*(axes_varied(jax.typeof(leaf)) for leaf in jax.tree.leaves(among)))",
        "every: frozenset[str] = frozenset()",
        ("test_transforms.py::test_batch_and_heads_over_devices_need_no_collective",),
    ),
    Mutant(
        "jattn/rule.py",
        "dout = (do - at.o * shared[..., None]) / jnp.where(answered, at.l, 1)[..., None]",
        "dout = do / jnp.where(answered, at.l, 1)[..., None]",
        (f"{A}::test_a9_derivatives_under_every_mask",),
    ),
    Mutant(
        "jattn/rule.py",
        "dout, dl = jnp.where(answered[..., None], dout, 0), jnp.where(answered, dl, 0)",
        "pass",
        (f"{C}::test_c1_whatever_the_cotangent_of_a_row_without_keys_holds",),
    ),
    Mutant(
        "jattn/rule.py",
        "e = jnp.exp(sink - shift)",
        "e = jnp.zeros_like(shift)",
        (f"{A}::test_a10_sink_has_a_gradient",),
    ),
    Mutant(
        "jattn/operations.py",
        "if any(has[form.array] and form.fits == letters.WHOLE for form in forms):",
        "if False:",
        (f"{D}::test_d1_vmap_over_each_argument_alone",),
    ),
    Mutant(
        "jattn/operations.py",
        "places = [None if place is None else place + m for place, m in each]",
        "places = [None if place is None else place for place, m in each]",
        (f"{D}::test_d2_nested_transforms",),
    ),
    Mutant(
        "jattn/autodiff.py",
        "rest = iter(found if takes is None else [x for x, taken in zip(found, takes, strict=True) if taken])",
        "rest = iter(found)",
        (f"{A}::test_a1_second_order_through_the_lse_alone",),
    ),
    Mutant(
        "jattn/autodiff.py",
        "results = [checkpoint_name(result, name) for result, name in zip(results, (OUT, LSE, LSE), strict=True)]",
        "pass",
        ("test_memory.py::test_a_policy_that_names_the_residuals_attends_once",),
    ),
    Mutant(
        "jattn/autodiff.py",
        "where = operation.where.on(platform, ",
        "where = operation.where.on(None, ",
        ("test_accelerators.py::test_the_platform_is_asked_for_and_lowered_for",),
    ),
]


def fate(mutant: Mutant, copy: Path) -> str:
    """Makes the fault in the copy, runs its tests and mends it: "caught", or what went wrong."""
    path = copy / mutant.file
    true = path.read_text()
    if true.count(mutant.old) != 1:
        return f"NOT MADE: the old text is there {true.count(mutant.old)} times"
    path.write_text(true.replace(mutant.old, mutant.new))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/{test}" for test in mutant.tests]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    path.write_text(true)
    if result.returncode == 1:
        return "caught"
    return "SURVIVED" if result.returncode == 0 else f"NOT RUN: {(result.stdout + result.stderr)[-500:]}"


def main(words: list[str]) -> int:
    """Runs the mutants that have one of the words, or all; returns the exit status."""
    chosen = [m for m in MUTANTS if not words or any(word in m.file + m.old + m.new for word in words)]
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "__pycache__", "build", ".*_cache"))
        for mutant in chosen:
            told = fate(mutant, copy)
            failures += told != "caught"
            print(f"{told:8}  {mutant.file}: {mutant.old}  ->  {mutant.new}", flush=True)
    print(f"{len(chosen) - failures} of {len(chosen)} mutants caught")
    return int(failures > 0 or not chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
