"""Weights in int8: a quarter of float32's bytes, half of bfloat16's.

Each output of a matrix has a scale of its own, and the products are scaled, not the weights: a
program that reads int8 from memory converts as it multiplies. Tables, biases and LayerNorms stay as
they are. On the bundle that ships: `experiments/precision`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict
KERNEL, SCALE = "kernel", "kernel_scale"
_LARGEST = 127


def quantise(params: Params) -> Params:
    """The same tree with its matrices, "kernel" [..., e, f], in int8, and a "kernel_scale" float32
    [..., f] beside each: kernel ≈ int8 · scale, within half a scale. Matrices that are int8 already
    stay. NumPy arrays are quantised on the host.

    Raises ValueError for a matrix that is not finite.
    """
    made: Params = {}
    for name, leaf in params.items():
        if isinstance(leaf, dict):
            made[name] = quantise(leaf)
        elif isinstance(leaf, tuple):  # layers that are not stacked
            made[name] = tuple(quantise(each) for each in leaf)
        elif name == KERNEL and leaf.ndim > 1 and leaf.dtype != np.int8:
            made[KERNEL], made[SCALE] = _quantised(leaf)
        else:
            made[name] = leaf
    return made


def is_quantised(params: Any) -> bool:
    """Whether a tree has matrices of `quantise`."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    return any(getattr(path[-1], "key", None) == SCALE for path, _ in paths)


def _quantised(kernel: Any) -> tuple[Any, Any]:
    if not isinstance(kernel, np.ndarray):
        return _rounded(kernel, jnp)
    if kernel.ndim == 2:
        if not np.isfinite(kernel).all():
            raise ValueError("a matrix with values that are not finite cannot be kept in int8")
        return _rounded(kernel, np)
    # A layer at a time: the float32 copy of a whole stack would take as much as the model.
    parts = [_quantised(each) for each in kernel]
    return np.stack([part for part, _ in parts]), np.stack([scale for _, scale in parts])


def _rounded(kernel: Any, xp: Any) -> tuple[Any, Any]:
    values = kernel.astype(np.float32)
    largest = xp.abs(values).max(-2, keepdims=True)
    scale = xp.where(largest > 0, largest, 1) / np.float32(_LARGEST)
    return xp.rint(values / scale).astype(np.int8), scale[..., 0, :].astype(np.float32)
