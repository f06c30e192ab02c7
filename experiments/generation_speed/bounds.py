"""Seconds that each stage takes at least: what must be read and multiplied, at measured rates.

A step can be no faster than its bytes at the bandwidth, nor than its products at the matrix rate;
the larger of the two is its bound. Exponentials, noise, sampling and masked keys are not counted,
so nothing reaches it.
"""

import jax
import jax.numpy as jnp

from cogview2_jax.config import TransformerConfig
from cogview2_jax.training.metrics import matrix_rate
from experiments.generation_speed.workload import Sizes
from experiments.local_attention.bounds import Rates, best_seconds, measure_rates, visible_keys
from pallas_kernels.local_attention.window import Window

_ITEMSIZE = 4


def rates() -> Rates:
    """The highest of several: products of two square matrices; a copy, and a matrix read for one
    row's product.
    """
    found = measure_rates("float32")
    rows, columns = (16384, 2048) if jax.default_backend() == "cpu" else (2**16, 2**13)
    matrix = jnp.ones((rows, columns))
    read = best_seconds(jax.jit(lambda matrix: matrix @ matrix[0]), matrix)
    return Rates(max(found.flops, matrix_rate()), max(found.bytes, matrix.nbytes / read))


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


def bounds(sizes: Sizes, found: Rates) -> dict[str, float]:
    """Seconds of each of `report.STAGES`."""
    base, direct, iterative = sizes.coglm, sizes.direct, sizes.iterative
    config = base.transformer
    weights, width = config.num_layers * layer_weights(config), config.hidden_size
    table = sizes.image_tokens * width
    seconds = {}
    for batch in (1, 4, 16):
        slots = base.max_text + 1 + base.num_image_tokens
        read = bytes_a_token(config, sizes.image_tokens, slots, batch, _ITEMSIZE)
        flops = 2 * batch * (weights + table)
        step = max(read / found.bytes, flops / found.flops)
        prefill = 2 * batch * weights * (base.max_text + 1) / found.flops
        seconds[f"stage1_batch{batch}"] = base.num_image_tokens * step + prefill

    pair = 4 * config.num_layers * width  # of a query and a key that it sees, in all layers
    fine = direct.num_image_tokens
    seen = visible_keys(direct.grid, Window(*direct.window))
    seen += visible_keys(direct.grid, Window(*direct.cross_window, ratio=direct.ratio))
    seen += direct.num_prefix**2
    products = 2 * (weights * (direct.num_prefix + fine) + table * fine) + pair * seen
    seconds["direct"] = products / found.flops

    seen = visible_keys(iterative.grid, Window(*iterative.window))
    seen += (fine + iterative.text_slots) * iterative.text_slots
    products = 2 * (weights * (iterative.text_slots + fine) + table * fine) + pair * seen
    seconds["iterative"] = iterative.rounds * products / found.flops
    seconds["whole"] = seconds["stage1_batch1"] + seconds["direct"] + seconds["iterative"]
    return seconds
