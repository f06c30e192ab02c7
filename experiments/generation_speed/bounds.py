"""Seconds that each stage takes at least: what must be read and multiplied, at measured rates.

A step can be no faster than its bytes at the bandwidth, nor than its products at the matrix rate;
the larger of the two is its bound. Exponentials, noise, sampling and masked keys are not counted,
so nothing reaches it.
"""

import math

import jax
import jax.numpy as jnp

from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    IterativeSRConfig,
    TransformerConfig,
)
from cogview2_jax.training.metrics import matrix_rate
from experiments.generation_speed.workload import Sizes
from experiments.local_attention.bounds import Rates, best_seconds, measure_rates, visible_keys
from pallas_kernels.local_attention.window import Window

_ITEMSIZE = 4


def rates(dtype: str = "float32") -> Rates:
    """The highest of several: products of two square matrices; a copy, and a matrix read for one
    row's product.
    """
    found = measure_rates(dtype)
    rows, columns = (16384, 2048) if jax.default_backend() == "cpu" else (2**16, 2**13)
    matrix = jnp.ones((rows, columns))
    read = best_seconds(jax.jit(lambda matrix: matrix @ matrix[0]), matrix)
    flops = max(found.flops, matrix_rate()) if dtype == "float32" else found.flops
    return Rates(flops, max(found.bytes, matrix.nbytes / read))


def layer_weights(config: TransformerConfig) -> int:
    """Weights of the matrices of one layer."""
    return (4 + 2 * config.mlp_ratio) * config.hidden_size**2


def bytes_a_token(
    config: TransformerConfig, image_tokens: int, slots: int, batch: int, itemsize: int
) -> int:
    """What one step of cached decoding must read: matrices, the image rows of the word table, and
    the cache of `slots` tokens once.
    """
    weights = config.num_layers * layer_weights(config) + image_tokens * config.hidden_size
    cache = 2 * batch * config.num_layers * slots * config.hidden_size
    return itemsize * (weights + cache)


def base_seconds(config: CogLMConfig, batch: int, found: Rates, itemsize: int) -> float:
    """Of the base stage: the prefill, then a step for each cell."""
    sizes = config.transformer
    weights = sizes.num_layers * layer_weights(sizes)
    table = config.vocabulary.num_image * sizes.hidden_size
    slots = config.max_text + 1 + config.num_image_tokens
    read = bytes_a_token(sizes, config.vocabulary.num_image, slots, batch, itemsize)
    step = max(read / found.bytes, 2 * batch * (weights + table) / found.flops)
    prefill = 2 * batch * weights * (config.max_text + 1) / found.flops
    return config.num_image_tokens * step + prefill


def direct_flops(config: DirectSRConfig) -> float:
    """Of direct super-resolution of one picture."""
    seen = visible_keys(config.grid, Window(*config.window))
    seen += visible_keys(config.grid, Window(*config.cross_window, ratio=config.ratio))
    seen += config.num_prefix**2
    return _flops(config.coglm, config.num_prefix, config.num_image_tokens, seen)


def iterative_flops(config: IterativeSRConfig) -> float:
    """Of all rounds of one picture."""
    fine = math.prod(config.grid)
    seen = visible_keys(config.grid, Window(*config.window))
    seen += (fine + config.text_slots) * config.text_slots
    return config.rounds * _flops(config, config.text_slots, fine, seen)


def _flops(config: CogLMConfig | IterativeSRConfig, prefix: int, fine: int, seen: int) -> float:
    """Of one pass over a prefix and fine cells, with `seen` pairs of a query and a key."""
    sizes = config.transformer
    weights = sizes.num_layers * layer_weights(sizes)
    table = config.vocabulary.num_image * sizes.hidden_size
    pair = 4 * sizes.num_layers * sizes.hidden_size
    return 2 * (weights * (prefix + fine) + table * fine) + pair * seen


def bounds(sizes: Sizes, found: Rates) -> dict[str, float]:
    """Seconds of each of `report.STAGES`."""
    seconds = {
        f"stage1_batch{batch}": base_seconds(sizes.coglm, batch, found, _ITEMSIZE)
        for batch in (1, 4, 16)
    }
    seconds["direct"] = direct_flops(sizes.direct) / found.flops
    seconds["iterative"] = iterative_flops(sizes.iterative) / found.flops
    seconds["whole"] = seconds["stage1_batch1"] + seconds["direct"] + seconds["iterative"]
    return seconds
