"""The weights of a bundle in the place of the seeded ones.

Published files hold float16, and so does a bundle made from them; the recorded numbers come from
the seeded float32 weights. So what rounding took from the seeded weights is added to the bundle's
in float32. Where the bundle has exactly the rounded weights, the sum is exactly the seeded ones,
and every recorded number must hold within the tolerances of float32; where it has others, their
difference from the right ones reaches the network in full.
"""

from pathlib import Path

import jax
import numpy as np
import safetensors

from cogview2_jax import bundle as bundles
from experiments.parity.golden import Check, equal

Params = dict


def params_of(network: str, seeded: Params, bundle: Path | None) -> tuple[Params, list[Check]]:
    """The parameters to run, from a tree of the seeded ones in float32, and the check that the
    bundle's are those, rounded. Without a bundle: the seeded ones and no check.

    Raises ValueError, in one line, for a bundle without this network or of other shapes.
    """
    if bundle is None:
        return seeded, []
    file = bundles.locate(bundle) / bundles.WEIGHTS
    differ = 0
    with safetensors.safe_open(file, framework="numpy") as stored:
        there = set(stored.keys())

        def one(path: tuple, expected: np.ndarray) -> np.ndarray:
            nonlocal differ
            name = f"{network}/{jax.tree_util.keystr(path, simple=True, separator='/')}"
            if name not in there:
                raise ValueError(f"{file} lacks tensor {name!r}")
            ours = stored.get_tensor(name)
            if ours.shape != expected.shape:
                raise ValueError(
                    f"{file}: tensor {name!r} must have shape {expected.shape}: got {ours.shape}"
                )
            # Published first, then as the bundle stores it.
            rounded = expected.astype(np.float16).astype(ours.dtype)
            differ += int((ours != rounded).sum())
            return ours.astype(np.float32) + (expected - rounded.astype(np.float32))

        params: Params = jax.tree_util.tree_map_with_path(one, seeded)
    size = sum(leaf.size for leaf in jax.tree.leaves(seeded))
    check = equal("weights of the bundle", differ, 0)
    return params, [check._replace(error=float(differ), note=f"{size:,} numbers")]
