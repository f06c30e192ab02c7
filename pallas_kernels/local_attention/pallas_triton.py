"""Local attention as fused GPU kernels: Pallas, compiled by Triton.

A program owns a tile of queries of one head and walks over the keys that the tile sees (`halo.py`)
with an online softmax, so scores stay on the chip and keys are read in place, in blocks. The
gradient by the queries has the same structure. The gradients by keys and values have a program for
each tile of keys, which walks over the queries that see it. Each number is written once, by one
program: nothing is summed across programs, and the same inputs give the same bits.

The backward pass computes the scores again from the log-sum-exp: FlashAttention-2, arXiv
2307.08691. Float32 inputs are multiplied in full float32, never in TF32.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.local_attention import xla
from pallas_kernels.local_attention.block_access import dot, load, load_vector, store
from pallas_kernels.local_attention.blocks import INTERPRETER, BlockSizes, Launch, block_sizes
from pallas_kernels.local_attention.derivatives import differentiable_once
from pallas_kernels.local_attention.devices import compute_capability, default_device
from pallas_kernels.local_attention.halo import Halo, hidden
from pallas_kernels.local_attention.window import Window

MAX_DIM = 128
LEAST_CAPABILITY = (8, 0)  # the first with bfloat16 products
_LOG2_E = math.log2(math.e)
# The score of a hidden pair, and the running maximum's start. They are far enough apart that hidden
# scores weigh exactly zero even before the first visible one, and both finite, so nothing is nan.
_HIDDEN = -1e30
_LOWEST = -1e20


def local_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: Window,
    scale: float | jax.Array,
    blocks: BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Fused local attention; `blocks` from the table in `blocks.py` if None.

    q [b, y, x, h, d], k and v [b, key y, key x, h, d], inputs already checked by the dispatch, d
    at most 128; float32, bfloat16 or float16. Accumulates in float32; returns out [b, y, x, h, d]
    in q's dtype and the log-sum-exp [b, h, y, x] in float32. A float `scale` is a constant of the
    kernels; an array [] is an operand, so it can be traced and learned. `interpret` runs the
    kernels' code op by op on any device, slowly, for tests.

    Reverse mode has kernels; forward mode computes tangents by the XLA form. A derivative of a
    derivative raises NotImplementedError.
    """
    if blocks is None:
        device_kind = INTERPRETER if interpret else default_device().device_kind
        blocks = block_sizes(device_kind, q.dtype, q.shape[-1], window.ratio)
    inputs = [q, k, v]
    constant: float | None = None
    if isinstance(scale, jax.Array):
        inputs.append(jnp.broadcast_to(scale.astype(jnp.float32), q.shape[:1]))
    else:
        constant = float(scale)
    # Not weakly typed, so that outputs and gradients have exactly the types of the inputs.
    inputs = [jax.lax.convert_element_type(a, a.dtype) for a in inputs]
    out, lse = _attention(*_equally_varying(inputs), call=Call(window, constant, blocks, interpret))
    return out, lse


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


@dataclass(frozen=True)
class Call:
    """All that is static in a call; a `scale` of None is an operand instead."""

    window: Window
    scale: float | None
    blocks: BlockSizes
    interpret: bool


def _equally_varying(arrays: list[jax.Array]) -> list[jax.Array]:
    """Inside shard_map: arrays that vary over the same mesh axes, as a kernel's operands must."""
    varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    everywhere = frozenset().union(*varying)
    return [
        jax.lax.pcast(a, tuple(sorted(everywhere - axes)), to="varying")
        if axes != everywhere
        else a
        for a, axes in zip(arrays, varying, strict=True)
    ]


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array | None = None, *, call: Call
) -> tuple[jax.Array, jax.Array]:
    """The first kernel: out [b, y, x, h, d] and the log-sum-exp [b, h, y, x].

    `scale` is float32 [b] where the call has none.
    """
    b, y, x, h, d = q.shape
    launch = call.blocks.forward
    halo = Halo.query_tiles(call.window, (y, x), launch.tile, launch.block)
    inputs = [*map(_cells, (q, k, v))]
    outputs = [_like(inputs[0]), _rows_like(inputs[0])]
    out, lse = _run(_forward_kernel, halo, launch, call, scale, inputs, outputs)
    return out.reshape(q.shape), lse.reshape(b, h, y, x)


