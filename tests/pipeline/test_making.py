"""How pictures came to be: the steps, the animation, and the probability of each token."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

from cogview2_jax.networks import coglm, direct_sr, inputs
from cogview2_jax.pipeline import making, settings
from tests.pipeline.conftest import PROMPT


@pytest.fixture(scope="module")
def made(cv):
    return cv.making(PROMPT, 2, key=jax.random.key(0))


def test_the_steps_end_in_the_pictures_of_generate(made, stages):
    assert [step for step, _ in made.steps] == ["base", "direct", *["round"] * 6]
    np.testing.assert_array_equal(made.steps[0][1], stages["base"][0])
    np.testing.assert_array_equal(made.steps[-1][1], stages["full"][0])
    assert made.base.shape == (2, 4, 4) and made.fine.shape == (2, 12, 12)


def test_probabilities_are_those_of_a_full_pass(cv, tiny, monkeypatch):
    """Softmax over image tokens of the network's own logits, in several blocks."""
    monkeypatch.setattr(making, "_ROWS_AT_ONCE", 6)
    rng = np.random.default_rng(0)
    tokens = cv._tokens([PROMPT] * 2)
    coarse = rng.integers(0, 64, (2, 16)).astype(np.int32)
    fine = rng.integers(0, 64, (2, 144)).astype(np.int32)

    def expected(logits, ids):
        return np.take_along_axis(np.asarray(jax.nn.softmax(logits)), ids[..., None], -1)[..., 0]

    config = tiny.coglm_config
    given = inputs.text_to_image(*tokens.base, coarse, config)
    bias = inputs.text_key_bias(given.is_text, 1.4)
    logits = coglm.apply(tiny.coglm, given, config=config, bias=bias, ids=(0, 64))
    found = making.base_probability(
        tiny.coglm, *tokens.base, coarse, config=config, text_upweight=1.4
    )
    np.testing.assert_allclose(found, expected(logits[:, -17:-1], coarse), rtol=1e-4)

    given = inputs.direct_super_resolution(*tokens.direct, coarse, tiny.direct_config)
    hidden = direct_sr.hidden_states(tiny.direct, given, config=tiny.direct_config)
    logits = hidden @ tiny.direct["word_embeddings"][:64].T
    found = making.direct_probability(
        tiny.direct, *tokens.direct, coarse, fine, config=tiny.direct_config
    )
    np.testing.assert_allclose(found, expected(logits, fine), rtol=1e-4)


def frames(content):
    image = Image.open(io.BytesIO(content))
    shown = []
    for number in range(image.n_frames):
        image.seek(number)
        shown.append(np.asarray(image.convert("RGB")).astype(int))
    return image, shown


@pytest.mark.parametrize("kind", settings.ANIMATIONS)
def test_cells_appear_in_order_then_the_steps(kind):
    """Grey until they are decoded; a lossy file shows them nearly as they are."""
    colours = ((200, 0, 0), (0, 160, 0), (0, 0, 220))
    steps = [
        (name, np.full((32, 32, 3), colour, np.uint8))
        for name, colour in zip(("candidate", "base", "round"), colours, strict=True)
    ]
    image, shown = frames(making.animation(steps, (2, 3), kind))
    assert image.format.lower() == kind and image.info.get("loop") == 0
    assert len(shown) == 6 + 2  # 0 to 5 cells, the base picture and the round
    for number in range(6):
        drawn = np.abs(shown[number] - colours[1]).max(-1) < 30
        cells = [drawn[:16], drawn[16:]]
        corners = [row[8, x] for row in cells for x in (5, 16, 27)]
        assert corners == [cell < number for cell in range(6)]
    assert np.abs(shown[-1] - colours[2]).max() < 30


def test_another_format_is_refused():
    with pytest.raises(ValueError, match="must be webp or gif: got png"):
        making.animation([("base", np.zeros((8, 8, 3), np.uint8))], (2, 2), "png")


def test_sure_is_yellow_and_unsure_dark():
    shown = making.confidence_map(np.array([[0, 0.5], [1, 1]]), (5, 8))
    assert shown.shape == (5, 8, 3) and shown.dtype == np.uint8
    assert shown[0, 0].sum() < shown[0, -1].sum() < shown[-1, 0].sum()
    np.testing.assert_array_equal(shown[-1, 0], shown[-1, -1])


def test_maps_stand_beside_the_picture(made):
    for picture, shown in zip(made.steps[-1][1], making.confidence(made), strict=True):
        assert shown.shape == (96, 3 * 96, 3)
        np.testing.assert_array_equal(shown[:, :96], picture)


def test_a_base_model_has_one_map(cv):
    alone = cv.making(PROMPT, 2, key=jax.random.key(0), stage="base")
    assert alone.fine is None and len(alone.steps) == 1
    assert making.confidence(alone)[0].shape == (96, 2 * 96, 3)


@pytest.mark.parametrize("stage", ["base", "full"])
def test_a_map_follows_the_pictures_that_are_watched(stage, cv):
    how = {"key": jax.random.key(0), "stage": stage}
    *before, (step, maps) = cv.watch(PROMPT, 2, confidence=True, **how)
    assert step == "confidence" and [part for part, _ in before] == [
        part for part, _ in cv.watch(PROMPT, 2, **how)
    ]
    np.testing.assert_array_equal(maps, making.confidence(cv.making(PROMPT, 2, **how)))
