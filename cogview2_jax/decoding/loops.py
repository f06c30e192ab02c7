"""Decoding as lax loops: token by token over a cache, and in local-parallel rounds. Knows no model.

Both loops take functions. What these close over (parameters, masks, keys) is the caller's; one
compilation serves every prompt and seed as long as the shapes stay.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def decode(
    step: Callable[[Any, Array, Array], tuple[Array, Any]],
    sample: Callable[[Array, Array], Array],
    logits: Array,
    cache: Any,
    num_tokens: int,
) -> tuple[Array, Any]:
    """Draw `num_tokens` tokens one after another.

    Args:
        step: (cache, tokens int32 [b], i) → (logits [b, v] for token i + 1, cache), where `tokens`
        is token i.
        sample: (logits [b, v], i) → token i, int32 [b].
        logits: [b, v] for token 0, from the prefill.
        cache: whatever `step` keeps; its shapes must not change.

    Returns:
        Tokens int32 [b, num_tokens] and the cache after all but the last of them.
    """

    def body(carry: tuple[Array, Any], i: Array) -> tuple[tuple[Array, Any], Array]:
        # carry: the last token drawn, and the cache without it.
        tokens, cache = carry
        logits, cache = step(cache, tokens, i - 1)
        tokens = sample(logits, i)
        return (tokens, cache), tokens

    first = sample(logits, jnp.zeros((), jnp.int32))
    (_, cache), rest = jax.lax.scan(body, (first, cache), jnp.arange(1, num_tokens))
    return jnp.concatenate([first[:, None], rest.T], axis=1), cache


def lopar(
    predict: Callable[[Array], Array],
    sample: Callable[[Array, Array], Array],
    tokens: Array,
    reset: Array,
    mask_token: Array | int,
) -> Array:
    """Local parallel auto-regression: re-predict masked cells of a grid, in rounds (paper section
    3.3).

    Args:
        predict: tokens int [b, cells], masked cells holding `mask_token` → logits [b, cells, v].
        sample: (logits [b, cells, v], round) → tokens int32 [b, cells].
        tokens: int32 [b, cells], the start.
        reset: bool [rounds, cells] (or [rounds, b, cells]): cells that each round masks, predicts
        and writes.

    Returns:
        Tokens int32 [b, cells] after the last round.
    """
    reset = jnp.asarray(reset)  # NumPy could not be indexed by the loop's counter

    def body(round_: Array, tokens: Array) -> Array:
        logits = predict(jnp.where(reset[round_], mask_token, tokens))
        return jnp.where(reset[round_], sample(logits, round_), tokens)

    return jax.lax.fori_loop(0, reset.shape[0], body, tokens)
