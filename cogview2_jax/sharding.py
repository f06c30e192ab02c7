"""How arrays are sharded over a mesh of devices: one table from logical axes to mesh axes.

A mesh has three axes, any of which may have size 1. "data" splits the batch. "fsdp" splits the
batch too, and every large weight: a weight is all-gathered where it is used. "tensor" splits the
heads and the MLP of each sample.

    sharding = Sharding(make_mesh(fsdp=4, tensor=2))
    logits = coglm.apply(params, inputs, config=config, execution=Execution(sharding=sharding))

There is no ambient mesh: functions that shard take a `Sharding`, and do nothing without one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cogview2_jax.config import Precision, Training

Array = jax.Array
MESH_AXES = ("data", "fsdp", "tensor")
Rules = tuple[tuple[str, tuple[str, ...]], ...]

# Logical axis of an array → the mesh axes that it is split over. An axis named None is not split.
RULES: Rules = (
    # Of activations.
    ("batch", ("data", "fsdp")),
    ("replica", ("data",)),  # the batch, gathered over the devices that share one copy of a weight
    ("tokens", ("tensor",)),  # the sequence, where logits are computed
    ("heads", ("tensor",)),
    ("mlp", ("tensor",)),
    # Of weights, which also have "heads" and "mlp".
    ("embed", ("fsdp",)),
    # Of weights that can be split along one axis only: the other axis holds Q, K and V packed, or
    # a vocabulary of 150,003.
    ("packed_embed", ("fsdp", "tensor")),
)
# Not split where the size is not a multiple: the result is the same, the work less evenly shared.
_IF_EVEN = ("tokens",)


@dataclass(frozen=True)
class Sharding:
    """A mesh and its rules. Raises ValueError for a rule with an axis that is not of the mesh."""

    mesh: Mesh
    rules: Rules = RULES

    def __post_init__(self) -> None:
        for name, parts in self.rules:
            for part in parts:
                if part not in self.mesh.axis_names:
                    raise ValueError(
                        f"rule {name!r} needs mesh axis {part!r}: the mesh has"
                        f" {self.mesh.axis_names}"
                    )

    def parts(self, axis: str | None) -> int:
        """How many parts a logical axis is split into. Raises ValueError for one without a rule."""
        return math.prod(self.mesh.shape[part] for part in self._rule(axis))

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The `PartitionSpec` of an array with these logical axes."""
        return PartitionSpec(*(self._rule(axis) or None for axis in axes))

    def named(self, *axes: str | None) -> NamedSharding:
        """The sharding of an array with these logical axes; `named()` is fully replicated."""
        return NamedSharding(self.mesh, self.spec(*axes))

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """`x` with the sharding of these logical axes, under jit.

        Raises ValueError for a size that is not a multiple of the parts its axis is split into.
        """
        if len(axes) != x.ndim:
            raise ValueError(f"axes must be one for each dimension of {x.shape}: got {axes}")
        kept = tuple(
            None if axis in _IF_EVEN and size % self.parts(axis) else axis
            for axis, size in zip(axes, x.shape, strict=True)
        )
        self._check(x.shape, kept, "an activation")
        return jax.lax.with_sharding_constraint(x, self.named(*kept))

    def of_tree(self, tree: Any, axes: Any) -> Any:
        """The `NamedSharding` of every leaf of `tree` (arrays or their shapes). `axes` is a tree of
        the same structure with a tuple of logical axes for each leaf.

        Raises ValueError, with the path of the leaf, for a size that is not a multiple of the parts
        its axis is split into.
        """

        def one(path: Any, leaf: Any, names: tuple[str | None, ...]) -> NamedSharding:
            self._check(leaf.shape, names, jax.tree_util.keystr(path, simple=True, separator="/"))
            return self.named(*names)

        return jax.tree_util.tree_map_with_path(one, tree, axes)

    def _rule(self, axis: str | None) -> tuple[str, ...]:
        if axis is None:
            return ()
        for name, parts in self.rules:
            if name == axis:
                return parts
        raise ValueError(f"axis {axis!r} has no rule: there are {[name for name, _ in self.rules]}")

    def _check(self, shape: Sequence[int], axes: Sequence[str | None], what: str) -> None:
        for size, axis in zip(shape, axes, strict=False):
            if size % self.parts(axis):
                raise ValueError(
                    f"{what} of shape {tuple(shape)}: axis {axis!r} of {size} must be a multiple"
                    f" of the {self.parts(axis)} parts that the mesh splits it into"
                )


@dataclass(frozen=True)
class Execution:
    """How a network is computed: one argument of every `apply` and every loss.

    It does not change the shapes of parameters, nor, except for rounding and dropout, any result.
    It is hashable, so it can be a static argument of `jax.jit`.
    """

    precision: Precision = Precision()
    training: Training = Training()
    sharding: Sharding | None = None
    # Set by cached decoding: see `networks.products`.
    decoding: bool = False

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """`sharding.constrain`, or `x` itself without a sharding."""
        return constrain(self.sharding, x, *axes)


def make_mesh(
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of `devices` (default: all devices of all processes).

    `data` is by default the number of devices divided by `fsdp · tensor`. Raises ValueError for
    sizes with a product other than the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    data = len(devices) // (fsdp * tensor) if data is None else data
    if data * fsdp * tensor != len(devices):
        raise ValueError(
            f"data × fsdp × tensor must be the number of devices, {len(devices)}:"
            f" got {data} × {fsdp} × {tensor}"
        )
    return jax.make_mesh(
        (data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def constrain(sharding: Sharding | None, x: Array, *axes: str | None) -> Array:
    """`sharding.constrain`, or `x` itself without a sharding."""
    return x if sharding is None else sharding.constrain(x, *axes)


def logical_axes(init: Callable[[], Any]) -> Any:
    """Logical axes of all parameters that `init` makes, as a tree of tuples. Runs nothing.

    They are declared with each parameter, by `nn.with_logical_partitioning`.
    """
    specs = nn.get_partition_spec(jax.eval_shape(init))
    return jax.tree.map(tuple, specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
