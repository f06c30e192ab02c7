"""The geometry and the sequence of the published editing (patch completion).

The published picture is a square of the size that the model draws (480 pixels a side). The model
sees a square crop around the box, in which the box has 14/20 of the side or less. Its coarse cells
(20×20) are infilled; super-resolution draws its fine cells (60×60). `plan` is that; `plan_mask` is
the same for a mask of any shape in a picture of any shape and size, at the picture's own
resolution. `editing` has the infilling of a box with other crops.

Sources: `comp_pipeline/__init__.py` (box), `comp_pipeline/patch_completion.py` (crop, masks),
`comp_pipeline/base_completion.py` and `cogview2_completion.py` (sequence). Recorded numbers:
`tests/golden/editing.npz`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from cogview2_jax.config import CogLMConfig, DirectSRConfig
from cogview2_jax.networks import inputs
from cogview2_jax.pipeline.editing import Box, cell_of_pixel, checked_box, picture_size
from cogview2_jax.tokenizer.pictures import MOST_PIXELS, Picture, open_picture

GROWTH = (20, 14)  # a crop's side to its box's longer side, as published
SHORTEST = 3  # pixels: the crop around a shorter box may miss a part of it (see `crop_around`)


class Pixels(NamedTuple):
    """A rectangle of pixels: the first row and column, and the last + 1."""

    top: int
    left: int
    bottom: int
    right: int


class Patch(NamedTuple):
    """A square crop of the picture, which may reach beyond it, and the cells to draw in it."""

    crop: Pixels
    coarse: np.ndarray  # bool [y, x], cells for the base model
    fine: np.ndarray  # bool [y, x], cells for super-resolution


def plan(box: Box, config: DirectSRConfig) -> Patch:
    """The crop around `box`, and the cells to draw in it.

    Raises ValueError for a model whose pictures are not square or have only one coarse cell, for a
    box that is empty or leaves the picture, and for one so small that it masks no cell or that its
    crop misses a part of it. (For a box without a coarse cell, the published code runs and changes
    nothing.)
    """
    rows = _square(config)
    side = picture_size(config)[0]
    masked = masked_pixels(box, side)
    height, width = masked.bottom - masked.top, masked.right - masked.left
    if height and width:
        crop = crop_around(masked, side)
        coarse = cells_of(masked, crop, rows)
        fine = cells_of(masked, crop, config.grid[0])
        whole = np.all(np.less_equal(crop[:2], masked[:2]) & np.less_equal(masked[2:], crop[2:]))
        if whole and coarse.any() and fine.any():
            return Patch(crop, coarse, fine)
    longer = max(height, width)
    # A coarse cell is one pixel of every so many, so a box of as many always holds one.
    enough = max(-(-_crop_side(longer, side) // rows), SHORTEST if longer < SHORTEST else 1)
    raise ValueError(
        f"box must be at least {enough} pixels high and wide, of the picture's {side}:"
        f" got {height} × {width}; give a larger box"
    )


def plan_part(
    box: Box | None, mask: Picture | None, picture: tuple[int, int], config: DirectSRConfig
) -> Patch:
    """`plan_mask` of a `box` or a `mask` in a picture of that height and width; one is None.

    Raises ValueError unless one is given, and as `box_mask`, `picture_mask` and `plan_mask`.
    """
    if (box is None) == (mask is None):
        raise ValueError(f"give a box or a mask: got {'neither' if box is None else 'both'}")
    if box is not None:
        return plan_mask(box_mask(box, *picture), config)
    assert mask is not None
    return plan_mask(picture_mask(mask, *picture), config)


def plan_mask(mask: ArrayLike, config: DirectSRConfig, *, touched: bool = False) -> Patch:
    """The crop around the true pixels of `mask` bool [y, x], and the cells to draw in it.

    The mask has the picture's shape. The crop is that of `crop_around`, with the picture's shorter
    side as the largest, except for a mask that is longer: its crop has the mask's length, and where
    that is more than the picture has, the picture is in the middle of it. A cell is drawn if its
    first pixel is masked, as in `cells_of`; with `touched`, if any pixel is.

    Raises ValueError for a model without a square grid, a mask without a true pixel, one so thin
    that no coarse or no fine cell is drawn, and one much longer than the picture's shorter side.
    """
    rows = _square(config)
    masked = np.asarray(mask)
    if masked.dtype != bool or masked.ndim != 2:
        raise ValueError(f"mask must be bool [y, x]: got {masked.dtype} {list(masked.shape)}")
    if not masked.any():
        raise ValueError("mask must have a pixel to redraw: got none")
    top, bottom = _extent(np.any(masked, axis=1))
    left, right = _extent(np.any(masked, axis=0))
    inside, picture = Pixels(top, left, bottom, right), (masked.shape[0], masked.shape[1])
    longer = max(bottom - top, right - left)
    if longer > rows * min(picture):
        raise ValueError(
            f"mask is {longer} pixels long, more than {rows} times the shorter side of a picture of"
            f" {picture[0]} × {picture[1]}; give a shorter one"
        )
    crop = _crop(inside, picture)
    of = _touched_cells if touched else _mask_cells
    coarse, fine = (of(masked, crop, cells) for cells in (rows, config.grid[0]))
    # A crop of one or two pixels may miss a part of the mask; a longer one never does.
    if coarse.any() and fine.any() and (crop.bottom >= bottom and crop.right >= right):
        return Patch(crop, coarse, fine)
    enough = max(-(-(crop.bottom - crop.top) // rows), SHORTEST if longer < SHORTEST else 1)
    raise ValueError(
        f"the mask holds no cell of the model: it must be at least {enough} pixels high and wide"
        f" somewhere, of the picture's {picture[0]} × {picture[1]}: got {bottom - top} ×"
        f" {right - left}; give a larger box or mask"
    )


def larger_canvas(
    picture: Image.Image, sides: tuple[float, float, float, float]
) -> tuple[Image.Image, np.ndarray]:
    """A picture continued by its border pixels, and which pixels are new: bool [y, x].

    `sides` are top, left, bottom and right, 0 to 1 of the height and the width. Raises ValueError
    for others, for less than a pixel in all, and for more pixels than a picture may have.
    """
    names = ("top", "left", "bottom", "right")
    for name, share in zip(names, sides, strict=True):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be from 0 to 1, a part of the picture: got {share}")
    height, width = picture.height, picture.width
    top, left, bottom, right = (
        round(share * side) for share, side in zip(sides, (height, width) * 2, strict=True)
    )
    if not top + left + bottom + right:
        raise ValueError(
            "top, left, bottom and right must add a pixel or more, of the picture's"
            f" {height} × {width}: got {', '.join(map(str, sides))}"
        )
    size = (height + top + bottom) * (width + left + right)
    if size > MOST_PIXELS:
        raise ValueError(
            f"the larger picture has {size:,} pixels, more than {MOST_PIXELS:,}: give less"
        )
    around = ((top, bottom), (left, right))
    canvas = np.pad(np.asarray(picture), (*around, (0, 0)), mode="edge")
    mask = np.pad(np.zeros((height, width), bool), around, constant_values=True)
    return Image.fromarray(canvas), mask


def box_mask(box: Box, height: int, width: int) -> np.ndarray:
    """The pixels of a box in a picture of that size, every edge rounded down: bool [y, x].

    Raises ValueError for a box that is empty, leaves the picture, or is less than a pixel.
    """
    top, left, bottom, right = checked_box(box)
    rows, columns = (
        slice(int(side * begin), int(side * end))
        for side, begin, end in ((height, top, bottom), (width, left, right))
    )
    mask = np.zeros((height, width), bool)
    mask[rows, columns] = True
    if not mask.any():
        raise ValueError(
            f"box must be at least a pixel high and wide, of the picture's {height} × {width}:"
            f" got {box}; give a larger box"
        )
    return mask


def square_box_mask(box: Box, height: int, width: int) -> np.ndarray:
    """The pixels of a box of the square in the middle of a picture: bool [height, width].

    The published edit files give boxes so. In a square picture it is `box_mask`, and it raises as
    that.
    """
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    mask = np.zeros((height, width), bool)
    mask[top : top + side, left : left + side] = box_mask(box, side, side)
    return mask


def picture_mask(mask: Picture, height: int, width: int) -> np.ndarray:
    """The pixels to redraw of a picture of that size: bool [y, x].

    They are the light ones of `mask` (grey 128 or more of 255), which include transparent ones. An
    array of bool says it itself. Raises ValueError for a mask of another size than the picture's,
    and PictureError for what is not a picture.
    """
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        light = mask
    else:
        light = np.asarray(open_picture(mask).convert("L")) >= 128
    if light.shape != (height, width):
        raise ValueError(
            f"mask must have the picture's size, {height} × {width} pixels: got"
            f" {' × '.join(map(str, light.shape))}"
        )
    if not light.any():
        raise ValueError("mask must have a white pixel, for what to redraw: got none")
    return light


def masked_pixels(box: Box, side: int) -> Pixels:
    """The pixels of a box in a picture of `side` × `side` pixels.

    Every edge is rounded down, so a thin box may hold none. Raises ValueError for a box that is
    empty or leaves the picture.
    """
    top, left, bottom, right = (int(side * edge) for edge in checked_box(box))
    return Pixels(top, left, bottom, right)


def crop_around(masked: Pixels, side: int) -> Pixels:
    """The square crop around a rectangle of at least one pixel, in a picture of `side` × `side`.

    Its side is the longer one of the rectangle times 20/14, rounded down, and at most the
    picture's. It is centred on the rectangle as far as the picture allows. The published code
    rounds its start down, so that a crop of one or two pixels may begin a pixel early and end
    before the rectangle does.
    """
    return _crop(masked, (side, side))


def cells_of(masked: Pixels, crop: Pixels, cells: int) -> np.ndarray:
    """The masked cells when a square crop is reduced to `cells` × `cells`: bool [cells, cells].

    A cell is masked if one pixel is, the first one of the cell (`interpolate` in its default mode,
    nearest).
    """
    pixels = _first_pixels(crop.bottom - crop.top, cells)
    rows, columns = pixels + crop.top, pixels + crop.left
    in_rows = (rows >= masked.top) & (rows < masked.bottom)
    return in_rows[:, None] & (columns >= masked.left) & (columns < masked.right)


def sequence(
    mask: ArrayLike,
    text: Sequence[int],
    image: ArrayLike,
    config: CogLMConfig,
    *,
    slots: int | None = None,
) -> inputs.Infill:
    """The sequence `text <start_of_image> <start_of_image> context rest`, as `inputs.infill`.

    `mask` [y, x] are the coarse cells to draw and `image` the crop's ids; `text` is the prompt
    without a start token, and may be empty. The first start token ends the prompt's template in
    `cogview2_completion.py`. So it is the last text token: it has the text's next position, is in
    `is_text` (and so up-weighted by `inputs.text_key_bias`), and the whole text sees it. The second
    has the position before the image's, as in every other sequence.

    Raises ValueError for a text that leaves no slot for its start token, and as `inputs.infill`.
    """
    slots = config.max_text if slots is None else slots
    if len(text) >= slots:
        raise ValueError(
            f"text must have at most {slots - 1} tokens, so that <start_of_image> fits in:"
            f" got {len(text)}"
        )
    prompt = [*text, config.vocabulary.start_of_image]
    return inputs.infill(mask, prompt, image, config, slots=slots)


def _square(config: DirectSRConfig) -> int:
    """The coarse cells along a side of a square grid."""
    rows, columns = config.coglm.grid
    if rows != columns or rows < 2:
        raise ValueError(
            "the published editing needs a square grid of at least 2 × 2 coarse cells:"
            f" got {rows} × {columns}"
        )
    return rows


def _crop_side(longer: int, side: int) -> int:
    return min(longer * GROWTH[0] // GROWTH[1], side)


def _crop(masked: Pixels, picture: tuple[int, int]) -> Pixels:
    """The crop of `crop_around` in a picture of that height and width."""
    longer = max(masked.bottom - masked.top, masked.right - masked.left)
    if longer > min(picture):
        length = longer
        top, left = (
            # Along the side that the mask has in full, the crop is the mask.
            min(max((first + end - length) // 2, 0), side - length)
            if length <= side
            else -((length - side) // 2)
            for first, end, side in zip(masked[:2], masked[2:], picture, strict=True)
        )
    else:
        length = _crop_side(longer, min(picture))
        top, left = (
            # The middle of the first and the last pixel, less half the length.
            min(max((first + end - 1 - length) // 2, 0), side - length)
            for first, end, side in zip(masked[:2], masked[2:], picture, strict=True)
        )
    return Pixels(top, left, top + length, left + length)


def _first_pixels(length: int, cells: int) -> np.ndarray:
    """The first pixel of every cell along a crop of `length`: int [cells]."""
    # torch multiplies in float32, which puts a few cells one pixel earlier: cell 15 of 20 in 84
    # pixels has pixel 62, not 63.
    scale = np.float32(length) / np.float32(cells)
    return np.floor(np.arange(cells, dtype=np.float32) * scale).astype(int).clip(0, length - 1)


def _mask_cells(mask: np.ndarray, crop: Pixels, cells: int) -> np.ndarray:
    """The masked cells of a crop that may reach beyond the picture, where nothing is masked."""
    pixels = _first_pixels(crop.bottom - crop.top, cells)
    rows, columns = pixels + crop.top, pixels + crop.left
    there = [
        (line >= 0) & (line < side) for line, side in zip((rows, columns), mask.shape, strict=True)
    ]
    rows, columns = (
        line.clip(0, side - 1) for line, side in zip((rows, columns), mask.shape, strict=True)
    )
    return mask[np.ix_(rows, columns)] & there[0][:, None] & there[1]


def _touched_cells(mask: np.ndarray, crop: Pixels, cells: int) -> np.ndarray:
    """As `_mask_cells`, but every cell in which `editing.paste` replaces a masked pixel."""
    length = crop.bottom - crop.top
    rows, columns = np.arange(length) + crop.top, np.arange(length) + crop.left
    height, width = mask.shape
    down, across = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    cell = cell_of_pixel(length, cells)
    touched = np.zeros((cells, cells), bool)
    of_pixel = cell[down][:, None], cell[across][None, :]
    np.logical_or.at(touched, of_pixel, mask[np.ix_(rows[down], columns[across])])
    return touched


def _extent(line: np.ndarray) -> tuple[int, int]:
    """The first true place of a line, and the last + 1."""
    places = np.flatnonzero(line)
    return int(places[0]), int(places[-1]) + 1