def score_offsets(out: jax.Array, dout: jax.Array, dlse: jax.Array) -> jax.Array:
    """The part of the gradient by a score that is the same for all keys of a query.

    That gradient is weight * (dout · v - delta), with delta = dout · out - dlse: the gradient of
    the log-sum-exp by a score is the weight. Returns delta, float32 [b, h, y, x].
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
    scale: jax.Array | None = None,
    *,
    call: Call,
) -> tuple[jax.Array, ...]:
    """The second kernel: dq [b, y, x, h, d], and dscale [b] where scale is an operand.

    `delta` comes from `score_offsets`.
    """
    launch = call.blocks.dq
    halo = Halo.query_tiles(call.window, (q.shape[1], q.shape[2]), launch.tile, launch.block)
    inputs = [*map(_cells, (q, k, v, dout)), *map(_by_query, (lse, delta))]
    outputs = [_like(inputs[0])]
    if scale is not None:
        outputs.append(_rows_like(inputs[0]))
    dq, *dscale = _run(_dq_kernel, halo, launch, call, scale, inputs, outputs)
    return dq.reshape(q.shape), *(rows.sum(axis=(1, 2)) for rows in dscale)


def key_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    scale: jax.Array | None = None,
    *,
    call: Call,
) -> tuple[jax.Array, jax.Array]:
    """The third kernel: dk and dv [b, key y, key x, h, d]; delta from `score_offsets`."""
    launch = call.blocks.dkv
    halo = Halo.key_tiles(call.window, (q.shape[1], q.shape[2]), launch.tile, launch.block)
    inputs = [*map(_cells, (q, k, v, dout)), *map(_by_query, (lse, delta))]
    outputs = [_like(inputs[1]), _like(inputs[2])]
    dk, dv = _run(_dkv_kernel, halo, launch, call, scale, inputs, outputs)
    return dk.reshape(k.shape), dv.reshape(v.shape)


def _output_types(q: Any, k: Any, v: Any, *scale: Any, call: Call) -> list[Any]:
    b, y, x, h, _ = q.shape
    return [q, q.update(shape=(b, h, y, x), dtype=jnp.dtype("float32"))]


def _tangents(inputs: Any, outputs: Any, input_tangents: Any, call: Call) -> Any:
    """By the XLA form, in full float32 as in the kernels."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, *scale: jax.Array) -> Any:
        factor = scale[0][:, None, None, None, None] if call.scale is None else call.scale
        q32 = factor * q.astype(jnp.float32)
        out, lse = xla.local_attention(q32, k, v, window=call.window, scale=1.0)
        return out.astype(q.dtype), lse

    with jax.default_matmul_precision("highest"):
        return jax.jvp(attend, tuple(inputs), tuple(input_tangents))[1]


def _cotangents(inputs: Any, outputs: Any, output_cotangents: Any, call: Call) -> Any:
    q, k, v, *scale = inputs
    out, lse = outputs
    dout, dlse = output_cotangents
    operands = (q, k, v, dout, lse, score_offsets(out, dout, dlse), *scale)
    dq, *dscale = query_gradient(*operands, call=call)
    return dq, *key_gradients(*operands, call=call), *dscale


def _second_order_error(call: Call) -> Exception:
    name = "pallas_triton_interpret" if call.interpret else "pallas_triton"
    return NotImplementedError(
        f"implementation={name!r} has no second-order derivatives; use implementation='xla'"
    )


_attention = differentiable_once(
    "local_attention", forward, _output_types, _tangents, _cotangents, _second_order_error
)


