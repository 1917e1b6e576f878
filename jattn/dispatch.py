"""The public attention functions: check the arguments, attend, give the results back in the caller's layout."""

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jattn import autodiff, checks, letters, masks, softmax, target
from jattn.implementations import Blockwise, choose, dense, named
from jattn.problem import Options, Problem, lay_out, opened, operands
from jattn.scores import Dropout
from jattn.softmax import Running
from jattn.values import Value


class Choices(Options, total=False):
    """All that `attention` takes beside query, key and value."""

    implementation: str | Blockwise | None


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    mask: masks.Mask | ArrayLike | None = None,
    scores: tuple[Value, ...] = (),
    scale: ArrayLike | None = None,
    key_scale: ArrayLike | None = None,
    value_scale: ArrayLike | None = None,
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
      key: `[..., S, K, H]`, real floating or int8; K divides N.
      value: `[..., S, K, V]`, likewise.
      mask: a mask of `jattn.masks`, or a bool array broadcastable to `[..., N, T, S]`, True where attending is
        allowed. None: everywhere.
      scores: modifiers of `jattn.scores`, applied in order behind the scale and before the mask.
      scale: a number, or numbers `[..., N]`, one for each head. None: 1/sqrt(H).
      key_scale: real floating `[..., S, K]`, broadcastable: what one of a key stands for, k = key_scale * key, as in a
        cache of int8 or float8 with a scale for each head `[K]`, token `[..., S, 1]` or both. Keys are never widened as
        a whole. For blocks of tokens, `jnp.repeat` its numbers. None: 1; int8 needs it.
      value_scale: the same for the values.
      q_offset: position of the first query, an int or an int array `[...]`. An int is static, an array dynamic.
      q_positions: `[..., T]` int positions of the queries, in place of `q_offset`. At a negative one is no query.
      kv_positions: `[..., S]` int positions of the keys. None: 0, 1, ... At a negative one is no key.
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
    return _attend(query, key, value, _options(locals()), implementation)[0]


