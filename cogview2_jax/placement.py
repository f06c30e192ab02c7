"""A network's parameters from the host to the devices: dtype, int8 matrices, sharding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cogview2_jax.config import CogLMConfig, DirectSRConfig, IterativeSRConfig, Precision
from cogview2_jax.networks import coglm, direct_sr, iterative_sr
from cogview2_jax.networks.quantisation import KERNEL, SCALE, quantise
from cogview2_jax.networks.transformer import unstacked
from cogview2_jax.sharding import Execution, Sharding

Params = dict
Config = CogLMConfig | DirectSRConfig | IterativeSRConfig
_AXES: dict[type, Callable[[Any], Any]] = {
    CogLMConfig: coglm.parameter_axes,
    DirectSRConfig: direct_sr.parameter_axes,
    IterativeSRConfig: iterative_sr.parameter_axes,
}


def prepared(tree: Params, config: Config | None, precision: Precision) -> Params:
    """The parameters as the network computes with them, where they are: those of a transformer in
    the dtypes of `precision`, those of the image tokenizer (no `config`) in float32: it is small,
    and pixels need the precision.
    """
    dtype = jax.numpy.dtype("float32" if config is None else precision.params)
    if config is not None and precision.matrices is not None:
        tree = quantise(tree)

    def cast(path: Any, leaf: Any) -> Any:
        name = path[-1].key
        kept = leaf.dtype == dtype or name == SCALE or (name == KERNEL and leaf.dtype == np.int8)
        return leaf if kept else leaf.astype(dtype)

    # On the host: on the device, each shape would compile a program.
    return jax.tree_util.tree_map_with_path(cast, tree)


def put(tree: Params, config: Config | None, sharding: Sharding | None) -> Params:
    """`prepared` parameters on the device, or on a mesh by their logical axes; the tokenizer's
    replicated. Raises ValueError for a parameter that the mesh cannot shard evenly.
    """
    if sharding is None:
        return jax.device_put(tree)
    if config is None:
        return jax.device_put(tree, sharding.named())
    return jax.device_put(tree, sharding.of_tree(tree, _AXES[type(config)](config)))


def put_for_decoding(tree: Params, config: CogLMConfig, sharding: Sharding | None) -> Params:
    """As `put`, a tree for each layer (`coglm.unstacked`): decoding reads no other form without a
    copy, and full passes read it too.
    """
    if isinstance(tree["layers"], tuple):  # placed before
        return jax.device_put(tree) if sharding is None else tree
    on_host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))
    each = unstacked(tree) if on_host else jax.jit(unstacked)(tree)
    if sharding is None:
        return jax.device_put(each)
    shardings = sharding.of_tree(tree, _AXES[type(config)](config))
    mesh = sharding.mesh
    layer = jax.tree.map(lambda stack: NamedSharding(mesh, P(*stack.spec[1:])), shardings["layers"])
    return jax.device_put(each, shardings | {"layers": (layer,) * len(each["layers"])})


def require_placeable(execution: Execution) -> None:
    """Raises ValueError for int8 matrices on a mesh."""
    if execution.precision.matrices is not None and execution.sharding is not None:
        raise ValueError("matrices in int8 run on one device: leave the mesh or int8 out")
