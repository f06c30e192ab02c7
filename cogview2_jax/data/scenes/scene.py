"""What a scene is: its words, its geometry, and the words for positions.

Everything that a small discrete tokenizer has to carry is periodic or centred on a lattice of 24
pixels (8 pixels of a 64-pixel picture, one token at stride 8): object centres are multiples of 24,
and the fills are anchored to the canvas with period 24.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

CANVAS = 192
CELL = 24
LATTICE = (48, 72, 96, 120, 144)
CENTRE = 96

RADII: Mapping[str, int] = {"small": 30, "large": 44}
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (222, 36, 40),
    "orange": (248, 136, 16),
    "yellow": (248, 222, 40),
    "green": (36, 168, 64),
    "cyan": (24, 204, 216),
    "blue": (36, 76, 224),
    "purple": (128, 44, 184),
    "pink": (250, 124, 190),
}
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "cream": (252, 244, 222),
    "mist": (222, 232, 246),
    "grey": (222, 222, 222),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "semicircle")
SIZES = tuple(RADII)
FILLS = ("plain", "striped", "dotted", "checked")
PLACES = ("left", "right", "top", "bottom", "centre")
RELATIONS = ("left of", "right of", "above", "below")
LANGUAGES = ("en", "zh")
ATTRIBUTES = ("shape", "colour", "size", "fill", "place")
"""What a caption can name, in the order of reports. A relation counts as a place."""

UNSEEN_PAIRS = frozenset(
    {
        ("circle", "purple"),
        ("square", "cyan"),
        ("triangle", "red"),
        ("diamond", "pink"),
        ("star", "blue"),
        ("heart", "green"),
        ("cross", "yellow"),
        ("semicircle", "orange"),
    }
)
"""(shape, colour) pairs that only the "composition" split draws."""


@dataclass(frozen=True)
class SceneObject:
    """One object. `x`, `y`: its centre in canvas pixels, x to the right and y down."""

    shape: str
    colour: str
    size: str
    fill: str
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """One or two objects that neither touch nor overlap, on a background."""

    objects: tuple[SceneObject, ...]
    background: str


def place_of(x: float, y: float) -> str | None:
    """The word for a position, after rounding it to the lattice; None where no word fits.

    "left" is the leftmost column within one cell of the middle row, and so on; "centre" is the
    middle exactly.
    """
    column, row = round((x - CENTRE) / CELL), round((y - CENTRE) / CELL)
    if column == 0 and row == 0:
        return "centre"
    if abs(row) <= 1 and abs(column) == 2:
        return "left" if column < 0 else "right"
    if abs(column) <= 1 and abs(row) == 2:
        return "top" if row < 0 else "bottom"
    return None


def relation_of(first: SceneObject, second: SceneObject) -> str | None:
    """The relation in "first <relation> second", along the longer axis; None on a diagonal."""
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) == abs(dy):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


POSITIONS_BY_PLACE = {
    place: tuple((x, y) for x in LATTICE for y in LATTICE if place_of(x, y) == place)
    for place in PLACES
}


_T = TypeVar("_T")


def pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]
