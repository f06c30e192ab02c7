"""The public functions: check the inputs, choose an implementation, run it."""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.local_attention import pallas_triton, reference, xla
from pallas_kernels.local_attention.window import Window

# Every implementation has one signature: (q, k, v, *, window: Window, scale) -> (out, lse).
_IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "reference": reference.local_attention,
    "xla": xla.local_attention,
    "pallas_triton": pallas_triton.local_attention,
    "pallas_triton_interpret": functools.partial(pallas_triton.local_attention, interpret=True),
}
# What "auto" takes the kernels on: the compute capability that they are compiled for, without
# spills, by experiments/local_attention/compile_gate.py.
_PALLAS_TRITON_CAPABILITIES = ((9, 0),)
_DTYPES = ("float32", "bfloat16", "float16")


def local_attention_2d(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: tuple[int, int],
    causal: bool = False,
    scale: float | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Attention of every cell of a grid to the keys in a window round it.

    q is [b, y, x, h, d]; k and v are [b, key y, key x, h, d], on the same grid or on one coarser
    by a whole ratio, the same along both axes. `window` is (rows, columns) of key cells, both odd,
    centred on the query's parent cell; cells out of the grid are not counted. `causal` keeps the
    first floor(rows * columns / 2) + 1 cells of the window in raster order and needs equal grids.
    Scores are multiplied by `scale`, 1 / sqrt(d) by default.

    `implementation` is one of

    - "xla": tiles with a halo, any device;
    - "pallas_triton": fused kernels, on NVIDIA GPUs of compute capability 8.0 or more and for
      head dims up to 128;
    - "pallas_triton_interpret": their code run op by op on any device, slowly, for tests;
    - "reference": dense, for tests;
    - "auto": "pallas_triton" where the default device (`jax.default_device`, else the first of
      the default backend) has compute capability 9.0 and the head dim is at most 128, else "xla".

    A named implementation is never replaced by another.

    Returns [b, y, x, h, d] in the inputs' dtype (float32, bfloat16 or float16). Sums are float32.
    Products of float32 inputs are exact in the kernels; in the others they follow
    `jax.default_matmul_precision`, which on a GPU means TF32 unless raised.
    Raises ValueError, in one line, for wrong ranks or shapes, even windows, indivisible grids,
    mixed or unsupported dtypes, a causal window on a coarser grid, implementations that do not
    exist, and a named one that cannot serve this call.

    CogView2, arXiv 2204.14217, section 3.3 and Image-Local-Attention. There, cells out of the grid
    score -10000 before the softmax, which float32 cannot tell from not counting them.
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
    scale: float | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """As `local_attention_2d`, with the log-sum-exp of the scaled scores, [b, h, y, x] float32.

    The pair is a part for `merge_attention`. Gradients flow through both.
    """
    geometry = _check(q, k, v, window, causal)
    attend = _IMPLEMENTATIONS[_choose(implementation, q.shape[-1])]
    return attend(q, k, v, window=geometry, scale=q.shape[-1] ** -0.5 if scale is None else scale)


def _choose(implementation: str, dim: int) -> str:
    """The implementation for a head dim on the default device, or a ValueError."""
    if implementation == "auto":
        device = _default_device()
        if pallas_triton.compute_capability(device) not in _PALLAS_TRITON_CAPABILITIES:
            return "xla"
        return "xla" if pallas_triton.obstacle(device, dim) else "pallas_triton"
    if implementation not in _IMPLEMENTATIONS:
        names = ", ".join(repr(name) for name in ("auto", *sorted(_IMPLEMENTATIONS)))
        raise ValueError(f"implementation={implementation!r} does not exist; there are {names}")
    obstacle = None
    if implementation == "pallas_triton":
        obstacle = pallas_triton.obstacle(_default_device(), dim)
    elif implementation == "pallas_triton_interpret":
        obstacle = pallas_triton.obstacle(None, dim)
    if obstacle:
        raise ValueError(f"implementation={implementation!r} cannot serve this call: {obstacle}")
    return implementation


def _default_device() -> jax.Device:
    """The device that jax computes on where nothing else is asked for."""
    default = getattr(jax.config, "jax_default_device", None)  # a device, a platform or None
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]


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
