"""What several test files of the attention share."""

import jax
import jax.numpy as jnp
import numpy as np

KERNEL = "pallas_triton_interpret"
IMPLEMENTATIONS = ("xla", KERNEL)


def cheaply(function):
    """jax.jit with little optimisation, which takes longer than these programs run."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def draw(*shapes, dtype="float32", seed=0):
    normal = np.random.default_rng(seed).standard_normal
    return [normal(shape).astype(jnp.dtype(dtype)) for shape in shapes]
