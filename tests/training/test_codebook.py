"""The codebook: where it is placed, how it moves, and that its codes come into use and stay so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogview2_jax.tokenizer import image
from cogview2_jax.training.codebook import (
    CodebookStatistics,
    codebook_revision,
    init_statistics,
    kmeans_plus_plus,
    revive_dead_codes,
    update_codebook,
    usage,
    watch_usage,
)
from cogview2_jax.training.losses import Assigned
from cogview2_jax.training.step import TrainState


def test_codebook_average_converges_to_the_mean_of_its_vectors():
    codebook = jnp.array([[0.0, 0.0], [10.0, 10.0]])
    statistics = init_statistics(codebook)
    vectors = jnp.array([[1.0, 1.0], [3.0, 1.0], [10.0, 12.0], [10.0, 12.0]])

    @jax.jit
    def step(codebook, statistics):
        ids = image.nearest_code(vectors, codebook)
        return update_codebook(statistics, vectors, ids, decay=0.9)

    for _ in range(200):
        codebook, statistics = step(codebook, statistics)
    np.testing.assert_allclose(codebook, [[2, 1], [10, 12]], atol=1e-3)
    np.testing.assert_allclose(statistics.cluster_size, [2, 2], atol=1e-3)


def test_idle_is_counted_in_uses_of_the_average_code():
    codebook = jnp.eye(4)
    statistics = init_statistics(codebook)
    assert usage(statistics) == {}
    ids = jnp.array([0, 0, 0, 1])
    for _ in range(3):
        _, statistics = update_codebook(statistics, codebook[ids], ids)
    np.testing.assert_array_equal(statistics.idle, [0, 0, 23, 23])
    # However many vectors a batch has, a code is out of use after 10 steps at the soonest.
    many = jnp.zeros(400, int)
    _, statistics = update_codebook(statistics, codebook[many], many)
    np.testing.assert_array_equal(statistics.idle, [0, 2, 25, 25])


def test_dead_codes_move_onto_vectors_and_others_stay():
    codebook = jnp.array([[0.0, 0.0], [50.0, 50.0], [60.0, 60.0], [70.0, 70.0], [80.0, 80.0]])
    idle = jnp.array([0.0, 40.0, 39.0, 41.0, 99.0])
    statistics = CodebookStatistics(jnp.array([4.0, 1, 1, 1, 1]), codebook, idle)
    vectors = jnp.array([[0.0, 0.1], [5.0, 5.0], [6.0, 5.0]])
    moved, statistics = revive_dead_codes(jax.random.key(0), codebook, statistics, vectors)
    np.testing.assert_array_equal(moved[jnp.array([0, 2])], codebook[jnp.array([0, 2])])
    # Each onto another vector, and the farther ones are all but surely the first.
    assert sorted(moved[jnp.array([1, 3])].tolist()) == [[5, 5], [6, 5]]
    np.testing.assert_allclose(moved[4], [0, 0.1])
    np.testing.assert_array_equal(statistics.idle, [0, 20, 39, 20, 20])
    np.testing.assert_allclose(
        statistics.embed_avg / statistics.cluster_size[:, None],
        [[0, 0], moved[1], [60, 60], moved[3], moved[4]],
        rtol=1e-5,
    )


def test_with_more_dead_codes_than_vectors_the_rest_wait():
    codebook = jnp.zeros((5, 2))
    statistics = CodebookStatistics(jnp.ones(5), codebook, jnp.full(5, 40.0))
    vectors = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    moved, statistics = revive_dead_codes(jax.random.key(0), codebook, statistics, vectors)
    assert sorted(moved[:2].tolist()) == [[1, 2], [3, 4]]
    np.testing.assert_array_equal(moved[2:], 0)
    np.testing.assert_array_equal(statistics.idle, [20, 20, 40, 40, 40])


CODES, VECTORS, STEPS, BEGIN = 64, 256, 200, 20


def vectors_at(step):
    """Vectors like those of an encoder in training: a cloud that moves, ever more slowly."""
    rng = np.random.default_rng((5, step))
    moved = 0.1 * (step - step**2 / (2 * STEPS))
    return jnp.asarray(rng.standard_normal((VECTORS, 4)) + moved, jnp.float32)


def codebook_after_training(revive_every):
    revise = jax.jit(codebook_revision(begin=BEGIN, revive_every=revive_every))
    nearest = jax.jit(image.nearest_code)
    codes = kmeans_plus_plus(np.random.default_rng(0), np.asarray(vectors_at(BEGIN)), CODES)
    params = {"codebook": jnp.asarray(codes)}
    statistics = init_statistics(params["codebook"])
    for step in range(STEPS):
        vectors = vectors_at(step)
        ids = nearest(vectors, params["codebook"])
        seen = Assigned(vectors[None], ids[None])
        params, statistics = revise(params, statistics, seen, step, jax.random.key(step))
        if step < BEGIN:
            assert usage(statistics) == {}
    used = np.unique(
        np.concatenate([nearest(vectors_at(STEPS + n), params["codebook"]) for n in range(4)])
    )
    return len(used) / CODES, usage(statistics)


def test_a_short_run_ends_with_its_codes_in_use():
    used, figures = codebook_after_training(revive_every=10)
    assert used >= 0.8 and figures["codes_used"] >= 0.8
    assert 0.5 * CODES < figures["perplexity"] <= CODES
    # As before, when no code was idle for long enough within the run.
    used, figures = codebook_after_training(revive_every=0)
    assert used < 0.1 and figures["codes_used"] < 0.1
    assert figures["perplexity"] <= figures["codes_used"] * CODES


@pytest.mark.parametrize(
    ("sizes", "perplexity"), [([2.0, 2, 2, 2], 4), ([1.0, 0, 0, 0], 1), ([1.0, 1, 0, 0], 2)]
)
def test_perplexity_is_the_number_of_codes_used_equally(sizes, perplexity):
    statistics = CodebookStatistics(jnp.array(sizes), jnp.zeros((4, 2)), jnp.zeros(4))
    assert usage(statistics) == {"codes_used": 1.0, "perplexity": pytest.approx(perplexity)}


def test_few_codes_in_use_are_warned_of_once_and_at_the_end():
    watch = watch_usage(low=0.5, logs=2)

    def seen(*idle, last=False):
        size = len(idle)
        extra = CodebookStatistics(jnp.ones(size), jnp.zeros((size, 2)), jnp.array(idle))
        return watch(TrainState((), (), extra, (), 0), last).warning

    few, many = (0.0, 99.0, 20.0), (0.0, 19.0, 20.0)
    assert seen(20.0, 20.0, 99.0, last=True) == ""  # the codebook is not placed yet
    assert seen(*few) == seen(*many) == seen(*few) == ""
    warning = seen(*few)
    assert warning.startswith("only 33% of the 3 codes are in use: try a lower learning rate")
    assert seen(*few) == ""
    assert seen(*few, last=True) == warning
    assert seen(*many, last=True) == ""


def test_kmeans_plus_plus_finds_separate_groups():
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [100, 0], [0, 100], [100, 100]], float)
    vectors = (centres[:, None] + rng.normal(0, 1, (4, 50, 2))).reshape(-1, 2)
    codes = kmeans_plus_plus(rng, vectors, 4)
    nearest = ((codes[:, None] - centres) ** 2).sum(axis=-1).argmin(axis=1)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3]
