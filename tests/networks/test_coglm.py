"""CogLM: the cache, what depends on what, padding, batches, precision and size."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogview2_jax.config import CogLMConfig, Precision, TransformerConfig, Vocabulary
from cogview2_jax.networks import attention, coglm, inputs
from cogview2_jax.networks.inputs import NetworkInput
from cogview2_jax.sharding import Execution
from tests.common import (
    TOLERANCE,
    assert_bfloat16_is_close_to_float32,
    assert_gradients_reach_every_parameter,
    assert_rows_do_not_depend_on_their_batch,
    parameter_count,
    quick_jit,
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

# Compiled once for all tests with the same shapes.
_apply = jax.jit(coglm.apply, static_argnames=("config", "ids", "execution"))
_logits = jax.jit(functools.partial(coglm.logits, config=SMALL))


def apply(params, network_input, bias=None, **options):
    if bias is None:
        bias = jnp.zeros(network_input.tokens.shape)
    return _apply(params, network_input, config=SMALL, bias=bias, **options)


@pytest.fixture(scope="module")
def params():
    return random_params(coglm.init_params, SMALL)


def inputs_of(texts, image, slots=SMALL.max_text, pad=inputs.right_padded):
    text, is_text = pad(texts, slots, SMALL.vocabulary)
    return inputs.text_to_image(text, is_text, image, SMALL)


def image_logits(params, network_input, upweight=1.4, **options):
    bias = inputs.text_key_bias(network_input.is_text, upweight)
    return apply(params, network_input, bias, **options)[:, -CELLS - 1 :]


# The words see each other, so the first piece holds them all.
@pytest.mark.parametrize("chunks", [[7] + [1] * 12, [7, 6, 6]], ids=str)
def test_cached_is_full(params, extend, chunks):
    whole = inputs_of([TEXT, TEXT[:2]], IMAGE)
    length = whole.tokens.shape[1]
    expected = image_logits(params, whole)
    # A cache longer than the sequence: what was never written is not seen.
    room = length + 3
    cache = coglm.init_cache(SMALL, 2, room)
    mask = np.pad(whole.mask, ((0, 0), (0, 0), (0, room - length)))
    bias = np.pad(
        inputs.text_key_bias(whole.is_text, 1.4), ((0, 0), (0, room - length)), constant_values=9.0
    )
    hidden, begin = [], 0
    for count in chunks:
        part = slice(begin, begin + count)
        piece = NetworkInput(whole.tokens[:, part], whole.positions[:, part], mask[:, part])
        out, cache = extend(params, cache, piece, begin, bias=bias)
        hidden.append(out)
        begin += count
    assert begin == length
    ours = _logits(params, np.concatenate(hidden, 1))[:, -CELLS - 1 :]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


def test_unstacked_parameters_give_the_same_and_are_unstacked_once(params, extend):
    whole = inputs_of([TEXT], IMAGE[:1])
    bias = inputs.text_key_bias(whole.is_text, 1.4)
    each = coglm.unstacked(params)
    assert len(each["layers"]) == SMALL.transformer.num_layers
    assert coglm.unstacked(each) is each
    cache = coglm.init_cache(SMALL, 1, whole.tokens.shape[1])
    stacked, unstacked = (extend(tree, cache, whole, 0, bias=bias) for tree in (params, each))
    jax.tree.map(np.testing.assert_array_equal, stacked, unstacked)


@pytest.fixture(scope="module")
def extend():
    return jax.jit(functools.partial(coglm.extend, config=SMALL))


def text_to_image_case():
    network_input = inputs_of([TEXT], IMAGE[:1])
    # Pads share position 0 with the first word; no other row sees them.
    return network_input, np.asarray(network_input.tokens[0] != SMALL.vocabulary.pad)


def captioning_case():
    text, is_text = inputs.right_padded([TEXT], SMALL.max_text, SMALL.vocabulary)
    network_input, _ = inputs.captioning(IMAGE[:1], text, is_text, np.array([True]), SMALL)
    return network_input, np.asarray(network_input.tokens[0] != SMALL.vocabulary.pad)


def infilling_case():
    # Two words more than in the other cases, so that no slot is a pad.
    made = inputs.infill(np.eye(3, 4, k=1), [*TEXT, 54, 55], IMAGE[0], SMALL)
    tokens = np.where(made.tokens < 0, 7, made.tokens)
    assert not (tokens == SMALL.vocabulary.pad).any()
    parts = (tokens, made.positions, made.mask, made.is_text)
    return NetworkInput(*(jnp.asarray(part)[None] for part in parts)), np.ones(len(tokens), bool)


@pytest.fixture(scope="module")
def sensitivity():
    """|∂ reading of slot i / ∂ position embedding j|, [slots, positions], of one row."""

    def readings(table, params, network_input):
        params = params | {"position_embeddings": table}
        hidden = coglm.hidden_states(params, network_input, config=SMALL)
        return hidden[0] @ jax.random.normal(jax.random.key(2), (SMALL.transformer.hidden_size,))

    jacobian = quick_jit(jax.jacrev(readings))
    return lambda params, network_input: np.abs(
        jacobian(params["position_embeddings"], params, network_input)
    ).max(-1)


@pytest.mark.parametrize("case", [text_to_image_case, captioning_case, infilling_case])
def test_a_row_depends_on_the_keys_of_its_mask_and_nothing_else(params, sensitivity, case):
    """Causality by gradient: each slot has its own position, so the table stands for the slots."""
    network_input, real = case()
    by_slot = sensitivity(params, network_input)[:, np.asarray(network_input.positions[0])]
    # Two layers: what a row sees, and what that saw.
    sees = np.asarray(network_input.mask[0]) | np.eye(len(real), dtype=bool)
    expected = (sees.astype(int) @ sees.astype(int)) > 0
    found, expected = by_slot[real][:, real] > 0, expected[real][:, real]
    np.testing.assert_array_equal(found, expected)


def test_text_sees_text_in_both_directions_and_the_image_is_causal(params):
    network_input = inputs_of([TEXT] * 2, IMAGE)
    before = apply(params, network_input)
    last_word, last_cell = len(TEXT) - 1, -1
    tokens = network_input.tokens.at[0, last_word].set(60).at[1, last_cell].set(39)
    changed = apply(params, network_input._replace(tokens=tokens))
    assert (np.abs(changed - before)[0].max(-1) > 1e-3).all()
    np.testing.assert_array_equal(changed[1, :-1], before[1, :-1])
    assert np.abs(changed - before)[1, -1].max() > 1e-3


@pytest.mark.parametrize("pad", [inputs.right_padded, inputs.left_padded])
def test_more_pads_change_nothing(params, pad):
    expected = image_logits(params, inputs_of([TEXT] * 2, IMAGE, slots=len(TEXT)))
    for slots in (SMALL.max_text, 8):
        ours = image_logits(params, inputs_of([TEXT] * 2, IMAGE, slots, pad))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


def test_a_row_does_not_depend_on_its_batch(params):
    network_input = inputs_of([TEXT, TEXT[:1]], IMAGE)
    assert_rows_do_not_depend_on_their_batch(functools.partial(image_logits, params), network_input)


def test_the_bias_moves_attention_to_its_keys(params):
    network_input = inputs_of([TEXT] * 2, IMAGE)
    plain = image_logits(params, network_input, upweight=0.0)
    # The same for every key is the same as none: softmax does not know.
    ours = apply(params, network_input, jnp.full(network_input.is_text.shape, 1.4))
    np.testing.assert_allclose(ours[:, -CELLS - 1 :], plain, rtol=0, atol=TOLERANCE)
    without = _apply(params, network_input, config=SMALL)
    np.testing.assert_allclose(without[:, -CELLS - 1 :], plain, rtol=0, atol=TOLERANCE)

    rng = np.random.default_rng(0)
    q, key, value = rng.standard_normal((3, 1, 1, 1, 4), np.float32)
    k, v = np.repeat(key, 3, 1), np.concatenate([value, value, value + 1], 1)
    mask, bias = np.ones((1, 1, 3), bool), np.array([[0, 0, 1.4]], np.float32)
    out = jax.jit(attention.dense_attention)(q, k, v, mask, bias)
    share = math.exp(1.4) / (2 + math.exp(1.4))
    np.testing.assert_allclose(out, value + share, rtol=0, atol=TOLERANCE)


def test_a_range_of_ids_is_a_slice_of_all_logits(params):
    network_input = inputs_of([TEXT] * 2, IMAGE)
    part = apply(params, network_input, ids=(5, 40))
    expected = apply(params, network_input)[..., 5:40]
    np.testing.assert_allclose(part, expected, rtol=0, atol=TOLERANCE)


def random_qkv():
    return tuple(np.random.default_rng(0).standard_normal((3, 2, 3, 2, 8), np.float32))


def test_a_row_that_sees_nothing_averages_everything_and_has_a_gradient():
    q, k, v = random_qkv()
    mask = np.ones((2, 3, 3), bool)
    mask[0, 1] = False

    def loss(q, k, v):
        out = attention.dense_attention(q, k, v, mask)
        return (out**2).sum(), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    np.testing.assert_allclose(out[0, 1], v[0].mean(0), rtol=0, atol=TOLERANCE)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not gradients[0][0, 1].any()  # its scores are constants


def test_an_empty_part_has_no_weight_and_a_finite_gradient():
    q, k, v = random_qkv()
    mask = np.array([[True, False, True], [False, False, False]])

    def loss(q, k, v):
        out, lse = attention.dense_attention_with_lse(q, k, v, mask)
        total = (out**2).sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()
        return total, (out, lse, attention.dense_attention(q, k, v, mask[:, None]))

    gradients, (out, lse, dense) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    assert np.isneginf(lse[1]).all() and np.isfinite(lse[0]).all() and not out[1].any()
    np.testing.assert_allclose(out[:1], dense[:1], rtol=0, atol=TOLERANCE)
    for gradient in gradients:
        assert np.isfinite(gradient).all() and not gradient[1].any()


def test_bfloat16_is_close_to_float32(params):
    network_input = inputs_of([TEXT] * 2, IMAGE)
    assert_bfloat16_is_close_to_float32(
        lambda params, execution: image_logits(params, network_input, execution=execution), params
    )
    half = Precision(jnp.bfloat16, jnp.bfloat16)
    assert coglm.init_cache(SMALL, 1, 4, Execution(half))[0].keys.dtype == jnp.bfloat16
    fresh = jax.eval_shape(lambda key: coglm.init_params(key, SMALL, half), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype(jnp.bfloat16)}


def test_scores_beyond_bfloat16_are_summed_in_float32():
    """A thousand equal keys: their weights sum to 1 in float32, to far less or more in bfloat16."""
    q, k = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 1024, 1, 8), jnp.bfloat16)
    out = jax.jit(attention.dense_attention)(q, k, jnp.ones_like(k), np.ones((1, 1, 1024), bool))
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, rtol=0, atol=2**-8)


def test_gradients_reach_every_parameter_and_are_finite(params):
    network_input = inputs_of([TEXT] * 2, IMAGE)

    def loss(params):
        logits = coglm.apply(params, network_input, config=SMALL)
        return (jax.nn.log_softmax(logits) ** 2).mean()

    assert_gradients_reach_every_parameter(loss, params)


def test_the_published_network_has_six_billion_parameters():
    e, n = 3072, 48
    layer = (e * 3 * e + 3 * e) + (e * e + e) + (e * 4 * e + 4 * e) + (4 * e * e + e) + 4 * 2 * e
    tables = (150_003 + 1024) * e
    total = parameter_count(coglm.init_params, CogLMConfig())
    assert total == n * layer + tables + 2 * e == 5_902_285_824
