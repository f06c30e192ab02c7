"""Clusters of the codebook, for cluster sampling (paper section 3.3). The published labels are from
k-means, too.
"""

import numpy as np
from scipy.cluster.vq import kmeans2


def cluster_codebook(codebook: np.ndarray, num_clusters: int, *, seed: int = 0) -> np.ndarray:
    """k-means of the code vectors [v, d] → labels int32 [v]. Every label from 0 to num_clusters − 1
    is used.

    Raises ValueError for more clusters than distinct codes.
    """
    codes = np.asarray(codebook, np.float64)
    distinct = len(np.unique(codes, axis=0))
    if not 0 < num_clusters <= distinct:
        raise ValueError(f"num_clusters must be 1 to {distinct} distinct codes: got {num_clusters}")
    # In rare cases SciPy leaves a cluster empty: then the next seed is tried. Trying seeds in order
    # keeps the labels a function of `seed`.
    for start in range(seed, seed + 50):
        _, labels = kmeans2(codes, num_clusters, iter=50, minit="++", missing="warn", rng=start)
        if len(np.unique(labels)) == num_clusters:
            return labels.astype(np.int32)
    raise ValueError(
        f"k-means left a cluster empty for all of 50 seeds: use fewer clusters than {num_clusters}"
        f" for {distinct} distinct codes"
    )
