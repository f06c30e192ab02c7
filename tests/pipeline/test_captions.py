"""Captions and ranks of a bundle's pictures."""

import functools

import jax
import numpy as np
import pytest

from cogview2_jax.pipeline.cogview import CogView
from tests.pipeline.conftest import PROMPT, noise


def test_ranking_sorts_by_score(cv, stages):
    order, scores = cv.rank(PROMPT, stages["full"][0])
    assert sorted(order.tolist()) == [0, 1]
    assert scores[order[0]] >= scores[order[1]]
    assert np.isfinite(scores).all() and (scores < 0).all()
    swapped, _ = cv.rank(PROMPT, stages["full"][0][::-1])
    assert swapped.tolist() == [1 - number for number in order]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_captions_are_words_of_their_language(cv, tiny, language):
    for seed in range(5):
        key = jax.random.key(seed) if seed else None
        said = cv.caption(noise(96, 96, seed), language=language, key=key)
        chinese = [any("\u4e00" <= letter <= "\u9fff" for letter in word) for word in said.split()]
        assert chinese and all(chinese) if language == "zh" else said and not any(chinese)


def test_a_key_draws_captions_and_temperature_0_does_not(cv):
    picture = noise(96, 96)
    draw = functools.partial(cv.caption, picture, temperature=4.0)  # one word is most probable
    drawn = [draw(key=jax.random.key(seed)) for seed in range(4)]
    assert len(set(drawn)) == 4  # twelve random words each
    assert draw(key=jax.random.PRNGKey(2)) == drawn[2]
    assert cv.caption(picture, key=jax.random.key(2), temperature=0) == cv.caption(picture)


def test_the_most_likely_of_several_captions_is_taken(cv, stages):
    pictures, key = list(stages["full"][0]), jax.random.key(3)
    best = cv.captions(pictures, key=key, candidates=5, temperature=2.0)
    greedy = cv.captions(pictures)
    for number, (mine, plain) in enumerate(zip(best, greedy, strict=True)):
        drawn = [
            cv.token_captions(
                [cv.picture_tokens(picture) for picture in pictures],
                keys=jax.vmap(jax.random.fold_in, (0, None))(
                    jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(2)), n
                ),
                temperature=2.0,
            )[number]
            for n in range(1, 5)
        ]
        texts = [plain, *drawn]
        assert len(set(texts)) > 2
        assert mine == texts[int(np.argmax(cv.scores(texts, [pictures[number]])[:, 0]))]
    with pytest.raises(ValueError, match="5 candidates need a key"):
        cv.caption(pictures[0], candidates=5)


def test_a_caption_has_a_word_whatever_the_network_prefers(tiny):
    """With a network that would end at once, by each kind of end."""
    vocabulary = tiny.coglm_config.vocabulary
    blank = [
        vocabulary.pad,
        vocabulary.num_image + tiny.text_model.eos_id(),
        vocabulary.num_image + tiny.text_model.piece_to_id("▁"),
    ]
    for number in blank:
        # The output matrix is the word table: a constant that grows with the row's own length.
        table = np.array(tiny.coglm["word_embeddings"])
        final = {name: np.zeros_like(leaf) for name, leaf in tiny.coglm["final_layernorm"].items()}
        final["bias"][0] = 1
        table[:, 0] = 0
        table[number, 0] = 50
        cv = CogView(
            tiny._replace(coglm=tiny.coglm | {"word_embeddings": table, "final_layernorm": final})
        )
        for language in ("en", "zh"):
            assert cv.caption(noise(96, 96), language=language).strip()


def test_captions_of_a_batch_are_those_of_each(cv):
    pictures = [noise(96, 96, seed) for seed in range(3)]
    for language in ("en", "zh"):
        each = [cv.caption(picture, language=language) for picture in pictures]
        assert cv.captions(pictures, language=language) == each
