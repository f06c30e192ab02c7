"""Pixels ↔ image tokens, as pure functions over the parameters of the hierarchical VQ-VAE."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cogview2_jax.config import Grid, HVQVAEConfig, Precision
from cogview2_jax.sharding import Execution
from cogview2_jax.tokenizer.hvqvae import HVQVAE

Array = jax.Array
Params = dict


def init_params(key: Array, config: HVQVAEConfig, precision: Precision = Precision()) -> Params:
    """Random parameters. The codebook is standard normal until training initialises it from data
    (`training/codebook.py`).
    """
    side = 2 * config.strides[-1]
    images = jnp.zeros((1, side, side, 3))
    return HVQVAE(config, precision).init(key, images)["params"]


def used_by(params: Params, strides: Sequence[int], config: HVQVAEConfig) -> Params:
    """Which parameters encoding and decoding at `strides` use: a tree of bool shaped as `params`
    (arrays or their shapes).

    Raises ValueError for a stride that the tokenizer does not have.
    """
    last = max((_level(stride, config) for stride in strides), default=-1)
    decoders = {f"decoder_{stride}" for stride in strides}
    downsamplers = {f"downsamplers_{level}" for level in range(last)}

    def used(name: str) -> bool:
        if name.startswith("decoder_"):
            return name in decoders
        if name.startswith("downsamplers_"):
            return name in downsamplers
        return bool(strides)

    return {
        name: jax.tree.map(lambda leaf, on=used(name): on, tree) for name, tree in params.items()
    }


def nearest_code(vectors: Array, codebook: Array) -> Array:
    """Id of the codebook entry at the least squared distance: [..., d], [v, d] → int32 [...]."""
    # ‖x − c‖² = ‖x‖² − 2x·c + ‖c‖², and ‖x‖² is the same for every c.
    # HIGHEST: with a GPU's default precision, rounded products would change ids that nearly tie.
    products = jnp.einsum("...d,vd->...v", vectors, codebook, precision=jax.lax.Precision.HIGHEST)
    scores = jnp.sum(codebook**2, axis=-1) - 2 * products
    return jnp.argmin(scores, axis=-1).astype(jnp.int32)


def _level(stride: int, config: HVQVAEConfig) -> int:
    if stride not in config.strides:
        raise ValueError(f"stride must be one of {config.strides}: got {stride}")
    return config.strides.index(stride)


def encode(
    params: Params,
    images: Array,
    stride: int,
    *,
    config: HVQVAEConfig,
    execution: Execution = Execution(),
) -> Array:
    """Pictures float [b, y, x, 3] in [0, 1] → ids int32 [b, y/stride, x/stride].

    Raises ValueError for a stride that the tokenizer does not have and for picture sides that are
    not multiples of the stride.
    """
    level = _level(stride, config)
    if images.shape[1] % stride or images.shape[2] % stride:
        raise ValueError(
            f"picture sides must be multiples of stride {stride}: got {images.shape[1:3]}"
        )
    images = execution.constrain(images, "batch", None, None, None)
    model = HVQVAE(config, execution.precision)
    vectors = model.apply({"params": params}, images, method="vectors")[level]
    return nearest_code(vectors.astype(jnp.float32), params["codebook"].astype(jnp.float32))


def decode(
    params: Params,
    ids: Array,
    stride: int,
    *,
    config: HVQVAEConfig,
    execution: Execution = Execution(),
) -> Array:
    """Ids int [b, y, x] → pictures float32 [b, stride·y, stride·x, 3], nominally in [0, 1], not
    clipped.

    Raises ValueError for a stride that the tokenizer does not have.
    """
    _level(stride, config)
    ids = execution.constrain(ids, "batch", None, None)
    vectors = params["codebook"][ids]
    model = HVQVAE(config, execution.precision)
    return model.apply({"params": params}, vectors, stride, method="reconstruct")


@functools.partial(jax.jit, static_argnames=("grid", "stride", "config", "execution"))
def to_pixels(
    params: Params,
    ids: Array,
    *,
    grid: Grid,
    stride: int,
    config: HVQVAEConfig,
    execution: Execution = Execution(),
) -> Array:
    """Image tokens int32 [b, cells] of a `grid` → pictures uint8 [b, stride·y, stride·x, 3]."""
    ids = ids.reshape(-1, *grid)
    pictures = decode(params, ids, stride, config=config, execution=execution)
    return jnp.round(jnp.clip(pictures, 0, 1) * 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames=("stride", "config", "execution"))
def to_tokens(
    params: Params,
    pictures: Array,
    *,
    stride: int,
    config: HVQVAEConfig,
    execution: Execution = Execution(),
) -> Array:
    """Pictures uint8 [b, y, x, 3] → image tokens int32 [b, cells], raster order."""
    pixels = pictures.astype(jnp.float32) / 255
    ids = encode(params, pixels, stride, config=config, execution=execution)
    return ids.reshape(ids.shape[0], -1)
