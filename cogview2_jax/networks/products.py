"""Matrix products of activations with a network's weights, as training and as decoding want them.

Decoding multiplies a few rows, so that its time is that of reading the weights. There sums are
float32 (of one row in bfloat16, XLA would write all products of a matrix out before it adds them
up), and on a GPU rows are padded to 8, which keeps both kinds of its matrix programs from
converting the weights first.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from cogview2_jax.networks.quantisation import SCALE
from cogview2_jax.sharding import Execution

Array = jax.Array
_init = nn.initializers.normal(0.02)
_LEAST_ROWS = 8  # of a product on a GPU


def product(x: Array, kernel: Array, execution: Execution, scale: Array | None = None) -> Array:
    """x [..., e] times kernel [e, f]: [..., f] in the compute dtype. `scale` float32 [f] is that of
    an int8 kernel (`quantisation`).
    """
    dtype = execution.precision.compute
    x = x.astype(dtype)

    def multiply(rows: Array) -> Array:
        out = jnp.matmul(rows, kernel.astype(dtype), preferred_element_type=jnp.float32)
        return out if scale is None else out * scale

    if not execution.decoding:
        if scale is None:
            return jnp.matmul(x, kernel.astype(dtype))
        return multiply(x).astype(dtype)

    rows = x.reshape(-1, x.shape[-1])
    # Of int8, cuBLAS writes a copy in any case, and Triton's partial sums have all padded rows.
    as_they_are = execution.sharding is not None or scale is not None
    out = multiply(rows) if as_they_are else few_rows(multiply, rows)
    return out.astype(dtype).reshape(*x.shape[:-1], -1)


def few_rows(multiply: Callable[[Array], Array], rows: Array) -> Array:
    """`multiply` of rows [n, e], on a GPU of at least 8 of them: the rows of its result."""
    missing = _LEAST_ROWS - len(rows)
    if missing <= 0:
        return multiply(rows)

    def padded(rows: Array) -> Array:
        return multiply(jnp.pad(rows, ((0, missing), (0, 0))))[:-missing]

    found: Array = jax.lax.platform_dependent(rows, cpu=multiply, default=padded)
    return found


def scale_of(module: nn.Module) -> Array | None:
    """The scale of a module's int8 kernel; None where the kernel has its own values."""
    if not module.has_variable("params", SCALE):
        return None
    scale: Array = module.get_variable("params", SCALE)
    return scale


class Dense(nn.Module):
    """`product` + bias: [..., features]. `axes` are the logical axes of the matrix."""

    features: int
    axes: tuple[str | None, str | None]
    execution: Execution

    @nn.compact
    def __call__(self, x: Array) -> Array:
        precision = self.execution.precision
        init = nn.with_logical_partitioning(_init, self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), precision.params)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), precision.params)
        out = product(x, kernel, self.execution, scale_of(self))
        return out + bias.astype(precision.compute)
