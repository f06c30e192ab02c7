"""Direct super-resolution: what a fine cell depends on, pads, batches, its start, size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    Precision,
    TransformerConfig,
    Vocabulary,
)
from cogview2_jax.networks import coglm, direct_sr, inputs
from pallas_kernels.local_attention.window import Window
from tests.common import (
    TOLERANCE,
    assert_bfloat16_is_close_to_float32,
    assert_gradients_reach_every_parameter,
    assert_rows_do_not_depend_on_their_batch,
    parameter_count,
    random_params,
)

SMALL = DirectSRConfig(
    CogLMConfig(
        TransformerConfig(num_layers=1, hidden_size=32, num_heads=2),
        Vocabulary(num_image=40, size=70, pad=43, unknown=40),
        grid=(4, 5),
        max_text=5,
        num_positions=40,
        image_position=9,
    ),
    ratio=2,
    text_slots=5,
    window=(5, 3),
    cross_window=(3, 1),
)
TEXT = [50, 51, 52]
COARSE = np.arange(40).reshape(2, 20) % 40


@pytest.fixture(scope="module")
def params():
    return random_params(direct_sr.init_params, SMALL)


def shardings_of(texts, coarse, config=SMALL):
    text, is_text = inputs.left_padded(texts, config.text_slots, config.coglm.vocabulary)
    return inputs.direct_super_resolution(text, is_text, coarse, config)


apply = jax.jit(direct_sr.apply, static_argnames=("config", "precision"))


def logits_of(params, layout, config=SMALL, precision=Precision()):
    tokens, positions, mask, _ = layout
    return apply(params, tokens, positions, mask, config=config, precision=precision)


def gradients_by_cell(params, layout, config):
    """|∂ reading of fine cell i / ∂ position embedding j|, for the first and the fine table."""
    direction = jax.random.normal(jax.random.key(2), (config.coglm.vocabulary.num_image,))
    names = ("position_embeddings", "extra_position_embeddings")

    @jax.jit
    def run(tables):
        def readings(tables):
            logits = direct_sr.apply(
                params | tables, layout.tokens, layout.positions, layout.mask, config=config
            )
            return logits[0] @ direction

        return {name: jnp.abs(part).max(-1) for name, part in jax.jacrev(readings)(tables).items()}

    found = run({name: params[name] for name in names})
    return (np.asarray(found[name]) for name in names)


def test_a_fine_cell_sees_its_two_windows_in_one_layer(params):
    layout = shardings_of([TEXT], COARSE[:1])
    prefix, fine = gradients_by_cell(params, layout, SMALL)
    (rows, columns), coarse = SMALL.grid, SMALL.coglm
    near = Window(*SMALL.window).dense_mask((rows, columns))
    np.testing.assert_array_equal(fine > 0, near.reshape(rows * columns, -1))
    parents = Window(*SMALL.cross_window, ratio=2).dense_mask((rows, columns))
    begin = coarse.image_position
    cells = prefix[:, begin : begin + coarse.num_image_tokens]
    np.testing.assert_array_equal(cells > 0, parents.reshape(rows * columns, -1))
    assert not prefix[:, :begin].any()  # no word is a fine cell's key


def test_words_reach_the_fine_cells_in_two_layers(params):
    config = dataclasses.replace(
        SMALL,
        coglm=dataclasses.replace(
            SMALL.coglm, transformer=TransformerConfig(num_layers=2, hidden_size=32, num_heads=2)
        ),
    )
    deeper = random_params(direct_sr.init_params, config)
    prefix, _ = gradients_by_cell(deeper, shardings_of([TEXT], COARSE[:1]), config)
    assert (prefix[:, : len(TEXT)] > 0).all()


def test_pads_change_nothing(params):
    expected = logits_of(params, shardings_of([TEXT] * 2, COARSE))
    wider = dataclasses.replace(SMALL, text_slots=9)
    ours = logits_of(params, shardings_of([TEXT] * 2, COARSE, wider), wider)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


def test_a_row_does_not_depend_on_its_batch(params):
    layout = shardings_of([TEXT, TEXT[:1]], COARSE)
    assert_rows_do_not_depend_on_their_batch(functools.partial(logits_of, params), layout)


def test_bfloat16_is_close_to_float32(params):
    layout = shardings_of([TEXT] * 2, COARSE)
    assert_bfloat16_is_close_to_float32(
        lambda params, precision: logits_of(params, layout, precision=precision), params
    )


def test_gradients_reach_every_parameter_and_are_finite(params):
    # What the last layer makes of the prefix goes nowhere, hence two layers.
    config = dataclasses.replace(
        SMALL,
        coglm=dataclasses.replace(
            SMALL.coglm, transformer=TransformerConfig(num_layers=2, hidden_size=32, num_heads=2)
        ),
    )
    deeper = random_params(direct_sr.init_params, config)
    layout = shardings_of([TEXT] * 2, COARSE)

    def loss(params):
        logits = direct_sr.apply(
            params, layout.tokens, layout.positions, layout.mask, config=config
        )
        return (jax.nn.log_softmax(logits) ** 2).mean()

    assert_gradients_reach_every_parameter(loss, deeper)


def test_a_start_from_coglm_copies_attention_and_tiles_positions():
    base = random_params(coglm.init_params, SMALL.coglm)
    made = direct_sr.from_coglm(base, SMALL)
    fresh = jax.eval_shape(lambda key: direct_sr.init_params(key, SMALL), jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype), fresh
    )
    attention = made["layers"]["attention"]
    for ours, theirs in (("qkv_plus", "qkv"), ("dense_plus", "dense")):
        jax.tree.map(np.testing.assert_array_equal, attention[ours], attention[theirs])
    table = made["extra_position_embeddings"].reshape(*SMALL.grid, -1)
    first = SMALL.coglm.image_position
    coarse = base["position_embeddings"][first : first + 20].reshape(4, 5, -1)
    for row, column in np.ndindex(*SMALL.grid):
        np.testing.assert_array_equal(table[row, column], coarse[row % 4, column % 5])


def test_the_published_network_has_7_7_billion_parameters():
    e, n = 3072, 48
    attention = (e * 3 * e + 3 * e) + (e * e + e)
    layer = 2 * attention + (e * 4 * e + 4 * e) + (4 * e * e + e) + 4 * 2 * e
    tables = (150_003 + 1024 + 3600) * e
    total = parameter_count(direct_sr.init_params, DirectSRConfig())
    assert total == n * layer + tables + 2 * e == 7_725_874_176
