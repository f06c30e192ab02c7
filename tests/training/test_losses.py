"""Losses: their values against NumPy, their parts, and the codebook's moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    IterativeSRConfig,
    TransformerConfig,
    Vocabulary,
)
from cogview2_jax.data.records import english_texts, make_record
from cogview2_jax.networks import coglm, direct_sr, inputs, iterative_sr
from cogview2_jax.tokenizer import image
from cogview2_jax.training import coglm_samples
from cogview2_jax.training.losses import (
    CodebookStatistics,
    coglm_loss,
    direct_sr_loss,
    hvqvae_loss,
    init_statistics,
    iterative_sr_loss,
    kmeans_plus_plus,
    revive_dead_codes,
    update_codebook,
)
from tests.common import SMALL_TOKENIZER

SIZES = TransformerConfig(num_layers=1, hidden_size=16, num_heads=2)
VOCABULARY = Vocabulary(num_image=12, size=24, pad=15, unknown=12)
BASE = CogLMConfig(SIZES, VOCABULARY, grid=(4, 4), max_text=5, num_positions=32, image_position=8)
TEXTS = [[17, 18, 19], [20, 17]]


def _log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def _image(shape, seed=0):
    return np.random.default_rng(seed).integers(12, size=shape).astype(np.int32)


@pytest.fixture(scope="module")
def base_params():
    return coglm.init_params(jax.random.key(0), BASE)


def test_coglm_loss_is_the_mean_over_its_kinds(base_params):
    cells = _image((2, 16))
    records = np.stack([make_record([t], c, BASE) for t, c in zip(TEXTS, cells, strict=True)])
    choices = coglm_samples.Choices(
        np.array([False, True]), np.zeros(2, bool), np.array([[[0, 0]], [[1, 1]]])
    )
    english = english_texts(records, BASE, first_chinese=20)
    sample = coglm_samples.mixed_samples(records, english, choices, BASE, patch_size=2)
    loss, by_kind = coglm_loss(base_params, sample, config=BASE)
    logits = coglm.apply(base_params, sample.tokens, sample.positions, sample.mask, config=BASE)
    each = -np.take_along_axis(_log_softmax(logits), sample.labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss.value, each[sample.loss_mask].mean(), rtol=1e-5)
    for kind in (
        coglm_samples.LossKind.IMAGE,
        coglm_samples.LossKind.PATCH,
        coglm_samples.LossKind.CHINESE,
    ):
        expected = each[sample.kind == kind].mean()
        np.testing.assert_allclose(by_kind[kind.name.lower()].value, expected, rtol=1e-5)
    assert np.isnan(by_kind["english"].value)  # none in the batch


def test_direct_sr_loss_weighs_cells(base_params):
    config = DirectSRConfig(BASE, ratio=3, text_slots=5, window=(3, 3), cross_window=(3, 3))
    params = direct_sr.from_coglm(base_params, config)
    text, is_text = inputs.left_padded(TEXTS, 5, VOCABULARY)
    fine = _image((2, 144))
    layout = inputs.direct_super_resolution(text, is_text, _image((2, 16), 1), config)
    weights = np.random.default_rng(2).uniform(0.5, 2, fine.shape).astype(np.float32)
    loss, _ = direct_sr_loss(params, layout, fine, weights, config=config)
    logits = direct_sr.apply(params, *layout[:3], config=config)
    each = -np.take_along_axis(_log_softmax(logits), fine[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss.value, (each * weights).sum() / weights.sum(), rtol=1e-5)


def test_direct_sr_starts_from_coglm(base_params):
    config = DirectSRConfig(BASE, ratio=3, text_slots=5)
    params = direct_sr.from_coglm(base_params, config)
    fresh = jax.eval_shape(lambda key: direct_sr.init_params(key, config), jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: leaf.shape, fresh)
    assert jax.tree.map(lambda leaf: leaf.shape, params) == shapes
    fine = params["extra_position_embeddings"].reshape(12, 12, -1)
    coarse = base_params["position_embeddings"][8:24].reshape(4, 4, -1)
    np.testing.assert_array_equal(fine[4:8, 8:12], coarse)  # tiled, not up-sampled
    attention = params["layers"]["attention"]
    np.testing.assert_array_equal(
        attention["qkv_plus"]["query_key_value"]["kernel"],
        attention["qkv"]["query_key_value"]["kernel"],
    )


def test_iterative_sr_loss_counts_masked_cells_alone():
    config = IterativeSRConfig(SIZES, VOCABULARY, grid=(6, 6), text_slots=5, num_positions=8)
    params = iterative_sr.init_params(jax.random.key(1), config)
    text, is_text = inputs.left_padded(TEXTS, 5, VOCABULARY)
    fine = _image((2, 36))
    masked = np.random.default_rng(3).random(fine.shape) < 0.5
    shown = np.where(masked, VOCABULARY.start_of_image, fine)
    layout = inputs.iterative_super_resolution(text, is_text, shown, config)
    weights = np.ones(fine.shape, np.float32)
    loss, metrics = iterative_sr_loss(params, layout, fine, masked, weights, config=config)
    logits = iterative_sr.apply(params, *layout[:3], config=config)
    each = -np.take_along_axis(_log_softmax(logits), fine[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss.value, each[masked].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["image"].value, loss.value, rtol=1e-5)


def test_straight_through_gradient_reaches_the_encoder_and_spares_the_codebook():
    params = image.init_params(jax.random.key(2), SMALL_TOKENIZER)
    pictures = jax.random.uniform(jax.random.key(3), (2, 16, 16, 3))

    def loss(params):
        weights = jnp.ones(pictures.shape[:3])
        return hvqvae_loss(params, pictures, weights, (8,), config=SMALL_TOKENIZER)[0].value

    grads = jax.grad(loss)(params)
    encoder = np.abs(grads["encoder"]["conv_in"]["kernel"])
    assert encoder.max() > 0
    np.testing.assert_array_equal(grads["codebook"], 0)  # moved by its average instead
    np.testing.assert_array_equal(grads["decoder_4"]["conv_in"]["kernel"], 0)


def test_codebook_average_converges_to_the_mean_of_its_vectors():
    codebook = jnp.array([[0.0, 0.0], [10.0, 10.0]])
    statistics = init_statistics(codebook)
    vectors = jnp.array([[1.0, 1.0], [3.0, 1.0], [10.0, 12.0], [10.0, 12.0]])
    for _ in range(200):
        ids = image.nearest_code(vectors, codebook)
        codebook, statistics = update_codebook(statistics, vectors, ids, decay=0.9)
    np.testing.assert_allclose(codebook, [[2, 1], [10, 12]], atol=1e-3)
    np.testing.assert_allclose(statistics.cluster_size, [2, 2], atol=1e-3)


def test_dead_codes_move_onto_vectors_and_live_ones_stay():
    codebook = jnp.array([[0.0, 0.0], [50.0, 50.0]])
    statistics = CodebookStatistics(jnp.array([4.0, 0.0]), codebook)
    vectors = jnp.array([[0.0, 0.1], [5.0, 5.0], [5.0, 5.0]])
    moved, statistics = revive_dead_codes(jax.random.key(0), codebook, statistics, vectors)
    np.testing.assert_array_equal(moved[0], codebook[0])
    np.testing.assert_array_equal(moved[1], [5, 5])  # far from its code, so all but surely drawn
    np.testing.assert_allclose(
        statistics.embed_avg[1] / statistics.cluster_size[1], [5, 5], rtol=1e-5
    )


def test_kmeans_plus_plus_finds_separate_groups():
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [100, 0], [0, 100], [100, 100]], float)
    vectors = (centres[:, None] + rng.normal(0, 1, (4, 50, 2))).reshape(-1, 2)
    codes = kmeans_plus_plus(rng, vectors, 4)
    nearest = ((codes[:, None] - centres) ** 2).sum(axis=-1).argmin(axis=1)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3]
