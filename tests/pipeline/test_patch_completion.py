"""The published editing's geometry and sequence, without a network. Recorded numbers are compared
by `tests/test_parity.py`.
"""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogview2_jax.config import CogLMConfig, DirectSRConfig
from cogview2_jax.networks import inputs
from cogview2_jax.pipeline import patch_completion
from cogview2_jax.pipeline.patch_completion import Pixels, cells_of, crop_around, masked_pixels
from tests.common import IMAGE, SMALL, TEXT, load

BOXES = settings(max_examples=1000, derandomize=True, database=None, deadline=None)
PUBLISHED = DirectSRConfig()
# Lengths of a crop at which float32 puts a cell of one of the published grids a pixel earlier.
ROUNDED = (70, 84, 126, 140, 156, 168, 250, 252, 254, 280, 284, 312, 336)


def geometry(cells: int, ratio: int) -> DirectSRConfig:
    positions = 200 + cells**2
    base = CogLMConfig(grid=(cells, cells), image_position=200, num_positions=positions)
    return DirectSRConfig(base, ratio=ratio)


@pytest.fixture(params=[(20, 3), (4, 3), (10, 2), (7, 4), (16, 1), (2, 1)], ids=str)
def config(request):
    return geometry(*request.param)


@st.composite
def boxes(draw, side: int):
    """Boxes with edges anywhere, half of the sides being a few pixels long."""
    edges = []
    for _ in range(2):
        length = draw(st.one_of(st.floats(0.01, side), st.floats(0.01, 8)))
        begin = draw(st.floats(0, side - length))
        edges.append((begin / side, min((begin + length) / side, 1.0)))
    (top, bottom), (left, right) = edges
    return top, left, bottom, right


def extent(mask: np.ndarray) -> list[tuple[int, int]]:
    """The first and last masked row and column of a rectangle."""
    rows, columns = mask.any(1), mask.any(0)
    np.testing.assert_array_equal(mask, rows[:, None] & columns)
    return [tuple(np.flatnonzero(line)[[0, -1]].tolist()) for line in (rows, columns)]


def test_a_thousand_boxes(config):
    side, cells, fine_cells = 8 * config.grid[0], config.coglm.grid[0], config.grid[0]
    planned, refused = [], []

    @BOXES
    @given(boxes(side))
    def check(box):
        masked = masked_pixels(box, side)
        assert masked == tuple(int(side * edge) for edge in box)
        height, width = masked.bottom - masked.top, masked.right - masked.left
        try:
            crop, coarse, fine = patch_completion.plan(box, config)
        except ValueError as error:
            refused.append(box)
            assert_larger_is_enough(str(error), masked, config)
            return
        planned.append(box)
        # A square in the picture, with the box in it, of the published size.
        length = crop.bottom - crop.top
        assert crop.right - crop.left == length
        assert 0 <= crop.top <= masked.top and masked.bottom <= crop.bottom <= side
        assert 0 <= crop.left <= masked.left and masked.right <= crop.right <= side
        assert length == min(int(max(height, width) * 20 / 14), side)
        assert coarse.shape == (cells, cells) and fine.shape == (fine_cells, fine_cells)
        assert_masks_fit(coarse, fine, length)
        # Turned on its side, all is turned.
        top, left, bottom, right = box
        turned = patch_completion.plan((left, top, right, bottom), config)
        assert turned.crop == (crop.left, crop.top, crop.right, crop.bottom)
        np.testing.assert_array_equal(turned.coarse, coarse.T)
        np.testing.assert_array_equal(turned.fine, fine.T)

    check()
    assert len(planned) > 200 and len(refused) > 20


def assert_larger_is_enough(message: str, masked: Pixels, config: DirectSRConfig) -> None:
    """The refusal is one line, true of the box, and a box of the size that it names is accepted."""
    side = 8 * config.grid[0]
    numbers = re.fullmatch(
        r"box must be at least (\d+) pixels high and wide, of the picture's (\d+): got (\d+) × "
        r"(\d+); give a larger box",
        message,
    )
    assert numbers, message
    enough, picture, height, width = map(int, numbers.groups())
    assert (picture, height, width) == (
        side,
        masked.bottom - masked.top,
        masked.right - masked.left,
    )
    assert min(height, width) < enough <= side
    edges = []
    for begin, length in ((masked.top, height), (masked.left, width)):
        length = max(length, enough)
        begin = min(begin, side - length)
        # The middle of the first pixel and of the one after the last: no edge rounds elsewhere.
        edges.append((begin + 0.5, min(begin + length + 0.5, side)))
    (top, bottom), (left, right) = edges
    larger = (top / side, left / side, bottom / side, right / side)
    assert patch_completion.plan(larger, config).coarse.any()


def assert_masks_fit(coarse: np.ndarray, fine: np.ndarray, length: int) -> None:
    """A coarse cell is masked if its first fine cell is. So the coarse mask covers the fine one,
    without less than a coarse cell above it and on its left, where a box begins inside a cell.
    """
    ratio = len(fine) // len(coarse)
    of_coarse, of_fine = extent(coarse), extent(fine)
    if len(coarse) == 20 and length in ROUNDED:
        return
    np.testing.assert_array_equal(coarse, fine[::ratio, ::ratio])
    for (first, last), (fine_first, fine_last) in zip(of_coarse, of_fine, strict=True):
        assert 0 <= first * ratio - fine_first < ratio
        assert fine_last // ratio == last


