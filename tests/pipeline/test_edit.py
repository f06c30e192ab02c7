"""Editing as published, in pictures of any shape and size, and the scores of texts and pictures."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from PIL import Image

from cogview2_jax.config import DirectSRConfig
from cogview2_jax.pipeline import patch_completion, settings
from cogview2_jax.pipeline import stages as programs
from cogview2_jax.pipeline.patch_completion import box_mask, picture_mask, plan_mask
from cogview2_jax.tokenizer.image import to_pixels, to_tokens
from tests.common import load
from tests.pipeline.conftest import OTHER, PROMPT, noise

TINY_SIDE, BASE_SIDE = 96, 32  # of the tiny model's pictures, and of those of its base stage
SHORT = "a star"


# --- Geometry -------------------------------------------------------------------------------------


def test_in_a_picture_of_the_models_size_it_is_the_published_geometry():
    recorded = load("editing")
    planned = 0
    for box, crop, coarse, fine in zip(
        *(recorded[name] for name in ("boxes", "crops", "masks_20", "masks_60")), strict=True
    ):
        if coarse.any():
            patch = plan_mask(box_mask(tuple(box), 480, 480), DirectSRConfig())
            assert patch.crop == tuple(crop)
            np.testing.assert_array_equal(patch.coarse, coarse)
            np.testing.assert_array_equal(patch.fine, fine)
            planned += 1
    assert planned > 150


def test_a_thousand_masks_in_pictures_of_any_shape(tiny):
    """The crop is a square around the mask, and cells are drawn only where pixels are masked."""
    rng, planned, refused = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        height, width = rng.integers(1, 130, 2)
        mask = rng.random((height, width)) < rng.choice([0.02, 0.5, 0.9])
        top, left = rng.integers(0, height), rng.integers(0, width)
        mask[:top] = mask[:, :left] = False
        try:
            (first, start, last, end), coarse, fine = plan_mask(mask, tiny.direct_config)
        except ValueError as error:
            assert "\n" not in str(error)
            assert any(word in str(error) for word in ("at least", "got none", "shorter"))
            refused += 1
            continue
        planned += 1
        length = last - first
        assert end - start == length
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        longer = max(np.ptp(rows), np.ptp(columns)) + 1
        assert length == max(min(longer * 20 // 14, height, width), longer)
        assert first <= rows[0] and rows[-1] < last and start <= columns[0] and columns[-1] < end
        # It leaves the picture only along a side that is shorter than it.
        for begin, side in ((first, height), (start, width)):
            assert (0 <= begin <= side - length) if length <= side else (begin <= 0)
        for cells in (coarse, fine):
            edges = np.arange(len(cells) + 1) * length // len(cells)
            inside = np.zeros((length, length), bool)
            there = [
                slice(max(begin, 0), min(begin + length, side))
                for begin, side in ((first, height), (start, width))
            ]
            place = tuple(
                slice(part.start - begin, part.stop - begin)
                for part, begin in zip(there, (first, start), strict=True)
            )
            inside[place] = mask[tuple(there)]
            np.testing.assert_array_equal(
                cells, inside[np.ix_(*[edges[:-1].clip(max=length - 1)] * 2)]
            )
    assert planned > 300 and refused > 100


@pytest.mark.parametrize("size", [(96, 96), (300, 200), (57, 500)])
def test_a_thin_mask_is_refused_and_one_of_the_size_that_is_named_is_not(size, tiny):
    thin = np.zeros(size, bool)
    thin[9, 5:55] = True  # the first row of no cell
    with pytest.raises(ValueError, match="at least .* got 1 × 50; give a larger") as refused:
        plan_mask(thin, tiny.direct_config)
    enough = int(str(refused.value).split("at least ")[1].split()[0])
    thin[9 : 9 + enough, 5:55] = True
    assert plan_mask(thin, tiny.direct_config).coarse.any()


def test_a_box_of_a_file_is_one_of_the_square_in_the_middle():
    mask = patch_completion.square_box_mask((0, 0.5, 1, 1), 10, 30)
    expected = np.zeros((10, 30), bool)
    expected[:, 15:20] = True
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(
        patch_completion.square_box_mask((0, 0.5, 1, 1), 10, 10), box_mask((0, 0.5, 1, 1), 10, 10)
    )


MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I;16")


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_of_every_mode(mode):
    half = np.zeros((8, 12), bool)
    half[:, 6:] = True
    if mode == "I;16":
        made = Image.fromarray(half.astype(np.uint16) * 65535)
    elif mode in ("LAB", "PA"):
        made = Image.fromarray(half.astype(np.uint8) * 255).convert("RGB")
        if mode == "PA":
            made = made.convert("P").convert("PA")
        else:
            from PIL import ImageCms

            lab = ImageCms.createProfile("LAB")
            made = ImageCms.profileToProfile(
                made, ImageCms.createProfile("sRGB"), lab, outputMode="LAB"
            )
    else:
        made = Image.fromarray(half.astype(np.uint8) * 255).convert("RGB").convert(mode)
    assert made.mode == mode
    np.testing.assert_array_equal(picture_mask(made, 8, 12), half)


def test_an_array_of_bool_is_a_mask_and_what_is_transparent_is_white():
    half = np.zeros((8, 12), bool)
    half[3:] = True
    np.testing.assert_array_equal(picture_mask(half, 8, 12), half)
    clear = Image.new("RGBA", (12, 8), (0, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (0, 3, 12, 8))
    np.testing.assert_array_equal(picture_mask(clear, 8, 12), half)


# --- edit -----------------------------------------------------------------------------------------

BLOB = np.zeros((200, 260), bool)
BLOB[60:150, 70:120] = BLOB[100:130, 100:190] = True
PARTS = {
    "the model's own size": ((96, 96), (0.5, 0, 1, 1)),
    "a part of it": ((96, 96), (0.1, 0.2, 0.5, 0.6)),
    "wide": ((96, 288), (0, 0.1, 1, 0.3)),
    "portrait": ((300, 110), (0.6, 0, 0.9, 1)),
    "small": ((30, 40), (0, 0, 1, 0.5)),
    "a small part, for the base stage alone": ((300, 400), (0.4, 0.4, 0.45, 0.45)),
    "longer than the shorter side": ((96, 288), (0, 0.1, 1, 0.9)),
    "a mask": ((200, 260), BLOB),
}


@pytest.mark.parametrize("name", PARTS)
def test_only_masked_cells_change(name, cv):
    (height, width), part = PARTS[name]
    picture = noise(height, width)
    mask = part if isinstance(part, np.ndarray) else box_mask(part, height, width)
    given = {"mask" if mask is part else "box": part}
    patch = plan_mask(mask, cv.bundle.direct_config)
    made = cv.edit(SHORT, picture, key=jax.random.key(0), num_images=2, **given)
    assert made.shape == (2, height, width, 3) and made.dtype == np.uint8
    top, left, bottom, right = patch.crop
    cells = patch.coarse if bottom - top <= BASE_SIDE else patch.fine
    # A pixel is of the cell that its centre is in.
    number = (2 * np.arange(bottom - top) + 1) * len(cells) // (2 * (bottom - top))
    may_change = np.zeros((height, width), bool)
    rows, columns = np.arange(top, bottom), np.arange(left, right)
    there = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    may_change[np.ix_(rows[there[0]], columns[there[1]])] = cells[np.ix_(number, number)][
        np.ix_(*there)
    ]
    changed = (made != picture).any(-1)
    assert not changed[:, ~may_change].any()
    assert changed[:, may_change].mean() > 0.9
    if (bottom - top) > 4 * BASE_SIDE:
        assert (made[0] != made[1]).any()


def test_kept_tokens_are_put_back_and_the_prompt_ends_with_its_start_token(cv, monkeypatch):
    """The ids of the pixels that are pasted, and the text that super-resolution reads."""
    bundle = cv.bundle
    picture, box = noise(96, 96), (0.1, 0.2, 0.5, 0.6)
    seen = {}

    def pixels(params, ids, **options):
        seen["ids"] = np.asarray(ids)
        return to_pixels(params, ids, **options)

    def direct(params, text, is_text, *rest, **options):
        seen["direct"] = np.asarray(text)[np.asarray(is_text)]
        return programs.super_resolve_direct(params, text, is_text, *rest, **options)

    def infilling(params, given, *rest, **options):
        seen["infilling"] = np.asarray(given.tokens)[np.asarray(given.is_text)]
        return programs.decode_infilling(params, given, *rest, **options)

    monkeypatch.setattr("cogview2_jax.tokenizer.image.to_pixels", pixels)
    monkeypatch.setattr("cogview2_jax.pipeline.parts.super_resolve_direct", direct)
    monkeypatch.setattr("cogview2_jax.pipeline.parts.decode_infilling", infilling)
    cv.edit(SHORT, picture, box=box, key=jax.random.key(0), num_images=2)
    start = bundle.coglm_config.vocabulary.start_of_image
    for ids in (seen["direct"], seen["infilling"]):
        assert (ids == start).tolist() == [False] * (len(ids) // 2 - 1) + [True] + [False] * (
            len(ids) // 2 - 1
        ) + [True]
    (top, left, bottom, right), _, fine = plan_mask(box_mask(box, 96, 96), bundle.direct_config)
    crop = Image.fromarray(picture[top:bottom, left:right])
    enlarged = np.asarray(crop.resize((96, 96), Image.Resampling.BICUBIC))
    kept = to_tokens(bundle.tokenizer, enlarged[None], stride=8, config=bundle.tokenizer_config)
    made, kept = seen["ids"].reshape(2, 12, 12), np.asarray(kept).reshape(12, 12)
    np.testing.assert_array_equal(made[:, ~fine], np.stack([kept[~fine]] * 2))
    assert (made[:, fine] != kept[fine]).mean() > 0.5


def test_one_compilation_serves_every_part_and_text(cv):
    def run(part, text=SHORT, size=(120, 150), seed=0):
        cv.edit(text, noise(*size), box=part, num_images=2, key=jax.random.key(seed))

    run((0, 0, 0.5, 1))
    run((0.4, 0.4, 0.5, 0.5))  # the base stage alone
    compiled = (
        programs.decode_infilling,
        programs.super_resolve_direct,
        programs.super_resolve_iterative,
        to_pixels,
        to_tokens,
    )
    before = [program._cache_size() for program in compiled]
    for seed, (part, text, size) in enumerate(
        [
            ((0, 0, 1, 0.4), OTHER, (96, 96)),
            ((0.2, 0.3, 0.9, 0.8), "a small dotted green star", (333, 200)),
            ((0, 0.1, 1, 0.9), SHORT, (96, 288)),
            ((0.4, 0.4, 0.5, 0.5), OTHER, (150, 120)),
        ]
    ):
        run(part, text, size, seed)
    assert [program._cache_size() for program in compiled] == before


def test_a_bundle_says_how_many_candidates_an_edit_has(cv):
    sampling = dataclasses.replace(cv.bundle.sampling, candidates=1, edit_candidates=3)
    often = dataclasses.replace(cv, bundle=cv.bundle._replace(sampling=sampling))
    picture, how = noise(TINY_SIDE, TINY_SIDE), {"box": (0, 0, 0.5, 1), "stage": "base"}
    key = jax.random.key(5)
    made = often.edit(SHORT, picture, key=key, **how)
    np.testing.assert_array_equal(made, cv.edit(SHORT, picture, key=key, candidates=3, **how))
    assert (made != cv.edit(SHORT, picture, key=key, candidates=1, **how)).any()
    generated = often.generate(SHORT, 1, key=key, stage="base")
    expected = cv.generate(SHORT, 1, key=key, stage="base", candidates=1)
    np.testing.assert_array_equal(generated, expected)


def test_the_key_alone_decides_and_more_results_begin_with_the_same(cv):
    picture, options = noise(96, 150), {"box": (0, 0, 1, 0.5), "key": jax.random.key(3)}
    made = cv.edit(SHORT, picture, num_images=2, **options)
    np.testing.assert_array_equal(cv.edit(SHORT, picture, num_images=2, **options), made)
    assert (made[0] != made[1]).any()
    mask = box_mask((0, 0, 1, 0.5), 96, 150)
    options.pop("box")
    np.testing.assert_array_equal(cv.edit(SHORT, picture, mask=mask, num_images=2, **options), made)


WRONG = {
    "neither": ({}, "a box or a mask: got neither"),
    "both": ({"box": (0, 0, 1, 1), "mask": np.ones((40, 60), bool)}, "got both"),
    "off the picture": ({"box": (0, 0, 1, 1.1)}, "0 <= left < right <= 1"),
    "reversed": ({"box": (1, 0, 0, 1)}, "0 <= top < bottom <= 1"),
    "less than a pixel": ({"box": (0.5, 0.1, 0.501, 0.9)}, "box must be at least a pixel"),
    "thin": ({"box": (0.25, 0, 0.3, 1)}, "at least 15 pixels high and wide"),
    "another size": ({"mask": np.ones((60, 40), bool)}, "size, 40 × 60 pixels: got 60 × 40"),
    "a pixel more": ({"mask": Image.new("L", (61, 40), 255)}, "40 × 60 pixels: got 40 × 61"),
    "black": ({"mask": Image.new("L", (60, 40))}, "white pixel"),
    "no true pixel": ({"mask": np.zeros((40, 60), bool)}, "white pixel"),
    "another rank": ({"mask": np.ones((40, 60, 3), bool)}, "got 40 × 60 × 3"),
    "no picture": ({"mask": b"abc"}, "not a picture"),
    "no count": ({"box": (0, 0, 1, 1), "num_images": 0}, "num_images must be at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_parts_are_refused_in_one_line(name, cv):
    options, said = WRONG[name]
    with pytest.raises(ValueError) as refused:
        cv.edit(SHORT, noise(40, 60), key=jax.random.key(0), **options)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_an_edits_prompt_leaves_room_for_its_start_token(cv):
    longest = "a red circle above a striped blue square"  # and as many more as fit
    most = cv.bundle.coglm_config.max_text
    words = (longest + " a" * most).split()
    picture, box, key = noise(96, 96), (0, 0, 1, 0.5), jax.random.key(0)
    read = next(
        " ".join(words[:count])
        for count in range(most, 0, -1)
        if len(cv.bundle.text_model.encode(" ".join(words[:count]))) == most
    )
    with pytest.raises(ValueError, match=f"at most {most - 1} tokens: got {most}"):
        cv.edit(read, picture, box=box, key=key)


# --- scores ---------------------------------------------------------------------------------------


def test_scores_are_a_matrix_of_texts_and_pictures(cv):
    texts = [PROMPT, OTHER, SHORT]
    pictures = [noise(96, 96, seed) for seed in range(4)]
    before = programs.caption_score._cache_size()
    scores = cv.scores(texts, pictures)
    assert scores.shape == (3, 4) and scores.dtype == np.float32
    assert np.isfinite(scores).all() and (scores < 0).all()
    for row, text in zip(scores, texts, strict=True):
        for score, picture in zip(row, pictures, strict=True):
            np.testing.assert_array_equal(cv.scores([text], [picture]), [[score]])
    assert programs.caption_score._cache_size() <= before + 1
    order, of_one = cv.rank(OTHER, pictures)
    np.testing.assert_array_equal(of_one, scores[1])
    np.testing.assert_array_equal(order, np.argsort(-scores[1]))


def test_more_pairs_than_a_batch_are_scored_in_their_order(cv):
    pictures = [noise(96, 96, seed) for seed in range(settings.SCORED_AT_ONCE + 1)]
    texts = [PROMPT, SHORT]
    scores = cv.scores(texts, pictures)
    turned = cv.scores(texts[::-1], pictures[::-1])
    # The same rows in other places of a batch: equal but for the order of float32 sums.
    np.testing.assert_allclose(turned[::-1, ::-1], scores, rtol=0, atol=1e-5)
    assert len(np.unique(scores)) == scores.size


def test_scores_of_nothing_are_refused(cv):
    for texts, pictures in (([], [noise(8, 8)]), ([SHORT], [])):
        with pytest.raises(ValueError, match="at least one: got none"):
            cv.scores(texts, pictures)


def test_a_picture_of_every_mode_is_edited(cv):
    """All that `open_picture` opens: the result is what a viewer shows, but for the part."""
    plain = Image.fromarray(noise(60, 80))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
        picture = plain.convert(mode)
        content = io.BytesIO()
        picture.save(content, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
        made = cv.edit(
            SHORT, content.getvalue(), box=(0, 0, 1, 0.4), num_images=2, key=jax.random.key(0)
        )
        shown = np.asarray(picture.convert("RGB"))
        np.testing.assert_array_equal(made[:, :, 40:], np.stack([shown[:, 40:]] * 2))


def test_scores_as_released_begin_every_text_as_chinese(cv, stages):
    """Only an English text is scored differently, and with the other start token's score."""
    pictures = list(stages["full"][0])
    ours, released = (cv.scores([PROMPT, OTHER], pictures, as_released=flag) for flag in (0, 1))
    np.testing.assert_array_equal(ours[1], released[1])
    assert (ours[0] != released[0]).all()
    tokens = cv._tokens([PROMPT] * 8)
    coarse = np.stack([cv.picture_tokens(pictures[0])] * 8)
    expected = programs.caption_score(
        cv.bundle.coglm,
        coarse,
        *tokens.base,
        np.zeros(8, bool),
        config=cv.bundle.coglm_config,
    )
    np.testing.assert_allclose(released[0, 0], expected[0], rtol=1e-6)
