"""Iterative super-resolution: what a cell depends on, pads, batches, rounds, size."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from cogview2_jax.config import (
    CogLMConfig,
    IterativeSRConfig,
    TransformerConfig,
    Vocabulary,
)
from cogview2_jax.decoding import loops, sampling
from cogview2_jax.networks import coglm, inputs, iterative_sr
from cogview2_jax.sharding import Execution
from pallas_kernels.local_attention.window import Window
from tests.common import (
    TOLERANCE,
    assert_bfloat16_is_close_to_float32,
    assert_gradients_reach_every_parameter,
    assert_rows_do_not_depend_on_their_batch,
    parameter_count,
    quick_jit,
    random_params,
)

SMALL = IterativeSRConfig(
    TransformerConfig(num_layers=1, hidden_size=32, num_heads=2),
    Vocabulary(num_image=40, size=70, pad=43, unknown=40),
    grid=(6, 7),
    text_slots=5,
    num_positions=12,
    window=(5, 3),
    order=((-1, 0, 1), (2, 3, -2)),
    rounds=3,
)
TEXT = [50, 51, 52]
CELLS = np.arange(84).reshape(2, 42) % 40


@pytest.fixture(scope="module")
def params():
    return random_params(iterative_sr.init_params, SMALL)


def inputs_of(texts, cells, config=SMALL):
    text, is_text = inputs.left_padded(texts, config.text_slots, config.vocabulary)
    return inputs.iterative_super_resolution(text, is_text, cells, config)


_apply = jax.jit(iterative_sr.apply, static_argnames=("config", "execution"))


def logits_of(params, network_input, config=SMALL, execution=Execution()):
    return _apply(params, network_input, config=config, execution=execution)


def test_a_cell_sees_all_words_and_its_window(params):
    """By gradient: each slot has its own row of a position table, so the tables stand for slots."""
    network_input = inputs_of([TEXT], CELLS[:1])
    direction = jax.random.normal(jax.random.key(2), (SMALL.vocabulary.num_image,))

    def readings(tables):
        return iterative_sr.apply(params | tables, network_input, config=SMALL)[0] @ direction

    names = ("position_embeddings", "extra_position_embeddings")
    jacobian = quick_jit(jax.jacrev(readings))({name: params[name] for name in names})
    words, cells = (np.abs(jacobian[name]).max(-1) for name in names)
    # Pads have position 0 too, but no cell attends to them.
    assert (words[:, : len(TEXT)] > 0).all() and not words[:, len(TEXT) :].any()
    near = Window(*SMALL.window).dense_mask(SMALL.grid)
    np.testing.assert_array_equal(cells > 0, near.reshape(42, 42))


def test_pads_change_nothing(params):
    expected = logits_of(params, inputs_of([TEXT] * 2, CELLS))
    wider = dataclasses.replace(SMALL, text_slots=9)
    ours = logits_of(params, inputs_of([TEXT] * 2, CELLS, wider), wider)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


def test_a_row_does_not_depend_on_its_batch(params):
    network_input = inputs_of([TEXT, TEXT[:1]], CELLS)
    assert_rows_do_not_depend_on_their_batch(functools.partial(logits_of, params), network_input)


def test_without_words_all_is_finite_and_gradients_reach_every_parameter(params):
    """The first row has pads alone: its text part is empty, and what remains is the window."""
    network_input = inputs_of([TEXT] * 2, CELLS)
    network_input = network_input._replace(mask=network_input.mask.at[0].set(False))

    def loss(params):
        logits = iterative_sr.apply(params, network_input, config=SMALL)
        return (jax.nn.log_softmax(logits) ** 2).mean()

    assert_gradients_reach_every_parameter(loss, params)
    assert np.isfinite(logits_of(params, network_input)).all()


def test_bfloat16_is_close_to_float32(params):
    network_input = inputs_of([TEXT] * 2, CELLS)
    assert_bfloat16_is_close_to_float32(
        lambda params, execution: logits_of(params, network_input, execution=execution), params
    )


def test_rounds_over_the_network_are_a_python_loop(params):
    reset, mask_token = inputs.lopar_schedule(SMALL), SMALL.vocabulary.start_of_image
    key = jax.random.key(5)

    def draw(logits, number):
        return sampling.sample_top_k(jax.random.fold_in(key, number), logits, 5)

    @jax.jit
    def refined(params, tokens, reset):
        def predict(cells):
            network_input = inputs_of([TEXT] * 2, cells)
            return iterative_sr.apply(params, network_input, config=SMALL)

        return loops.lopar(predict, draw, tokens, reset, mask_token)

    ours = refined(params, CELLS.astype(np.int32), reset)
    cells, draw_once = CELLS, jax.jit(draw)
    for number, masked in enumerate(reset):
        logits = logits_of(params, inputs_of([TEXT] * 2, np.where(masked, mask_token, cells)))
        cells = np.where(masked, draw_once(logits, number), cells)
    np.testing.assert_array_equal(ours, cells)
    assert (ours != CELLS).any() and not (ours != CELLS)[:, ~reset[0]].any()


def test_the_published_network_has_5_9_billion_parameters():
    e, n = 3072, 48
    layer = (e * 3 * e + 3 * e) + (e * e + e) + (e * 4 * e + 4 * e) + (4 * e * e + e) + 4 * 2 * e
    tables = (150_003 + 1024 + 3600) * e
    total = parameter_count(iterative_sr.init_params, IterativeSRConfig())
    assert total == n * layer + tables + 2 * e == 5_913_345_024


def base_config(**changes):
    sizes = TransformerConfig(num_layers=2, hidden_size=32, num_heads=2)
    base = CogLMConfig(sizes, SMALL.vocabulary, (3, 7), 5, num_positions=30, image_position=9)
    return dataclasses.replace(base, **changes)


def test_a_start_from_coglm_takes_its_first_layers_and_up_samples_positions():
    base = random_params(coglm.init_params, base_config())
    made = iterative_sr.from_coglm(base, base_config(), SMALL)
    fresh = jax.eval_shape(lambda key: iterative_sr.init_params(key, SMALL), jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype), fresh
    )
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_array_equal(ours, theirs[:1]),
        made["layers"],
        base["layers"],
    )
    for name in base.keys() - {"layers", "position_embeddings"}:
        jax.tree.map(np.testing.assert_array_equal, made[name], base[name])
    np.testing.assert_array_equal(made["position_embeddings"], base["position_embeddings"][:12])
    table = made["extra_position_embeddings"].reshape(*SMALL.grid, -1)
    coarse = base["position_embeddings"][9:30].reshape(3, 7, -1)
    for row, column in np.ndindex(*SMALL.grid):
        np.testing.assert_array_equal(table[row, column], coarse[row // 2, column])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer": TransformerConfig(2, 64, 2)}, "transformer must be the first layers"),
        ({"grid": (4, 7), "num_positions": 37}, r"grid must be a multiple of \(4, 7\)"),
        ({"grid": (1, 1), "num_positions": 10}, "num_positions must be at most 10: got 12"),
    ],
)
def test_a_start_from_another_geometry_is_refused(changes, message):
    config = base_config(**changes)
    shapes = jax.eval_shape(lambda key: coglm.init_params(key, config), jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda base: iterative_sr.from_coglm(base, config, SMALL), shapes)
