"""Decoding as lax loops: token by token over a cache, and in local parallel rounds.

Both loops take functions and know no model. Parameters, masks and random keys are in the functions
that the caller passes. Under jit, one compilation serves every prompt and seed of the same shapes.
"""

import operator
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
    """Draw `num_tokens` tokens, one after another.

    Args:
        step: (cache, token i int32 [b], i) → (logits [b, v] of token i + 1, cache).
        sample: (logits [b, v], i) → token i, int32 [b].
        logits: [b, v], of token 0, from the prefill.
        cache: any tree of arrays; `step` must keep its shapes.

    Returns:
        Tokens int32 [b, num_tokens], and the cache, which does not include the last token.
    """

    def body(carry: tuple[Array, Any], i: Array) -> tuple[tuple[Array, Any], Array]:
        # carry: the last token drawn, and the cache, which does not include it yet.
        tokens, cache = carry
        logits, cache = step(cache, tokens, i - 1)
        tokens = sample(logits, i)
        return (tokens, cache), tokens

    if operator.index(num_tokens) < 1:
        raise ValueError(f"num_tokens must be at least 1: got {num_tokens}")
    first = sample(logits, jnp.zeros((), jnp.int32))
    (_, cache), rest = jax.lax.scan(body, (first, cache), jnp.arange(1, num_tokens))
    return jnp.concatenate([first[:, None], rest.T], axis=1), cache


def lopar(
    predict: Callable[[Array], Any],
    sample: Callable[[Any, Array], Array],
    tokens: Array,
    reset: Array,
    mask_token: Array | int,
    rounds: tuple[Array | int, Array | int] | None = None,
) -> Array:
    """Local parallel auto-regression (paper section 3.3): re-predict masked cells in rounds.

    Args:
        predict: tokens int [b, cells], `mask_token` in masked cells → what `sample` takes, such as
        logits [b, cells, v].
        sample: (that, round) → tokens int32 [b, cells]; only those of the round's cells are kept.
        tokens: int32 [b, cells], before the first round.
        reset: bool [rounds, cells] or [rounds, b, cells], the cells that each round masks and
        writes.
        rounds: the first round to run and the one before which to stop; None: all.

    Returns:
        Tokens int32 [b, cells], after the last round.
    """
    reset = jnp.asarray(reset)  # a NumPy array cannot be indexed by the traced round
    if not reset.shape[0]:
        return tokens

    def body(round_: Array, tokens: Array) -> Array:
        predicted = predict(jnp.where(reset[round_], mask_token, tokens))
        return jnp.where(reset[round_], sample(predicted, round_), tokens)

    return jax.lax.fori_loop(*(rounds or (0, reset.shape[0])), body, tokens)
