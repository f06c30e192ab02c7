"""CogLM: the cache, what depends on what, padding, batches, precision and size."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogview2_jax.config import CogLMConfig, Precision, TransformerConfig, Vocabulary
from cogview2_jax.networks import attention, coglm, inputs
from tests.common import (
    TOLERANCE,
    assert_bfloat16_is_close_to_float32,
    assert_gradients_reach_every_parameter,
    assert_rows_do_not_depend_on_their_batch,
    parameter_count,
    random_params,
)

SMALL = CogLMConfig(
    TransformerConfig(num_layers=2, hidden_size=32, num_heads=2),
    Vocabulary(num_image=40, size=70, pad=43, unknown=40),
    grid=(3, 4),
    max_text=6,
    num_positions=24,
    image_position=9,
)
TEXT, CELLS = [50, 51, 52, 53], SMALL.num_image_tokens
IMAGE = np.arange(2 * CELLS).reshape(2, CELLS) % 40

apply = jax.jit(functools.partial(coglm.apply, config=SMALL))


@pytest.fixture(scope="module")
def params():
    return random_params(coglm.init_params, SMALL)


def shardings_of(texts, image, slots=SMALL.max_text, pad=inputs.right_padded):
    text, is_text = pad(texts, slots, SMALL.vocabulary)
    return inputs.text_to_image(text, is_text, image, SMALL)


def image_logits(params, layout, upweight=1.4, run=apply):
    bias = inputs.text_key_bias(layout.is_text, upweight)
    logits = run(params, layout.tokens, layout.positions, layout.mask, bias=bias)
    return logits[:, -CELLS - 1 :]


# The words see each other, so the first piece holds them all.
@pytest.mark.parametrize("chunks", [[7] + [1] * 12, [7, 6, 6]], ids=str)
def test_cached_is_full(params, chunks):
    layout = shardings_of([TEXT, TEXT[:2]], IMAGE)
    length = layout.tokens.shape[1]
    bias = inputs.text_key_bias(layout.is_text, 1.4)
    expected = image_logits(params, layout)
    # A cache longer than the sequence: what was never written is not seen.
    room = length + 3
    cache = coglm.init_cache(SMALL, 2, room)
    mask = np.pad(layout.mask, ((0, 0), (0, 0), (0, room - length)))
    bias = np.pad(bias, ((0, 0), (0, room - length)), constant_values=9.0)
    extend = jax.jit(functools.partial(coglm.extend, config=SMALL))
    hidden, begin = [], 0
    for count in chunks:
        part = slice(begin, begin + count)
        tokens, positions = layout.tokens[:, part], layout.positions[:, part]
        out, cache = extend(params, cache, tokens, positions, mask[:, part], begin, bias=bias)
        hidden.append(out)
        begin += count
    assert begin == length
    ours = coglm.logits(params, jnp.concatenate(hidden, 1), config=SMALL)[:, -CELLS - 1 :]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


def text_to_image_case():
    layout = shardings_of([TEXT], IMAGE[:1])
    # Pads share position 0 with the first word; no other row sees them.
    return layout, np.asarray(layout.tokens[0] != SMALL.vocabulary.pad)


def captioning_case():
    text, is_text = inputs.right_padded([TEXT], SMALL.max_text, SMALL.vocabulary)
    layout, _ = inputs.captioning(IMAGE[:1], text, is_text, np.array([True]), SMALL)
    return layout, np.asarray(layout.tokens[0] != SMALL.vocabulary.pad)


def infilling_case():
    made = inputs.infill(np.eye(3, 4, k=1), TEXT, IMAGE[0], SMALL, slots=len(TEXT))
    tokens = np.where(made.tokens < 0, 7, made.tokens)
    layout = inputs.NetworkInput(*(jnp.asarray(a)[None] for a in (tokens, *made[1:4])))
    return layout, np.ones(len(tokens), bool)


@pytest.mark.parametrize("case", [text_to_image_case, captioning_case, infilling_case])
def test_a_row_depends_on_the_keys_of_its_mask_and_nothing_else(params, case):
    """Causality by gradient: each slot has its own position, so the table stands for the slots."""
    layout, real = case()
    direction = jax.random.normal(jax.random.key(2), (SMALL.transformer.hidden_size,))

    @jax.jit
    def jacobian(params, table):
        def readings(table):
            hidden = coglm.hidden_states(
                params | {"position_embeddings": table},
                layout.tokens,
                layout.positions,
                layout.mask,
                config=SMALL,
            )
            return hidden[0] @ direction

        return jnp.abs(jax.jacrev(readings)(table)).max(-1)

    gradients = jacobian(params, params["position_embeddings"])
    by_slot = np.asarray(gradients)[:, np.asarray(layout.positions[0])]
    # Two layers: what a row sees, and what that saw.
    sees = np.asarray(layout.mask[0]) | np.eye(len(real), dtype=bool)
    expected = (sees.astype(int) @ sees.astype(int)) > 0
    assert not (by_slot[real][:, real][~expected[real][:, real]]).any()
    assert (by_slot[real][:, real][expected[real][:, real]] > 0).all()


def test_text_sees_text_in_both_directions_and_the_image_is_causal(params):
    layout = shardings_of([TEXT], IMAGE[:1], slots=len(TEXT))
    hidden_states = jax.jit(functools.partial(coglm.hidden_states, config=SMALL))

    def hidden(tokens):
        return hidden_states(params, tokens, layout.positions, layout.mask)[0]

    last_word, last_cell = len(TEXT) - 1, -1
    before = hidden(layout.tokens)
    changed = hidden(layout.tokens.at[0, last_word].set(60))
    assert (np.abs(changed - before).max(-1) > 1e-3).all()
    changed = hidden(layout.tokens.at[0, last_cell].set(39))
    np.testing.assert_array_equal(changed[:-1], before[:-1])


@pytest.mark.parametrize("pad", [inputs.right_padded, inputs.left_padded])
def test_more_pads_change_nothing(params, pad):
    expected = image_logits(params, shardings_of([TEXT] * 2, IMAGE, slots=len(TEXT)))
    for slots in (5, 8):
        ours = image_logits(params, shardings_of([TEXT] * 2, IMAGE, slots, pad))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


def test_a_row_does_not_depend_on_its_batch(params):
    layout = shardings_of([TEXT, TEXT[:1]], IMAGE)
    assert_rows_do_not_depend_on_their_batch(functools.partial(image_logits, params), layout)


def test_the_bias_moves_attention_to_its_keys(params):
    layout = shardings_of([TEXT] * 2, IMAGE)
    plain = image_logits(params, layout, upweight=0.0)
    # The same for every key is the same as none: softmax does not know.
    bias = jnp.full(layout.is_text.shape, 1.4)
    ours = apply(params, layout.tokens, layout.positions, layout.mask, bias=bias)
    np.testing.assert_allclose(ours[:, -CELLS - 1 :], plain, rtol=0, atol=TOLERANCE)
    ours = apply(params, layout.tokens, layout.positions, layout.mask)
    np.testing.assert_allclose(ours[:, -CELLS - 1 :], plain, rtol=0, atol=TOLERANCE)

    q, k, v = (
        jax.random.normal(key, (1, 1, 1, 4)) for key in jax.random.split(jax.random.key(0), 3)
    )
    k, v = jnp.repeat(k, 3, 1), jnp.stack([v[0], v[0], v[0] + 1], 1)
    mask, bias = jnp.ones((1, 1, 3), bool), jnp.array([[0.0, 0.0, 1.4]])
    out = attention.dense_attention(q, k, v, mask, bias)
    share = math.exp(1.4) / (2 + math.exp(1.4))
    np.testing.assert_allclose(out, v[:, :1] + share, rtol=0, atol=TOLERANCE)


def test_a_range_of_ids_is_a_slice_of_all_logits(params):
    layout = shardings_of([TEXT] * 2, IMAGE)
    arguments = (params, layout.tokens, layout.positions, layout.mask)
    part = jax.jit(functools.partial(coglm.apply, config=SMALL, ids=(5, 40)))(*arguments)
    np.testing.assert_allclose(part, apply(*arguments)[..., 5:40], rtol=0, atol=TOLERANCE)


def test_a_row_that_sees_nothing_averages_everything_and_has_a_gradient():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 3, 2, 8)) for key in keys)
    mask = jnp.ones((2, 3, 3), bool).at[0, 1].set(False)
    out = attention.dense_attention(q, k, v, mask)
    np.testing.assert_allclose(out[0, 1], v[0].mean(0), rtol=0, atol=TOLERANCE)
    gradients = jax.grad(
        lambda *qkv: (attention.dense_attention(*qkv, mask) ** 2).sum(), (0, 1, 2)
    )(q, k, v)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not gradients[0][0, 1].any()  # its scores are constants


def test_an_empty_part_has_no_weight_and_a_finite_gradient():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 3, 2, 8)) for key in keys)
    mask = jnp.array([[True, False, True], [False, False, False]])
    out, lse = attention.dense_attention_with_lse(q, k, v, mask)
    assert np.isneginf(lse[1]).all() and np.isfinite(lse[0]).all() and not out[1].any()
    dense = attention.dense_attention(q[:1], k[:1], v[:1], mask[:1, None])
    np.testing.assert_allclose(out[:1], dense, rtol=0, atol=TOLERANCE)

    def loss(q, k, v):
        out, lse = attention.dense_attention_with_lse(q, k, v, mask)
        return (out**2).sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()

    for gradient in jax.grad(loss, (0, 1, 2))(q, k, v):
        assert np.isfinite(gradient).all() and not gradient[1].any()


def test_bfloat16_is_close_to_float32(params):
    layout = shardings_of([TEXT] * 2, IMAGE)

    def logits_of(params, precision):
        run = jax.jit(functools.partial(coglm.apply, config=SMALL, precision=precision))
        return image_logits(params, layout, run=run)

    assert_bfloat16_is_close_to_float32(logits_of, params)
    half = Precision(jnp.bfloat16, jnp.bfloat16)
    assert coglm.init_cache(SMALL, 1, 4, half).keys.dtype == jnp.bfloat16
    fresh = jax.eval_shape(lambda key: coglm.init_params(key, SMALL, half), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype(jnp.bfloat16)}


def test_scores_beyond_bfloat16_are_summed_in_float32():
    """A thousand equal keys: their weights sum to 1 in float32, to far less or more in bfloat16."""
    q, k = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 1024, 1, 8), jnp.bfloat16)
    out = attention.dense_attention(q, k, jnp.ones_like(k), jnp.ones((1, 1, 1024), bool))
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, rtol=0, atol=2**-8)


def test_gradients_reach_every_parameter_and_are_finite(params):
    layout = shardings_of([TEXT] * 2, IMAGE)

    def loss(params):
        logits = coglm.apply(params, layout.tokens, layout.positions, layout.mask, config=SMALL)
        return (jax.nn.log_softmax(logits) ** 2).mean()

    assert_gradients_reach_every_parameter(loss, params)


def test_the_published_network_has_six_billion_parameters():
    e, n = 3072, 48
    layer = (e * 3 * e + 3 * e) + (e * e + e) + (e * 4 * e + 4 * e) + (4 * e * e + e) + 4 * 2 * e
    tables = (150_003 + 1024) * e
    total = parameter_count(coglm.init_params, CogLMConfig())
    assert total == n * layer + tables + 2 * e == 5_902_285_824
