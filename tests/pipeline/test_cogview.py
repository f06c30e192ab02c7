"""Strings and pictures in and out: results depend on the documented arguments alone."""

import dataclasses
import io
import math
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

import cogview2_jax
from cogview2_jax import bundle as bundles
from cogview2_jax.pipeline import stages as programs
from cogview2_jax.pipeline.cogview import STAGES, CogView
from cogview2_jax.pipeline.prompts import image_keys
from cogview2_jax.tokenizer.image import to_pixels, to_tokens
from tests.pipeline.conftest import OTHER, PROMPT, noise

# --- generate -------------------------------------------------------------------------------------


def test_pictures_of_every_stage(stages):
    assert tuple(stages) == STAGES
    for pictures in stages.values():
        assert pictures.shape == (1, 2, 96, 96, 3)
        assert pictures.dtype == np.uint8
        assert pictures.std() > 0


def test_the_key_alone_decides(cv, stages):
    again = cv.generate(PROMPT, 2, key=jax.random.key(0))
    np.testing.assert_array_equal(again, stages["full"][0])
    old = cv.generate(PROMPT, 2, key=jax.random.PRNGKey(0))
    np.testing.assert_array_equal(old, again)
    other = cv.generate(PROMPT, 2, key=jax.random.key(1))
    # Of two random pictures, most pixels differ.
    assert (other != again).mean() > 0.5 and (again[0] != again[1]).mean() > 0.5


def test_watching_ends_in_the_same_pictures(cv, stages):
    first, *steps = list(cv.watch(PROMPT, 2, key=jax.random.key(0)))
    assert first[0] == "candidate" and (first[1] == steps[0][1]).all()
    assert [name for name, _ in steps] == ["base", "direct", *["round"] * 6]
    for (_, pictures), stage in zip((steps[0], steps[1], steps[-1]), STAGES, strict=True):
        np.testing.assert_array_equal(pictures, stages[stage][0])
    before = programs.super_resolve_iterative._cache_size()
    base = cv.watch(OTHER, 2, key=jax.random.key(0), stage="base", candidates=3)
    assert [name for name, _ in base] == [*["candidate"] * 3, "base"]
    assert programs.super_resolve_iterative._cache_size() == before


