"""Direct super-resolution: what a fine cell depends on, pads, batches, its start, size."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogview2_jax import coglm, direct_sr, sequence
from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    Precision,
    TransformerConfig,
    Vocabulary,
)
from pallas_kernels.local_attention.window import Window

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
TOLERANCE = 1e-5


def drawn(shapes):
    """Random parameters, scales round 1. Fresh biases are zero, behind which much could hide."""
    rng = np.random.default_rng(0)

    def leaf(path, like):
        centre, spread = (1, 0.2) if path[-1].key == "scale" else (0, 0.2)
        return jnp.asarray(centre + spread * rng.standard_normal(like.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def params_of(config):
    return drawn(jax.eval_shape(lambda key: direct_sr.init_params(key, config), jax.random.key(0)))


@pytest.fixture(scope="module")
def params():
    return params_of(SMALL)


def layout_of(texts, coarse, config=SMALL):
    text, is_text = sequence.left_padded(texts, config.text_slots, config.coglm.vocabulary)
    return sequence.direct_super_resolution(text, is_text, coarse, config)


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
    layout = layout_of([TEXT], COARSE[:1])
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
    deeper = params_of(config)
    prefix, _ = gradients_by_cell(deeper, layout_of([TEXT], COARSE[:1]), config)
    assert (prefix[:, : len(TEXT)] > 0).all()


def test_pads_change_nothing(params):
    expected = logits_of(params, layout_of([TEXT] * 2, COARSE))
    wider = dataclasses.replace(SMALL, text_slots=9)
    ours = logits_of(params, layout_of([TEXT] * 2, COARSE, wider), wider)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


def test_a_row_does_not_depend_on_its_batch(params):
    layout = layout_of([TEXT, TEXT[:1]], COARSE)
    together = logits_of(params, layout)
    swapped = logits_of(params, sequence.Layout(*(part[::-1] for part in layout)))
    np.testing.assert_allclose(swapped[::-1], together, rtol=0, atol=TOLERANCE)
    for row in range(2):
        ours = logits_of(params, sequence.Layout(*(part[np.array([row, row])] for part in layout)))
        np.testing.assert_allclose(ours[0], together[row], rtol=0, atol=TOLERANCE)


def test_bfloat16_is_close_to_float32(params):
    layout = layout_of([TEXT] * 2, COARSE)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    ours = logits_of(rounded, layout, precision=Precision(jnp.bfloat16, jnp.bfloat16))
    assert ours.dtype == jnp.float32
    expected = logits_of(jax.tree.map(lambda x: x.astype(jnp.float32), rounded), layout)
    # A number of 8 bits is off by up to 2^-9 of itself, ten times a layer: 0.035 of the spread was
    # seen.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=0.05 * float(jnp.std(expected)))


def test_gradients_reach_every_parameter_and_are_finite(params):
    # What the last layer makes of the prefix goes nowhere, hence two layers.
    config = dataclasses.replace(
        SMALL,
        coglm=dataclasses.replace(
            SMALL.coglm, transformer=TransformerConfig(num_layers=2, hidden_size=32, num_heads=2)
        ),
    )
    deeper = params_of(config)
    layout = layout_of([TEXT] * 2, COARSE)

    def loss(params):
        logits = direct_sr.apply(
            params, layout.tokens, layout.positions, layout.mask, config=config
        )
        return (jax.nn.log_softmax(logits) ** 2).mean()

    for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(deeper)):
        assert np.isfinite(gradient).all() and gradient.any()


def test_a_start_from_coglm_copies_attention_and_tiles_positions():
    shapes = jax.eval_shape(lambda key: coglm.init_params(key, SMALL.coglm), jax.random.key(0))
    base = drawn(shapes)
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
    config = DirectSRConfig()
    shapes = jax.eval_shape(lambda key: direct_sr.init_params(key, config), jax.random.key(0))
    e, n = 3072, 48
    attention = (e * 3 * e + 3 * e) + (e * e + e)
    layer = 2 * attention + (e * 4 * e + 4 * e) + (4 * e * e + e) + 4 * 2 * e
    tables = (150_003 + 1024 + 3600) * e
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert total == n * layer + tables + 2 * e == 7_725_874_176
