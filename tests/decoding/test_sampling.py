"""Sampling against the recorded probabilities, and every form of it against the others."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogview2_jax.config import ClusterSampling
from cogview2_jax.decoding import sampling

GOLDEN = Path(__file__).parents[1] / "golden" / "sampling.npz"
# float32 softmax of probabilities up to 1, against float64: a few units in the last place, 6e-8
# each.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


def cluster_cases(golden):
    for name in sorted({key.split("/")[1] for key in golden if key.startswith("cluster/")}):
        parts = ("temperature", "top_clusters", "within_temperature")
        temperature, top, within = (golden[f"cluster/{name}/{part}"].item() for part in parts)
        yield name, ClusterSampling(temperature, top, within)


def top_k_cases(golden):
    return sorted(int(key.split("/")[1]) for key in golden if key.startswith("topk/"))


def clusters(golden):
    labels = golden["cluster_labels"]
    return jnp.asarray(labels, jnp.int32), int(labels.max()) + 1


def chi_square_limit(degrees: int) -> float:
    """The 99.9 % point of chi-square, by Wilson and Hilferty's approximation (within 1 % from 3
    degrees on).
    """
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.0902 * spread**0.5) ** 3


def assert_drawn_from(drawn, probabilities):
    """A chi-square test of int `drawn` [n] against `probabilities` [v]; rare ones share a bin."""
    counts = np.bincount(drawn, minlength=len(probabilities))
    assert not counts[probabilities == 0].any()
    expected = probabilities * len(drawn)
    common = expected >= 10
    seen = np.append(counts[common], counts[~common].sum())
    hoped = np.append(expected[common], expected[~common].sum())
    seen, hoped = seen[hoped > 0], hoped[hoped > 0]
    assert len(hoped) > 3
    statistic = ((seen - hoped) ** 2 / hoped).sum()
    assert statistic < chi_square_limit(len(hoped) - 1)


def test_cluster_probabilities_match_the_recorded(golden):
    labels, number = clusters(golden)
    for name, how in cluster_cases(golden):
        ours = sampling.cluster_probabilities(golden["logits"], labels, number, how)
        np.testing.assert_allclose(
            ours, golden[f"cluster/{name}/probs"], rtol=0, atol=TOLERANCE, err_msg=name
        )


def test_top_k_probabilities_match_the_recorded(golden):
    traced = jax.jit(sampling.top_k_probabilities, static_argnames="max_k")
    for k in top_k_cases(golden):
        for ours in (
            sampling.top_k_probabilities(golden["logits"], k),
            traced(golden["logits"], k),
            traced(golden["logits"], k, max_k=60),
        ):
            np.testing.assert_allclose(ours, golden[f"topk/{k}/probs"], rtol=0, atol=TOLERANCE)


def test_cluster_draws_follow_the_recorded_probabilities(golden):
    labels, number = clusters(golden)
    for seed, (name, how) in enumerate(cluster_cases(golden)):
        logits = jnp.broadcast_to(golden["logits"][0], (20_000, golden["logits"].shape[-1]))
        drawn = sampling.sample_clusters(jax.random.key(seed), logits, labels, number, how)
        assert_drawn_from(np.asarray(drawn), golden[f"cluster/{name}/probs"][0])


def test_top_k_draws_follow_the_recorded_probabilities(golden):
    for k in top_k_cases(golden):
        logits = jnp.broadcast_to(golden["logits"][1], (20_000, golden["logits"].shape[-1]))
        drawn = sampling.sample_top_k(jax.random.key(k), logits, k)
        assert_drawn_from(np.asarray(drawn), golden[f"topk/{k}/probs"][1])


def test_chi_square_notices_a_wrong_temperature(golden):
    k = max(top_k_cases(golden))
    logits = jnp.broadcast_to(golden["logits"][1], (20_000, golden["logits"].shape[-1]))
    drawn = sampling.sample_top_k(jax.random.key(0), logits, k, 1.1)
    with pytest.raises(AssertionError):
        assert_drawn_from(np.asarray(drawn), golden[f"topk/{k}/probs"][1])


@pytest.mark.parametrize("block", [4, 100])
def test_draws_do_not_depend_on_blocks_or_batch(golden, block):
    labels, number = clusters(golden)
    logits = jnp.asarray(golden["logits"], jnp.float32)[None].repeat(3, 0)  # [3, rows, v]
    how, key = ClusterSampling(), jax.random.key(3)
    whole = sampling.sample_clusters(key, logits, labels, number, how)
    assert whole.shape == logits.shape[:-1] and whole.dtype == jnp.int32
    draws = sampling.sample_clusters(key, logits, labels, number, how, block=block)
    np.testing.assert_array_equal(draws, whole)
    np.testing.assert_array_equal(
        sampling.sample_clusters(key, logits[:2], labels, number, how, block=block), whole[:2]
    )
    top = sampling.sample_top_k(key, logits, 10)
    np.testing.assert_array_equal(sampling.sample_top_k(key, logits, 10, block=block), top)
    np.testing.assert_array_equal(sampling.sample_top_k(key, logits[:1], 10, block=block), top[:1])


def test_a_traced_k_draws_like_a_static_one(golden):
    draw = jax.jit(sampling.sample_top_k, static_argnames="max_k")
    key, logits = jax.random.key(1), jnp.asarray(golden["logits"], jnp.float32)
    for k in (1, 7, logits.shape[-1], logits.shape[-1] + 5):
        np.testing.assert_array_equal(
            draw(key, logits, k), sampling.sample_top_k(key, logits, k, max_k=k)
        )
    np.testing.assert_array_equal(draw(key, logits, 1), sampling.greedy(logits))


def test_greedy_is_the_most_probable_member_of_the_heaviest_cluster():
    labels = jnp.array([0, 0, 0, 1, 2, 2])
    logits = jnp.log(
        jnp.array([[0.2, 0.1, 0.2, 0.4, 0.05, 0.05], [0.1, 0.1, 0.1, 0.4, 0.15, 0.15]])
    )
    np.testing.assert_array_equal(sampling.greedy_clusters(logits, labels, 3), [0, 3])
    np.testing.assert_array_equal(sampling.greedy(logits), [3, 3])


def test_greedy_is_the_limit_of_sampling(golden):
    labels, number = clusters(golden)
    limit = ClusterSampling(1.0, top_clusters=1, within_temperature=1e-4)
    np.testing.assert_array_equal(
        sampling.sample_clusters(jax.random.key(0), golden["logits"], labels, number, limit),
        sampling.greedy_clusters(golden["logits"], labels, number),
    )


def test_equal_ones_are_settled_by_the_lowest_id():
    labels, flat = jnp.array([2, 0, 1, 1, 0, 2]), jnp.zeros((6,))
    assert sampling.greedy_clusters(flat, labels, 3) == 1  # cluster 0, its first member
    assert sampling.greedy(flat) == 0
    one = sampling.cluster_probabilities(flat, labels, 3, ClusterSampling(1.0, 1, 1.0))
    np.testing.assert_allclose(one, [0, 0.5, 0, 0, 0.5, 0])
    # Top-k keeps every token equal to the k-th, as published.
    np.testing.assert_allclose(
        sampling.top_k_probabilities(jnp.array([2.0, 2, 2, 1]), 2), [1 / 3, 1 / 3, 1 / 3, 0]
    )


def test_extreme_logits_stay_finite():
    labels = jnp.array([0, 0, 1, 1])
    logits = jnp.array([3e4, 0.0, -3e4, -3e4])
    for how in (ClusterSampling(1.0, 2, 1.0), ClusterSampling(0.5, 2, 0.1)):
        np.testing.assert_allclose(
            sampling.cluster_probabilities(logits, labels, 2, how), [1, 0, 0, 0]
        )
        assert sampling.sample_clusters(jax.random.key(0), logits, labels, 2, how) == 0


def test_empty_clusters_and_more_kept_than_there_are(golden):
    labels, number = clusters(golden)
    how = ClusterSampling(1.15, top_clusters=10_000, within_temperature=1.0)
    ours = sampling.cluster_probabilities(golden["logits"], labels, number + 7, how)
    exact = golden["logits"] / 1.15
    exact = np.exp(exact - exact.max(-1, keepdims=True))
    np.testing.assert_allclose(ours, exact / exact.sum(-1, keepdims=True), rtol=0, atol=TOLERANCE)


def test_half_precision_logits_are_summed_in_float32(golden):
    labels, number = clusters(golden)
    half = jnp.asarray(golden["logits"], jnp.bfloat16)
    how = ClusterSampling()
    np.testing.assert_array_equal(
        sampling.cluster_probabilities(half, labels, number, how),
        sampling.cluster_probabilities(half.astype(jnp.float32), labels, number, how),
    )


def test_wrong_arguments_are_named(golden):
    logits = golden["logits"]
    with pytest.raises(ValueError, match="labels must be one per token: got .3,. for logits of"):
        sampling.sample_clusters(jax.random.key(0), logits, jnp.zeros(3, int), 2, ClusterSampling())
    with pytest.raises(ValueError, match="k must be at least 1: got 0"):
        sampling.top_k_logits(logits, 0)
    with pytest.raises(ValueError, match="k must not be above max_k: got 9 and 5"):
        sampling.sample_top_k(jax.random.key(0), logits, 9, max_k=5)
    with pytest.raises(ValueError, match="max_k must be at least 1: got 0"):
        sampling.top_k_logits(logits, 3, max_k=0)


def test_the_nucleus_is_the_fewest_tokens_that_reach_p():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
    for p, kept in (
        (0.05, [1]),
        (0.4, [1]),
        (0.41, [1, 3]),
        (0.85, [1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ):
        found = np.asarray(sampling.top_p_probabilities(logits, p))
        assert np.flatnonzero(found).tolist() == kept
        whole = np.exp(np.asarray(logits)) * (found > 0)
        np.testing.assert_allclose(found, whole / whole.sum(), atol=TOLERANCE)


def test_equal_tokens_at_the_edge_of_the_nucleus_go_by_id():
    found = sampling.top_p_probabilities(jnp.zeros((2, 8)), 0.5)
    np.testing.assert_allclose(found, [[0.25] * 4 + [0] * 4] * 2, atol=TOLERANCE)


@pytest.mark.parametrize(("p", "temperature"), [(0.5, 1.0), (0.9, 0.7), (1.0, 1.3)])
def test_nucleus_draws_follow_their_probabilities(golden, p, temperature):
    row = golden["logits"][0]
    logits = jnp.broadcast_to(row, (20_000, row.shape[-1]))
    drawn = sampling.sample_top_p(jax.random.key(3), logits, p, temperature)
    expected = sampling.top_p_probabilities(row, p, temperature)
    assert_drawn_from(np.asarray(drawn), np.asarray(expected, np.float64))
    few = sampling.sample_top_p(jax.random.key(3), logits[:50], p, temperature, block=7)
    np.testing.assert_array_equal(few, drawn[:50])


def test_a_nucleus_of_wrong_size_is_refused(golden):
    for p in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="p must be above 0 and at most 1"):
            sampling.sample_top_p(jax.random.key(0), golden["logits"], p)
    one = sampling.sample_top_p(jax.random.key(0), golden["logits"], 0.9, 0)
    np.testing.assert_array_equal(one, sampling.greedy(golden["logits"]))
