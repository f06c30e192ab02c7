"""The geometry of infilling: from a box in a picture of any shape to the cells to draw, and back.

The model sees a crop around the box, with the aspect ratio of its own pictures: the largest that
fits into the picture. If the box is longer than that, the crop is as long as the box and reaches
beyond the picture, which is padded with its border pixels. Pixels outside the crop never change.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from cogview2_jax.config import TOKEN_STRIDE, DirectSRConfig
from cogview2_jax.tokenizer.pictures import fit_picture

Box = tuple[float, float, float, float]  # top, left, bottom, right: parts of the picture, 0 to 1


class Edit(NamedTuple):
    """A crop in pixels of the picture, which may reach beyond it, and the cells to draw in it."""

    top: int
    left: int
    height: int
    width: int
    mask: np.ndarray  # bool [y, x], the cells to draw: coarse ones from `plan`


def picture_size(config: DirectSRConfig) -> tuple[int, int]:
    """Height and width of the pictures that the model draws."""
    return config.grid[0] * TOKEN_STRIDE, config.grid[1] * TOKEN_STRIDE


def checked_box(box: Box) -> Box:
    """`box` as floats. Raises ValueError for one that is empty or leaves the picture."""
    try:
        top, left, bottom, right = (float(edge) for edge in box)
        valid = 0 <= top < bottom <= 1 and 0 <= left < right <= 1
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(
            "box must be (top, left, bottom, right) with 0 <= top < bottom <= 1"
            f" and 0 <= left < right <= 1: got {box}"
        )
    return top, left, bottom, right


def plan(box: Box, picture: tuple[int, int], config: DirectSRConfig) -> Edit:
    """The crop of a picture around `box`, and the coarse cells with their centre in the box.

    `picture` is its height and width. Raises ValueError for a box that is empty, leaves the
    picture, contains no cell's centre, or is much longer than the picture's shorter side.
    """
    top, left, bottom, right = checked_box(box)
    model, grid = picture_size(config), config.coglm.grid
    edges = (top, bottom), (left, right)
    fits = min(side / ours for side, ours in zip(picture, model, strict=True))
    needed = max(
        (end - begin) * side / ours
        for (begin, end), side, ours in zip(edges, picture, model, strict=True)
    )
    size = [max(round(max(fits, needed) * ours), 1) for ours in model]
    if any(length > cells * side for length, cells, side in zip(size, grid, picture, strict=True)):
        raise ValueError(
            f"box is {max(size)} pixels long, more than {max(grid)} times the shorter side of a"
            f" picture of {picture[0]} × {picture[1]}; give a shorter box"
        )
    starts = [
        _start(begin, end, side, length)
        for (begin, end), side, length in zip(edges, picture, size, strict=True)
    ]
    inside = [
        _cells(begin, end, side, start, length, cells)
        for (begin, end), side, start, length, cells in zip(
            edges, picture, starts, size, grid, strict=True
        )
    ]
    mask = inside[0][:, None] & inside[1]
    if not mask.any():
        height, width = (length / cells for length, cells in zip(size, grid, strict=True))
        raise ValueError(
            f"box must hold the centre of a cell, {height:g} × {width:g} pixels of this picture:"
            f" got {box}; give a larger box"
        )
    return Edit(starts[0], starts[1], size[0], size[1], mask)


def cut(picture: Image.Image, edit: Edit) -> np.ndarray:
    """The crop of a picture in RGB: uint8 [height, width, 3], padded with the border pixels."""
    rows = np.arange(edit.top, edit.top + edit.height).clip(0, picture.height - 1)
    columns = np.arange(edit.left, edit.left + edit.width).clip(0, picture.width - 1)
    part = picture.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    return np.asarray(part)[np.ix_(rows - rows[0], columns - columns[0])]


def paste(
    picture: Image.Image, drawn: np.ndarray, edit: Edit, *, cells_only: bool = False
) -> np.ndarray:
    """Pictures with `drawn` [b, y', x', 3] pasted into the crop: uint8 [b, y, x, 3].

    A crop of the size that the model draws is replaced as a whole: the tokenizer has decoded the
    new cells with those around them, so no seam shows. At any other size only the new cells are
    replaced, and all others keep the resolution of the picture. With `cells_only` that is so at
    every size.
    """
    original = np.asarray(picture)
    place, inside = [], []
    for start, length, side in (
        (edit.top, edit.height, original.shape[0]),
        (edit.left, edit.width, original.shape[1]),
    ):
        first, last = max(start, 0), min(start + length, side)
        place.append(slice(first, last))
        inside.append(slice(first - start, last - start))
    pixels = tuple(
        cell_of_pixel(length, cells)
        for length, cells in zip((edit.height, edit.width), edit.mask.shape, strict=True)
    )
    replaced = edit.mask[np.ix_(*pixels)][tuple(inside)]
    if drawn.shape[1:3] == (edit.height, edit.width) and not cells_only:
        replaced = np.ones_like(replaced)
    made = np.repeat(original[None], len(drawn), axis=0)
    for one, new in zip(made, drawn, strict=True):
        fitted = fit_picture(new, edit.height, edit.width)[tuple(inside)]
        one[tuple(place)] = np.where(replaced[..., None], fitted, one[tuple(place)])
    return made


def cell_of_pixel(length: int, cells: int) -> np.ndarray:
    """The cell, of `cells` along a crop of `length` pixels, that holds each one's centre."""
    return (2 * np.arange(length) + 1) * cells // (2 * length)


def _start(begin: float, end: float, side: int, length: int) -> int:
    """The start of a crop of `length`, centred on the box as far as the picture allows."""
    if length >= side:
        return -((length - side) // 2)
    centred = round((begin + end) / 2 * side - length / 2)
    return min(max(centred, 0), side - length)


def _cells(begin: float, end: float, side: int, start: int, length: int, cells: int) -> np.ndarray:
    """Which cells along one side of the crop have their centres in the box: bool [cells]."""
    if (start, length) != (0, side):  # else the box's own numbers, without rounding
        begin, end = ((edge * side - start) / length for edge in (begin, end))
    centres = (np.arange(cells) + 0.5) / cells
    return (centres >= begin) & (centres < end)
