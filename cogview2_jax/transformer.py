"""The sandwich-LayerNorm transformer that CogLM and both super-resolution networks share
(SwissArmyTransformer v0.2).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cogview2_jax.config import Precision, TransformerConfig

Array = jax.Array
_init = nn.initializers.normal(0.02)


def _layernorm(config: TransformerConfig, precision: Precision, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=config.layernorm_epsilon,
        dtype=precision.compute,
        param_dtype=precision.params,
        # Σ(x−μ)² rather than Σx² − μ²: the sandwich feeds it large activations.
        use_fast_variance=False,
        name=name,
    )


class MLP(nn.Module):
    config: TransformerConfig
    precision: Precision

    @nn.compact
    def __call__(self, x: Array) -> Array:
        e, f = self.config.hidden_size, self.config.mlp_ratio * self.config.hidden_size
        options = {
            "dtype": self.precision.compute,
            "param_dtype": self.precision.params,
            "kernel_init": _init,
        }
        x = nn.gelu(nn.Dense(f, name="dense_h_to_4h", **options)(x), approximate=True)
        return nn.Dense(e, name="dense_4h_to_h", **options)(x)


class Block(nn.Module):
    """LN → attention → LN → add; LN → MLP → LN → add."""

    config: TransformerConfig
    precision: Precision
    attention: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array, context: Any, cache: Any) -> tuple[Array, Any]:
        config, precision = self.config, self.precision
        out = _layernorm(config, precision, "input_layernorm")(x)
        attention = self.attention(config=config, precision=precision, name="attention")
        out, cache = attention(out, context, cache)
        x = x + _layernorm(config, precision, "third_layernorm")(out)
        out = _layernorm(config, precision, "post_attention_layernorm")(x)
        out = MLP(config, precision, name="mlp")(out)
        return x + _layernorm(config, precision, "fourth_layernorm")(out), cache


class Transformer(nn.Module):
    """Embeddings, the scanned stack and the tied output.

    Attributes:
        attention: makes the attention module of a layer, called with `config`, `precision` and
        `name`.
        position_tables: sizes of the position tables. Ids count through the first, then the second.
    """

    config: TransformerConfig
    attention: Callable[..., nn.Module]
    vocabulary_size: int
    position_tables: tuple[int, ...]
    precision: Precision = Precision()

    def setup(self) -> None:
        e, dtype = self.config.hidden_size, self.precision.params
        self.word_embeddings = self.param(
            "word_embeddings", _init, (self.vocabulary_size, e), dtype
        )
        names = ("position_embeddings", "extra_position_embeddings")
        self.positions = [
            self.param(name, _init, (size, e), dtype)
            for name, size in zip(names, self.position_tables, strict=False)
        ]
        scanned = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            out_axes=0,
            length=self.config.num_layers,
            unroll=self.config.unroll,
        )
        self.layers = scanned(self.config, self.precision, self.attention)
        self.final_layernorm = _layernorm(self.config, self.precision, "final_layernorm")

    def __call__(
        self, tokens: Array, positions: Array, context: Any, cache: Any
    ) -> tuple[Array, Any]:
        """Tokens int [b, s], positions int [b or 1, s] → hidden [b, s, e] after the final LN, and
        the cache.
        """
        table = jnp.concatenate(self.positions) if len(self.positions) > 1 else self.positions[0]
        x = self.word_embeddings[tokens] + table[positions]
        x, cache = self.layers(x.astype(self.precision.compute), context, cache)
        return self.final_layernorm(x), cache

    def logits(self, hidden: Array, start: int, stop: int) -> Array:
        """Hidden [..., e] → float32 logits [..., stop − start] of ids start…stop−1."""
        embeddings = self.word_embeddings[start:stop].astype(hidden.dtype)
        return jnp.einsum("...e,ve->...v", hidden, embeddings, preferred_element_type=jnp.float32)
