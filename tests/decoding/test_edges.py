"""Settings at the edge, in every sampler and configuration: 0 is greedy, nonsense is refused; and
keys of both kinds.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogview2_jax.config import ClusterSampling, Sampling
from cogview2_jax.decoding import loops, sampling
from cogview2_jax.keys import key_batch, one_key

LABELS, CLUSTERS = jnp.arange(40) % 5, 5
# Ties in every row, so that "the lowest id" shows.
LOGITS = jnp.asarray(np.random.default_rng(0).integers(-3, 4, (3, 4, 40)), jnp.float32)
KEY = jax.random.key(0)

TEMPERATURES = {
    "sample_top_k": lambda t: sampling.sample_top_k(KEY, LOGITS, 5, t),
    "top_k_probabilities": lambda t: sampling.top_k_probabilities(LOGITS, 5, t),
    "greedy_clusters": lambda t: sampling.greedy_clusters(LOGITS, LABELS, CLUSTERS, t),
    "ClusterSampling": lambda t: ClusterSampling(t),
    "within_temperature": lambda t: ClusterSampling(within_temperature=t),
    "Sampling": lambda t: Sampling(iterative_temperature=t),
}
COUNTS = {
    "sample_top_k": lambda n: sampling.sample_top_k(KEY, LOGITS, n),
    "max_k": lambda n: sampling.sample_top_k(KEY, LOGITS, jnp.int32(1), max_k=n),
    "block": lambda n: sampling.sample_top_k(KEY, LOGITS, 5, block=n),
    "top_k_probabilities": lambda n: sampling.top_k_probabilities(LOGITS, n),
    "top_k_logits": lambda n: sampling.top_k_logits(LOGITS, n),
    "num_clusters": lambda n: sampling.cluster_sums(LOGITS, LABELS, n),
    "top_clusters": lambda n: ClusterSampling(top_clusters=n),
    "iterative_top_k": lambda n: Sampling(iterative_top_k=(9, n)),
    "candidates": lambda n: Sampling(candidates=n),
}


def refused(call, value):
    with pytest.raises(ValueError) as caught:
        call(value)
    assert "\n" not in str(caught.value) and "must be" in str(caught.value)


@pytest.mark.parametrize("temperature", [-1, -0.0001, math.nan, math.inf, -math.inf, "1", None])
@pytest.mark.parametrize("name", TEMPERATURES)
def test_temperatures_that_mean_nothing_are_refused(name, temperature):
    refused(TEMPERATURES[name], temperature)


@pytest.mark.parametrize("count", [0, -1, 1.5, 2.0, math.nan, math.inf, "2", True])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_that_mean_nothing_are_refused(name, count):
    refused(COUNTS[name], count)


@pytest.mark.parametrize("top_k", [(), [40], 40, None])
def test_top_k_of_the_rounds_is_a_tuple(top_k):
    refused(lambda value: Sampling(iterative_top_k=value), top_k)


@pytest.mark.parametrize("upweight", [math.nan, math.inf, "1.4"])
def test_up_weighting_is_a_number(upweight):
    refused(lambda value: Sampling(text_upweight=value), upweight)


# 0, and what float32 logits cannot be divided by.
@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), 1e-45, 1e-300])
def test_temperature_0_is_greedy(zero):
    most_probable = LOGITS.argmax(-1)
    how = ClusterSampling(float(zero), 2)
    for drawn in (
        sampling.sample_top_k(KEY, LOGITS, 5, zero),
        sampling.sample_top_k(KEY, LOGITS, 5, jnp.float32(zero)),
        sampling.greedy_clusters(LOGITS, LABELS, CLUSTERS, zero),
        sampling.sample_clusters(KEY, LOGITS, LABELS, CLUSTERS, how),
        sampling.sample_clusters(KEY, LOGITS, LABELS, CLUSTERS, how, block=2),
    ):
        np.testing.assert_array_equal(drawn, most_probable)
        assert drawn.dtype == jnp.int32
    one_hot = jax.nn.one_hot(most_probable, 40)
    np.testing.assert_array_equal(sampling.top_k_probabilities(LOGITS, 5, zero), one_hot)
    exact = sampling.cluster_probabilities(LOGITS, LABELS, CLUSTERS, how)
    np.testing.assert_array_equal(exact, one_hot)


def test_within_temperature_0_takes_the_most_probable_of_a_drawn_cluster():
    how = ClusterSampling(1.0, 3, within_temperature=0)
    row = LOGITS[0, 0]
    probabilities = sampling.cluster_probabilities(row, LABELS, CLUSTERS, how)
    sums = np.sort(sampling.cluster_sums(jax.nn.softmax(row), LABELS, CLUSTERS))[::-1][:3]
    best = [int(jnp.where(LABELS == c, row, -jnp.inf).argmax()) for c in range(CLUSTERS)]
    kept = np.flatnonzero(probabilities)
    assert len(kept) == 3 and set(kept.tolist()) <= set(best)
    np.testing.assert_allclose(np.sort(probabilities[kept])[::-1], sums / sums.sum(), rtol=1e-6)
    many = jnp.broadcast_to(row, (4000, 40))
    drawn = sampling.sample_clusters(KEY, many, LABELS, CLUSTERS, how)
    shares = np.bincount(drawn, minlength=40) / 4000
    # Four standard deviations of a share of 4,000 draws.
    np.testing.assert_allclose(shares, probabilities, rtol=0, atol=4 * 0.5 / 4000**0.5)
    assert not shares[np.asarray(probabilities) == 0].any()


def test_numpy_numbers_are_numbers():
    np.testing.assert_array_equal(
        sampling.sample_top_k(KEY, LOGITS, np.int64(5), np.float64(0.7)),
        sampling.sample_top_k(KEY, LOGITS, 5, 0.7),
    )
    same = ClusterSampling(np.float32(1), np.int32(3))
    assert same == ClusterSampling(1.0, 3) and dataclasses.replace(same, top_clusters=4)


def test_more_than_there_are_is_all_of_them():
    np.testing.assert_array_equal(
        sampling.top_k_probabilities(LOGITS, 10**6), jax.nn.softmax(LOGITS)
    )


# --- Keys -----------------------------------------------------------------------------------------


def test_an_older_key_draws_the_same():
    old = jax.random.PRNGKey(3)
    assert one_key(old) == jax.random.key(3)
    assert one_key(np.asarray(old)) == jax.random.key(3)
    batch = jax.random.split(old, 4)
    np.testing.assert_array_equal(
        jax.random.key_data(key_batch(batch)),
        jax.random.key_data(key_batch(jax.random.split(jax.random.key(3), 4))),
    )
    how = ClusterSampling()
    for draw in (
        lambda key: sampling.sample_top_k(key, LOGITS, 5),
        lambda key: sampling.sample_clusters(key, LOGITS, LABELS, CLUSTERS, how),
    ):
        np.testing.assert_array_equal(draw(old), draw(jax.random.key(3)))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (7, "got 7; pass jax.random.key(7)"),
        (1.5, "got 1.5; pass jax.random.key(seed)"),
        ("7", "got '7'; pass"),
        (None, "got NoneType; pass"),
        (np.arange(2), "got int64 [2]; pass"),
        (np.zeros(3, np.uint32), "got uint32 [3]; pass"),
        (jax.random.split(jax.random.key(0), 2), "got keys of shape (2,); pass key[0]"),
        (jax.random.split(jax.random.PRNGKey(0), 2), "got keys of shape (2,); pass key[0]"),
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_what_is_no_key_is_refused_in_one_line(key, said, temperature):
    how = ClusterSampling(temperature)
    for draw in (
        lambda: sampling.sample_top_k(key, LOGITS, 5, temperature),
        lambda: sampling.sample_clusters(key, LOGITS, LABELS, CLUSTERS, how),
    ):
        with pytest.raises(ValueError) as caught:
            draw()
        assert said in str(caught.value) and "\n" not in str(caught.value)


def test_one_key_is_no_batch_of_keys():
    with pytest.raises(ValueError, match=r"keys must be one for each sample.*jax.random.split"):
        key_batch(jax.random.key(0))
    with pytest.raises(ValueError, match="keys must come from jax.random.key: got 3"):
        key_batch(3)


def test_numbers_too_large_for_jax_are_taken_as_numbers():
    """A whole number of 32 bits or more is no argument of a jitted function."""
    np.testing.assert_array_equal(sampling.top_k_logits(LOGITS, 2**40), LOGITS)
    token = sampling.sample_top_k(KEY, LOGITS, 2**40, 2**40)
    assert token.shape == LOGITS.shape[:-1]
    how = ClusterSampling(2**40, within_temperature=2**40)
    assert sampling.sample_clusters(KEY, LOGITS, LABELS, CLUSTERS, how).shape == token.shape
    assert sampling.greedy_clusters(LOGITS, LABELS, CLUSTERS, 2**40).shape == token.shape
    with pytest.raises(ValueError, match="temperature must be finite"):
        ClusterSampling(10**400)


@pytest.mark.parametrize("logits", [jnp.ones(5, complex), jnp.ones((2, 0)), jnp.ones(())])
def test_logits_that_are_none_are_refused(logits):
    for call in (
        lambda: sampling.top_k_logits(logits, 1),
        lambda: sampling.sample_top_k(KEY, logits, 1),
        lambda: sampling.greedy_clusters(logits, LABELS[:5], CLUSTERS),
        lambda: sampling.sample_clusters(KEY, logits, LABELS[:5], CLUSTERS, ClusterSampling()),
    ):
        with pytest.raises(ValueError, match="logits must be"):
            call()


def test_loops_of_no_turn():
    tokens = jnp.ones((2, 4), jnp.int32)
    assert loops.lopar(None, None, tokens, np.ones((0, 4), bool), 0) is tokens
    with pytest.raises(ValueError, match="num_tokens must be at least 1: got 0"):
        loops.decode(None, None, jnp.zeros((2, 3)), (), 0)
