"""Direct super-resolution: all fine tokens from the coarse grid in one pass (section 3.3)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cogview2_jax.config import DirectSRConfig, Precision
from cogview2_jax.networks import transformer
from cogview2_jax.networks.attention import DirectSRAttention, SuperResolutionContext
from cogview2_jax.networks.inputs import NetworkInput
from cogview2_jax.networks.transformer import Transformer
from cogview2_jax.sharding import Execution, logical_axes

Array = jax.Array
Params = dict


def network(
    config: DirectSRConfig,
    execution: Execution = Execution(),
) -> Transformer:
    return Transformer(
        config.coglm.transformer,
        functools.partial(DirectSRAttention, geometry=config),
        config.coglm.vocabulary.size,
        (config.coglm.num_positions, config.num_image_tokens),
        execution,
    )


def init_params(key: Array, config: DirectSRConfig, precision: Precision = Precision()) -> Params:
    """Random parameters. `from_coglm` is the better start."""
    return nn.meta.unbox(_declare(key, config, precision))


def parameter_axes(config: DirectSRConfig) -> Any:
    """Logical axes of every parameter (see `sharding.RULES`), as a tree of tuples."""
    return logical_axes(lambda: _declare(jax.random.key(0), config, Precision()))


def _declare(key: Array, config: DirectSRConfig, precision: Precision) -> Any:
    length = config.num_prefix + config.num_image_tokens
    tokens = jnp.zeros((1, length), jnp.int32)
    context = SuperResolutionContext(jnp.ones((1, config.num_prefix, config.num_prefix), bool))
    return network(config, Execution(precision)).init(key, tokens, tokens, context, None)["params"]


def from_coglm(coglm_params: Params, config: DirectSRConfig) -> Params:
    """Parameters to start training from, made of a trained base model's.

    The second attention is a copy of the first. The fine cells' position table is the coarse one
    tiled (the whole coarse grid repeats), not up-sampled, as in the published code.
    """
    rows, columns = config.coglm.grid
    first = config.coglm.image_position
    table = coglm_params["position_embeddings"]
    coarse = table[first : first + rows * columns].reshape(rows, columns, -1)
    fine = jnp.tile(coarse, (config.ratio, config.ratio, 1))
    attention = coglm_params["layers"]["attention"]
    plus = {"qkv_plus": attention["qkv"], "dense_plus": attention["dense"]}
    layers = coglm_params["layers"] | {"attention": attention | plus}
    extra = {"extra_position_embeddings": fine.reshape(-1, table.shape[-1])}
    # Copies: no two leaves may share a buffer, or the tree could not be donated.
    return jax.tree.map(jnp.array, coglm_params | {"layers": layers} | extra)


def added_parameters(params: Params) -> Params:
    """Which parameters the base model does not have: a tree of bool shaped as `params`, the leaves
    of which may be anything, tuples of axes too.
    """
    new = ("qkv_plus", "dense_plus", "extra_position_embeddings")

    def one(path: Any, leaf: Any) -> bool:
        return any(key.key in new for key in path)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda leaf: type(leaf) is tuple)


def hidden_states(
    params: Params,
    inputs: NetworkInput,
    *,
    config: DirectSRConfig,
    execution: Execution = Execution(),
    dropout_key: Array | None = None,
) -> Array:
    """Hidden states of the fine cells after the last LayerNorm, [b, fine cells, e]. Arguments as
    `apply`.
    """
    model, context = network(config, execution), SuperResolutionContext(inputs.mask)
    hidden = transformer.hidden_states(model, params, inputs, context, dropout_key)
    return hidden[:, config.num_prefix :]


def apply(
    params: Params,
    inputs: NetworkInput,
    *,
    config: DirectSRConfig,
    execution: Execution = Execution(),
    dropout_key: Array | None = None,
) -> Array:
    """Logits of every fine cell.

    Args:
        inputs: from `inputs.direct_super_resolution`. Tokens int [b, text slots + coarse cells +
        fine cells], with `<start_of_image>` in the fine cells; positions int [b or 1, s], those of
        fine cells count from `num_positions`; mask bool [b or 1, p, p] of the p text slots and
        coarse cells.

    Returns:
        float32 [b, fine cells, num_image].
    """
    fine = hidden_states(
        params, inputs, config=config, execution=execution, dropout_key=dropout_key
    )
    model, stop = network(config, execution), config.coglm.vocabulary.num_image
    return model.apply({"params": params}, fine, 0, stop, method="logits")
