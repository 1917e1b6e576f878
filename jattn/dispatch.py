"""The public attention functions: check and lay out, choose an implementation, run it, give the field's layout back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jattn import blockwise, checks, dense, masks, softmax, sweep
from jattn.blockwise import Blockwise
from jattn.problem import Problem, lay_out, move
from jattn.scores import Bias, Dropout
from jattn.values import Value

IMPLEMENTATIONS = ("dense", "blockwise")


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    mask: masks.Mask | ArrayLike | None = None,
    scores: tuple[Value, ...] = (),
    scale: ArrayLike | None = None,
    q_offset: ArrayLike | None = None,
    q_positions: ArrayLike | None = None,
    kv_positions: ArrayLike | None = None,
    dropout: Dropout | None = None,
    implementation: str | Blockwise | None = None,
) -> jax.Array:
    """Attends: each query gathers the values of the keys it may attend to, by how well they answer.

        out_t = Σ_s p_ts v_s,   p_ts = softmax_s(mask_ts(modifiers(scale * q_t·k_s)))

    Exact, in memory linear in T and S, and differentiable in every mode to any order: in query, key, value, scale and
    everything that `scores` carry. Query head n reads key/value head n // (N / K).
    A query that may attend to nothing gets 0 and sends no gradient. Keys and values that no query may attend to, and
    queries that may attend to nothing, can hold NaN or Inf. Sums are taken in float32, or float64 if an operand is.
    Logits beyond the greatest finite number of that dtype are not defined. On a GPU or TPU products take narrow
    operands as they are, and weights as narrow as values, as fused kernels do. Vaswani et al., 2017 (arXiv:1706.03762).

    Args:
      query: `[..., T, N, H]`, real floating; the leading dims are the batch.
      key: `[..., S, K, H]`; K divides N.
      value: `[..., S, K, V]`.
      mask: a mask of `jattn.masks`, or a bool array broadcastable to `[..., N, T, S]`, True where attending is
        allowed. None: everywhere.
      scores: modifiers of `jattn.scores`, applied in order behind the scale and before the mask.
      scale: a number. None: 1/sqrt(H).
      q_offset: position of the first query, an int or an int array `[...]`. An int is static, an array dynamic.
      q_positions: `[..., T]` int positions of the queries, in place of `q_offset`.
      kv_positions: `[..., S]` int positions of the keys. None: 0, 1, ...
      dropout: a `jattn.Dropout`, or None.
      implementation: "dense", "blockwise" or a `jattn.Blockwise` with block sizes. None chooses; `explain` tells. For
        few queries against a cache that lies in memory as `[..., K, S, H]`, "dense" is the better choice on a CPU,
        because it need not move the keys; tracing cannot see how they lie.

    Returns:
      `[..., T, N, V]` in the dtype of the query.

    Raises:
      ValueError: shapes that do not agree; K that does not divide N; an unknown implementation; `q_offset` together
        with `q_positions`; or T != S with a mask or modifier that compares positions and nothing to say where the
        queries stand.
      TypeError: dtypes that are not real floating, or arguments that are not what they should be.
    """
    problem = lay_out(query, key, value, mask, scores, scale, q_offset, q_positions, kv_positions, dropout)
    return _output(problem, _attend(problem, implementation), query)


def attention_with_lse(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    mask: masks.Mask | ArrayLike | None = None,
    scores: tuple[Value, ...] = (),
    scale: ArrayLike | None = None,
    q_offset: ArrayLike | None = None,
    q_positions: ArrayLike | None = None,
    kv_positions: ArrayLike | None = None,
    dropout: Dropout | None = None,
    implementation: str | Blockwise | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends, and returns the log of each query's denominator too, so that results over disjoint keys can be merged.

        lse_t = log Σ_s exp(logit_ts)

    Args:
      query, key, value and all others: as in `attention`.

    Returns:
      out `[..., T, N, V]` in the dtype of the query, and lse `[..., T, N]`, the natural log in float32 or wider, -inf
      for a query that may attend to nothing. Both are differentiable.

    Raises:
      ValueError, TypeError: as in `attention`.
    """
    problem = lay_out(query, key, value, mask, scores, scale, q_offset, q_positions, kv_positions, dropout)
    state = _attend(problem, implementation)
    return _output(problem, state, query), _as_it_came(softmax.log_sum_exp(state), problem)


