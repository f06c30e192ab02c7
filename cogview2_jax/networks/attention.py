"""The attention of each network: dense (with or without a cache), direct SR's and iterative SR's.

The three networks differ only in these classes; `transformer.Block` is what they share. Each is
called as `(x [b, s, e], context, cache) → (out [b, s, e], cache)`. Scores are q·k/√d plus an
additive term. Where the mask is False they are −10000, as in the published code, so a query without
any visible key averages all values.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from cogview2_jax.config import (
    DirectSRConfig,
    Grid,
    IterativeSRConfig,
    TransformerConfig,
)
from cogview2_jax.networks.products import Dense, product, scale_of
from cogview2_jax.sharding import Execution, Sharding
from pallas_kernels import local_attention_2d_with_lse, merge_attention

Array = jax.Array
MASKED_SCORE = -10000.0
_init = nn.initializers.normal(0.02)


class KVCache(NamedTuple):
    """Keys and values of one layer, [b, h, t, d]: contiguous for each head, as they are read."""

    keys: Array
    values: Array


class DenseContext(NamedTuple):
    """`mask` bool [b or 1, s, t], True where query s sees key t; `bias` float32 [b or 1, t], added
    to every score of a key.

    `start` is the cache slot of the first new key (a scalar, unused without a cache).
    """

    mask: Array
    bias: Array
    start: Array | int = 0


class SuperResolutionContext(NamedTuple):
    """Direct SR: `mask` bool [b or 1, p, p] of the p text slots and coarse cells, which attend
    densely. Iterative SR: `mask` bool [b or 1, text slots], True at words.
    """

    mask: Array


class PackedDense(nn.Module):
    """One matrix [e, 3·e] with the output [Q | K | V], each split into heads: [b, s, 3, h, d].

    On a mesh the matrix is sharded along its input, because shards along [Q | K | V] would not
    follow the heads. It is resharded by heads where it is used.
    """

    config: TransformerConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: Array) -> Array:
        e, heads = self.config.hidden_size, self.config.num_heads
        precision = self.execution.precision
        init = nn.with_logical_partitioning(_init, ("packed_embed", None))
        kernel = self.param("kernel", init, (e, 3 * e), precision.params)
        bias = self.param("bias", nn.initializers.zeros, (3 * e,), precision.params)
        if self.execution.sharding is None:
            out = product(x, kernel, self.execution, scale_of(self))
            out = out + bias.astype(precision.compute)
            return out.reshape(*x.shape[:-1], 3, heads, -1)
        kernel, bias = (
            weight.astype(precision.compute).reshape(*weight.shape[:-1], 3, heads, -1)
            for weight in (kernel, bias)
        )
        # Two steps with one collective each: an all-to-all, then an all-gather.
        kernel = self.execution.constrain(kernel, "embed", None, "heads", None)
        kernel = self.execution.constrain(kernel, None, None, "heads", None)
        out = jnp.einsum("bse,ethd->bsthd", x.astype(precision.compute), kernel) + bias
        return self.execution.constrain(out, "batch", None, None, "heads", None)


class QKV(nn.Module):
    """Queries, keys and values, each [b, s, h, d]."""

    config: TransformerConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array, Array]:
        packed = PackedDense(self.config, self.execution, name="query_key_value")
        q, k, v = jnp.moveaxis(packed(x), 2, 0)
        return q, k, v


def output_projection(config: TransformerConfig, execution: Execution, name: str) -> Dense:
    return Dense(config.hidden_size, ("heads", "embed"), execution, name=name)


def local_attention_with_lse(
    q: Array, k: Array, v: Array, *, window: Grid, sharding: Sharding | None
) -> tuple[Array, Array]:
    """`local_attention_2d_with_lse`, on a mesh with `shard_map` over samples and heads, because the
    compiler cannot partition a kernel.
    """
    attend = functools.partial(local_attention_2d_with_lse, window=window)
    if sharding is None:
        return attend(q, k, v)
    cells = sharding.spec("batch", None, None, "heads", None)
    lse = sharding.spec("batch", "heads", None, None)
    return jax.shard_map(
        attend, mesh=sharding.mesh, in_specs=cells, out_specs=(cells, lse), check_vma=False
    )(q, k, v)


def dense_attention(q: Array, k: Array, v: Array, mask: Array, bias: Array | None = None) -> Array:
    """Softmax attention of queries [b, s, h, d] over keys and values [b, t, h, d] → [b, s, h, d].

    `mask` bool [b or 1, s, t]; `bias` float32 [b or 1, t], added to every score of a key.
    """
    products = jnp.einsum("bshd,bthd->bhst", q, k, preferred_element_type=jnp.float32)
    weights = _weights(products, q.shape[-1], mask, bias).astype(v.dtype)
    return jnp.einsum("bhst,bthd->bshd", weights, v)


def cached_attention(q: Array, cache: KVCache, mask: Array, bias: Array) -> Array:
    """`dense_attention` of queries [b, s, h, d] over a cache [b, h, t, d]."""
    if q.shape[:2] != (1, 1):
        return _cached_attention(q, cache, mask, bias)
    return jax.lax.platform_dependent(
        q, cache, mask, bias, cpu=_attention_of_one, default=_cached_attention
    )


def _attention_of_one(q: Array, cache: KVCache, mask: Array, bias: Array) -> Array:
    """Of one query [1, 1, h, d], as sums over the cache: on a CPU four times as fast as a product
    with one row.
    """
    q = q[0, 0, :, None].astype(jnp.float32)
    products = jnp.sum(q * cache.keys[0], axis=-1)[None, :, None]
    weights = _weights(products, q.shape[-1], mask, bias).astype(cache.values.dtype)
    out = jnp.sum(weights[0, :, 0, :, None] * cache.values[0], axis=1, dtype=jnp.float32)
    return out.astype(cache.values.dtype)[None, None]


def _cached_attention(q: Array, cache: KVCache, mask: Array, bias: Array) -> Array:
    products = jnp.einsum("bshd,bhtd->bhst", q, cache.keys, preferred_element_type=jnp.float32)
    weights = _weights(products, q.shape[-1], mask, bias).astype(cache.values.dtype)
    return jnp.einsum("bhst,bhtd->bshd", weights, cache.values)


def _weights(products: Array, dim: int, mask: Array, bias: Array | None) -> Array:
    """Softmax over the keys of the products q·k, [b, h, s, t]."""
    scores = products * dim**-0.5
    if bias is not None:
        scores = scores + bias[:, None, None, :]
    return nn.softmax(jnp.where(mask[:, None], scores, MASKED_SCORE))


def _written(cache: KVCache, k: Array, v: Array, start: Array | int) -> KVCache:
    """The cache with keys and values [b, s, h, d] written from slot `start` on."""

    def one(old: Array, new: Array) -> Array:
        new = jnp.swapaxes(new, 1, 2).astype(old.dtype)
        return jax.lax.dynamic_update_slice(old, new, (0, 0, start, 0))

    return KVCache(one(cache.keys, k), one(cache.values, v))


def dense_attention_with_lse(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array]:
    """As `dense_attention`, with the log-sum-exp of the scores: out [b, s, h, d], lse float32
    [b, h, s]. `mask` bool [b or 1, t] is the same for every query.

    Masked keys have weight 0, not a score of −10000, so that the result can be merged with
    attention over other keys. A row without any key has out 0 and lse −inf.
    """
    scores = jnp.einsum("bshd,bthd->bhst", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * q.shape[-1] ** -0.5, -jnp.inf)
    lse = nn.logsumexp(scores, axis=-1)
    shift = jnp.where(jnp.isneginf(lse), 0.0, lse)
    weights = jnp.exp(scores - shift[..., None]).astype(v.dtype)
    return jnp.einsum("bhst,bthd->bshd", weights, v), lse


class DenseAttention(nn.Module):
    """CogLM's attention. With a cache, the new keys and values are written from slot
    `context.start` on, and the queries attend to the whole cache.
    """

    config: TransformerConfig
    execution: Execution

    @nn.compact
    def __call__(
        self, x: Array, context: DenseContext, cache: KVCache | None
    ) -> tuple[Array, KVCache | None]:
        q, k, v = QKV(self.config, self.execution, name="qkv")(x)
        if cache is None:
            out = dense_attention(q, k, v, context.mask, context.bias)
        else:
            cache = _written(cache, k, v, context.start)
            out = cached_attention(q, cache, context.mask, context.bias)
        out = rearrange(out, "b s h d -> b s (h d)")
        return output_projection(self.config, self.execution, "dense")(out), cache


class DirectSRAttention(nn.Module):
    """Text and coarse cells attend densely, with the base model's matrices; fine cells attend
    locally, with a second set.

    A fine query attends, in one softmax, to a window of coarse keys around its parent cell (keys of
    the base model's matrices) and to a window of fine keys around itself (published
    `dsr_model.py`).
    """

    config: TransformerConfig
    execution: Execution
    geometry: DirectSRConfig

    @nn.compact
    def __call__(
        self, x: Array, context: SuperResolutionContext, cache: None
    ) -> tuple[Array, None]:
        geometry = self.geometry
        prefix, fine = jnp.split(x, [geometry.num_prefix], axis=1)
        q0, k0, v0 = QKV(self.config, self.execution, name="qkv")(prefix)
        q1, k1, v1 = QKV(self.config, self.execution, name="qkv_plus")(fine)
        dense = dense_attention(q0, k0, v0, context.mask)

        rows, columns = geometry.coglm.grid
        k0, v0 = (
            rearrange(t[:, geometry.text_slots :], "b (y x) h d -> b y x h d", y=rows, x=columns)
            for t in (k0, v0)
        )
        q1, k1, v1 = (
            rearrange(t, "b (y x) h d -> b y x h d", y=geometry.grid[0]) for t in (q1, k1, v1)
        )
        attend = functools.partial(local_attention_with_lse, q1, sharding=self.execution.sharding)
        local = merge_attention(
            attend(k1, v1, window=geometry.window), attend(k0, v0, window=geometry.cross_window)
        )
        dense = rearrange(dense, "b s h d -> b s (h d)")
        local = rearrange(local, "b y x h d -> b (y x) (h d)")
        out = [
            output_projection(self.config, self.execution, "dense")(dense),
            output_projection(self.config, self.execution, "dense_plus")(local),
        ]
        return jnp.concatenate(out, axis=1), None


class IterativeSRAttention(nn.Module):
    """Text attends to text; an image cell attends, in one softmax, to all words and to a window of
    cells around itself.
    """

    config: TransformerConfig
    execution: Execution
    geometry: IterativeSRConfig

    @nn.compact
    def __call__(
        self, x: Array, context: SuperResolutionContext, cache: None
    ) -> tuple[Array, None]:
        slots = self.geometry.text_slots
        q, k, v = QKV(self.config, self.execution, name="qkv")(x)
        text_k, text_v = k[:, :slots], v[:, :slots]
        text = dense_attention(q[:, :slots], text_k, text_v, context.mask[:, None])
        out, lse = dense_attention_with_lse(q[:, slots:], text_k, text_v, context.mask)
        rows = self.geometry.grid[0]
        cells = tuple(
            rearrange(t[:, slots:], "b (y x) h d -> b y x h d", y=rows) for t in (q, k, v)
        )
        image = merge_attention(
            local_attention_with_lse(
                *cells, window=self.geometry.window, sharding=self.execution.sharding
            ),
            (
                rearrange(out, "b (y x) h d -> b y x h d", y=rows),
                rearrange(lse, "b h (y x) -> b h y x", y=rows),
            ),
        )
        text = rearrange(text, "b s h d -> b s (h d)")
        image = rearrange(image, "b y x h d -> b (y x) (h d)")
        out = jnp.concatenate([text, image], axis=1)
        return output_projection(self.config, self.execution, "dense")(out), None
