"""Clusters of the codebook: near codes share a cluster, and every label is used."""

import numpy as np
import pytest

from cogview2_jax.tokenizer.clusters import cluster_codebook


def test_clusters_group_what_is_near_and_use_every_label():
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 50, (6, 3))
    codebook = np.repeat(centres, 10, axis=0) + rng.normal(0, 0.1, (60, 3))
    labels = cluster_codebook(codebook, 6)
    assert labels.dtype == np.int32
    groups = labels.reshape(6, 10)
    assert (groups == groups[:, :1]).all()
    assert sorted(groups[:, 0].tolist()) == list(range(6))
    np.testing.assert_array_equal(labels, cluster_codebook(codebook, 6))


def test_more_clusters_than_codes_is_refused():
    with pytest.raises(ValueError, match="num_clusters must be 1 to 2 distinct codes: got 3"):
        cluster_codebook(np.array([[0.0], [0.0], [1.0]]), 3)
