"""Frames of two things side by side or one above the other, made of two pictures of one style."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from cogview2_jax.data.illustrations.captions import RELATIONS, frame_captions
from cogview2_jax.data.illustrations.index import Item


class Frame(NamedTuple):
    """Two pictures, by their numbers; `relation` says where the first is from the second."""

    first: int
    second: int
    relation: str
    captions: dict[str, str]


def draw_frame(items: Sequence[Item], rng: np.random.Generator) -> Frame:
    """Two different things of one style out of `items`, somewhere from each other."""
    by_style: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        by_style.setdefault(item.style, []).append(number)
    styles = sorted(style for style, numbers in by_style.items() if len(numbers) > 1)
    first, second = rng.choice(by_style[str(rng.choice(styles))], 2, replace=False)
    relation = str(rng.choice(RELATIONS))
    words = frame_captions(items[first], items[second], relation, rng)
    return Frame(int(first), int(second), relation, words)


def compose(
    first: Image.Image, second: Image.Image, relation: str, rng: np.random.Generator, side: int
) -> Image.Image:
    """Two pictures on white, `side` pixels: each in its half, of 3/8 to 1/2 of the side, centred
    along the half's length with some play.
    """
    whole = Image.new("RGB", (side, side), "white")
    along = 0 if relation in ("left", "right") else 1  # x or y
    ahead = relation in ("left", "above")
    for picture, half in ((first, 0 if ahead else 1), (second, 1 if ahead else 0)):
        length = int(rng.integers(3 * side // 8, side // 2 + 1))
        corner = [0, 0]
        corner[along] = half * side // 2 + int(rng.integers(side // 2 - length + 1))
        across = side - length
        corner[1 - along] = int(rng.integers(across // 4, 3 * across // 4 + 1))
        small = picture.resize((length, length), Image.Resampling.LANCZOS)
        whole.paste(small, (corner[0], corner[1]))
    return whole
