"""Merges attention over disjoint key sets into one softmax, from outputs and log-sum-exps."""

import jax
import jax.numpy as jnp

Part = tuple[jax.Array, jax.Array]


def merge_attention(*parts: Part) -> jax.Array:
    """Attention over disjoint key sets, as if softmaxed together.

    Each part is (out [b, y, x, h, d], lse [b, h, y, x] float32). A part with all keys masked
    has lse = -inf and adds nothing; where all parts do, the result is zero. Accumulates in float32
    and returns [b, y, x, h, d] in the parts' dtype. Differentiable in every out and lse. Raises
    ValueError for no parts and for parts of different shapes or dtypes.

    CogView2's super-resolution has one softmax over two windows, or over a window and the text
    (arXiv 2204.14217, section 3.3).
    """
    return merge_attention_with_lse(*parts)[0]


def merge_attention_with_lse(*parts: Part) -> Part:
    """`merge_attention`'s output and the log-sum-exp [b, h, y, x] float32 over all parts' keys.

    The result is a part again, so merges can be nested. The log-sum-exp is -inf where every part's
    is.
    """
    _check(parts)
    lses = jnp.stack([lse for _, lse in parts])
    # Subtract the largest lse first: exp overflows float32 near 88. The result does not depend on
    # what is subtracted, so no gradient flows through it. Where every part is empty, subtract zero:
    # -inf - -inf would be nan.
    largest = jax.lax.stop_gradient(lses.max(axis=0))
    largest = jnp.where(jnp.isneginf(largest), 0.0, largest)
    weights = jnp.exp(lses - largest)
    total = weights.sum(axis=0)
    # Where every part is empty, divide zero by one and take no logarithm of zero.
    empty = total == 0.0
    safe_total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, largest + jnp.log(safe_total))
    shares = jnp.einsum("pbhyx->pbyxh", weights / safe_total)[..., None]

    merged = jnp.zeros(parts[0][0].shape, jnp.float32)
    for (out, _), share in zip(parts, shares, strict=True):
        # An empty part's output is undefined and may be nan; zero times nan would spread it.
        merged += share * jnp.where(share > 0.0, out.astype(jnp.float32), 0.0)
    return merged.astype(parts[0][0].dtype), lse


def _check(parts: tuple[Part, ...]) -> None:
    if not parts:
        raise ValueError("merge_attention needs at least one part, got 0")
    first = parts[0][0]
    if first.ndim != 5:
        raise ValueError(f"parts[0] out must be [b, y, x, h, d], got shape {first.shape}")
    b, y, x, h, _ = first.shape
    for i, (out, lse) in enumerate(parts):
        if out.shape != first.shape:
            raise ValueError(f"parts[{i}] out has shape {out.shape}, parts[0] out {first.shape}")
        if out.dtype != first.dtype:
            raise ValueError(f"parts[{i}] out is {out.dtype}, parts[0] out is {first.dtype}")
        if lse.shape != (b, h, y, x):
            raise ValueError(f"parts[{i}] lse has shape {lse.shape}, its out needs {(b, h, y, x)}")
        if lse.dtype != jnp.float32:
            raise ValueError(f"parts[{i}] lse is {lse.dtype}, must be float32")
