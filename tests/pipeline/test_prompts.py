"""Strings to ids and back, and the ids of captions."""

import numpy as np
import pytest

from cogview2_jax.pipeline.prompts import caption_ids, caption_text
from cogview2_jax.tokenizer import text


def test_a_caption_ends_at_its_first_pad(tiny):
    vocabulary, model = tiny.coglm_config.vocabulary, tiny.text_model
    words = [vocabulary.num_image + model.piece_to_id(piece) for piece in ("▁a", "▁star")]
    for end in (vocabulary.pad, vocabulary.num_image + model.eos_id()):
        assert caption_text(np.array([*words, end, *words]), model, vocabulary) == "a star"
    assert caption_text(np.array(words), model, vocabulary) == "a star"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_captions_hold_pieces_of_their_language(tiny, language):
    vocabulary, model = tiny.coglm_config.vocabulary, tiny.text_model
    first, words, later = caption_ids(model, vocabulary, language)
    pieces = np.array(model.id_to_piece(list(range(vocabulary.num_text))))
    chinese = np.array([text.is_chinese(piece) for piece in pieces])
    assert set(pieces[later & ~first]) == {"<pad>", "</s>"}
    assert not (words & ~first).any() and not (first & ~later).any()
    assert "<unk>" not in pieces[later] and "▁" not in pieces[words]
    np.testing.assert_array_equal(words, chinese if language == "zh" else words & ~chinese)
    assert "▁star" in pieces[words] if language == "en" else "星形" in pieces[words]


def test_a_language_that_the_text_model_lacks_is_refused(tiny):
    model = text.load_text_model(text.train_text_model(["a red star"]))
    vocabulary = text.vocabulary_for(model, 64)
    with pytest.raises(ValueError, match="the text model has no word in zh"):
        caption_ids(model, vocabulary, "zh")
    with pytest.raises(ValueError, match="language must be en or zh: got 'fr'"):
        caption_ids(model, vocabulary, "fr")


def test_a_prompt_that_is_no_text_is_refused(tiny):
    for prompt in (["a star"], {}, None, 1, b"a star"):
        with pytest.raises(ValueError, match="text must be one string: got"):
            text.encode_prompt(tiny.text_model, prompt, tiny.coglm_config.vocabulary, 12)
