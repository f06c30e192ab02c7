"""The loops against Python loops, over toy models: they know no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogview2_jax.decoding import loops

BATCH, VOCABULARY, LENGTH = 3, 11, 9
TABLE = jax.random.normal(jax.random.key(0), (VOCABULARY, VOCABULARY))


def step(cache, tokens, i):
    """A toy model whose next token depends on all tokens so far, on their order and on the step."""
    cache = 0.5 * cache + TABLE[tokens]
    return cache + jnp.cos(i + jnp.arange(VOCABULARY)), cache


def sample(key, logits, i):
    # The step also enters the sampling, as a schedule of temperatures would.
    return jax.random.categorical(key, logits / (1 + 0.1 * i), axis=-1).astype(jnp.int32)


def first_logits():
    return jax.random.normal(jax.random.key(1), (BATCH, VOCABULARY))


def decoded(key, num_tokens):
    cache = jnp.zeros((BATCH, VOCABULARY))
    return loops.decode(step, sample, first_logits(), cache, key, num_tokens)


@pytest.mark.parametrize("num_tokens", [1, 2, LENGTH])
def test_decode_is_a_python_loop(num_tokens):
    key = jax.random.key(7)
    tokens, cache = decoded(key, num_tokens)
    assert tokens.shape == (BATCH, num_tokens) and tokens.dtype == jnp.int32
    logits, expected_cache, expected = first_logits(), jnp.zeros((BATCH, VOCABULARY)), []
    for i in range(num_tokens):
        expected.append(sample(jax.random.fold_in(key, i), logits, i))
        if i + 1 < num_tokens:
            logits, expected_cache = step(expected_cache, expected[-1], i)
    np.testing.assert_array_equal(tokens, np.stack(expected, 1))
    np.testing.assert_allclose(cache, expected_cache, rtol=1e-6)


def test_a_shorter_decode_is_the_beginning_of_a_longer_one():
    key = jax.random.key(3)
    np.testing.assert_array_equal(decoded(key, 4)[0], decoded(key, LENGTH)[0][:, :4])


def test_one_compilation_serves_every_seed_and_prompt():
    traces = []

    @jax.jit
    def run(key, logits, cache):
        traces.append(1)
        return loops.decode(step, sample, logits, cache, key, LENGTH)[0]

    prompts = [(seed * first_logits(), jnp.ones((BATCH, VOCABULARY))) for seed in range(4)]
    drawn = [run(jax.random.key(seed), *prompt) for seed, prompt in enumerate(prompts)]
    assert len(traces) == 1
    for tokens, (seed, (logits, cache)) in zip(drawn, enumerate(prompts), strict=True):
        key = jax.random.key(seed)
        expected, _ = loops.decode(step, sample, logits, cache, key, LENGTH)
        np.testing.assert_array_equal(tokens, expected)


def predict(cells):
    """A toy network: each cell's logits follow from its left neighbour."""
    return 3 * TABLE[jnp.roll(cells, 1, axis=-1)]


def draw(key, logits, round_):
    return jax.random.categorical(key, logits / (1 + round_), axis=-1).astype(jnp.int32)


def rounds_by_python(tokens, reset, write, mask_token, key):
    for number in range(len(reset)):
        logits = predict(np.where(reset[number], mask_token, tokens))
        drawn = draw(jax.random.fold_in(key, number), logits, number)
        tokens = np.where(write[number], drawn, tokens)
    return tokens


CELLS = np.random.default_rng(2).integers(0, VOCABULARY, (BATCH, 12)).astype(np.int32)


@pytest.mark.parametrize("lead", [(), (BATCH,)], ids=["one_schedule", "a_schedule_for_each_row"])
def test_lopar_is_a_python_loop(lead):
    rng, key = np.random.default_rng(0), jax.random.key(4)
    # Cells may be reset and not written, and written without having been reset.
    reset, write = rng.random((2, 4, *lead, 12)) < 0.5
    ours = loops.lopar(predict, draw, jnp.asarray(CELLS), reset, write, VOCABULARY - 1, key)
    expected = rounds_by_python(CELLS, reset, write, VOCABULARY - 1, key)
    np.testing.assert_array_equal(ours, expected)
    assert ours.dtype == jnp.int32


def test_the_schedule_is_data():
    """One compilation for every schedule of as many rounds, and no change where none writes."""
    traces = []

    @jax.jit
    def run(reset, write, key):
        traces.append(1)
        return loops.lopar(predict, draw, jnp.asarray(CELLS), reset, write, 10, key)

    for seed in range(3):
        reset = np.random.default_rng(seed).random((3, 12)) < 0.5
        expected = rounds_by_python(CELLS, reset, reset, 10, jax.random.key(seed))
        np.testing.assert_array_equal(run(reset, reset, jax.random.key(seed)), expected)
    nothing = np.zeros((3, 12), bool)
    np.testing.assert_array_equal(run(~nothing, nothing, jax.random.key(0)), CELLS)
    assert len(traces) == 1