def _forward_kernel(
    scale: Any, q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, lse_ref: Any, *, halo: Halo
) -> None:
    """out [tile, d] and lse [tile] of a tile of queries. Refs are one head's [cells, d]; lse's is
    [cells]."""
    place = halo.place(pl.program_id(0))
    tile = place.tile()
    rows, mask = tile.index, None if halo.divides else tile.exists
    q = load(q_ref, rows, mask)

    def step(i: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest, total, out = carry
        keys = place.block(i)
        # In base 2, which is the exponential the hardware has.
        scores = (scale * _LOG2_E) * dot(q, load(k_ref, keys.index), transpose_b=True)
        scores = jnp.where(hidden(halo, tile, keys), _HIDDEN, scores)
        new_largest = jnp.maximum(largest, scores.max(axis=1))
        weights = jnp.exp2(scores - new_largest[:, None])
        shrink = jnp.exp2(largest - new_largest)
        total = shrink * total + weights.sum(axis=1)
        v = load(v_ref, keys.index)
        return new_largest, total, shrink[:, None] * out + dot(weights.astype(v.dtype), v)

    start = (
        jnp.full(rows.shape, _LOWEST, jnp.float32),
        jnp.zeros(rows.shape, jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    largest, total, out = _for_each_step(halo, step, start)
    if mask is not None:
        # Cells that stick out of the grid may see nothing; they are not stored.
        total = jnp.where(mask, total, 1.0)
    store(out_ref, rows, mask, out / total[:, None])
    plgpu.store(lse_ref.at[rows], (largest + jnp.log2(total)) / _LOG2_E, mask=mask)


def _dq_kernel(
    scale: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    dq_ref: Any,
    dscale_ref: Any = None,
    *,
    halo: Halo,
) -> None:
    """dq [tile, d] of a tile of queries, and each query's part of the gradient by the scale."""
    place = halo.place(pl.program_id(0))
    tile = place.tile()
    rows, mask = tile.index, None if halo.divides else tile.exists
    q, dout = (load(ref, rows, mask) for ref in (q_ref, dout_ref))
    lse, delta = (load_vector(ref, rows, mask) for ref in (lse_ref, delta_ref))
    lse *= _LOG2_E

    def step(i: Any, dq: jax.Array) -> jax.Array:
        keys = place.block(i)
        k, v = load(k_ref, keys.index), load(v_ref, keys.index)
        scores = (scale * _LOG2_E) * dot(q, k, transpose_b=True) - lse[:, None]
        weights = jnp.exp2(jnp.where(hidden(halo, tile, keys), _HIDDEN, scores))
        dscores = weights * (dot(dout, v, transpose_b=True) - delta[:, None])
        return dq + dot(dscores.astype(k.dtype), k)

    dq = _for_each_step(halo, step, jnp.zeros(q.shape, jnp.float32))
    store(dq_ref, rows, mask, scale * dq)
    if dscale_ref is not None:
        # Scores are scale * q · k, so the gradient by the scale is q · (dq / scale).
        plgpu.store(dscale_ref.at[rows], (q.astype(jnp.float32) * dq).sum(axis=1), mask=mask)


def _dkv_kernel(
    scale: Any,
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
) -> None:
    """dk and dv [tile, d] of a tile of keys, gathered from the queries that see it."""
    place = halo.place(pl.program_id(0))
    tile = place.tile()
    rows, mask = tile.index, None if halo.divides else tile.exists
    k, v = (load(ref, rows, mask) for ref in (k_ref, v_ref))

    def step(i: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dk, dv = carry
        queries = place.block(i)
        q, dout = load(q_ref, queries.index), load(dout_ref, queries.index)
        lse, delta = (load_vector(ref, queries.index) for ref in (lse_ref, delta_ref))
        lse *= _LOG2_E
        scores = (scale * _LOG2_E) * dot(k, q, transpose_b=True) - lse[None, :]
        weights = jnp.exp2(jnp.where(hidden(halo, tile, queries), _HIDDEN, scores))
        dv += dot(weights.astype(dout.dtype), dout)
        dscores = weights * (dot(v, dout, transpose_b=True) - delta[None, :])
        return dk + dot(dscores.astype(q.dtype), q), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = _for_each_step(halo, step, (zeros, zeros))
    store(dk_ref, rows, mask, scale * dk)
    store(dv_ref, rows, mask, dv)


def _run(
    kernel: Any,
    halo: Halo,
    launch: Launch,
    call: Call,
    scale: jax.Array | None,
    inputs: list[jax.Array],
    outputs: list[jax.ShapeDtypeStruct],
) -> list[jax.Array]:
    """One program a tile, head and batch entry, over arrays [b, cells, h, d] and [b, h, cells].

    A program's refs are its head's [cells, d] and [cells], in place. `kernel` gets the scale first:
    the call's constant, or the batch entry's number out of `scale` [b].
    """

    def spec(array: Any) -> pl.BlockSpec:
        if array.ndim == 1:
            return pl.BlockSpec((1,), lambda tile, head, b: (b,))
        # int32, because a literal 0 is an int64 under jax_enable_x64.
        zero = np.int32(0)
        if array.ndim == 4:
            cells, d = array.shape[1], array.shape[3]
            return pl.BlockSpec((None, cells, None, d), lambda tile, head, b: (b, zero, head, zero))
        return pl.BlockSpec((None, None, array.shape[2]), lambda tile, head, b: (b, head, zero))

    def program(*refs: Any) -> None:
        if scale is None:
            kernel(call.scale, *refs, halo=halo)
        else:
            kernel(refs[0][0], *refs[1:], halo=halo)

    b, _, heads, _ = inputs[0].shape
    if scale is not None:
        inputs = [scale, *inputs]
    return pl.pallas_call(
        program,
        # Tiles vary fastest, so neighbours run together and share their halos in the cache.
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


def _for_each_step(halo: Halo, step: Any, start: Any) -> Any:
    """`step(i, carry)` for each block of the extent; i is int32 under jax_enable_x64 too."""
    return jax.lax.fori_loop(np.int32(0), np.int32(halo.steps), step, start)


def _cells(array: jax.Array) -> jax.Array:
    """[b, y, x, h, d] to [b, y * x, h, d]."""
    b, y, x, h, d = array.shape
    return array.reshape(b, y * x, h, d)


def _by_query(array: jax.Array) -> jax.Array:
    """[b, h, y, x] to [b, h, y * x]."""
    return array.reshape(*array.shape[:2], -1)


def _like(array: jax.Array) -> jax.ShapeDtypeStruct:
    """An output of the array's type; in shard_map it varies over the same mesh axes."""
    mesh_axes = jax.typeof(array).manual_axis_type
    return jax.ShapeDtypeStruct(array.shape, array.dtype, manual_axis_type=mesh_axes)


def _rows_like(array: jax.Array) -> jax.ShapeDtypeStruct:
    """Float32 [b, h, cells] for an array [b, cells, h, d]."""
    b, cells, h, _ = array.shape
    mesh_axes = jax.typeof(array).manual_axis_type
    return jax.ShapeDtypeStruct((b, h, cells), jnp.float32, manual_axis_type=mesh_axes)
