"""Iterative super-resolution: re-predict masked fine tokens from their neighbours and the text
(paper section 3.3).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cogview2_jax.config import CogLMConfig, IterativeSRConfig, Precision
from cogview2_jax.networks import transformer
from cogview2_jax.networks.attention import IterativeSRAttention, SuperResolutionContext
from cogview2_jax.networks.inputs import NetworkInput
from cogview2_jax.networks.transformer import Transformer
from cogview2_jax.sharding import Execution, logical_axes

Array = jax.Array
Params = dict


def network(
    config: IterativeSRConfig,
    execution: Execution = Execution(),
) -> Transformer:
    return Transformer(
        config.transformer,
        functools.partial(IterativeSRAttention, geometry=config),
        config.vocabulary.size,
        (config.num_positions, config.num_image_tokens),
        execution,
    )


def init_params(
    key: Array, config: IterativeSRConfig, precision: Precision = Precision()
) -> Params:
    return nn.meta.unbox(_declare(key, config, precision))


def parameter_axes(config: IterativeSRConfig) -> Any:
    """Logical axes of every parameter (see `sharding.RULES`), as a tree of tuples."""
    return logical_axes(lambda: _declare(jax.random.key(0), config, Precision()))


def _declare(key: Array, config: IterativeSRConfig, precision: Precision) -> Any:
    tokens = jnp.zeros((1, config.text_slots + config.num_image_tokens), jnp.int32)
    context = SuperResolutionContext(jnp.ones((1, config.text_slots), bool))
    return network(config, Execution(precision)).init(key, tokens, tokens, context, None)["params"]


def from_coglm(coglm_params: Params, coglm: CogLMConfig, config: IterativeSRConfig) -> Params:
    """Parameters to start training from, made of a trained base model's: its first layers, and the
    positions of its cells up-sampled.

    The released code does not train this network. Its weights have the base model's names and
    sizes, which suggests this start. Positions are up-sampled, not tiled as for direct
    super-resolution, because words such as "left" refer to places in the picture.

    Raises ValueError if this network has more layers or positions than the base model, other
    widths, or a grid that is not a multiple of the base model's.
    """
    ours, theirs = config.transformer, coglm.transformer
    layers = ours.num_layers
    if layers > theirs.num_layers or ours != dataclasses.replace(
        theirs, num_layers=layers, unroll=ours.unroll
    ):
        raise ValueError(f"transformer must be the first layers of {theirs}: got {ours}")
    if config.num_positions > coglm.num_positions:
        raise ValueError(
            f"num_positions must be at most {coglm.num_positions}: got {config.num_positions}"
        )
    table = coglm_params["position_embeddings"]
    (rows, columns), (fine_rows, fine_columns) = coglm.grid, config.grid
    if fine_rows % rows or fine_columns % columns:
        raise ValueError(f"grid must be a multiple of {coglm.grid}: got {config.grid}")
    begin = coglm.image_position
    cells = table[begin : begin + rows * columns].reshape(rows, columns, -1)
    cells = cells.repeat(fine_rows // rows, axis=0).repeat(fine_columns // columns, axis=1)
    made = coglm_params | {
        "layers": jax.tree.map(lambda leaf: leaf[:layers], coglm_params["layers"]),
        "position_embeddings": table[: config.num_positions],
        "extra_position_embeddings": cells.reshape(-1, table.shape[-1]),
    }
    # Copies: no two leaves may share a buffer, or the tree could not be donated.
    return jax.tree.map(jnp.array, made)


def hidden_states(
    params: Params,
    inputs: NetworkInput,
    *,
    config: IterativeSRConfig,
    execution: Execution = Execution(),
    dropout_key: Array | None = None,
) -> Array:
    """Hidden states of the cells after the last LayerNorm, [b, cells, e]. Arguments as `apply`."""
    model, context = network(config, execution), SuperResolutionContext(inputs.mask)
    hidden = transformer.hidden_states(model, params, inputs, context, dropout_key)
    return hidden[:, config.text_slots :]


def apply(
    params: Params,
    inputs: NetworkInput,
    *,
    config: IterativeSRConfig,
    execution: Execution = Execution(),
    dropout_key: Array | None = None,
) -> Array:
    """Logits of every cell; position i predicts cell i.

    Args:
        inputs: from `inputs.iterative_super_resolution`. Tokens int [b, text slots + cells], with
        `<start_of_image>` in the cells to predict; positions int [b or 1, s], those of cells count
        from `num_positions`; mask bool [b or 1, text slots], True at words.

    Returns:
        float32 [b, cells, num_image].
    """
    cells = hidden_states(
        params, inputs, config=config, execution=execution, dropout_key=dropout_key
    )
    model, stop = network(config, execution), config.vocabulary.num_image
    return model.apply({"params": params}, cells, 0, stop, method="logits")
