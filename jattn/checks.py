"""What public functions demand of their arguments: an error names the argument, what came and what was wanted.

A lost check here can mean wrong numbers further on, so the ones that JAX itself would not catch raise by themselves and
survive `python -O` and `chex.disable_asserts()`; a plain shape mismatch, which no einsum lets through, is left to chex.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np


def floating(name: str, array: Any) -> jax.Array:
    """Returns `array` as a JAX array; TypeError unless its dtype is a real floating one."""
    result = as_array(name, array)
    if not jnp.issubdtype(result.dtype, jnp.floating):
        raise TypeError(f"{name} must have a real floating dtype (float8 to float64), got {result.dtype}")
    return result


def stored(name: str, array: Any) -> jax.Array:
    """Returns keys or values as a JAX array; TypeError unless its dtype is a real floating one or int8."""
    result = as_array(name, array)
    return result if result.dtype == jnp.int8 else floating(name, result)


def integer(name: str, array: Any) -> jax.Array:
    """Returns `array` as an int32 JAX array; TypeError unless its dtype is an integer one. As `int32` does."""
    result = as_array(name, array)
    if not jnp.issubdtype(result.dtype, jnp.integer):
        raise TypeError(f"{name} must have an integer dtype, got {result.dtype}")
    return int32(name, array if hasattr(array, "dtype") else result)


def int32(name: str, array: Any) -> jax.Array:
    """Returns integers as int32: ValueError for known ones that it cannot hold, the nearest it can for traced ones."""
    limits, own = np.iinfo(np.int32), np.iinfo(array.dtype)
    if own.min >= limits.min and own.max <= limits.max:
        return jnp.asarray(array).astype(jnp.int32)
    if isinstance(array, jax.core.Tracer):
        least, greatest = max(own.min, limits.min), min(own.max, limits.max)
        return jnp.clip(array, np.array(least, array.dtype), np.array(greatest, array.dtype)).astype(jnp.int32)
    return jnp.asarray(_held(name, array, np.dtype(np.int32)).astype(np.int32))


def boolean(name: str, array: Any) -> jax.Array:
    """Returns `array` as a JAX array; TypeError unless it is boolean."""
    result = as_array(name, array)
    if result.dtype != jnp.bool_:
        raise TypeError(f"{name} must be boolean, got dtype {result.dtype}")
    return result


def count(name: str, value: Any, *, optional: bool = False) -> None:
    """TypeError or ValueError unless `value` is an int from 0 to the greatest int32, or an integer array."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not (isinstance(value, int) or hasattr(value, "dtype")):
        raise TypeError(f"{name} must be an int{', None' if optional else ''} or an integer array, got {value!r}")
    if isinstance(value, int):
        if not 0 <= value <= np.iinfo(np.int32).max:
            raise ValueError(f"{name} must be from 0 to {np.iinfo(np.int32).max}, got {value}")
        return
    carried(name, value, jnp.integer, 0)


def ids(name: str, array: Any) -> Any:
    """Returns ids in a dtype of 32 bits at least; those that JAX would cut must fit int32."""
    cut = jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype
    return int32(name, array) if cut or array.dtype.itemsize < 4 else array


def uncut(name: str, array: Any) -> Any:
    """Returns an array as it is; ValueError for integers of 64 bits that JAX would cut to 32, if they do not fit."""
    dtype = getattr(array, "dtype", None)
    if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended) or jax.dtypes.canonicalize_dtype(dtype) == dtype:
        return array
    kept = jax.dtypes.canonicalize_dtype(dtype)
    return _held(name, array, kept) if jnp.issubdtype(dtype, jnp.integer) else array


def _held(name: str, array: Any, dtype: Any) -> np.ndarray:
    """Known integers; ValueError for those that a dtype cannot hold."""
    limits, known = np.iinfo(dtype), np.asarray(array)
    if known.size and not (limits.min <= known.min() and known.max() <= limits.max):
        raise ValueError(f"{name} must be integers that fit {dtype}, got {known.min()} ... {known.max()}")
    return known


def carried(name: str, array: Any, kind: Any, least_rank: int, *, optional: bool = False) -> None:
    """TypeError or ValueError unless `array` is an array of a kind, jnp.integer or jnp.bool_, with axes enough."""
    if array is None and optional:
        return
    word = "a boolean" if kind == jnp.bool_ else "an integer"
    if not hasattr(array, "dtype"):
        raise TypeError(f"{name} must be {word} array, got {type(array).__name__}")
    if not jnp.issubdtype(array.dtype, kind):
        raise TypeError(f"{name} must have {word} dtype, got {array.dtype}")
    if array.ndim < least_rank:
        raise ValueError(f"{name} must have at least {least_rank} axes, got shape {array.shape}")


def rank(name: str, array: jax.Array, letters: str) -> None:
    """ValueError unless `array` has an axis for each letter of `letters`, or more where `letters` begins with '...'."""
    axes = letters.replace("...", "").replace(",", " ").split()
    open_ended = letters.startswith("...")
    if array.ndim < len(axes) or (array.ndim > len(axes) and not open_ended):
        raise ValueError(f"{name} must be [{letters}], got shape {array.shape} with {array.ndim} axes")


def shape(name: str, array: jax.Array, letters: str, sizes: tuple[Any, ...]) -> None:
    """ValueError unless `array` has the shape `sizes`, spelled `letters` in the message."""
    wanted = f"{name} must be [{letters}] = {_spell(sizes)}, got shape {_spell(array.shape)}"
    chex.assert_shape(array, sizes, exception_type=ValueError, custom_message=wanted)


def divides(num_kv_heads: int, num_heads: int) -> None:
    """ValueError unless the number of key/value heads divides the number of query heads."""
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"the number of query heads N must be a multiple of the number of key/value heads K, which divides it: "
            f"got num_heads N={num_heads} and num_kv_heads K={num_kv_heads}"
        )


def wide(*arrays: Any) -> Any:
    """Returns the dtype in which sums over `arrays` are taken: float64 if any is, else float32."""
    return jnp.float64 if any(jnp.result_type(array) == jnp.float64 for array in arrays) else jnp.float32


def common(*arrays: Any) -> Any:
    """Returns the dtype in which products of `arrays` are taken: the widest; float32 of different ones as wide."""
    dtypes = {jnp.dtype(array.dtype) for array in arrays}
    widest = max(dtype.itemsize for dtype in dtypes)
    first, *others = (dtype for dtype in dtypes if dtype.itemsize == widest)
    return jnp.dtype(jnp.float32) if others else first


def is_narrow(array: Any) -> bool:
    """Whether `array` is of numbers narrower than float32."""
    return jnp.issubdtype(array.dtype, jnp.number) and array.dtype.itemsize < 4


def as_array(name: str, array: Any) -> jax.Array:
    """Returns `array` as a JAX array; TypeError if it cannot be one."""
    try:
        result: jax.Array = jnp.asarray(array)
        return result
    except OverflowError as error:
        raise ValueError(f"{name} must fit int32, got {array!r}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be an array, got {type(array).__name__}: {error}") from error


def _spell(sizes: tuple[Any, ...]) -> str:
    return "[" + ", ".join(map(str, sizes)) + "]"
