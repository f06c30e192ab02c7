"""Losses: their values against NumPy, and their sums over the parts of a batch."""

import functools

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
from cogview2_jax.networks.inputs import NetworkInput
from cogview2_jax.tokenizer import image
from cogview2_jax.tokenizer.hvqvae import HVQVAE
from cogview2_jax.training import coglm_samples
from cogview2_jax.training.losses import (
    coglm_loss,
    direct_sr_loss,
    hvqvae_loss,
    iterative_sr_loss,
)
from tests.common import SMALL_TOKENIZER, random_params

SIZES = TransformerConfig(num_layers=1, hidden_size=16, num_heads=2)
VOCABULARY = Vocabulary(num_image=12, size=24, pad=15, unknown=12)
BASE = CogLMConfig(SIZES, VOCABULARY, grid=(4, 4), max_text=5, num_positions=32, image_position=8)
TEXTS = [[17, 18, 19], [20, 17]]


def compiled(function, *arguments, config):
    """Its value, computed by one program with little optimisation, which compiles fastest."""
    return jit(functools.partial(function, config=config))(*arguments)


jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def _image(shape, seed=0):
    return np.random.default_rng(seed).integers(12, size=shape).astype(np.int32)


@pytest.fixture(scope="module")
def base_params():
    return random_params(coglm.init_params, BASE)


def test_coglm_loss_is_the_mean_over_its_kinds(base_params):
    cells = _image((2, 16))
    records = np.stack([make_record([t], c, BASE) for t, c in zip(TEXTS, cells, strict=True)])
    choices = coglm_samples.Choices(
        np.array([False, True]), np.zeros(2, bool), np.array([[[0, 0]], [[1, 1]]])
    )
    english = english_texts(records, BASE, first_chinese=20)
    sample = coglm_samples.mixed_samples(records, english, choices, BASE, patch_size=2)
    loss, by_kind = compiled(coglm_loss, base_params, sample, config=BASE)
    given = NetworkInput(sample.tokens, sample.positions, sample.mask)
    logits = compiled(coglm.apply, base_params, given, config=BASE)
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
    given = inputs.direct_super_resolution(text, is_text, _image((2, 16), 1), config)
    weights = np.random.default_rng(2).uniform(0.5, 2, fine.shape).astype(np.float32)
    loss, _ = compiled(direct_sr_loss, params, given, fine, weights, config=config)
    logits = compiled(direct_sr.apply, params, given, config=config)
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
    params = random_params(iterative_sr.init_params, config)
    text, is_text = inputs.left_padded(TEXTS, 5, VOCABULARY)
    fine = _image((2, 36))
    masked = np.random.default_rng(3).random(fine.shape) < 0.5
    shown = np.where(masked, VOCABULARY.start_of_image, fine)
    given = inputs.iterative_super_resolution(text, is_text, shown, config)
    weights = np.ones(fine.shape, np.float32)
    loss, metrics = compiled(iterative_sr_loss, params, given, fine, masked, weights, config=config)
    logits = compiled(iterative_sr.apply, params, given, config=config)
    each = -np.take_along_axis(_log_softmax(logits), fine[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss.value, each[masked].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["image"].value, loss.value, rtol=1e-5)


# --- The image tokenizer --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_params():
    return random_params(image.init_params, SMALL_TOKENIZER)


@pytest.fixture(scope="module")
def tokenizer_loss():
    """(params, pictures, weights) → the loss, its parts and its gradient, all summed."""

    def found(params, pictures, weights):
        def total(params):
            loss, metrics, _ = hvqvae_loss(
                params,
                pictures,
                weights,
                (4, 8),
                config=SMALL_TOKENIZER,
                commitment=0.5,
                perceptual=lambda made, true: jnp.mean(jnp.abs(made - true) ** 3),
                perceptual_weight=3.0,
            )
            return loss.total, metrics | {"loss": loss}

        (_, metrics), grads = jax.value_and_grad(total, has_aux=True)(params)
        return metrics, grads

    return jit(found)


PICTURES = np.random.default_rng(3).random((4, 16, 16, 3), np.float32)


def test_tokenizer_losses_of_parts_add_up_to_that_of_the_whole(tokenizer_params, tokenizer_loss):
    """Values and gradients, with pixel weights that differ between and within pictures."""
    rng = np.random.default_rng(4)
    weights = rng.uniform(0, 1, (4, 16, 16)) * np.array([9.0, 1.0, 0.0, 0.2])[:, None, None]
    weights = weights.astype(np.float32)
    whole = tokenizer_loss(tokenizer_params, PICTURES, weights)
    halves = [
        tokenizer_loss(tokenizer_params, PICTURES[rows], weights[rows])
        for rows in (slice(0, 2), slice(2, 4))
    ]
    summed = jax.tree.map(jnp.add, *halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), summed, whole)
    assert abs(halves[0][0]["loss"].value - halves[1][0]["loss"].value) > 0.01


@pytest.fixture(scope="module")
def reconstructed(tokenizer_params):
    """Stride → the errors of pictures and of vectors, value by value."""

    @jit
    def found(params):
        levels = HVQVAE(SMALL_TOKENIZER).apply({"params": params}, PICTURES, method="vectors")
        errors = {}
        for stride, vectors in zip((4, 8), levels, strict=False):
            ids = image.nearest_code(vectors, params["codebook"])
            made = image.decode(params, ids, stride, config=SMALL_TOKENIZER)
            errors[stride] = jnp.abs(made - PICTURES), vectors - params["codebook"][ids]
        return errors

    return jax.device_get(found(tokenizer_params))


def test_tokenizer_loss_is_made_of_its_parts(tokenizer_params, tokenizer_loss, reconstructed):
    """With weights of 1 each is the published mean over the batch."""
    metrics, _ = tokenizer_loss(tokenizer_params, PICTURES, np.ones((4, 16, 16), np.float32))
    values = {name: float(mean.value) for name, mean in metrics.items()}
    expected, loss = {}, 0.0
    for stride, (error, moved) in reconstructed.items():
        expected[f"reconstruction_{stride}"] = (error + error**2).mean()
        expected[f"commitment_{stride}"] = (moved**2).mean()
        expected[f"perceptual_{stride}"] = (error**3).mean()
        reconstruction, commitment, perceptual = list(expected.values())[-3:]
        loss += (reconstruction + 0.5 * commitment + 3 * perceptual) / 2
    expected["loss"] = loss
    assert values == {name: pytest.approx(value, rel=1e-4) for name, value in expected.items()}


def test_pixels_count_by_their_weights(tokenizer_params, tokenizer_loss, reconstructed):
    weights = np.random.default_rng(5).uniform(0, 2, (4, 16, 16)).astype(np.float32)
    metrics, _ = tokenizer_loss(tokenizer_params, PICTURES, weights)
    error, _ = reconstructed[4]
    each = (error + error**2).mean(axis=-1)
    expected = (weights * each).sum() / weights.sum()
    np.testing.assert_allclose(metrics["reconstruction_4"].value, expected, rtol=1e-4)


def test_straight_through_gradient_reaches_the_encoder_and_spares_the_codebook(
    tokenizer_params, tokenizer_loss
):
    _, grads = tokenizer_loss(tokenizer_params, PICTURES, np.ones((4, 16, 16), np.float32))
    assert np.abs(grads["encoder"]["conv_in"]["kernel"]).max() > 0
    np.testing.assert_array_equal(grads["codebook"], 0)  # moved by its average instead
    np.testing.assert_array_equal(grads["decoder_16"]["conv_in"]["kernel"], 0)
