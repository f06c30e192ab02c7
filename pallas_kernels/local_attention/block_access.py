"""Loads, stores and products of blocks inside a Triton kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def dot(a: jax.Array, b: jax.Array, transpose_b: bool = False) -> jax.Array:
    """a @ b, or a @ b.T, in float32; no TF32 for float32 inputs, whatever the default is."""
    full = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (1 if transpose_b else 0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def load(ref: Any, rows: jax.Array, exists: jax.Array | None = None) -> jax.Array:
    """Rows of a [cells, d] ref, zero where they do not exist and in padding columns."""
    columns, mask = _columns(ref, exists)
    block = ref.at[rows[:, None], columns[None, :]]
    return plgpu.load(block, mask=mask, other=None if mask is None else 0.0)


def load_vector(ref: Any, rows: jax.Array, exists: jax.Array | None = None) -> jax.Array:
    return plgpu.load(ref.at[rows], mask=exists, other=None if exists is None else 0.0)


def store(ref: Any, rows: jax.Array, exists: jax.Array | None, values: jax.Array) -> None:
    columns, mask = _columns(ref, exists)
    plgpu.store(ref.at[rows[:, None], columns[None, :]], values.astype(ref.dtype), mask=mask)


def _columns(ref: Any, exists: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Columns of a ref, padded to a power of two of at least 16, and the mask [rows, columns]."""
    d = ref.shape[-1]
    columns = jnp.arange(max(16, pl.next_power_of_2(d)), dtype=jnp.int32)
    mask = None if exists is None else exists[:, None]
    if columns.size != d:
        mask = columns[None, :] < d if mask is None else mask & (columns[None, :] < d)
    return columns, mask
