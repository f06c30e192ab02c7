"""The public functions: check the inputs, choose an implementation, run it."""

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.local_attention import pallas_triton, reference, xla
from pallas_kernels.local_attention.acceptance import Kind, Record, is_accepted, shipped_records
from pallas_kernels.local_attention.devices import default_device
from pallas_kernels.local_attention.window import Window

# Every implementation has one signature: (q, k, v, *, window: Window, scale) -> (out, lse).
_IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "reference": reference.local_attention,
    "xla": xla.local_attention,
    "pallas_triton": pallas_triton.local_attention,
    "pallas_triton_interpret": functools.partial(pallas_triton.local_attention, interpret=True),
}
_DTYPES = ("float32", "bfloat16", "float16")


def local_attention_2d(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: tuple[int, int],
    causal: bool = False,
    scale: float | jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Attention of each query to the keys in a window of the grid, centred on the query.

    q is [b, y, x, h, d]; k and v are [b, key y, key x, h, d], on the same grid or on one that is
    coarser by a whole ratio, the same along both axes. `window` is (rows, columns) of key cells,
    both odd, centred on the query's parent cell; cells outside the grid are left out. `causal`
    keeps the first floor(rows * columns / 2) + 1 cells of the window in raster order and needs
    equal grids. Scores are multiplied by `scale`, 1 / sqrt(d) by default. A scale may be a traced
    array [], also a learned one.

    `implementation` is one of

    - "xla": tiles with a halo, any device;
    - "pallas_triton": fused kernels, on NVIDIA GPUs of compute capability 8.0 or more and for
      head dims up to 128;
    - "pallas_triton_interpret": the kernels' code run op by op on any device, slowly, for tests;
    - "reference": dense, for tests;
    - "auto": "pallas_triton" where `accepted.json` in this folder has a record that, on the kind
      of device used (`jax.default_device`, else the first of the default backend), the kernels
      agree with "xla" and are faster for this dtype, this head dim, and keys on the same or on a
      coarser grid; else "xla". No GPU has been measured yet, so today "auto" is always "xla".

    A named implementation is never replaced by another. All work under jit, vmap, grad, jvp,
    linearize, checkpoint and shard_map. The kernels have no second-order derivatives; in forward
    mode (jvp) the XLA form computes their tangents.

    Returns [b, y, x, h, d] in the inputs' dtype (float32, bfloat16 or float16). Sums are float32.
    The kernels multiply float32 inputs exactly; the others follow
    `jax.default_matmul_precision`, which on a GPU means TF32 unless raised.
    Raises ValueError, in one line, for wrong ranks or shapes, even windows, indivisible grids,
    mixed or unsupported dtypes, a causal window on a coarser grid, a scale that is not one real
    number, implementations that do not exist, and a named one that cannot serve this call.

    CogView2, arXiv 2204.14217, section 3.3 and Image-Local-Attention. There, cells outside the grid
    score -10000 before the softmax, which in float32 equals leaving them out.
    """
    return local_attention_2d_with_lse(
        q, k, v, window=window, causal=causal, scale=scale, implementation=implementation
    )[0]


def local_attention_2d_with_lse(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: tuple[int, int],
    causal: bool = False,
    scale: float | jax.Array | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """`local_attention_2d`'s output and the log-sum-exp of the scaled scores, [b, h, y, x] float32.

    The pair is a part for `merge_attention`. Both are differentiable.
    """
    geometry = _check(q, k, v, window, causal)
    checked_scale = _check_scale(scale, q.shape[-1])
    name = choose(implementation, q.dtype, q.shape[-1], geometry.ratio, default_device())
    return _IMPLEMENTATIONS[name](q, k, v, window=geometry, scale=checked_scale)


def choose(
    implementation: str,
    dtype: jnp.dtype,
    dim: int,
    ratio: int,
    device: jax.Device,
    records: Iterable[Record] | None = None,
) -> str:
    """The implementation that serves a call on a device, or a ValueError.

    `records` tells "auto" what was measured; None is what ships with the package.
    """
    if implementation == "auto":
        kind = Kind(device.device_kind, jnp.dtype(dtype).name, dim, coarse_keys=ratio > 1)
        measured = shipped_records() if records is None else records
        fits = is_accepted(kind, measured) and not pallas_triton.obstacle(device, dim)
        return "pallas_triton" if fits else "xla"
    if implementation not in _IMPLEMENTATIONS:
        names = ", ".join(repr(name) for name in ("auto", *sorted(_IMPLEMENTATIONS)))
        raise ValueError(f"implementation={implementation!r} does not exist; there are {names}")
    obstacle = None
    if implementation == "pallas_triton":
        obstacle = pallas_triton.obstacle(device, dim)
    elif implementation == "pallas_triton_interpret":
        obstacle = pallas_triton.obstacle(None, dim)
    if obstacle:
        raise ValueError(f"implementation={implementation!r} cannot serve this call: {obstacle}")
    return implementation


def _check(
    q: jax.Array, k: jax.Array, v: jax.Array, window: tuple[int, int], causal: bool
) -> Window:
    """The window with its ratio deduced from the grids, or a ValueError."""
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 5:
            raise ValueError(f"{name} must be [b, y, x, h, d], got shape {array.shape}")
        if 0 in array.shape:
            raise ValueError(f"{name} must not be empty, got shape {array.shape}")
        if array.dtype != q.dtype:
            raise ValueError(f"{name} is {array.dtype} but q is {q.dtype}; dtypes must be equal")
    if q.dtype not in [jnp.dtype(name) for name in _DTYPES]:
        raise ValueError(f"q is {q.dtype}; the dtype must be one of {', '.join(_DTYPES)}")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {v.shape} but k has shape {k.shape}; they must be equal")
    for axis, name in ((0, "batch"), (3, "heads"), (4, "head dim")):
        if k.shape[axis] != q.shape[axis]:
            raise ValueError(f"k has {name} {k.shape[axis]} but q has {name} {q.shape[axis]}")
    grid, key_grid = q.shape[1:3], k.shape[1:3]
    ratio = grid[0] // key_grid[0]
    if ratio < 1 or grid != (key_grid[0] * ratio, key_grid[1] * ratio):
        raise ValueError(
            f"k has grid {key_grid[0]}x{key_grid[1]} but q has grid {grid[0]}x{grid[1]}; "
            "q's must be k's times one whole number"
        )
    try:
        rows, columns = (operator.index(side) for side in window)
    except (TypeError, ValueError):
        raise ValueError(f"window must be (rows, columns), two integers, got {window!r}") from None
    return Window(rows, columns, causal=causal, ratio=ratio)


def _check_scale(scale: Any, dim: int) -> float | jax.Array:
    """A float, constant in the program, or a float32 array [], or a ValueError."""
    if scale is None:
        return float(dim**-0.5)
    dtype, shape = jnp.result_type(scale), jnp.shape(scale)
    if shape or not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise ValueError(f"scale must be one real number, got {dtype} of shape {shape}")
    return scale.astype(jnp.float32) if isinstance(scale, jax.Array) else float(scale)