def test_masks_are_those_of_the_pixels():
    """Against masks made pixel by pixel, in crops whose cells are whole pixels."""
    rng = np.random.default_rng(0)
    for length in (20, 60, 160, 480):
        crop = Pixels(0, 0, length, length)
        top, left = rng.integers(0, length // 2, 2)
        masked = Pixels(int(top), int(left), int(top) + length // 3, int(left) + length // 4)
        pixels = np.zeros((length, length), bool)
        pixels[masked.top : masked.bottom, masked.left : masked.right] = True
        np.testing.assert_array_equal(
            cells_of(masked, crop, 20), pixels[:: length // 20, :: length // 20]
        )
        np.testing.assert_array_equal(
            cells_of(Pixels(*(edge + 7 for edge in masked)), Pixels(*(e + 7 for e in crop)), 20),
            cells_of(masked, crop, 20),
        )


def test_the_reduction_rounds_as_float32_does():
    crop = Pixels(0, 0, 84, 84)
    assert cells_of(Pixels(62, 62, 63, 63), crop, 20)[15, 15]  # 15 · 84/20 = 63
    assert not cells_of(Pixels(63, 63, 64, 64), crop, 20).any()


@pytest.mark.parametrize(
    ("masked", "crop"),
    [
        ((100, 200, 170, 214), (84, 156, 184, 256)),  # 70 pixels: a crop of 100 round the middle
        ((0, 200, 70, 214), (0, 156, 100, 256)),  # moved inwards
        ((410, 466, 480, 480), (380, 380, 480, 480)),
        ((100, 0, 110, 336), (0, 0, 480, 480)),  # 336 · 20/14 = 480: the whole picture
        ((100, 10, 110, 345), (0, 0, 478, 478)),
        ((100, 100, 103, 101), (99, 98, 103, 102)),
        ((100, 100, 101, 101), (99, 99, 100, 100)),  # the published start of a single pixel's crop
    ],
)
def test_where_the_crop_is(masked, crop):
    assert crop_around(Pixels(*masked), 480) == crop


def test_recorded_boxes_are_planned_or_refused():
    recorded = load("editing")
    for box, crop, coarse, fine in zip(
        *(recorded[name] for name in ("boxes", "crops", "masks_20", "masks_60")), strict=True
    ):
        if coarse.any():
            patch = patch_completion.plan(tuple(box), PUBLISHED)
            assert patch.crop == tuple(crop)
            np.testing.assert_array_equal(patch.coarse, coarse)
            np.testing.assert_array_equal(patch.fine, fine)
        else:
            with pytest.raises(ValueError, match="^box must be at least"):
                patch_completion.plan(tuple(box), PUBLISHED)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0.3, 0.3, 0.31, 0.9), "at least 21 pixels high and wide, .* 480: got 4 × 288;"),
        ((0.5, 0.1, 0.5001, 0.9), "at least 24 pixels high and wide, .* got 0 × 384;"),
        ((0.5001, 0.5001, 0.5002, 0.5002), "at least 3 pixels .* got 0 × 0;"),
        ((0.5, 0.5, 0.5 + 2 / 480, 0.5 + 2 / 480), "at least 3 pixels .* got 2 × 2;"),
        ((0.5, 0.1, 0.4, 0.9), "0 <= top < bottom <= 1"),
        ((0, 0, 1, 1.1), "0 <= left < right <= 1"),
    ],
)
def test_small_and_wrong_boxes_are_refused(box, message):
    with pytest.raises(ValueError, match=message) as refusal:
        patch_completion.plan(box, PUBLISHED)
    assert "\n" not in str(refusal.value)


def test_only_square_pictures():
    with pytest.raises(ValueError, match="square grid of at least 2 × 2 .* got 4 × 6"):
        patch_completion.plan((0, 0, 1, 1), DirectSRConfig(SMALL, text_slots=8))
    with pytest.raises(ValueError, match="got 1 × 1"):
        patch_completion.plan((0, 0, 1, 1), geometry(1, 3))


# --- the sequence ---------------------------------------------------------------------------------

MASK = np.zeros(SMALL.grid, bool)
MASK[1:3, 2:4] = True
START = SMALL.vocabulary.start_of_image


@pytest.mark.parametrize("slots", [None, len(TEXT) + 1])
@pytest.mark.parametrize("text", [TEXT, []])
def test_the_prompts_start_token_is_its_last_word(text, slots):
    made = patch_completion.sequence(MASK, text, IMAGE, SMALL, slots=slots)
    end, second = len(text), slots or SMALL.max_text
    assert made.tokens[[end, second]].tolist() == [START, START]
    assert made.positions[[end, second]].tolist() == [end, SMALL.image_position - 1]
    assert made.is_text[: end + 1].all() and not made.is_text[end + 1 :].any()
    assert made.mask[:, : end + 1].all()  # the whole text block and everything after it see both
    assert not made.mask[:second, second:].any()
    bias = inputs.text_key_bias(made.is_text, 1.4)
    np.testing.assert_allclose(bias, np.where(np.arange(len(bias)) <= end, 1.4, 0), rtol=1e-6)
    # The image part is that of any infilling.
    plain = inputs.infill(MASK, TEXT, IMAGE, SMALL)
    for name in ("tokens", "positions"):
        cells = getattr(made, name)[second + 1 :]
        np.testing.assert_array_equal(cells, getattr(plain, name)[SMALL.max_text + 1 :])


def test_a_text_needs_room_for_its_start_token():
    patch_completion.sequence(MASK, [60] * (SMALL.max_text - 1), IMAGE, SMALL)
    with pytest.raises(ValueError, match="at most 7 tokens, so that .* fits in: got 8"):
        patch_completion.sequence(MASK, [60] * SMALL.max_text, IMAGE, SMALL)
    with pytest.raises(ValueError, match="at most 1 tokens"):
        patch_completion.sequence(MASK, TEXT, IMAGE, replace(SMALL, max_text=2))
