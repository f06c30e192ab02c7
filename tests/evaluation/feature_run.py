"""`python -m tests.evaluation.feature_run PICTURES OUT`: features by a small encoder, and the peak
of the memory in MiB.
"""

import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cogview2_jax.data.sources import PictureFolder
from cogview2_jax.evaluation.features import Encoder, write_features

WIDTH, CLASSES = 12, 5


@jax.jit
def _apply(pictures):
    rng = np.random.default_rng(0)
    flat = pictures.astype(jnp.float32).reshape(len(pictures), -1) / 255
    features = jnp.tanh(flat @ rng.standard_normal((flat.shape[1], WIDTH)).astype(np.float32))
    return features, features @ rng.standard_normal((WIDTH, CLASSES)).astype(np.float32)


ENCODER = Encoder(_apply, WIDTH, CLASSES, {"encoder": "small"})


def run(pictures: Path, out: Path, **how):
    how = {"size": 16, "blurs": (0, 1), "batch_size": 8, "shard_size": 100, "workers": 2} | how
    return write_features(PictureFolder(pictures), out, ENCODER, **how)


if __name__ == "__main__":
    report = run(Path(sys.argv[1]), Path(sys.argv[2]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(report.records, sum(report.refused.values()), report.complete, round(peak), flush=True)
