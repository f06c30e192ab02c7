"""Iterative super-resolution: what a cell depends on, pads, batches, rounds, size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogview2_jax.config import (
    CogLMConfig,
    IterativeSRConfig,
    Precision,
    TransformerConfig,
    Vocabulary,
)
from cogview2_jax.decoding import loops, sampling
from cogview2_jax.networks import coglm, inputs, iterative_sr
from pallas_kernels.local_attention.window import Window
from tests.common import (
    TOLERANCE,
    assert_bfloat16_is_close_to_float32,
    assert_rows_do_not_depend_on_their_batch,
    parameter_count,
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


def shardings_of(texts, cells, config=SMALL):
    text, is_text = inputs.left_padded(texts, config.text_slots, config.vocabulary)
    return inputs.iterative_super_resolution(text, is_text, cells, config)


apply = jax.jit(iterative_sr.apply, static_argnames=("config", "precision"))


def logits_of(params, layout, config=SMALL, precision=Precision()):
    tokens, positions, mask, _ = layout
    return apply(params, tokens, positions, mask, config=config, precision=precision)


def test_a_cell_sees_all_words_and_its_window(params):
    layout = shardings_of([TEXT], CELLS[:1])
    direction = jax.random.normal(jax.random.key(2), (SMALL.vocabulary.num_image,))
    names = ("position_embeddings", "extra_position_embeddings")

    @jax.jit
    def run(tables):
        def readings(tables):
            logits = iterative_sr.apply(
                params | tables, layout.tokens, layout.positions, layout.mask, config=SMALL
            )
            return logits[0] @ direction

        return {name: jnp.abs(part).max(-1) for name, part in jax.jacrev(readings)(tables).items()}

    found = run({name: params[name] for name in names})
    words, cells = (np.asarray(found[name]) for name in names)
    # Pads have position 0 too, but are keys for nobody.
    assert (words[:, : len(TEXT)] > 0).all() and not words[:, len(TEXT) :].any()
    near = Window(*SMALL.window).dense_mask(SMALL.grid)
    np.testing.assert_array_equal(cells > 0, near.reshape(42, 42))


def test_pads_change_nothing(params):
    expected = logits_of(params, shardings_of([TEXT] * 2, CELLS))
    wider = dataclasses.replace(SMALL, text_slots=9)
    ours = logits_of(params, shardings_of([TEXT] * 2, CELLS, wider), wider)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


def test_a_row_does_not_depend_on_its_batch(params):
    layout = shardings_of([TEXT, TEXT[:1]], CELLS)
    assert_rows_do_not_depend_on_their_batch(functools.partial(logits_of, params), layout)


def test_without_words_all_is_finite(params):
    """A row of pads alone: its text part is empty, and what remains is the window."""
    layout = shardings_of([TEXT] * 2, CELLS)
    mask = layout.mask.at[0].set(False)

    @jax.jit
    def run(params):
        logits = iterative_sr.apply(params, layout.tokens, layout.positions, mask, config=SMALL)
        return (jax.nn.log_softmax(logits) ** 2).mean(), logits

    gradients, logits = jax.grad(run, has_aux=True)(params)
    assert np.isfinite(logits).all()
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all() and gradient.any()


def test_bfloat16_is_close_to_float32(params):
    layout = shardings_of([TEXT] * 2, CELLS)
    assert_bfloat16_is_close_to_float32(
        lambda params, precision: logits_of(params, layout, precision=precision), params
    )


def test_rounds_over_the_network_are_a_python_loop(params):
    schedule, key = inputs.lopar_schedule(SMALL), jax.random.key(5)
    mask_token = SMALL.vocabulary.start_of_image

    def predict(cells):
        layout = shardings_of([TEXT] * 2, cells)
        return iterative_sr.apply(
            params, layout.tokens, layout.positions, layout.mask, config=SMALL
        )

    def draw(key, logits, _):
        return sampling.sample_top_k(key, logits, 5)

    run = jax.jit(functools.partial(loops.lopar, predict, draw, mask_token=mask_token, key=key))
    ours = run(tokens=CELLS.astype(np.int32), reset=schedule.reset, write=schedule.write)
    cells, predict, draw = CELLS, jax.jit(predict), jax.jit(draw)
    for number, (reset, write) in enumerate(zip(*schedule, strict=True)):
        logits = predict(np.where(reset, mask_token, cells))
        drawn = draw(jax.random.fold_in(key, number), logits, number)
        cells = np.where(write, drawn, cells)
    np.testing.assert_array_equal(ours, cells)
    assert (ours != CELLS).any() and not (ours != CELLS)[:, ~schedule.write[0]].any()


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
