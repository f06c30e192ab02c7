"""The loops against Python loops, over toy models: they know no other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogview2_jax.decoding import loops

BATCH, VOCABULARY, LENGTH = 3, 11, 9
TABLE = jax.random.normal(jax.random.key(0), (VOCABULARY, VOCABULARY))


def step(cache, tokens, i):
    """A toy model: its logits depend on all tokens so far, on their order and on the step."""
    cache = 0.5 * cache + TABLE[tokens]
    return cache + jnp.cos(i + jnp.arange(VOCABULARY)), cache


def sampler(key):
    def sample(logits, i):
        # The step also enters the sampling, as a schedule of temperatures would.
        logits, key_of_i = logits / (1 + 0.1 * i), jax.random.fold_in(key, i)
        return jax.random.categorical(key_of_i, logits, axis=-1).astype(jnp.int32)

    return sample


# Compiled once for all tests.
step_once, sample_once = jax.jit(step), jax.jit(lambda key, logits, i: sampler(key)(logits, i))
FIRST_LOGITS = np.random.default_rng(1).standard_normal((BATCH, VOCABULARY), np.float32)
EMPTY = np.zeros((BATCH, VOCABULARY), np.float32)


TRACES: list[int] = []  # `num_tokens` of every compilation of `_decode`


@functools.partial(jax.jit, static_argnames="num_tokens")
def _decode(key, logits, cache, num_tokens):
    TRACES.append(num_tokens)
    return loops.decode(step, sampler(key), logits, cache, num_tokens)


def decoded(key, logits=FIRST_LOGITS, cache=EMPTY, num_tokens=LENGTH):
    return _decode(key, logits, cache, num_tokens)


def decoded_by_python(key, logits, cache, num_tokens):
    tokens = []
    for i in range(num_tokens):
        tokens.append(sample_once(key, logits, i))
        if i + 1 < num_tokens:
            logits, cache = step_once(cache, tokens[-1], i)
    return np.stack(tokens, 1), cache


@pytest.mark.parametrize("num_tokens", [1, 2, LENGTH])
def test_decode_is_a_python_loop(num_tokens):
    key = jax.random.key(7)
    tokens, cache = decoded(key, num_tokens=num_tokens)
    assert tokens.shape == (BATCH, num_tokens) and tokens.dtype == jnp.int32
    expected, expected_cache = decoded_by_python(key, FIRST_LOGITS, EMPTY, num_tokens)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(cache, expected_cache, rtol=1e-6)


def test_a_shorter_decode_is_the_beginning_of_a_longer_one():
    key = jax.random.key(3)
    shorter, _ = decoded(key, num_tokens=2)
    np.testing.assert_array_equal(shorter, decoded(key)[0][:, :2])


def test_one_compilation_serves_every_seed_and_prompt():
    for seed in range(4):
        key, logits, cache = jax.random.key(seed), seed * FIRST_LOGITS, EMPTY + seed
        tokens, _ = decoded(key, logits, cache)
        expected, _ = decoded_by_python(key, logits, cache, LENGTH)
        np.testing.assert_array_equal(tokens, expected)
    assert TRACES.count(LENGTH) == 1


def predict(cells):
    """A toy network: each cell's logits follow from its left neighbour."""
    return 3 * TABLE[jnp.roll(cells, 1, axis=-1)]


def drawer(key):
    def draw(logits, round_):
        key_of_round = jax.random.fold_in(key, round_)
        return jax.random.categorical(key_of_round, logits / (1 + round_)).astype(jnp.int32)

    return draw


@jax.jit
def one_round(key, tokens, masked, mask_token, number):
    logits = predict(jnp.where(masked, mask_token, tokens))
    return jnp.where(masked, drawer(key)(logits, number), tokens)


def rounds_by_python(tokens, reset, mask_token, key):
    for number, masked in enumerate(reset):
        tokens = one_round(key, tokens, masked, mask_token, number)
    return tokens


CELLS = np.random.default_rng(2).integers(0, VOCABULARY, (BATCH, 12)).astype(np.int32)


@pytest.mark.parametrize("lead", [(), (BATCH,)], ids=["one_schedule", "a_schedule_for_each_row"])
def test_lopar_is_a_python_loop(lead):
    key, mask_token = jax.random.key(4), VOCABULARY - 1
    reset = np.random.default_rng(0).random((4, *lead, 12)) < 0.5
    ours = loops.lopar(predict, drawer(key), CELLS, reset, mask_token)
    expected = rounds_by_python(CELLS, reset, mask_token, key)
    np.testing.assert_array_equal(ours, expected)
    assert ours.dtype == jnp.int32


def test_the_schedule_is_data():
    """One compilation for every schedule of as many rounds, and no change where none writes."""
    traces = []

    @jax.jit
    def run(reset, key):
        traces.append(1)
        return loops.lopar(predict, drawer(key), CELLS, reset, 10)

    for seed in range(3):
        reset = np.random.default_rng(seed).random((3, 12)) < 0.5
        expected = rounds_by_python(CELLS, reset, 10, jax.random.key(seed))
        np.testing.assert_array_equal(run(reset, jax.random.key(seed)), expected)
    nothing = np.zeros((3, 12), bool)
    np.testing.assert_array_equal(run(nothing, jax.random.key(0)), CELLS)
    assert len(traces) == 1
