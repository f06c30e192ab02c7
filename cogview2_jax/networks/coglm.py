"""CogLM: text → image, infilling and captioning in one transformer (paper section 3.2)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cogview2_jax.config import CogLMConfig, Precision
from cogview2_jax.networks import transformer
from cogview2_jax.networks.attention import DenseAttention, DenseContext, KVCache
from cogview2_jax.networks.inputs import NetworkInput
from cogview2_jax.networks.products import few_rows
from cogview2_jax.networks.transformer import Transformer
from cogview2_jax.sharding import Execution, logical_axes

Array = jax.Array
Params = dict
Cache = tuple[KVCache, ...]  # one of each layer


def network(
    config: CogLMConfig,
    execution: Execution = Execution(),
) -> Transformer:
    return Transformer(
        config.transformer,
        DenseAttention,
        config.vocabulary.size,
        (config.num_positions,),
        execution,
    )


def init_params(key: Array, config: CogLMConfig, precision: Precision = Precision()) -> Params:
    return nn.meta.unbox(_declare(key, config, precision))


def parameter_axes(config: CogLMConfig) -> Any:
    """Logical axes of every parameter (see `sharding.RULES`), as a tree of tuples."""
    return logical_axes(lambda: _declare(jax.random.key(0), config, Precision()))


def _declare(key: Array, config: CogLMConfig, precision: Precision) -> Any:
    tokens = jnp.zeros((1, 1), jnp.int32)
    context = DenseContext(jnp.ones((1, 1, 1), bool), jnp.zeros((1, 1)))
    return network(config, Execution(precision)).init(key, tokens, tokens, context, None)["params"]


def hidden_states(
    params: Params,
    inputs: NetworkInput,
    *,
    config: CogLMConfig,
    bias: Array | None = None,
    execution: Execution = Execution(),
    dropout_key: Array | None = None,
) -> Array:
    """Hidden states after the last LayerNorm, [b, s, e]. Arguments as `apply`."""
    if bias is None:
        bias = jnp.zeros((1, inputs.tokens.shape[1]))
    model, context = network(config, execution), DenseContext(inputs.mask, bias)
    return transformer.hidden_states(model, params, inputs, context, dropout_key)


def logits(
    params: Params,
    hidden: Array,
    *,
    config: CogLMConfig,
    ids: tuple[int, int] | None = None,
    execution: Execution = Execution(),
) -> Array:
    """Hidden states [..., e] → float32 logits [..., v] of the ids in the half-open range `ids`
    (default: all).
    """
    start, stop = ids or (0, config.vocabulary.size)
    model = network(config, execution)
    outer = {"params": transformer.outer_params(params)}
    return model.apply(outer, hidden, start, stop, method="logits")


def apply(
    params: Params,
    inputs: NetworkInput,
    *,
    config: CogLMConfig,
    bias: Array | None = None,
    ids: tuple[int, int] | None = None,
    execution: Execution = Execution(),
    dropout_key: Array | None = None,
) -> Array:
    """One full pass.

    Args:
        inputs: tokens and positions int [b, s] (positions also [1, s]); mask bool [b or 1, s, t],
        True where query s sees key t.
        bias: float32 [b or 1, t], added to every score of a key (textual-attention up-weighting).
        ids: half-open range of ids to compute logits for (default: all); `(0, num_image)` are the
        image tokens.
        dropout_key: the key for `execution.training.dropout`; without one there is no dropout.

    Returns:
        float32 logits [b, s, v].
    """
    hidden = hidden_states(
        params,
        inputs,
        config=config,
        bias=bias,
        execution=execution,
        dropout_key=dropout_key,
    )
    return logits(params, hidden, config=config, ids=ids, execution=execution)


def unstacked(params: Params) -> Params:
    """Parameters as `extend` reads them without a copy: see `transformer.unstacked`."""
    return transformer.unstacked(params)


def init_cache(
    config: CogLMConfig, batch: int, length: int, execution: Execution = Execution()
) -> Cache:
    """Empty keys and values for `length` tokens, in the compute dtype, for each layer."""
    sizes = config.transformer
    shape = (batch, sizes.num_heads, length, sizes.head_dim)
    dtype = execution.precision.compute
    return tuple(
        KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(sizes.num_layers)
    )


def extend(
    params: Params,
    cache: Cache,
    inputs: NetworkInput,
    index: Array | int,
    *,
    config: CogLMConfig,
    bias: Array,
    execution: Execution = Execution(),
) -> tuple[Array, Cache]:
    """Run tokens [b, s] after those in the cache: hidden [b, s, e] and the updated cache.

    `inputs.mask` [b or 1, s, length] and `bias` [b or 1, length] span the whole cache. The new keys
    and values are written at slots `index` to `index + s − 1`, which must be in the cache: past its
    end `dynamic_update_slice` moves the start and overwrites earlier slots. `params` should be
    those of `unstacked`, made once: stacked ones are taken apart in every call.
    """
    context = DenseContext(inputs.mask, bias, index)
    model = network(config, execution)
    return transformer.by_layers(model, params, inputs.tokens, inputs.positions, context, cache)


def next_logits(hidden: Array, rows: Array, *, execution: Execution = Execution()) -> Array:
    """`logits` of hidden states [b, e] for `transformer.word_rows`: float32 [b, v]."""
    if execution.sharding is not None:
        return transformer.tied_logits(hidden, rows, execution.sharding)
    return few_rows(lambda hidden: transformer.tied_logits(hidden, rows, None), hidden)
