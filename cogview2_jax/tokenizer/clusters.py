"""Clusters of the codebook, for cluster sampling (paper section 3.3; the published labels are
k-means too).
"""

import numpy as np
from scipy.cluster.vq import kmeans2


def cluster_codebook(codebook: np.ndarray, num_clusters: int, *, seed: int = 0) -> np.ndarray:
    """k-means of the code vectors. [v, d] → labels int32 [v], every label of 0…num_clusters−1 in
    use.

    Raises:
        ValueError: more clusters than distinct codes.
    """
    codes = np.asarray(codebook, np.float64)
    distinct = len(np.unique(codes, axis=0))
    if not 0 < num_clusters <= distinct:
        raise ValueError(f"num_clusters must be 1 to {distinct} distinct codes: got {num_clusters}")
    # SciPy drops to fewer clusters when one runs empty; another start seldom does, and equal labels
    # are what cluster sampling needs, so starts are tried in order.
    for start in range(seed, seed + 50):
        _, labels = kmeans2(codes, num_clusters, iter=50, minit="++", missing="warn", rng=start)
        if len(np.unique(labels)) == num_clusters:
            return labels.astype(np.int32)
    raise ValueError(f"no k-means start of 50 kept all {num_clusters} clusters of {distinct} codes")