def attention_weights(
    query: ArrayLike,
    key: ArrayLike,
    *,
    rows: Any = None,
    mask: masks.Mask | ArrayLike | None = None,
    scores: tuple[Value, ...] = (),
    scale: ArrayLike | None = None,
    q_offset: ArrayLike | None = None,
    q_positions: ArrayLike | None = None,
    kv_positions: ArrayLike | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Returns the weights by which attention sums the values, for looking at.

        p_ts = softmax_s(mask_ts(modifiers(scale * q_t·k_s)))

    The rows of a query that may attend to nothing are 0; with a `Sink` the rows sum to less than 1.

    Args:
      query: `[..., T, N, H]`. key: `[..., S, K, H]`.
      rows: `[R]` int indices of the queries wanted, so that T x S need not be built. None: all.
      mask, scores, scale, q_offset, q_positions, kv_positions, dropout: as in `attention`.

    Returns:
      `[..., N, T, S]`, or `[..., N, R, S]`, in float32 or wider.

    Raises:
      ValueError, TypeError: as in `attention`; ValueError for rows out of range, if they are known.
    """
    none = jnp.asarray(key)[..., :0]
    problem = lay_out(query, key, none, mask, scores, scale, q_offset, q_positions, kv_positions, dropout)
    if rows is not None:
        problem = _take_rows(problem, rows)
    p = dense.weights(problem)
    *batch, K, G, T, S = p.shape
    return p.reshape((*batch, K * G, T, S))


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | Blockwise | None = None,
    return_residual: bool = False,
) -> Any:
    """Attends, called as `jax.nn.dot_product_attention` is: replacing the import is the whole migration.

        out = softmax(scale * q kᵀ + bias, masked) v

    It is `attention` in another spelling, and differs from jax.nn only in these:
      - a query that may attend to nothing gets 0 and no gradient (jax.nn: the mean of all values);
      - NaN or Inf in masked keys and values, and a bias of -inf, stay where they are (jax.nn: NaN everywhere);
      - the residual is float32 or wider and differentiable (jax.nn: the input dtype, no gradient);
      - float64 stays float64 (jax.nn: float32 sums);
      - memory is linear; any number of leading dims; V may differ from H;
      - nothing is cast: a bias that is not floating, negative windows and numbers for `is_causal` are refused.
    As in jax.nn, and unlike in `attention`, position t of the queries is position t of the keys also when T != S, so
    that `is_causal` is aligned at the top left: for decoding use `attention` with `q_offset`.

    Args:
      query: `[..., T, N, H]`. key: `[..., S, K, H]`. value: `[..., S, K, V]`.
      bias: broadcastable to `[..., N, T, S]`, added to the scaled logits.
      mask: bool, broadcastable to `[..., N, T, S]`, True where attending is allowed.
      scale: a number. None: 1/sqrt(H).
      is_causal: whether key position s is seen only from query positions t >= s.
      query_seq_lengths: `[B]` int, the rows at and past which are 0.
      key_value_seq_lengths: `[B]` int, the keys at and past which are not seen.
      local_window_size: (left, right), both inclusive; an int is both.
      implementation: None or "xla" choose; "dense", "blockwise" or a `jattn.Blockwise`.
      return_residual: whether to return the lse too.

    Returns:
      out `[..., T, N, V]`, or (out, lse `[..., T, N]`).

    Raises:
      ValueError, TypeError: as in `attention`.
    """
    allowed = masks.as_mask(None if mask is None else checks.boolean("mask", mask))
    if not isinstance(is_causal, bool | np.bool_):
        raise TypeError(f"is_causal must be a bool, got {is_causal!r}")
    if is_causal:
        allowed = allowed & masks.Causal()
    if local_window_size is not None:
        window = local_window_size if isinstance(local_window_size, tuple | list) else (local_window_size,) * 2
        if len(window) != 2:
            raise ValueError(f"local_window_size must be an int or (left, right), got {local_window_size!r}")
        allowed = allowed & masks.Window(*window)
    batch = jnp.shape(query)[:-3]
    lengths = dict(query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths)
    given = {name: checks.integer(name, length) for name, length in lengths.items() if length is not None}
    for name, length in given.items():
        if length.shape not in (batch, batch or (1,)):
            raise ValueError(f"{name} must be [B] = {list(batch) or [1]}, got shape {list(length.shape)}")
    if given:
        q, kv = (given[name].reshape(batch or (1,)) if name in given else None for name in lengths)
        allowed = allowed & masks.Lengths(q, kv)
    # Three axes are a batch of one, as in jax.nn: a bias or a mask may have an axis for it.
    batched = [jnp.expand_dims(a, 0) if getattr(a, "ndim", 0) == 3 else a for a in (query, key, value)]
    scores = () if bias is None else (Bias(checks.floating("bias", bias)),)
    chosen = None if implementation == "xla" else implementation
    out, lse = attention_with_lse(*batched, mask=allowed, scores=scores, scale=scale, q_offset=0, implementation=chosen)
    out, lse = (out, lse) if batch else (out[0], lse[0])
    return (out, lse) if return_residual else out


class Explanation(NamedTuple):
    """What `attention` would run, and why; `print` it."""

    implementation: str
    block_sizes: tuple[int, ...]  # along [*B, K, G, T, S]
    empty: float | None  # share of the blocks; None where arrays decide that are not given
    partial: float | None
    full: float | None
    flops: float  # of the two products over the blocks that are not empty
    temp_bytes: int  # peak, beyond arguments and results
    reasons: dict[str, str]  # for each implementation why it was or was not taken

    def __str__(self) -> str:
        shares = "decided by arrays, while running"
        if self.empty is not None:
            shares = f"{self.empty:.1%} empty, {self.partial:.1%} partial, {self.full:.1%} full"
        lines = [
            f"implementation  {self.implementation}",
            f"block sizes     {list(self.block_sizes)} along [*B, K, G, T, S]",
            f"blocks          {shares}",
            f"flops           {self.flops:.4g}",
            f"temp memory     {self.temp_bytes / 2**20:.2f} MiB",
        ]
        return "\n".join(lines + [f"{name:15} {reason}" for name, reason in self.reasons.items()])


def explain(query: Any, key: Any, value: Any, *, implementation: Any = None, **options: Any) -> Explanation:
    """Tells what `attention` would run for the same arguments, without running it: where arrays decide, it counts.

        flops ≈ 2 B N (H + V) T S (share of blocks that are not empty)

    Args:
      query, key, value and all others: as in `attention`, each array an array or a `jax.ShapeDtypeStruct`.

    Returns:
      an `Explanation`; print it.

    Raises:
      ValueError, TypeError: as in `attention`.
    """
    arrays, rebuild = _arrays_apart((query, key, value, options))

    def run(*arrays: Any) -> Any:
        query, key, value, options = rebuild(arrays)
        return attention_with_lse(query, key, value, implementation=implementation, **options)

    found: list[Any] = []

    def look(*arrays: Any) -> list[jax.Array] | None:
        query, key, value, options = rebuild(arrays)
        problem = lay_out(query, key, value, **options)
        chosen = _choose(problem, implementation)
        blocks = tuple(max(size, 1) for size in problem.sizes) if chosen is None else chosen
        kinds = sweep.static_kinds(problem, blocks)
        found.append((problem.sizes, chosen, blocks, kinds))
        return sweep.count_visits(problem, blocks) if kinds is None else None

    jax.eval_shape(look, *arrays)
    sizes, chosen, blocks, kinds = found[0]
    counts: Any = None if kinds is None else [np.sum(kinds == k) for k in (sweep.EMPTY, sweep.PARTIAL, sweep.FULL)]
    if counts is None and not any(isinstance(array, jax.ShapeDtypeStruct | jax.core.Tracer) for array in arrays[3:]):
        counts = jax.jit(lambda *given: look(*map(jnp.zeros_like, arrays[:3]), *given))(*arrays[3:])
    empty, partial, full = 3 * [None] if counts is None else (np.array(counts) / max(np.sum(counts), 1)).tolist()
    memory: Any = jax.jit(run).lower(*arrays).compile().memory_analysis()
    skipped = 0.0 if chosen is None or empty is None else empty
    return Explanation(
        implementation="dense" if chosen is None else "blockwise",
        block_sizes=tuple(blocks),
        empty=empty,
        partial=partial,
        full=full,
        flops=2.0 * (arrays[0].shape[-1] + arrays[2].shape[-1]) * float(np.prod(sizes, dtype=float)) * (1 - skipped),
        temp_bytes=int(memory.temp_size_in_bytes),
        reasons=_reasons(sizes, arrays[0].shape[-1], chosen, implementation),
    )


def _attend(problem: Problem, implementation: Any) -> softmax.Running:
    chosen = _choose(problem, implementation)
    return dense.attend(problem) if chosen is None else blockwise.attend(problem, chosen)


def _output(problem: Problem, state: softmax.Running, query: ArrayLike) -> jax.Array:
    return _as_it_came(softmax.output(state), problem).astype(jnp.result_type(query))


def _choose(problem: Problem, implementation: Any) -> tuple[int, ...] | None:
    """The block sizes of the blockwise implementation, or None for the dense one."""
    if isinstance(implementation, Blockwise):
        return blockwise.choose_blocks(problem, implementation)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation must be None, one of {list(IMPLEMENTATIONS)} or a jattn.Blockwise, got {implementation!r}"
        )
    if implementation == "dense" or (implementation is None and _why_dense(problem.sizes, problem.q.shape[-1])):
        return None
    return blockwise.choose_blocks(problem, Blockwise())


def _why_dense(sizes: tuple[int, ...], H: int) -> str | None:
    """Why all scores at once are the better choice; None if they are not."""
    *_, G, T, S = sizes
    if not all(isinstance(size, int) for size in sizes):
        return None
    count = int(np.prod(sizes, dtype=float))
    few = 2**20 if G * T * S <= 2**12 else 2**16  # so many short heads gain nothing by a loop
    if count <= few:
        return f"{count} scores in all, at most {few}"
    # On a CPU XLA transposes all keys for that, which takes longer than taking the heads one by one.
    if G * T <= H and 16 * T <= S and jax.default_backend() != "cpu":
        return f"few queries for many keys: the scores, G*T={G * T} for each key, take no more room than keys of H={H}"
    return None


def _reasons(sizes: tuple[int, ...], H: int, chosen: tuple[int, ...] | None, implementation: Any) -> dict[str, str]:
    taken = "dense" if chosen is None else "blockwise"
    other = "blockwise" if chosen is None else "dense"
    if implementation is not None:
        return {taken: "taken: asked for by name", other: f"not taken: implementation={implementation!r} was asked for"}
    if chosen is None:
        return {"dense": f"taken: {_why_dense(sizes, H)}", "blockwise": "not taken: a loop gains nothing here"}
    scores = 4 * np.prod(sizes, dtype=float) / 2**20
    return {
        "blockwise": "taken: memory stays linear, and blocks known to be empty are skipped",
        "dense": f"not taken: it would hold {scores:.1f} MiB of scores or more",
    }


def _as_it_came(result: jax.Array, problem: Problem) -> jax.Array:
    """[*B, K, G, T, ...] -> [*B, T, N, ...]"""
    *batch, K, G, T, _ = problem.sizes
    rows_first = move(result, len(batch) + 2, len(batch))
    return rows_first.reshape((*batch, T, K * G, *rows_first.shape[len(batch) + 3 :]))


def _take_rows(problem: Problem, rows: Any) -> Problem:
    T = problem.sizes[-2]
    rows = checks.integer("rows", rows)
    if rows.ndim != 1:
        raise ValueError(f"rows must be [R], got shape {rows.shape}")
    if not isinstance(rows, jax.core.Tracer) and rows.size and (int(rows.min()) < 0 or int(rows.max()) >= T):
        raise ValueError(f"rows must lie in 0 ... T - 1 = {T - 1}, got {rows.min()} ... {rows.max()}")
    axis = len(problem.sizes) - 2
    problem = problem.with_positions()
    taken = jax.tree.map(lambda leaf: leaf if leaf.shape[axis] == 1 else jnp.take(leaf, rows, axis=axis), problem)
    return taken._replace(q=jnp.take(problem.q, rows, axis=axis))  # an axis T of 1 too: it says how many rows there are


def _arrays_apart(tree: Any) -> tuple[list[Any], Any]:
    """Parts a pytree into its arrays and a function that puts arrays in their places."""
    leaves = jax.tree.leaves(tree)
    structure: Any = jax.tree.structure(tree)
    # NumPy's numbers stay: as ints they are known while tracing.
    is_array = [hasattr(leaf, "shape") and not isinstance(leaf, np.generic) for leaf in leaves]

    def rebuild(arrays: Any) -> Any:
        rest = iter(arrays)
        return structure.unflatten([next(rest) if a else leaf for a, leaf in zip(is_array, leaves, strict=True)])

    return [leaf for a, leaf in zip(is_array, leaves, strict=True) if a], rebuild
