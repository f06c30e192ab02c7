"""Random weights of FID's Inception under their published names."""

import functools

import jax
import numpy as np

from cogview2_jax.evaluation import inception


@functools.cache
def published() -> dict[str, np.ndarray]:
    """name → float32, of a size that keeps activations alive through all layers."""
    rng = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(inception.shapes()):
        name = ".".join(key.key for key in keys[:-1])
        if keys[-1].key != "kernel":
            continue
        if name == "fc":
            made["fc.weight"] = rng.standard_normal(leaf.shape[::-1]) / 20
            made["fc.bias"] = rng.standard_normal(leaf.shape[1:])
            continue
        y, x, inputs, outputs = leaf.shape
        spread = np.sqrt(2 / (y * x * inputs))
        made[f"{name}.conv.weight"] = spread * rng.standard_normal((outputs, inputs, y, x))
        for part, low, high in (
            ("weight", 0.6, 1.4),
            ("bias", -0.1, 0.3),
            ("running_mean", -0.1, 0.1),
            ("running_var", 0.8, 1.2),
        ):
            made[f"{name}.bn.{part}"] = rng.uniform(low, high, outputs)
    return {name: values.astype(np.float32) for name, values in made.items()}
