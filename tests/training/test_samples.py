"""Pictures of a network in training: what is drawn and labelled, and what is refused at first."""

import jax
import numpy as np
import pytest

from cogview2_jax.tokenizer import image
from cogview2_jax.training import samples


def test_reconstructions_show_the_trained_strides_alone_each_with_a_label(tiny):
    """Untrained strides would be noise that nobody can tell from a failure."""
    crops = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    draw = samples.reconstructions(crops, (8,), tiny.tokenizer_config)
    sheet = draw(tiny.tokenizer)
    label_width = sheet.shape[1] - 3 * 32
    assert sheet.shape[0] == 2 * 32 and label_width > 0
    pictures = sheet[:, label_width:]
    np.testing.assert_array_equal(pictures[:32], np.concatenate(list(crops), axis=1))
    images = crops.astype(np.float32) / 255
    ids = image.encode(tiny.tokenizer, images, 8, config=tiny.tokenizer_config)
    made = np.asarray(image.decode(tiny.tokenizer, ids, 8, config=tiny.tokenizer_config))
    expected = np.concatenate(list(made.clip(0, 1) * 255), axis=1)
    np.testing.assert_allclose(pictures[32:].astype(float), expected, rtol=0, atol=1)
    for row in (sheet[:32, :label_width], sheet[32:, :label_width]):
        assert row.min() < 128 and row.max() == 255  # dark words on white


def test_prompts_are_drawn_in_rows(tiny):
    def put(bundle, params):
        return bundle._replace(coglm=params)

    draw = samples.of_prompts(tiny, put, "base", ["a red circle", "a small green star"], 2)
    sheet = draw(jax.device_get(tiny.coglm))
    assert sheet.shape == (2 * 96, 2 * 96, 3) and sheet.dtype == np.uint8
    # The first row does not depend on the second prompt.
    alone = samples.of_prompts(tiny, put, "base", ["a red circle"], 2)(tiny.coglm)
    np.testing.assert_allclose(sheet[:96].astype(int), alone.astype(int), atol=1)


def test_what_cannot_be_drawn_is_refused_before_training(tiny):
    with pytest.raises(ValueError, match="sample_every needs"):
        samples.of_prompts(tiny, lambda bundle, params: bundle, "base", [])
    without = tiny._replace(tokenizer={}, cluster_labels=np.zeros(0, np.int32))
    with pytest.raises(ValueError, match="lacks tokenizer"):
        samples.of_prompts(without, lambda bundle, params: bundle, "base", ["a red circle"])
