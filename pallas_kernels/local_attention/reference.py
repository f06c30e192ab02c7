"""Local attention in its simplest form: every implementation is tested against it."""

import jax
import jax.numpy as jnp

from pallas_kernels.local_attention.window import Window


def local_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, window: Window, scale: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Masked softmax over the whole key grid; memory grows with the square of the grid.

    q [b, y, x, h, d], k and v [b, key y, key x, h, d], inputs already checked by the dispatch.
    Returns out [b, y, x, h, d] in q's dtype and the log-sum-exp [b, h, y, x] in float32.
    """
    q32, k32, v32 = (a.astype(jnp.float32) for a in (q, k, v))
    # t and u are the rows and columns of the key grid.
    scores = scale * jnp.einsum("byxhd,btuhd->bhyxtu", q32, k32)
    scores = jnp.where(window.dense_mask((q.shape[1], q.shape[2])), scores, -jnp.inf)
    # Every query sees at least its parent cell, so no row is empty.
    lse = jax.nn.logsumexp(scores, axis=(-2, -1))
    weights = jnp.exp(scores - lse[..., None, None])
    out = jnp.einsum("bhyxtu,btuhd->byxhd", weights, v32)
    return out.astype(q.dtype), lse
