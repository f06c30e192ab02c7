"""New versions of a picture, and pictures continued beyond their border."""

import jax
import numpy as np
import pytest
from PIL import Image

from cogview2_jax.pipeline.cogview import CogView
from cogview2_jax.pipeline.editing import cell_of_pixel
from cogview2_jax.pipeline.edits import _rectangles
from cogview2_jax.pipeline.patch_completion import larger_canvas, plan_mask
from cogview2_jax.tokenizer.image import to_pixels
from tests.pipeline.conftest import OTHER, PROMPT


@pytest.fixture
def tokens_drawn(monkeypatch):
    """The image tokens that are turned into pixels, as they come."""
    tokens = []

    def pixels(params, ids, **options):
        tokens.append(np.asarray(ids))
        return to_pixels(params, ids, **options)

    monkeypatch.setattr("cogview2_jax.tokenizer.image.to_pixels", pixels)
    return tokens


def test_each_version_redraws_another_rectangle(cv, stages, tokens_drawn):
    picture = stages["full"][0, 0]
    made = cv.vary(picture, OTHER, num_images=2, key=jax.random.key(3), keep=0.5)
    assert made.shape == (2, 96, 96, 3) and made.dtype == np.uint8
    (drawn,) = tokens_drawn
    before = cv._picture_tokens(picture, (12, 12))
    changed = (drawn != before).reshape(2, 12, 12)
    where = [np.argwhere(each) for each in changed]
    extents = [(*cells.min(0), *cells.max(0) + 1) for cells in where]
    assert extents[0] != extents[1]
    for each, (top, left, bottom, right) in zip(changed, extents, strict=True):
        assert (bottom - top) * (right - left) == pytest.approx(72, abs=12)
        assert each[top:bottom, left:right].mean() > 0.5
    again = cv.vary(picture, OTHER, num_images=2, key=jax.random.key(3))
    np.testing.assert_array_equal(again, made)


def test_without_a_text_the_caption_describes_it(cv, stages, monkeypatch):
    picture = stages["full"][0, 0]
    options = {"num_images": 2, "key": jax.random.key(2), "stage": "base"}
    assert len(cv.caption(picture).split()) == 12  # one too many, so it is cut
    shorter = cv.vary(picture, **options)
    monkeypatch.setattr(CogView, "token_captions", lambda self, images: [PROMPT])
    expected = cv.vary(picture, PROMPT, **options)
    np.testing.assert_array_equal(cv.vary(picture, **options), expected)
    assert (shorter != expected).any()


@pytest.mark.parametrize("grid", [(4, 4), (20, 20), (3, 7)])
def test_rectangles_have_the_share_that_is_not_kept(grid):
    keys = jax.random.split(jax.random.key(0), 200)
    for keep in (0, 0.25, 0.5, 0.99):
        masks = _rectangles(keys, grid, keep)
        sizes = masks.sum((1, 2))
        wanted = (1 - keep) * grid[0] * grid[1]
        assert (sizes >= 1).all() and (np.abs(sizes - wanted) <= max(grid) / 2).all()
        for mask in masks:
            assert mask.sum() == mask.any(0).sum() * mask.any(1).sum()
    assert len({mask.tobytes() for mask in _rectangles(keys, grid, 0.5)}) > 5


@pytest.mark.parametrize("side", ["top", "left", "bottom", "right"])
def test_a_picture_is_continued_beyond_a_border(side, cv):
    """What is new is drawn, all but the cells across the border stays."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3)).astype(np.uint8)
    made = cv.outpaint(PROMPT, pixels, **{side: 0.5}, num_images=2, key=jax.random.key(0))
    along_y = side in ("top", "bottom")
    assert made.shape == (2, *((105, 90) if along_y else (70, 135)), 3)
    place = {"top": (35, 0), "left": (0, 45)}.get(side, (0, 0))
    rows, columns = slice(place[0], place[0] + 70), slice(place[1], place[1] + 90)
    same = (made[:, rows, columns] == pixels).all(-1)
    depth = np.flatnonzero(~same.all((0, 2) if along_y else (0, 1)))
    assert len(depth) <= 12, "more than a cell of the picture was redrawn"
    border = np.asarray(larger_canvas(Image.fromarray(pixels), _sides(side))[0])
    new = np.ones(border.shape[:2], bool)
    new[rows, columns] = False
    assert ((made != border).any(-1)[:, new]).mean() > 0.9, "border pixels are left"


def _sides(side, share=0.5):
    return tuple(share * (side == name) for name in ("top", "left", "bottom", "right"))


def test_every_new_pixel_is_in_a_drawn_cell(tiny):
    rng = np.random.default_rng(0)
    config = tiny.direct_config
    for _ in range(200):
        height, width = rng.integers(8, 60, 2)
        sides = rng.choice([0, 0.1, 0.4, 1], 4)
        if not round(sides.max() * min(height, width)):
            continue
        canvas, mask = larger_canvas(Image.new("RGB", (int(width), int(height))), tuple(sides))
        assert mask.shape == (canvas.height, canvas.width)
        assert (~mask).sum() == height * width
        if max(mask.shape) > 4 * min(mask.shape):
            continue
        patch = plan_mask(mask, config, touched=True)
        top, left, bottom, _ = patch.crop
        for cells in (patch.coarse, patch.fine):
            cell = cell_of_pixel(bottom - top, len(cells))
            for y, x in np.argwhere(mask):
                assert cells[cell[y - top], cell[x - left]]


PICTURE = np.zeros((8, 8, 3), np.uint8)
WRONG = {
    "nothing added": ({}, "must add a pixel or more, of the picture's 8 × 8"),
    "less than a pixel": ({"top": 0.01}, "must add a pixel or more"),
    "too much": ({"top": 1.5}, "top must be from 0 to 1"),
    "negative": ({"left": -0.1}, "left must be from 0 to 1"),
    "NaN": ({"right": float("nan")}, "right must be from 0 to 1"),
    "no images": ({"top": 0.5, "num_images": 0}, "num_images must be"),
    "stage": ({"top": 0.5, "stage": "last"}, "got last"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_in_one_line(name, cv):
    arguments, said = WRONG[name]
    with pytest.raises(ValueError) as caught:
        cv.outpaint("a star", PICTURE, key=jax.random.key(0), **arguments)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [1, -0.1, float("nan")])
def test_a_share_must_be_one(keep, cv):
    with pytest.raises(ValueError, match="keep must be at least 0 and less than 1"):
        cv.vary(PICTURE, "a star", key=jax.random.key(0), keep=keep)


def test_a_picture_too_large_to_continue_is_refused(monkeypatch):
    monkeypatch.setattr("cogview2_jax.pipeline.patch_completion.MOST_PIXELS", 150)
    with pytest.raises(ValueError, match="has 160 pixels, more than 150: give less"):
        larger_canvas(Image.new("RGB", (8, 10)), (1, 0, 0, 0))
