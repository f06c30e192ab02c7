"""The geometry and the sequence of the published editing (patch completion).

The picture is a square of the size that the model draws (published: 480 pixels a side). The model
sees a square crop around the box, in which the box has 14/20 of the side or less. Its coarse cells
(20×20) are infilled; super-resolution draws its fine cells (60×60). `editing` has the infilling of
pictures of any shape, with other crops.

Sources: `comp_pipeline/__init__.py` (box), `comp_pipeline/patch_completion.py` (crop, masks),
`comp_pipeline/base_completion.py` and `cogview2_completion.py` (sequence). Recorded numbers:
`tests/golden/editing.npz`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from cogview2_jax.config import CogLMConfig, DirectSRConfig
from cogview2_jax.networks import inputs
from cogview2_jax.pipeline.editing import Box, checked_box, picture_size

GROWTH = (20, 14)  # a crop's side to its box's longer side, as published
SHORTEST = 3  # pixels: the crop around a shorter box may miss a part of it (see `crop_around`)


class Pixels(NamedTuple):
    """A rectangle of pixels: the first row and column, and the last + 1."""

    top: int
    left: int
    bottom: int
    right: int


class Patch(NamedTuple):
    """A square crop of the picture, and the cells to draw in it."""

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
    rows, columns = config.coglm.grid
    if rows != columns or rows < 2:
        raise ValueError(
            "the published editing needs a square grid of at least 2 × 2 coarse cells:"
            f" got {rows} × {columns}"
        )
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
    length = _crop_side(max(masked.bottom - masked.top, masked.right - masked.left), side)
    top, left = (
        # The middle of the first and the last pixel, less half the length.
        min(max((first + end - 1 - length) // 2, 0), side - length)
        for first, end in ((masked.top, masked.bottom), (masked.left, masked.right))
    )
    return Pixels(top, left, top + length, left + length)


def cells_of(masked: Pixels, crop: Pixels, cells: int) -> np.ndarray:
    """The masked cells when a square crop is reduced to `cells` × `cells`: bool [cells, cells].

    A cell is masked if one pixel is, the first one of the cell (`interpolate` in its default mode,
    nearest).
    """
    length = crop.bottom - crop.top
    # torch multiplies in float32, which puts a few cells one pixel earlier: cell 15 of 20 in 84
    # pixels has pixel 62, not 63.
    scale = np.float32(length) / np.float32(cells)
    pixels = np.floor(np.arange(cells, dtype=np.float32) * scale).astype(int).clip(0, length - 1)
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


def _crop_side(longer: int, side: int) -> int:
    return min(longer * GROWTH[0] // GROWTH[1], side)
