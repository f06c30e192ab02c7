"""Local attention as fused GPU kernels: Pallas, compiled by Triton.

A program owns a tile of queries of one head and walks over the box of keys round it (`halo.py`)
with an online softmax, so that scores stay on the chip and keys are read in place, in blocks. The
gradient by the queries goes the same way; the gradients by keys and values have a program for each
tile of keys, walking over the queries that see it. Each number is written once, by one program:
nothing is added up across programs, and the same inputs give the same bits.

Scores are computed again in the backward pass, from the log-sum-exp: see FlashAttention-2, arXiv
2307.08691. Float32 inputs are multiplied in full float32, never in TF32.
"""

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.local_attention.blocks import INTERPRETER, BlockSizes, Launch, block_sizes
from pallas_kernels.local_attention.halo import Halo, hidden
from pallas_kernels.local_attention.window import Window

MAX_DIM = 128
LEAST_CAPABILITY = (8, 0)  # the first with bfloat16 products
_LOG2_E = math.log2(math.e)
# The score of a hidden pair, and what the running maximum starts at: far enough apart that hidden
# scores weigh exactly zero even before a seen one was met, and both finite, so nothing is nan.
_HIDDEN = -1e30
_LOWEST = -1e20


def local_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: Window,
    scale: float,
    blocks: BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Fused local attention; `blocks` from the table in `blocks.py` if None.

    q [b, y, x, h, d], k and v [b, key y, key x, h, d], inputs already checked by the dispatch, d
    at most 128; float32, bfloat16 or float16. Accumulates in float32; returns out [b, y, x, h, d]
    in q's dtype and the log-sum-exp [b, h, y, x] in float32. Differentiable once, in q, k and v.
    `interpret` runs the kernels' code op by op on any device, slowly, for tests.
    """
    if blocks is None:
        device_kind = INTERPRETER if interpret else jax.devices()[0].device_kind
        blocks = block_sizes(device_kind, q.dtype, q.shape[-1], window.ratio)
    return _attention(q, k, v, Call(window, float(scale), blocks, interpret))


def obstacle(device: jax.Device | None, dim: int) -> str | None:
    """Why the kernels cannot run for a head dim on a device, or None if they can.

    A device of None stands for interpretation.
    """
    if dim > MAX_DIM:
        return f"its head dim may be at most {MAX_DIM}, got {dim}"
    if device is None:
        return None
    capability = compute_capability(device)
    if capability is None:
        return f"it needs an NVIDIA GPU, the default device is {device.device_kind!r}"
    if capability < LEAST_CAPABILITY:
        return "it needs compute capability {}.{}, {!r} has {}.{}".format(
            *LEAST_CAPABILITY, device.device_kind, *capability
        )
    return None


def compute_capability(device: jax.Device) -> tuple[int, int] | None:
    """(major, minor) of an NVIDIA GPU, None for other devices."""
    name = str(getattr(device, "compute_capability", ""))  # "9.0"; another maker's are words
    found = re.fullmatch(r"(\d+)\.(\d+)", name) if device.platform == "gpu" else None
    return (int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True)
class Call:
    """All that is static in a call."""

    window: Window
    scale: float
    blocks: BlockSizes
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, call: Call) -> tuple[jax.Array, jax.Array]:
    return forward(q, k, v, call)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, call: Call) -> tuple[Any, Any]:
    out, lse = forward(q, k, v, call)
    return (out, lse), (q, k, v, out, lse)


def _backward(call: Call, residuals: Any, cotangents: Any) -> tuple[jax.Array, ...]:
    q, k, v, out, lse = residuals
    dout, dlse = cotangents
    inputs = (q, k, v, dout, lse, score_offsets(out, dout, dlse))
    return query_gradient(*inputs, call), *key_gradients(*inputs, call)


_attention.defvjp(_forward, _backward)


def forward(q: jax.Array, k: jax.Array, v: jax.Array, call: Call) -> tuple[jax.Array, jax.Array]:
    """The first kernel: out [b, y, x, h, d] and the log-sum-exp [b, h, y, x]."""
    b, y, x, h, d = q.shape
    launch = call.blocks.forward
    halo = Halo.query_tiles(call.window, (y, x), launch.tile, launch.block)
    out, lse = _run(
        _forward_kernel,
        halo,
        launch,
        call,
        inputs=[_cells(q), _cells(k), _cells(v)],
        outputs=[_like(_cells(q)), jax.ShapeDtypeStruct((b, h, y * x), jnp.float32)],
    )
    return out.reshape(q.shape), lse.reshape(b, h, y, x)


def score_offsets(out: jax.Array, dout: jax.Array, dlse: jax.Array) -> jax.Array:
    """What the gradient by a score has beside dout · v: float32 [b, h, y, x], one a query.

    That gradient is weight * (dout · v - dout · out + dlse): the log-sum-exp's own gradient by a
    score is the weight.
    """
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=-1)
    return jnp.moveaxis(delta, -1, 1) - dlse


def query_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    call: Call,
) -> jax.Array:
    """The second kernel: dq [b, y, x, h, d]; delta from `score_offsets`."""
    launch = call.blocks.dq
    halo = Halo.query_tiles(call.window, (q.shape[1], q.shape[2]), launch.tile, launch.block)
    inputs = [*map(_cells, (q, k, v, dout)), *map(_by_query, (lse, delta))]
    (dq,) = _run(_dq_kernel, halo, launch, call, inputs, [_like(_cells(q))])
    return dq.reshape(q.shape)


def key_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    call: Call,
) -> tuple[jax.Array, jax.Array]:
    """The third kernel: dk and dv [b, key y, key x, h, d]; delta from `score_offsets`."""
    launch = call.blocks.dkv
    halo = Halo.key_tiles(call.window, (q.shape[1], q.shape[2]), launch.tile, launch.block)
    inputs = [*map(_cells, (q, k, v, dout)), *map(_by_query, (lse, delta))]
    dk, dv = _run(_dkv_kernel, halo, launch, call, inputs, [_like(_cells(k))] * 2)
    return dk.reshape(k.shape), dv.reshape(v.shape)


def _forward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, lse_ref: Any, *, halo: Halo, scale: float
) -> None:
    """out [tile, d] and lse [tile] of a tile of queries. Refs are one head's [cells, d]; lse's is
    [cells]."""
    place = halo.place(pl.program_id(0))
    tile = place.tile()
    rows, mask = tile.index, None if halo.divides else tile.exists
    q = _load(q_ref, rows, mask)

    def step(i: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest, total, out = carry
        keys = place.block(i)
        # In base 2, which is the exponential the hardware has.
        scores = (scale * _LOG2_E) * _dot(q, _load(k_ref, keys.index), transpose_b=True)
        scores = jnp.where(hidden(halo, tile, keys), _HIDDEN, scores)
        new_largest = jnp.maximum(largest, scores.max(axis=1))
        weights = jnp.exp2(scores - new_largest[:, None])
        shrink = jnp.exp2(largest - new_largest)
        total = shrink * total + weights.sum(axis=1)
        v = _load(v_ref, keys.index)
        return new_largest, total, shrink[:, None] * out + _dot(weights.astype(v.dtype), v)

    start = (
        jnp.full(rows.shape, _LOWEST, jnp.float32),
        jnp.zeros(rows.shape, jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    largest, total, out = jax.lax.fori_loop(0, halo.steps, step, start)
    if mask is not None:
        # Cells that stick out of the grid may see nothing; they are not stored.
        total = jnp.where(mask, total, 1.0)
    _store(out_ref, rows, mask, out / total[:, None])
    plgpu.store(lse_ref.at[rows], (largest + jnp.log2(total)) / _LOG2_E, mask=mask)


def _dq_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    dq_ref: Any,
    *,
    halo: Halo,
    scale: float,
) -> None:
    """dq [tile, d] of a tile of queries."""
    place = halo.place(pl.program_id(0))
    tile = place.tile()
    rows, mask = tile.index, None if halo.divides else tile.exists
    q, dout = (_load(ref, rows, mask) for ref in (q_ref, dout_ref))
    lse, delta = (_load_vector(ref, rows, mask) for ref in (lse_ref, delta_ref))
    lse *= _LOG2_E

    def step(i: Any, dq: jax.Array) -> jax.Array:
        keys = place.block(i)
        k, v = _load(k_ref, keys.index), _load(v_ref, keys.index)
        scores = (scale * _LOG2_E) * _dot(q, k, transpose_b=True) - lse[:, None]
        weights = jnp.exp2(jnp.where(hidden(halo, tile, keys), _HIDDEN, scores))
        dscores = weights * (_dot(dout, v, transpose_b=True) - delta[:, None])
        return dq + _dot(dscores.astype(k.dtype), k)

    dq = jax.lax.fori_loop(0, halo.steps, step, jnp.zeros(q.shape, jnp.float32))
    _store(dq_ref, rows, mask, scale * dq)


def _dkv_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    halo: Halo,
    scale: float,
) -> None:
    """dk and dv [tile, d] of a tile of keys, gathered from the queries that see it."""
    place = halo.place(pl.program_id(0))
    tile = place.tile()
    rows, mask = tile.index, None if halo.divides else tile.exists
    k, v = (_load(ref, rows, mask) for ref in (k_ref, v_ref))

    def step(i: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dk, dv = carry
        queries = place.block(i)
        q, dout = _load(q_ref, queries.index), _load(dout_ref, queries.index)
        lse, delta = _load_vector(lse_ref, queries.index), _load_vector(delta_ref, queries.index)
        lse *= _LOG2_E
        scores = (scale * _LOG2_E) * _dot(k, q, transpose_b=True) - lse[None, :]
        weights = jnp.exp2(jnp.where(hidden(halo, tile, queries), _HIDDEN, scores))
        dv += _dot(weights.astype(dout.dtype), dout)
        dscores = weights * (_dot(v, dout, transpose_b=True) - delta[None, :])
        return dk + _dot(dscores.astype(q.dtype), q), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, halo.steps, step, (zeros, zeros))
    _store(dk_ref, rows, mask, scale * dk)
    _store(dv_ref, rows, mask, dv)


def _run(
    kernel: Any,
    halo: Halo,
    launch: Launch,
    call: Call,
    inputs: list[jax.Array],
    outputs: list[jax.ShapeDtypeStruct],
) -> list[jax.Array]:
    """One program a tile, head and batch entry, over arrays [b, cells, h, d] and [b, h, cells].

    A program's refs are its head's [cells, d] and [cells], in place.
    """

    def spec(array: Any) -> pl.BlockSpec:
        if array.ndim == 4:
            cells, d = array.shape[1], array.shape[3]
            return pl.BlockSpec((None, cells, None, d), lambda tile, head, b: (b, 0, head, 0))
        return pl.BlockSpec((None, None, array.shape[2]), lambda tile, head, b: (b, head, 0))

    b, _, heads, _ = inputs[0].shape
    return pl.pallas_call(
        functools.partial(kernel, halo=halo, scale=call.scale),
        # Tiles vary fastest, so that neighbours run together and share their halos in the cache.
        grid=(math.prod(halo.counts), heads, b),
        in_specs=[spec(a) for a in inputs],
        out_specs=[spec(a) for a in outputs],
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(
            num_warps=launch.num_warps, num_stages=launch.num_stages
        ),
        interpret=call.interpret,
        name="local_attention" + kernel.__name__.removesuffix("_kernel"),
    )(*inputs)


def _dot(a: jax.Array, b: jax.Array, transpose_b: bool = False) -> jax.Array:
    """a @ b, or a @ b.T, in float32; no TF32 for float32 inputs, whatever the default is."""
    full = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (1 if transpose_b else 0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _load(ref: Any, rows: jax.Array, exists: jax.Array | None = None) -> jax.Array:
    """Rows of a [cells, d] ref, zero where they do not exist and in padded columns."""
    columns, mask = _columns(ref, exists)
    block = ref.at[rows[:, None], columns[None, :]]
    return plgpu.load(block, mask=mask, other=None if mask is None else 0.0)


def _load_vector(ref: Any, rows: jax.Array, exists: jax.Array | None = None) -> jax.Array:
    return plgpu.load(ref.at[rows], mask=exists, other=None if exists is None else 0.0)


def _store(ref: Any, rows: jax.Array, exists: jax.Array | None, values: jax.Array) -> None:
    columns, mask = _columns(ref, exists)
    plgpu.store(ref.at[rows[:, None], columns[None, :]], values.astype(ref.dtype), mask=mask)


def _columns(ref: Any, exists: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Columns of a ref, padded to a power of two of at least 16, and the mask [rows, columns]."""
    d = ref.shape[-1]
    columns = jnp.arange(padded_dim(d), dtype=jnp.int32)
    mask = None if exists is None else exists[:, None]
    if columns.size != d:
        mask = columns[None, :] < d if mask is None else mask & (columns[None, :] < d)
    return columns, mask


def padded_dim(dim: int) -> int:
    """The head dim that the kernels compute with: a power of two, at least 16."""
    return max(16, pl.next_power_of_2(dim))


def _cells(array: jax.Array) -> jax.Array:
    """[b, y, x, h, d] to [b, y * x, h, d]."""
    b, y, x, h, d = array.shape
    return array.reshape(b, y * x, h, d)


def _by_query(array: jax.Array) -> jax.Array:
    """[b, h, y, x] to [b, h, y * x]."""
    return array.reshape(*array.shape[:2], -1)


def _like(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
