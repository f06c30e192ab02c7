"""Shared by test modules: recorded files, small geometries, properties of every network."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cogview2_jax.config import (
    CogLMConfig,
    HVQVAEConfig,
    Precision,
    TransformerConfig,
    Vocabulary,
)
from cogview2_jax.sharding import Execution

GOLDEN = Path(__file__).parent / "golden"

# A geometry that differs from the published one in every size.
SMALL = CogLMConfig(
    TransformerConfig(2, 32, 2),
    Vocabulary(50, 90, 53, 50),
    grid=(4, 6),
    max_text=8,
    num_positions=48,
    image_position=10,
)
SMALL_TOKENIZER = HVQVAEConfig(
    channels=8,
    encoder_multipliers=(1, 1, 1),
    encoder_blocks=1,
    decoder_multipliers=((1, 1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1)),
    groups=4,
    z_channels=8,
    codebook_size=64,
    codebook_dim=8,
)
TEXT = [60, 61, 62, 63, 64]
IMAGE = np.arange(24)

# For float32 sums taken in another order; the logits are of size 1.
TOLERANCE = 1e-5


def load(name):
    """The arrays of a recorded file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def random_params(init_params, config):
    """Random parameters, scales around 1. `init_params` makes zero biases, which would hide
    mistakes in how biases are used.
    """
    rng = np.random.default_rng(0)

    def leaf(path, like):
        centre, spread = (1, 0.2) if path[-1].key == "scale" else (0, 0.2)
        return jnp.asarray(centre + spread * rng.standard_normal(like.shape), jnp.float32)

    shapes = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def assert_rows_do_not_depend_on_their_batch(logits_of, network_input):
    """`logits_of` maps a NetworkInput to logits; it is called with two different rows."""
    together = logits_of(network_input)
    swapped = logits_of(jax.tree.map(lambda part: part[::-1], network_input))
    np.testing.assert_allclose(swapped[::-1], together, rtol=0, atol=TOLERANCE)
    for row in range(2):
        twice = jax.tree.map(lambda part, row=row: part[np.array([row, row])], network_input)
        np.testing.assert_allclose(logits_of(twice)[0], together[row], rtol=0, atol=TOLERANCE)


def assert_bfloat16_is_close_to_float32(logits_of, params):
    """`logits_of` is a function of parameters and an Execution."""
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    ours = logits_of(rounded, Execution(Precision(jnp.bfloat16, jnp.bfloat16)))
    assert ours.dtype == jnp.float32
    back = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    expected = logits_of(back, Execution())
    # bfloat16 keeps 8 bits, so each of about ten roundings a layer is off by up to 2^-9 of the
    # value. The largest difference seen is 0.035 of the logits' standard deviation.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=0.05 * float(jnp.std(expected)))


def quick_jit(function):
    """`jax.jit` with little optimisation by LLVM, which takes less than half as long to compile.

    For large programs that run once, to see what depends on what: that is decided before LLVM.
    Programs compared with recorded or other numbers are compiled as for users.
    """
    quick = {"xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=quick if jax.default_backend() == "cpu" else None)


def assert_gradients_reach_every_parameter(loss, params):
    for gradient in jax.tree.leaves(quick_jit(jax.grad(loss))(params)):
        assert np.isfinite(gradient).all() and gradient.any()


def parameter_count(init_params, config):
    shapes = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