def test_the_best_of_all_candidates_are_kept(cv, stages):
    """Five candidates of two prompts: the kept two have the highest scores, in their order."""
    prompts, key = [PROMPT, OTHER], jax.random.key(5)
    made = cv.generate_stages(prompts, key, 2, candidates=5, keep_best=True)
    tokens, keys = cv._drawing(prompts, key, 2)
    drawn = [
        programs.decode_image(
            cv._params("coglm"),
            *tokens.base,
            keys(number),
            cv.bundle.cluster_labels,
            config=cv.bundle.coglm_config,
            **cv._sampling(),
        )
        for number in range(3)
    ]
    pictures, scores = {}, {}
    for coarse in drawn:
        found, pixels = (
            cv._scores(tokens, np.asarray(coarse)),
            cv._pixels(np.asarray(coarse), "base"),
        )
        for row in range(4):
            scores.setdefault(row // 2, []).append(found[row])
            pictures.setdefault(row // 2, []).append(cv._enlarged(pixels[row : row + 1])[0])
    for prompt in (0, 1):  # the sixth is not asked for
        order = np.argsort(-np.array(scores[prompt][:5]), kind="stable")[:2]
        expected = np.stack([pictures[prompt][i] for i in order])
        np.testing.assert_array_equal(made["base"][prompt], expected)
    with pytest.raises(ValueError, match="at least the 2 pictures to keep: got 1"):
        cv.generate_stages(prompts, key, 2, candidates=1, keep_best=True)


def test_one_compilation_serves_every_prompt_and_seed(cv, stages):
    compiled = (
        image_keys,
        programs.decode_image,
        programs.super_resolve_direct,
        programs.super_resolve_iterative,
        to_pixels,
    )
    before = [program._cache_size() for program in compiled]
    for seed, prompt in enumerate(
        (OTHER, "a star", "a small dotted green star on the left", "红色圆")
    ):
        cv.generate_stages([prompt], jax.random.key(seed), 2)
    assert [program._cache_size() for program in compiled] == before


def test_what_else_is_in_the_batch_does_not_matter(cv, stages):
    both = cv.generate_stages([OTHER, PROMPT], jax.random.key(0), 1)
    for stage in STAGES:
        np.testing.assert_array_equal(both[stage][1, 0], stages[stage][0, 0])


def test_progress_names_the_parts(cv):
    for stages, parts in (
        (("base",), ["base", "pixels"]),
        (("direct",), ["base", "direct", "pixels"]),
        (("full",), ["base", "direct", "iterative", "pixels"]),
    ):
        seen: list[str] = []
        made = cv.generate_stages(
            [OTHER], jax.random.key(0), 2, stages=stages, progress=seen.append
        )
        assert seen == parts
        assert tuple(made) == stages


def test_the_best_candidate_is_kept(cv, tiny, monkeypatch):
    """Of three candidates, drawn in one batch, each image keeps the one with the best score. The
    bundle sets their number, and an argument overrides it.
    """
    drawn, scored = [], []

    def draw(*arguments, **options):
        drawn.append(np.asarray(programs.decode_image(*arguments, **options)))
        return drawn[-1]

    def score(*arguments, **options):
        scored.append(np.asarray(programs.caption_score(*arguments, **options)))
        return scored[-1]

    monkeypatch.setattr("cogview2_jax.pipeline.cogview.decode_image", draw)
    monkeypatch.setattr("cogview2_jax.pipeline.parts.caption_score", score)
    key = jax.random.key(5)
    made = cv.generate(PROMPT, 2, key=key, stage="base", candidates=3)
    assert len(drawn) == 1 and len(scored) == 3
    best = np.argmax(scored, axis=0)
    kept = drawn[0].reshape(2, 3, -1)[np.arange(2), best]
    pixels = to_pixels(tiny.tokenizer, kept, grid=(4, 4), stride=8, config=tiny.tokenizer_config)
    shrunk = [Image.fromarray(picture).resize((32, 32), Image.Resampling.BOX) for picture in made]
    # Enlarged bicubically and shrunk again: within the ringing of a bicubic filter.
    assert np.abs(np.stack(shrunk).astype(int) - np.asarray(pixels)).mean() < 12
    choosy = CogView(tiny._replace(sampling=dataclasses.replace(tiny.sampling, candidates=3)))
    np.testing.assert_array_equal(choosy.generate(PROMPT, 2, key=key, stage="base"), made)
    assert len(drawn) == 2
    # In batches of two images, one after another, the pictures are the same.
    choosy = dataclasses.replace(choosy, at_once=2)
    np.testing.assert_array_equal(choosy.generate(PROMPT, 2, key=key, stage="base"), made)
    assert len(drawn) == 5
    np.testing.assert_array_equal(
        drawn[1].reshape(2, 3, -1), np.stack([coarse for coarse in drawn[2:]], axis=1)
    )
    choosy.generate(PROMPT, 2, key=key, stage="base", candidates=1)
    assert len(drawn) == 6


# --- Pictures come in one way ---------------------------------------------------------------------


def test_a_picture_is_the_same_from_a_file_and_from_memory(cv, tmp_path):
    """Turned by EXIF, transparent, 16 bits: scores are of the pixels that a viewer shows."""
    upright = Image.fromarray(noise(96, 96))
    exif = Image.Exif()
    exif[0x112] = 6
    turned = tmp_path / "turned.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    sticker = tmp_path / "sticker.png"
    clear = Image.new("RGBA", (96, 96), (0, 0, 0, 0))
    clear.paste(upright.crop((0, 0, 50, 50)))
    clear.save(sticker)
    white = Image.new("RGB", (96, 96), "white")
    white.paste(upright.crop((0, 0, 50, 50)))
    deep = tmp_path / "deep.png"
    grey = np.asarray(upright.convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(deep)
    for file, plain in ((turned, upright), (sticker, white), (deep, Image.fromarray(grey))):
        expected = cv.rank(PROMPT, [plain, plain])[1]
        for way in (file, str(file), file.read_bytes(), Image.open(io.BytesIO(file.read_bytes()))):
            np.testing.assert_array_equal(cv.rank(PROMPT, [way, plain])[1], expected)


# --- infill ---------------------------------------------------------------------------------------


def test_infilling_a_picture_of_the_models_own_size(cv, tiny, stages, monkeypatch):
    """All of the picture passes the tokenizer once; cells outside the box keep their tokens."""
    picture, box = stages["full"][0, 0], (0.5, 0, 1, 1)
    tokens = []

    def pixels(params, ids, **options):
        tokens.append(np.asarray(ids))
        return to_pixels(params, ids, **options)

    monkeypatch.setattr("cogview2_jax.tokenizer.image.to_pixels", pixels)
    made = cv.infill(OTHER, picture, box, 2, key=jax.random.key(0))
    again = cv.infill(OTHER, picture, box, 2, key=jax.random.PRNGKey(0))
    np.testing.assert_array_equal(made, again)
    config = tiny.tokenizer_config
    kept = to_tokens(tiny.tokenizer, picture[None], stride=8, config=config)
    fine = tokens[0].reshape(2, 12, 12)
    before = np.asarray(kept).reshape(12, 12)
    np.testing.assert_array_equal(fine[:, :6], np.stack([before[:6]] * 2))
    # Drawn from 64 codes: few are what they were, or what the other picture has.
    assert (fine[:, 6:] != before[6:]).mean() > 0.5 and (fine[0, 6:] != fine[1, 6:]).mean() > 0.5
    drawn = to_pixels(tiny.tokenizer, tokens[0], grid=(12, 12), stride=8, config=config)
    np.testing.assert_array_equal(made, drawn)


SHAPES = {
    "wide": ((96, 288), (0, 0, 1, 0.33)),
    "wide, right": ((96, 288), (0.2, 0.7, 1, 1)),
    "portrait": ((300, 110), (0.6, 0, 0.9, 1)),
    "large": ((200, 200), (0, 0.5, 0.5, 1)),
    "small": ((30, 40), (0, 0, 1, 0.5)),
    "a box longer than the shorter side": ((96, 288), (0, 0.1, 1, 0.9)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_infilling_keeps_what_is_outside(name, cv):
    (height, width), box = SHAPES[name]
    picture = noise(height, width)
    made = cv.infill(PROMPT, picture, box, 2, key=jax.random.key(0))
    assert made.shape == (2, height, width, 3) and made.dtype == np.uint8
    changed = (made != picture).any((0, -1))
    rows, columns = np.arange(height)[:, None] + 0.5, np.arange(width) + 0.5
    top, left, bottom, right = box
    # Half a cell of the 4×4 grid: a cell with its centre in the box is drawn as a whole.
    side = max(min(height, width), (bottom - top) * height, (right - left) * width)
    near_rows = (rows > top * height - side / 8 - 1) & (rows < bottom * height + side / 8 + 1)
    near = near_rows & (
        (columns > left * width - side / 8 - 1) & (columns < right * width + side / 8 + 1)
    )
    if side == 96 and (height, width) != (96, 96) and "wide" in name:
        # The crop has the model's own size, and all of it passes through the tokenizer.
        first = 0 if left == 0 else width - 96
        assert not changed[:, :first].any() and not changed[:, first + 96 :].any()
    else:
        assert not changed[~near].any()
    inside = (rows > (top + bottom) / 2 * height - side / 16) & (
        rows < (top + bottom) / 2 * height + side / 16
    )
    assert changed[np.broadcast_to(inside, changed.shape) & near].mean() > 0.5


def test_a_picture_is_infilled_upright(cv, tmp_path):
    upright = Image.fromarray(noise(96, 192))
    exif = Image.Exif()
    exif[0x112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    box, key = (0, 0, 1, 0.4), jax.random.key(0)
    np.testing.assert_array_equal(
        cv.infill(PROMPT, tmp_path / "turned.png", box, 2, key=key),
        cv.infill(PROMPT, upright, box, 2, key=key),
    )


# --- A model in the making ------------------------------------------------------------------------


def test_a_base_model_does_what_it_can(tiny, stages, tmp_path):
    bundles.save(tmp_path / "base", tiny._replace(direct={}, iterative={}))
    cv = cogview2_jax.load(tmp_path / "base")
    key = jax.random.key(0)
    said = (
        "the model lacks direct, iterative: `cogview2 train direct-sr` trains direct;"
        " until then it draws as far as stage base (--stage base)"
    )
    with pytest.warns(UserWarning) as caught:
        made = cv.generate(PROMPT, 2, key=key)
    assert [str(each.message) for each in caught] == [said]
    np.testing.assert_array_equal(made, stages["base"][0])
    for stage in ("direct", "full"):
        with pytest.raises(ValueError) as refused:
            cv.generate(PROMPT, 2, key=key, stage=stage)
        assert "--stage base" in str(refused.value) and "\n" not in str(refused.value)
    picture = stages["full"][0, 0]
    with pytest.warns(UserWarning, match="--stage base"):
        filled = cv.infill(PROMPT, picture, (0.5, 0, 1, 1), 2, key=key)
    np.testing.assert_array_equal(filled[:, :48], np.stack([picture[:48]] * 2))
    assert (filled[:, 48:] != picture[48:]).mean() > 0.5
    assert cv.caption(picture)
    assert np.isfinite(cv.rank(PROMPT, [picture] * 2)[1]).all()


def test_a_complete_model_warns_of_nothing(cv, stages):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cv.generate(PROMPT, 2, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (("tokenizer",), "lacks tokenizer: `cogview2 train tokenizer` trains it"),
        (("coglm",), "lacks coglm: `cogview2 train coglm` trains it"),
    ],
)
def test_a_network_that_is_still_to_be_trained_is_named(missing, said, tiny):
    cv = CogView(tiny._replace(**{name: {} for name in missing}))
    picture, key = noise(96, 96), jax.random.key(0)
    for call in (
        lambda: cv.generate(PROMPT, 2, key=key),
        lambda: cv.infill(PROMPT, picture, (0, 0, 1, 1), 2, key=key),
        lambda: cv.caption(picture),
        lambda: cv.rank(PROMPT, [picture] * 2),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert said.replace(" trains it", " trains") in str(caught.value)
        assert "\n" not in str(caught.value)


# --- Wrong arguments ------------------------------------------------------------------------------

PICTURE = np.zeros((8, 8, 3), np.uint8)
WRONG = {
    "no prompt": (lambda cv, key: cv.generate_stages([], key), "prompts must have at least one"),
    "empty prompt": (lambda cv, key: cv.generate(" ", key=key), "at least one word"),
    "long prompt": (lambda cv, key: cv.generate("a star " * 9, key=key), "at most 12 tokens"),
    "unknown word": (lambda cv, key: cv.generate("a zebra", key=key), "text model: zebra"),
    "stage": (lambda cv, key: cv.generate("a star", key=key, stage="last"), "got last"),
    "no stage": (lambda cv, key: cv.generate_stages(["a star"], key, stages=()), "got none"),
    "language": (lambda cv, key: cv.caption(PICTURE, language="fr"), "fr"),
    "float picture": (lambda cv, key: cv.caption(np.zeros((8, 8, 3))), "picture must be uint8"),
    "no file": (lambda cv, key: cv.caption("nowhere.png"), "nowhere.png: no such file"),
    "no picture": (lambda cv, key: cv.caption(b"abc"), "not a picture"),
    "box order": (
        lambda cv, key: cv.infill("a star", PICTURE, (1, 0, 0, 1), key=key),
        "box must be (top, left, bottom, right)",
    ),
    "half a box": (lambda cv, key: cv.infill("a star", PICTURE, (0, 1), key=key), "box must be"),
    "NaN box": (
        lambda cv, key: cv.infill("a star", PICTURE, (0, 0, math.nan, 1), key=key),
        "box must be",
    ),
    "small box": (
        lambda cv, key: cv.infill("a star", PICTURE, (0, 0, 0.01, 0.01), key=key),
        "must hold the centre of a cell",
    ),
    "endless box": (
        lambda cv, key: cv.infill(
            "a star", np.zeros((1, 9000, 3), np.uint8), (0, 0, 1, 1), key=key
        ),
        "give a shorter box",
    ),
    "no pictures": (lambda cv, key: cv.rank("a star", []), "pictures must have at least one"),
    "top_k above": (lambda cv, key: cv.caption(PICTURE, key=key, top_k=10**6), "top_k must be at"),
}
for count in (0, -1, 1.5, "2", None, True):
    WRONG[f"{count!r} images"] = (
        lambda cv, key, n=count: cv.generate("a star", n, key=key),
        "num_images must be",
    )
    WRONG[f"{count!r} infilled"] = (
        lambda cv, key, n=count: cv.infill("a star", PICTURE, (0, 0, 1, 1), n, key=key),
        "num_images must be",
    )
    WRONG[f"top {count!r}"] = (
        lambda cv, key, n=count: cv.caption(PICTURE, key=key, top_k=n),
        "top_k must be",
    )
    if count is not None:
        WRONG[f"{count!r} candidates"] = (
            lambda cv, key, n=count: cv.generate("a star", key=key, candidates=n),
            "candidates must be",
        )
for temperature in (-1, math.nan, math.inf, "1", None):
    WRONG[f"temperature {temperature}"] = (
        lambda cv, key, t=temperature: cv.caption(PICTURE, key=key, temperature=t),
        "temperature must be",
    )
for wrong in (0, "0", np.zeros(3, np.uint32), jax.random.split(jax.random.key(0), 2)):
    for name, call in {
        "generate": lambda cv, key: cv.generate("a star", key=key),
        "infill": lambda cv, key: cv.infill("a star", PICTURE, (0, 0, 1, 1), key=key),
        "caption": lambda cv, key: cv.caption(PICTURE, key=key),
    }.items():
        WRONG[f"{name} with key {wrong!r}"] = (
            lambda cv, key, call=call, wrong=wrong: call(cv, wrong),
            "key must",
        )


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_in_one_line(name, cv):
    call, message = WRONG[name]
    with pytest.raises(ValueError) as caught:
        call(cv, jax.random.key(0))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
