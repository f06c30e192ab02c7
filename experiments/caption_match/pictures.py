"""The judge's own training pictures: looser than the data set's, and damaged.

Positions are free as often as they are on the lattice, sizes, outlines, shades and fills' phases
vary, there may be no object or three, and the finished picture is blurred, warped, compressed or
reduced to 64 pixels and back, as decoded pictures may be. Some objects are garbled, half one thing
and half another: the judge learns even odds for what it cannot know.
"""

from __future__ import annotations

import dataclasses
import io
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from cogview2_jax.data import scenes
from cogview2_jax.data.scenes import CANVAS, Scene, SceneObject, Style
from experiments.caption_match.judge import CELL, GRID, WORDS

_NUM_OBJECTS = (0.03, 0.35, 0.52, 0.10)
_GARBLED = 0.3
_NEAR = CELL * 0.75  # a grid position this near to a centre, but not the nearest, may say either


class Sample(NamedTuple):
    """A picture and what the judge should say of it.

    `image`: uint8 [192, 192, 3]. `present`: float32 [7, 7], 1 at the grid position of an object.
    `weight`: float32 [7, 7], 0 where `present` may be either. `offset`: float32 [7, 7, 2] in
    cells. `words`: per attribute float32 [7, 7, words], probabilities where an object is.
    """

    image: np.ndarray
    present: np.ndarray
    weight: np.ndarray
    offset: np.ndarray
    words: dict[str, np.ndarray]


def sample(rng: np.random.Generator) -> Sample:
    """One training sample."""
    style = Style(
        radii=(int(rng.integers(27, 34)), int(rng.integers(40, 49))),
        outline=float(rng.choice([3.0, 3.5, 4.0, 4.5, 5.0])),
        outline_shade=float(rng.choice([0.24, 0.32, 0.40])),
        fill_shade=float(rng.choice([0.44, 0.52, 0.60])),
        phase=(0, 0) if rng.random() < 0.5 else (int(rng.integers(CELL)), int(rng.integers(CELL))),
    )
    objects = _objects(rng, style)
    background = str(rng.choice(list(scenes.BACKGROUNDS)))
    image = scenes.draw(Scene(tuple(objects), background), style)
    twins = list(objects)
    if objects and rng.random() < _GARBLED:
        which = int(rng.integers(len(objects)))
        twins[which] = _changed(objects[which], rng)
        other = scenes.draw(Scene(tuple(twins), background), style)
        image.paste(other, mask=_half_plane(objects[which], rng))
    return Sample(np.asarray(damage(image, rng)), *_targets(objects, twins))


def _objects(rng: np.random.Generator, style: Style) -> list[SceneObject]:
    objects: list[SceneObject] = []
    number = int(rng.choice(len(_NUM_OBJECTS), p=_NUM_OBJECTS))
    on_lattice = rng.random() < 0.5
    for _ in range(number):
        words = {name: str(rng.choice(WORDS[name])) for name in WORDS}
        if number == 3:
            words["size"] = "small"
        for _ in range(20):
            if on_lattice:
                x, y = (int(rng.choice(scenes.LATTICE)) for _ in range(2))
            else:
                x, y = (int(rng.integers(40, CANVAS - 39)) for _ in range(2))
            item = SceneObject(**words, x=x, y=y)
            if all(_apart(item, other, style) for other in objects):
                objects.append(item)
                break
    return objects


def _apart(one: SceneObject, other: SceneObject, style: Style) -> bool:
    radii = dict(zip(scenes.SIZES, style.radii, strict=True))
    gap = math.hypot(one.x - other.x, one.y - other.y) - radii[one.size] - radii[other.size]
    return gap >= 3


def _changed(item: SceneObject, rng: np.random.Generator) -> SceneObject:
    """The same object with another shape, colour or fill, or several of them."""
    names = [name for name in ("shape", "colour", "fill") if rng.random() < 0.4] or ["shape"]
    changes = {
        name: str(rng.choice([word for word in WORDS[name] if word != getattr(item, name)]))
        for name in names
    }
    return dataclasses.replace(item, **changes)  # type: ignore[arg-type]


def _half_plane(item: SceneObject, rng: np.random.Generator) -> Image.Image:
    angle = rng.uniform(0, 2 * math.pi)
    along = 3 * CANVAS * np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-along[1], along[0]])
    centre = np.array([item.x, item.y])
    corners = [centre + along, centre - along, centre - along + across, centre + along + across]
    mask = Image.new("L", (CANVAS, CANVAS))
    ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in corners], fill=255)
    return mask


def damage(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture as a decoder might return it: with a few random artefacts, often none."""
    if rng.random() < 0.25:
        return image
    if rng.random() < 0.4:
        image = warp(image, rng, pixels=2.0)
    if rng.random() < 0.5:
        image = through_64(image, Image.Resampling.BICUBIC)
    elif rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.6)))
    if rng.random() < 0.3:
        buffer = io.BytesIO()
        image.save(buffer, "jpeg", quality=int(rng.integers(30, 85)))
        image = Image.open(buffer)
    pixels = np.asarray(image, float)
    if rng.random() < 0.5:
        pixels = pixels * rng.uniform(0.93, 1.05, 3) + rng.uniform(-8, 8, 3)
    if rng.random() < 0.4:
        pixels = pixels + rng.normal(0, rng.uniform(1, 9), pixels.shape)
    return Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))


def through_64(image: Image.Image, up: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """Reduced to 64x64 and enlarged again."""
    return image.resize((64, 64), Image.Resampling.BOX).resize(image.size, up)


def warp(image: Image.Image, rng: np.random.Generator, pixels: float) -> Image.Image:
    """Bent smoothly: the corners of 24-pixel cells move by up to so many pixels."""
    cells = CANVAS // CELL
    y, x = np.mgrid[: cells + 1, : cells + 1] * float(CELL)
    # There are no pixels beyond the edge to move in.
    x = np.clip(x + rng.uniform(-pixels, pixels, x.shape), 0, CANVAS)
    y = np.clip(y + rng.uniform(-pixels, pixels, y.shape), 0, CANVAS)
    mesh = []
    for row in range(cells):
        for column in range(cells):
            box = (column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL)
            corners = ((0, 0), (1, 0), (1, 1), (0, 1))
            quad = [(x[row + i, column + j], y[row + i, column + j]) for i, j in corners]
            mesh.append((box, tuple(float(v) for corner in quad for v in corner)))
    return image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def _targets(
    objects: list[SceneObject], twins: list[SceneObject]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    side = len(GRID)
    present, weight = np.zeros((side, side), np.float32), np.ones((side, side), np.float32)
    offset = np.zeros((side, side, 2), np.float32)
    words = {name: np.zeros((side, side, len(WORDS[name])), np.float32) for name in WORDS}
    for item, twin in zip(objects, twins, strict=True):
        dx, dy = (item.x - GRID) / CELL, (item.y - GRID) / CELL
        near = np.maximum(np.abs(dy)[:, None], np.abs(dx)[None, :]) * CELL < _NEAR
        row, column = int(np.argmin(np.abs(dy))), int(np.argmin(np.abs(dx)))
        weight[near] = 0
        weight[row, column] = present[row, column] = 1
        offset[row, column] = dx[column], dy[row]
        for name in WORDS:
            for one in (item, twin):
                words[name][row, column, WORDS[name].index(getattr(one, name))] += 0.5
    return present, weight, offset, words
