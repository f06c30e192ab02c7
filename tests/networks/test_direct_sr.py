"""Direct super-resolution: what a fine cell depends on, pads, batches, its start, size."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    TransformerConfig,
    Vocabulary,
)
from cogview2_jax.networks import coglm, direct_sr, inputs
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


def inputs_of(texts, coarse, config=SMALL):
    text, is_text = inputs.left_padded(texts, config.text_slots, config.coglm.vocabulary)
    return inputs.direct_super_resolution(text, is_text, coarse, config)


_apply = jax.jit(direct_sr.apply, static_argnames=("config", "execution"))


def logits_of(params, network_input, config=SMALL, execution=Execution()):
    return _apply(params, network_input, config=config, execution=execution)


def test_a_fine_cell_sees_its_two_windows_in_one_layer(params):
    """By gradient: each cell has its own row of a position table, so the tables stand for cells."""
    network_input = inputs_of([TEXT], COARSE[:1])
    direction = jax.random.normal(jax.random.key(2), (SMALL.coglm.vocabulary.num_image,))

    def readings(tables):
        return direct_sr.apply(params | tables, network_input, config=SMALL)[0] @ direction

    names = ("position_embeddings", "extra_position_embeddings")
    jacobian = quick_jit(jax.jacrev(readings))({name: params[name] for name in names})
    prefix, fine = (np.abs(jacobian[name]).max(-1) for name in names)
    (rows, columns), coarse = SMALL.grid, SMALL.coglm
    near = Window(*SMALL.window).dense_mask((rows, columns))
    np.testing.assert_array_equal(fine > 0, near.reshape(rows * columns, -1))
    parents = Window(*SMALL.cross_window, ratio=2).dense_mask((rows, columns))
    begin = coarse.image_position
    cells = prefix[:, begin : begin + coarse.num_image_tokens]
    np.testing.assert_array_equal(cells > 0, parents.reshape(rows * columns, -1))
    assert not prefix[:, :begin].any()  # no word is a fine cell's key


@pytest.fixture(scope="module")
def of_two_layers():
    """Two layers: what the last one makes of the prefix goes nowhere."""
    sizes = TransformerConfig(num_layers=2, hidden_size=32, num_heads=2)
    config = dataclasses.replace(SMALL, coglm=dataclasses.replace(SMALL.coglm, transformer=sizes))
    return config, random_params(direct_sr.init_params, config)


@pytest.mark.parametrize("changed", range(len(TEXT)))
def test_a_word_reaches_the_fine_cells_in_the_second_layer(of_two_layers, changed):
    config, params = of_two_layers
    other = [60 if place == changed else word for place, word in enumerate(TEXT)]
    network_input = inputs_of([TEXT, other], COARSE[:1].repeat(2, 0), config)
    first, second = logits_of(params, network_input, config)
    assert (np.abs(second - first).max(-1) > 1e-4).all()
    # The first layer alone: no difference.
    layers = jax.tree.map(lambda leaf: leaf[:1], params["layers"])
    first, second = logits_of(params | {"layers": layers}, network_input)
    np.testing.assert_array_equal(second, first)


def test_pads_change_nothing(params):
    expected = logits_of(params, inputs_of([TEXT] * 2, COARSE))
    wider = dataclasses.replace(SMALL, text_slots=9)
    ours = logits_of(params, inputs_of([TEXT] * 2, COARSE, wider), wider)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


def test_a_row_does_not_depend_on_its_batch(params):
    network_input = inputs_of([TEXT, TEXT[:1]], COARSE)
    assert_rows_do_not_depend_on_their_batch(functools.partial(logits_of, params), network_input)


def test_bfloat16_is_close_to_float32(params):
    network_input = inputs_of([TEXT] * 2, COARSE)
    assert_bfloat16_is_close_to_float32(
        lambda params, execution: logits_of(params, network_input, execution=execution), params
    )


def test_gradients_reach_every_parameter_and_are_finite(of_two_layers):
    config, params = of_two_layers
    network_input = inputs_of([TEXT] * 2, COARSE)

    def loss(params):
        logits = direct_sr.apply(params, network_input, config=config)
        return (jax.nn.log_softmax(logits) ** 2).mean()

    assert_gradients_reach_every_parameter(loss, params)


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


def test_a_word_never_has_the_position_of_a_cell():
    with pytest.raises(ValueError, match="text_slots must be at most image_position: got 10 and 9"):
        dataclasses.replace(SMALL, text_slots=10)
