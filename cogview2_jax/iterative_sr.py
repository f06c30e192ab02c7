"""Iterative super-resolution: re-predict masked fine tokens from their neighbours and the text
(paper section 3.3).
"""

import functools

import jax
import jax.numpy as jnp

from cogview2_jax.attention import IterativeSRAttention, SuperResolutionContext
from cogview2_jax.config import IterativeSRConfig, Precision
from cogview2_jax.transformer import Transformer

Array = jax.Array
Params = dict


def network(config: IterativeSRConfig, precision: Precision = Precision()) -> Transformer:
    return Transformer(
        config.transformer,
        functools.partial(IterativeSRAttention, geometry=config),
        config.vocabulary.size,
        (config.num_positions, config.num_image_tokens),
        precision,
    )


def init_params(
    key: Array, config: IterativeSRConfig, precision: Precision = Precision()
) -> Params:
    tokens = jnp.zeros((1, config.text_slots + config.num_image_tokens), jnp.int32)
    context = SuperResolutionContext(jnp.ones((1, config.text_slots), bool))
    return network(config, precision).init(key, tokens, tokens, context, None)["params"]


def apply(
    params: Params,
    tokens: Array,
    positions: Array,
    mask: Array,
    *,
    config: IterativeSRConfig,
    precision: Precision = Precision(),
) -> Array:
    """Logits of every cell; position i predicts cell i.

    Args:
        tokens: int [b, text slots + cells]; cells to predict hold `<start_of_image>`.
        positions: int [b or 1, s]; cells count from `num_positions`.
        mask: bool [b or 1, text slots], which slots are words.

    Returns:
        float32 [b, cells, num_image].
    """
    model = network(config, precision)
    context = SuperResolutionContext(mask)
    hidden, _ = model.apply({"params": params}, tokens, positions, context, None)
    cells = hidden[:, config.text_slots :]
    return model.apply({"params": params}, cells, 0, config.vocabulary.num_image, method="logits")
