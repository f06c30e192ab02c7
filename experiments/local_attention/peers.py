"""What local attention is measured against: other ways to compute it, and global attention.

All take q [b, y, x, h, d], k and v [b, key y, key x, h, d] and return [b, y, x, h, d].
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.local_attention.window import Window


def gather_of_windows(q: jax.Array, k: jax.Array, v: jax.Array, *, window: Window) -> jax.Array:
    """Copies each query's window of keys and values, then attends to the copies."""
    parents = [np.arange(n) // window.ratio for n in q.shape[1:3]]
    rows = parents[0][:, None, None] + window.offsets()[:, 0]
    columns = parents[1][None, :, None] + window.offsets()[:, 1]
    inside = (rows >= 0) & (rows < k.shape[1]) & (columns >= 0) & (columns < k.shape[2])
    rows, columns = np.clip(rows, 0, k.shape[1] - 1), np.clip(columns, 0, k.shape[2] - 1)
    keys, values = k[:, rows, columns], v[:, rows, columns]
    scores = jnp.einsum("byxhd,byxthd->byxht", q, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(inside[:, :, None, :], scores * q.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("byxht,byxthd->byxhd", weights, values)


def dense_masked(q: jax.Array, k: jax.Array, v: jax.Array, *, window: Window) -> jax.Array:
    """Every query against every key, with the window as a mask."""
    q1, k1, v1 = map(_in_a_row, (q, k, v))
    mask = window.dense_mask((q.shape[1], q.shape[2])).reshape(q1.shape[1], k1.shape[1])
    scores = jnp.einsum("bshd,bthd->bhst", q1, k1, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * q.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bhst,bthd->bshd", weights, v1).reshape(q.shape)


def naive_global(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention to the whole grid, with all scores written to memory in the inputs' dtype."""
    q1, k1, v1 = map(_in_a_row, (q, k, v))
    scores = jnp.einsum("bshd,bthd->bhst", q1, k1) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bhst,bthd->bshd", weights, v1).reshape(q.shape)


def cudnn_global(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention to the whole grid by cuDNN's fused kernels, jax's fastest, on NVIDIA GPUs."""
    q1, k1, v1 = map(_in_a_row, (q, k, v))
    return jax.nn.dot_product_attention(q1, k1, v1, implementation="cudnn").reshape(q.shape)


def _in_a_row(array: jax.Array) -> jax.Array:
    """[b, y, x, h, d] to [b, y * x, h, d]."""
    return array.reshape(array.shape[0], -1, *array.shape[3:])
