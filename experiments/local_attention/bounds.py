"""Lower bounds for the time of local attention: counted work over measured rates."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.local_attention.window import Window

# Forward reads q, k, v and writes out; backward reads those four and a cotangent, writes three.
_PRODUCTS = {"forward": 2, "forward+backward": 6}  # each 2 * d operations a visible key
_QUERY_ARRAYS = {"forward": 2, "forward+backward": 6}
_KEY_ARRAYS = {"forward": 2, "forward+backward": 6}


@dataclass(frozen=True)
class Rates:
    """Operations and bytes a second, measured on the device."""

    flops: float
    bytes: float


class Floors(NamedTuple):
    """Seconds that every implementation needs at least. Exponentials and masked keys are not
    counted, so no implementation reaches the products' floor."""

    traffic: float  # each array touched once
    products: float  # of visible pairs only


def measure_rates(dtype: str) -> Rates:
    """The best of twenty square matrix products and of twenty copies (read and write counted)."""
    on_cpu = jax.default_backend() == "cpu"
    side, length = (1536, 2**25) if on_cpu else (8192, 2**29)
    # Random numbers: of ones, a GPU multiplies more in a second.
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.float32).astype(dtype)
    b = jnp.ones((length,), jnp.float32)
    return Rates(
        flops=2 * side**3 / best_seconds(jax.jit(lambda a: a @ a), a),
        bytes=2 * b.nbytes / best_seconds(jax.jit(lambda b: b + 1), b),
    )


def visible_keys(grid: tuple[int, int], window: Window) -> int:
    """Pairs of a query and a key in its window and in the grid, for windows that are not causal."""
    pairs = 1
    for side, radius in zip(grid, window.radius, strict=True):
        parent, last = np.arange(side) // window.ratio, side // window.ratio - 1
        pairs *= int((np.minimum(parent + radius, last) - np.maximum(parent - radius, 0) + 1).sum())
    return pairs


def floors(
    grid: tuple[int, int],
    window: Window,
    *,
    batch: int,
    heads: int,
    dim: int,
    itemsize: int,
    direction: str,
    rates: Rates,
) -> Floors:
    """Seconds that the traffic and the products of an attention take at the measured rates."""
    queries, keys = grid[0] * grid[1], grid[0] * grid[1] // window.ratio**2
    arrays = _QUERY_ARRAYS[direction] * queries + _KEY_ARRAYS[direction] * keys
    flops = _PRODUCTS[direction] * 2 * dim * batch * heads * visible_keys(grid, window)
    return Floors(
        traffic=arrays * batch * heads * dim * itemsize / rates.bytes,
        products=flops / rates.flops,
    )


def best_seconds(function: Callable[[jax.Array], jax.Array], argument: jax.Array) -> float:
    """Seconds of a call, the best of twenty; on a GPU of five calls in flight."""
    calls = 1 if jax.default_backend() == "cpu" else 5
    jax.block_until_ready(function(argument))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready([function(argument) for _ in range(calls)])
        times.append((time.perf_counter() - start) / calls)
    return min(times)