def attention_with_lse(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    mask: masks.Mask | ArrayLike | None = None,
    scores: tuple[Value, ...] = (),
    scale: ArrayLike | None = None,
    key_scale: ArrayLike | None = None,
    value_scale: ArrayLike | None = None,
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
    out, state = _attend(query, key, value, _options(locals()), implementation)
    return out, softmax.log_sum_exp(state)


def attention_weights(
    query: ArrayLike,
    key: ArrayLike,
    *,
    rows: Any = None,
    mask: masks.Mask | ArrayLike | None = None,
    scores: tuple[Value, ...] = (),
    scale: ArrayLike | None = None,
    key_scale: ArrayLike | None = None,
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
      rows: `[R]` int indices of the queries wanted, so that T x S need not be built. None: all. If they are traced and
        out of range, negative ones count from the end, and others give rows that mean nothing.
      mask, scores, scale, key_scale, q_offset, q_positions, kv_positions, dropout: as in `attention`.

    Returns:
      `[..., N, T, S]`, or `[..., N, R, S]`, in float32 or wider.

    Raises:
      ValueError, TypeError: as in `attention`; ValueError for rows out of range, if they are known.
    """
    options = _options(locals())

    def run(query: Any, key: Any, value: Any, options: Options, rows: Any) -> jax.Array:
        problem = lay_out(query, key, value, options)
        p: jax.Array = dense.weights(problem if rows is None else _take_rows(problem, rows), target.now())
        return p

    def lies(spec: Any) -> Any:
        return jax.P(*spec[:-3], spec[-2], None if rows is not None else spec[-3])

    query, key = checks.floating("query", query), checks.stored("key", key)
    none = jnp.zeros((*key.shape[:-1], 0), query.dtype)
    weights: jax.Array = _run(run, lies, query, key, none, options, rows)
    return weights


def _options(arguments: dict[str, Any]) -> Options:
    """Those of the arguments of a public function that are options."""
    return cast(Options, {name: arguments[name] for name in Options.__annotations__ if name in arguments})


def _attend(query: Any, key: Any, value: Any, options: Options, implementation: Any) -> tuple[jax.Array, Running]:
    """The output in the query's dtype, and the softmax that it comes from, in the caller's layout."""
    query, key, value = operands(query, key, value)

    def run(query: Any, key: Any, value: Any, options: Options) -> Running:
        return _state(query, key, value, options, implementation)

    def lies(spec: Any) -> Any:
        rows: Any = jax.P(*spec[:-1])
        return Running(rows, rows, rows)

    state: Running = _run(run, lies, query, key, value, options)
    return state.o.astype(query.dtype), state


def _run(f: Any, lies: Any, query: jax.Array, key: jax.Array, value: jax.Array, options: Options, *others: Any) -> Any:
    """Returns f(query, key, value, options, *others), in a mesh with explicit axes too.

    Blocks and loops over them are for XLA to partition: all that can be said is where the result lies.

    Args:
      lies: gives the specs of the result, from that of the query.
    """
    options = opened(options, checks.wide(query, key, value))
    sharding = jax.typeof(query).sharding
    if not sharding.mesh.explicit_axes:
        return f(query, key, value, options, *others)
    key, value, options = _as_many_heads(query, key, value, options)
    arrays, rebuild = arrays_apart((query, key, value, options, *others))
    run = jax.sharding.auto_axes(lambda *arrays: f(*rebuild(arrays)), out_sharding=lies(sharding.spec))
    return run(*arrays)


def _as_many_heads(query: jax.Array, key: jax.Array, value: jax.Array, options: Options) -> Any:
    """Keys, values and their scales with heads for all devices that share the queries' heads, as far as they can be.

    Where there are more of these than heads of keys, XLA would gather queries and scores: so each takes its own heads.
    """
    names, K = _spec(query)[-2], key.shape[-2]
    times = math.lcm(K, math.prod(jax.typeof(query).sharding.mesh.shape[name] for name in names)) // max(K, 1)
    taken = {name for array in (key, value) for entry in _spec(array)[:-2] + _spec(array)[-1:] for name in entry}
    if times == 1 or query.shape[-2] % (K * times) or taken & {*names}:
        return key, value, options

    def repeated(array: Any, axis: int) -> jax.Array:
        spec: list[Any] = [*_spec(array)]
        spec[axis] = names
        return jnp.repeat(array, times, axis=axis, out_sharding=jax.P(*spec))

    scales: dict[str, Any] = {name: options.get(name) for name in ("key_scale", "value_scale")}
    by_head = {name: repeated(scale, -1) for name, scale in scales.items() if np.shape(scale)[-1:] == (K,) != (1,)}
    return repeated(key, -2), repeated(value, -2), {**options, **by_head}


def _spec(array: Any) -> list[tuple[Any, ...]]:
    """The axes of the mesh along which each axis of an array lies."""
    entries = [*jax.typeof(array).sharding.spec] or [None] * np.ndim(array)
    return [() if entry is None else entry if isinstance(entry, tuple) else (entry,) for entry in entries]


def _state(query: Any, key: Any, value: Any, options: Options, implementation: Any) -> Running:
    problem = lay_out(query, key, value, options)
    asked, where = named(implementation), target.now()
    if asked is not None:
        choose(problem, where, asked)  # raises its reason now, and not when a program is lowered
    state, axes = autodiff.attend(problem, asked, where), problem.axes
    rows = (*axes.shape(axes.batch), axes["T"], axes["K"] * axes["G"])
    return Running(*(x.reshape((*rows, *x.shape[len(problem.q.letters) :])) for x in state))


def arrays_apart(tree: Any) -> tuple[list[Any], Any]:
    """Parts a pytree into its arrays and a function that puts arrays in their places."""
    leaves = jax.tree.leaves(tree)
    structure: Any = jax.tree.structure(tree)
    # NumPy's numbers stay: as ints they are known while tracing.
    is_array = [hasattr(leaf, "shape") and not isinstance(leaf, np.generic) for leaf in leaves]

    def rebuild(arrays: Any) -> Any:
        rest = iter(arrays)
        return structure.unflatten([next(rest) if a else leaf for a, leaf in zip(is_array, leaves, strict=True)])

    return [leaf for a, leaf in zip(is_array, leaves, strict=True) if a], rebuild


def _take_rows(problem: Problem, rows: Any) -> Problem:
    """The problem of some of the queries."""
    T = problem.axes["T"]
    rows = checks.integer("rows", rows)
    if rows.ndim != 1:
        raise ValueError(f"rows must be [R], got shape {rows.shape}")
    if not isinstance(rows, jax.core.Tracer) and rows.size and (int(rows.min()) < 0 or int(rows.max()) >= T):
        raise ValueError(f"rows must lie in 0 ... T - 1 = {T - 1}, got {rows.min()} ... {rows.max()}")

    def take(leaf: letters.Lettered) -> letters.Lettered:
        axis = leaf.letters.find("T")
        return leaf if axis < 0 else leaf.replace(jnp.take(leaf.array, rows, axis=axis))

    problem = jax.tree.map(take, problem.with_positions(), is_leaf=letters.is_lettered)
    return problem._replace(axes=problem.axes.replace(T=rows.shape[0]))
