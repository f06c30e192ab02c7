"""The sandwich-LayerNorm transformer that CogLM and both super-resolution networks share
(SwissArmyTransformer v0.2).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cogview2_jax.config import Precision, TransformerConfig
from cogview2_jax.networks.inputs import NetworkInput
from cogview2_jax.networks.products import Dense
from cogview2_jax.sharding import Execution, Sharding, constrain

Array = jax.Array
Params = dict
_init = nn.initializers.normal(0.02)
_REMAT_POLICIES = {
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "all": jax.checkpoint_policies.nothing_saveable,
}


def _layernorm(config: TransformerConfig, precision: Precision, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=config.layernorm_epsilon,
        dtype=precision.compute,
        param_dtype=precision.params,
        # Σ(x−μ)² rather than Σx² − μ², which loses digits: activations are large here.
        use_fast_variance=False,
        name=name,
    )


class MLP(nn.Module):
    config: TransformerConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def dense(name: str, features: int, axes: tuple[str, str]) -> Dense:
            return Dense(features, axes, self.execution, name=name)

        e, f = self.config.hidden_size, self.config.mlp_ratio * self.config.hidden_size
        x = nn.gelu(dense("dense_h_to_4h", f, ("embed", "mlp"))(x), approximate=True)
        x = self.execution.constrain(x, "batch", None, "mlp")
        return dense("dense_4h_to_h", e, ("mlp", "embed"))(x)


class Block(nn.Module):
    """LN → attention → LN → add; LN → MLP → LN → add."""

    config: TransformerConfig
    execution: Execution
    attention: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array, context: Any, cache: Any) -> tuple[Array, Any]:
        config, execution, precision = self.config, self.execution, self.execution.precision
        dropout = nn.Dropout(execution.training.dropout, deterministic=not self.has_rng("dropout"))
        out = _layernorm(config, precision, "input_layernorm")(x)
        attention = self.attention(config=config, execution=execution, name="attention")
        out, cache = attention(out, context, cache)
        x = x + _layernorm(config, precision, "third_layernorm")(dropout(out))
        x = execution.constrain(x, "batch", None, None)
        out = _layernorm(config, precision, "post_attention_layernorm")(x)
        out = MLP(config, execution, name="mlp")(out)
        x = x + _layernorm(config, precision, "fourth_layernorm")(dropout(out))
        return execution.constrain(x, "batch", None, None), cache


class Transformer(nn.Module):
    """Embeddings, the scanned stack and the tied output.

    Attributes:
        attention: called with `config`, `execution` and `name`, returns a layer's attention module.
        position_tables: sizes of the position tables. Positions index their concatenation.
        execution: dropout is applied only in calls with an rng named "dropout".
    """

    config: TransformerConfig
    attention: Callable[..., nn.Module]
    vocabulary_size: int
    position_tables: tuple[int, ...]
    execution: Execution = Execution()

    def setup(self) -> None:
        e, dtype = self.config.hidden_size, self.execution.precision.params
        embeddings = nn.with_logical_partitioning(_init, (None, "packed_embed"))
        self.word_embeddings = self.param(
            "word_embeddings", embeddings, (self.vocabulary_size, e), dtype
        )
        names = ("position_embeddings", "extra_position_embeddings")
        self.positions = [
            self.param(name, _init, (size, e), dtype)
            for name, size in zip(names, self.position_tables, strict=False)
        ]
        policy = _REMAT_POLICIES.get(self.execution.training.remat)
        scanned = nn.scan(
            nn.remat(Block, policy=policy, prevent_cse=False) if policy else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0),
            out_axes=0,
            length=self.config.num_layers,
            unroll=self.config.unroll,
            metadata_params={nn.PARTITION_NAME: None},
        )
        self.layers = scanned(self.config, self.execution, self.attention)
        self.dropout = nn.Dropout(self.execution.training.dropout)
        self.final_layernorm = _layernorm(self.config, self.execution.precision, "final_layernorm")

    def __call__(
        self, tokens: Array, positions: Array, context: Any, cache: Any
    ) -> tuple[Array, Any]:
        """Tokens int [b, s], positions int [b or 1, s] → hidden states [b, s, e] after the final
        LayerNorm, and the updated cache.
        """
        x, cache = self.layers(self.embed(tokens, positions), context, cache)
        return self.final_layernorm(x), cache

    def embed(self, tokens: Array, positions: Array) -> Array:
        """What the first layer is given, [b, s, e]."""
        table = jnp.concatenate(self.positions) if len(self.positions) > 1 else self.positions[0]
        x = self._looked_up(tokens) + table[positions]
        x = self.dropout(x, deterministic=not self.has_rng("dropout"))
        x = x.astype(self.execution.precision.compute)
        return self.execution.constrain(x, "batch", None, None)

    def _looked_up(self, tokens: Array) -> Array:
        """Rows of the word table, [b, s, e].

        On a mesh the table is not gathered: each device looks up the tokens of every device that
        shares the table in its own column shard, and an all-to-all returns the rows.
        """
        if self.execution.sharding is None:
            return self.word_embeddings[tokens]
        tokens = self.execution.constrain(tokens, "replica", None)
        rows = self.word_embeddings[tokens]
        rows = self.execution.constrain(rows, "replica", None, "packed_embed")
        # One mesh axis after the other: for both at once, XLA would replicate the rows first.
        rows = self.execution.constrain(rows, "batch", None, "mlp")
        return self.execution.constrain(rows, "batch", None, None)

    def logits(self, hidden: Array, start: int, stop: int) -> Array:
        """Hidden states [..., e] → float32 logits [..., stop − start] of ids start to stop − 1."""
        if hidden.ndim == 3:
            hidden = self.execution.constrain(hidden, "batch", "tokens", None)
        return tied_logits(hidden, self.word_embeddings[start:stop], self.execution.sharding)


def unstacked(params: Params) -> Params:
    """Parameters with one tree for each layer, "layers" being a tuple, instead of one stack.

    For decoding: a program that reads one layer of a stack copies it first, at every token.
    Unstacked parameters are returned as they are.
    """
    layers = params["layers"]
    if isinstance(layers, tuple):
        return params
    number = jax.tree.leaves(layers)[0].shape[0]
    each = tuple(jax.tree.map(lambda leaf, n=n: leaf[n], layers) for n in range(number))
    return params | {"layers": each}


def outer_params(params: Params) -> Params:
    """The parameters outside the layers."""
    return {name: tree for name, tree in params.items() if name != "layers"}


def by_layers(
    model: Transformer,
    params: Params,
    tokens: Array,
    positions: Array,
    context: Any,
    caches: tuple[Any, ...] | None,
) -> tuple[Array, tuple[Any, ...]]:
    """As `Transformer.__call__`, over `unstacked` parameters and a cache for each layer, in a
    Python loop: each cache is an array of its own, which the compiler can update in place. Without
    caches it is one full pass.
    """
    params = unstacked(params)
    outer = {"params": outer_params(params)}
    x = model.apply(outer, tokens, positions, method="embed")
    execution = dataclasses.replace(model.execution, decoding=caches is not None)
    caches = (None,) * len(params["layers"]) if caches is None else caches
    block = Block(model.config, execution, model.attention)
    written = []
    for layer, cache in zip(params["layers"], caches, strict=True):
        x, cache = block.apply({"params": layer}, x, context, cache)
        written.append(cache)
    hidden = model.apply(outer, x, method=lambda module, x: module.final_layernorm(x))
    return hidden, tuple(written)


def hidden_states(
    model: Transformer,
    params: Any,
    inputs: NetworkInput,
    context: Any,
    dropout_key: Array | None = None,
) -> Array:
    """Hidden states [b, s, e] of one full pass, without a cache. Dropout only with a key, and only
    over stacked parameters, which training has.
    """
    if isinstance(params["layers"], tuple):
        return by_layers(model, params, inputs.tokens, inputs.positions, context, None)[0]
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    hidden, _ = model.apply(
        {"params": params}, inputs.tokens, inputs.positions, context, None, rngs=rngs
    )
    return hidden


def word_rows(params: Params, ids: tuple[int, int]) -> Array:
    """The rows of the word table of the half-open range `ids`, [v, e], for `tied_logits` in a loop.

    The barrier keeps the loop from slicing the table anew each time.
    """
    rows: Array = jax.lax.optimization_barrier(params["word_embeddings"][ids[0] : ids[1]])
    return rows


def tied_logits(hidden: Array, embeddings: Array, sharding: Sharding | None) -> Array:
    """Hidden states [..., e] times rows [v, e] of the word table: float32 [..., v]."""
    return _tied_logits(hidden, embeddings.astype(hidden.dtype), sharding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _tied_logits(hidden: Array, embeddings: Array, sharding: Sharding | None) -> Array:
    words = constrain(sharding, embeddings, None, None)
    return jnp.einsum("...e,ve->...v", hidden, words, preferred_element_type=jnp.float32)


def _tied_logits_forward(hidden: Array, embeddings: Array, sharding: Sharding | None) -> Any:
    return _tied_logits(hidden, embeddings, sharding), (hidden, embeddings)


def _tied_logits_backward(sharding: Sharding | None, kept: Any, gradient: Array) -> Any:
    hidden, embeddings = kept
    # The cast keeps the products, and the gathered table, in the dtype of the hidden states.
    gradient = gradient.astype(hidden.dtype)
    words = constrain(sharding, embeddings, None, None)
    by_hidden = jnp.einsum("...v,ve->...e", gradient, words)
    by_words = jnp.einsum("...v,...e->ve", gradient, hidden)
    return by_hidden, constrain(sharding, by_words, None, "packed_embed")


_tied_logits.defvjp(_tied_logits_forward, _tied_logits_backward)
