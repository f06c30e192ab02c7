"""Where arrays lie on a mesh of devices: one table from the names of axes to those of the mesh.

A mesh has three axes. Along "data" the devices see other samples; along "fsdp" too, and each keeps
a part of every large weight, which is gathered where it is used; along "tensor" they share the
heads and the MLP of each sample. Any of them may be 1.

    sharding = Sharding(make_mesh(fsdp=4, tensor=2))
    logits = coglm.apply(params, inputs, config=config, execution=Execution(sharding=sharding))

Nothing is ambient: what is to be sharded takes a `Sharding`, and without one nothing happens.
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

# Name of an axis of an array → the axes of the mesh that cut it. Axes without a name stay whole.
RULES: Rules = (
    # Of activations.
    ("batch", ("data", "fsdp")),
    ("replica", ("data",)),  # samples of all devices that share one copy of the weights
    ("tokens", ("tensor",)),  # where logits are made of them
    ("heads", ("tensor",)),
    ("mlp", ("tensor",)),
    # Of weights, which also have "heads" and "mlp".
    ("embed", ("fsdp",)),
    # Of weights whose other axis cannot be cut by heads, or by anything: Q, K and V in one
    # matrix, and a vocabulary of 150,003.
    ("packed_embed", ("fsdp", "tensor")),
)
# Cut only where it comes out even: it moves work, and changes no one's memory for long.
_IF_EVEN = ("tokens",)


@dataclass(frozen=True)
class Sharding:
    """A mesh and the rules for it. Raises ValueError for rules with axes that the mesh lacks."""

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
        """Into how many parts an axis of this name is cut. ValueError for a name with no rule."""
        return math.prod(self.mesh.shape[part] for part in self._rule(axis))

    def spec(self, *axes: str | None) -> PartitionSpec:
        return PartitionSpec(*(self._rule(axis) or None for axis in axes))

    def named(self, *axes: str | None) -> NamedSharding:
        """How an array with these axes lies on the mesh; `named()` is whole on every device."""
        return NamedSharding(self.mesh, self.spec(*axes))

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """Have the compiler lay `x` so. Raises ValueError for an axis that does not come out
        even.
        """
        if len(axes) != x.ndim:
            raise ValueError(f"axes must be one for each of {x.shape}: got {axes}")
        kept = tuple(
            None if axis in _IF_EVEN and size % self.parts(axis) else axis
            for axis, size in zip(axes, x.shape, strict=True)
        )
        self._check(x.shape, kept, "an activation")
        return jax.lax.with_sharding_constraint(x, self.named(*kept))

    def of_tree(self, tree: Any, axes: Any) -> Any:
        """`NamedSharding` of every leaf of `tree` (arrays or their shapes), whose `axes` are a
        tree of tuples. Raises ValueError, with the name of the leaf, for one that does not come
        out even.
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
                    f" of the {self.parts(axis)} parts that the mesh cuts it into"
                )


@dataclass(frozen=True)
class Execution:
    """How a network is computed: one argument of every `apply` and every loss.

    It changes no parameter's shape and, but for rounding and dropout, no result. Hashable, so it
    can be a static argument of `jax.jit`.
    """

    precision: Precision = Precision()
    training: Training = Training()
    sharding: Sharding | None = None

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """`sharding.constrain`, or `x` itself where there is no sharding."""
        return constrain(self.sharding, x, *axes)


def make_mesh(
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of all `devices` (default: all there are, of all processes).

    `data` is by default what the other two leave. Raises ValueError for sizes that do not multiply
    to the number of devices.
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
    """`sharding.constrain`, or `x` itself where there is no sharding."""
    return x if sharding is None else sharding.constrain(x, *axes)


def logical_axes(init: Callable[[], Any]) -> Any:
    """Names of the axes of all parameters that `init` makes, as a tree of tuples; runs nothing.

    They are declared where the parameter is, by `nn.with_logical_partitioning`.
    """
    specs = nn.get_partition_spec(jax.eval_shape(init))
    return jax.tree.map(tuple, specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
