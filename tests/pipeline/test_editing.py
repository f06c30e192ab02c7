"""The geometry of infilling, without a network."""

import numpy as np
import pytest
from PIL import Image

from cogview2_jax.pipeline import editing

# Pictures of the tiny model have 96 pixels a side; its coarse grid is 4×4, so a cell is a quarter.


@pytest.fixture(scope="module")
def config(tiny):
    return tiny.direct_config


def test_a_box_covers_the_cells_whose_centres_it_holds(config):
    edit = editing.plan((0.5, 0, 1, 0.4), (96, 96), config)
    assert edit[:4] == (0, 0, 96, 96)
    np.testing.assert_array_equal(edit.mask, np.array([[0] * 4] * 2 + [[1, 1, 0, 0]] * 2, bool))


@pytest.mark.parametrize(
    ("picture", "box", "crop", "columns"),
    [
        # The crop is the shorter side's square around the box, and stays in the picture.
        ((96, 288), (0, 0, 1, 0.33), (0, 0, 96, 96), [1, 1, 1, 1]),
        ((96, 288), (0, 0.9, 1, 1), (0, 192, 96, 96), [0, 0, 0, 1]),
        ((96, 288), (0, 0.4, 1, 0.6), (0, 96, 96, 96), [0, 1, 1, 0]),
        ((96, 288), (0, 0.5, 1, 0.75), (0, 132, 96, 96), [1, 1, 1, 0]),
        ((192, 192), (0, 0, 1, 0.5), (0, 0, 192, 192), [1, 1, 0, 0]),
        # Longer than that: as long as the box, the picture in its middle.
        ((96, 288), (0, 0, 1, 1), (-96, 0, 288, 288), [1, 1, 1, 1]),
        ((96, 288), (0, 0.5, 1, 1), (-24, 144, 144, 144), [1, 1, 1, 1]),
    ],
)
def test_where_the_crop_is(picture, box, crop, columns, config):
    edit = editing.plan(box, picture, config)
    assert edit[:4] == crop
    assert edit.mask.any(0).tolist() == [bool(each) for each in columns]
    # Turned on its side, all is turned.
    top, left, bottom, right = box
    turned = editing.plan((left, top, right, bottom), picture[::-1], config)
    assert turned[:4] == (crop[1], crop[0], crop[3], crop[2])
    np.testing.assert_array_equal(turned.mask, edit.mask.T)


def test_a_crop_beyond_the_picture_continues_its_border(config):
    pixels = np.random.default_rng(0).integers(0, 256, (96, 288, 3)).astype(np.uint8)
    edit = editing.plan((0, 0, 1, 1), (96, 288), config)
    crop = editing.cut(Image.fromarray(pixels), edit)
    assert crop.shape == (288, 288, 3)
    np.testing.assert_array_equal(crop, np.pad(pixels, ((96, 96), (0, 0), (0, 0)), "edge"))


def test_only_the_box_is_replaced_where_the_model_draws_at_another_size(config):
    pixels = np.random.default_rng(0).integers(0, 200, (192, 400, 3)).astype(np.uint8)
    edit = editing.plan((0.25, 0.5, 0.75, 0.75), (192, 400), config)
    assert edit[:4] == (0, 154, 192, 192)
    drawn = np.full((2, 96, 96, 3), 255, np.uint8)
    made = editing.paste(Image.fromarray(pixels), drawn, edit)
    replaced = (made == 255).all((0, -1))
    cells = edit.mask.repeat(48, axis=0).repeat(48, axis=1)
    np.testing.assert_array_equal(replaced[:, 154 : 154 + 192], cells)
    assert not replaced[:, :154].any() and not replaced[:, 154 + 192 :].any()
    np.testing.assert_array_equal(made[:, ~replaced], np.stack([pixels[~replaced]] * 2))


def test_all_of_the_crop_is_replaced_where_the_model_draws_it_pixel_for_pixel(config):
    pixels = np.zeros((96, 200, 3), np.uint8)
    edit = editing.plan((0, 0, 0.5, 0.2), (96, 200), config)
    made = editing.paste(Image.fromarray(pixels), np.full((1, 96, 96, 3), 255, np.uint8), edit)
    assert (made[0, :, :96] == 255).all() and not made[0, :, 96:].any()


@pytest.mark.parametrize("picture", [(1, 9000), (9000, 1), (3, 40)])
def test_a_crop_is_never_much_larger_than_the_picture(picture, config):
    with pytest.raises(ValueError, match="give a shorter box"):
        editing.plan((0, 0, 1, 1), picture, config)
    with pytest.raises(ValueError, match="centre of a cell"):
        editing.plan((0, 0, 0.00001, 0.00001), picture, config)
