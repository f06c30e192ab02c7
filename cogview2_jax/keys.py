"""Random keys from callers: made by `jax.random.key`, or by the older `jax.random.PRNGKey`."""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def one_key(key: Any) -> Array:
    """`key` as one typed key, shape []; a key made by `jax.random.PRNGKey` is converted.

    Raises ValueError, in one line that says what to pass, for anything else.
    """
    typed = _typed(key, "key")
    if typed.shape:
        raise ValueError(f"key must be one key: got keys of shape {typed.shape}; pass key[0]")
    return typed


def key_batch(keys: Any) -> Array:
    """Typed keys, one for each sample, shape [b]; older keys are uint32 [b, 2].

    Raises ValueError, in one line that says what to pass, for anything else.
    """
    typed = _typed(keys, "keys")
    if len(typed.shape) != 1:
        raise ValueError(
            f"keys must be one for each sample, [b]: got shape {typed.shape};"
            " pass jax.random.split(key, b)"
        )
    return typed


def fold_in_all(keys: Array, number: Array) -> Array:
    """Keys [b], `number` folded into each."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _typed(key: Any, name: str) -> Array:
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        typed: Array = key
        return typed
    data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    if dtype == data.dtype and key.shape[-1:] == data.shape:
        return jax.random.wrap_key_data(jnp.asarray(key))
    what = repr(key) if isinstance(key, (int, float, str)) else _shape_of(key)
    seed = key if isinstance(key, int) and not isinstance(key, bool) else "seed"
    raise ValueError(
        f"{name} must come from jax.random.key: got {what}; pass jax.random.key({seed})"
    )


def _shape_of(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
