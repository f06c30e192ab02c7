"""Drawing scenes with Pillow: anti-aliased shapes with a dark outline and one of four fills."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from cogview2_jax.data.scenes.scene import (
    BACKGROUNDS,
    CANVAS,
    CELL,
    COLOURS,
    RADII,
    SIZES,
    Scene,
)


@dataclass(frozen=True)
class Style:
    """How scenes are drawn. Lengths in pixels of the canvas; shades multiply the object's colour.

    `radii`: of small and large objects. `phase`: shift of the fills against the canvas.
    """

    radii: tuple[int, int] = (RADII["small"], RADII["large"])
    outline: float = 4.0
    outline_shade: float = 0.32
    fill_shade: float = 0.52
    phase: tuple[int, int] = (0, 0)


DEFAULT_STYLE = Style()
_SUPERSAMPLE = 4


def draw(scene: Scene, style: Style = DEFAULT_STYLE) -> Image.Image:
    """The picture of a scene: RGB, 192x192, anti-aliased."""
    image = Image.new("RGB", (CANVAS, CANVAS), BACKGROUNDS[scene.background])
    for item in scene.objects:
        radius = style.radii[SIZES.index(item.size)]
        whole, inside = _masks(item.shape, radius, style.outline)
        colour = COLOURS[item.colour]
        corner = (item.x - whole.width // 2, item.y - whole.height // 2)
        box = (*corner, corner[0] + whole.width, corner[1] + whole.height)
        image.paste(_shade(colour, style.outline_shade), box, whole)
        if item.fill == "plain":
            image.paste(colour, box, inside)
        else:
            cloth = _cloth(item.fill, colour, _shade(colour, style.fill_shade))
            dx, dy = (box[0] - style.phase[0]) % CELL, (box[1] - style.phase[1]) % CELL
            image.paste(cloth.crop((dx, dy, dx + whole.width, dy + whole.height)), box, inside)
    return image


def _shade(colour: Sequence[int], factor: float) -> tuple[int, ...]:
    return tuple(round(c * factor) for c in colour)


@functools.lru_cache(maxsize=1024)
def _masks(shape: str, radius: int, outline: float) -> tuple[Image.Image, Image.Image]:
    """Coverage of a shape with and without its outline: "L", 2 * (radius + 1) square, centred."""
    half = radius + 1
    scale = _SUPERSAMPLE
    contour = _contour(shape)
    points = [((half + x * radius) * scale, (half + y * radius) * scale) for x, y in contour]
    whole = Image.new("L", (2 * half * scale,) * 2)
    ImageDraw.Draw(whole).polygon(points, fill=255)
    # The outline is inside the shape: rub a stroke of twice its width off the edge, with discs
    # to round the joints.
    inside = whole.copy()
    pen = ImageDraw.Draw(inside)
    width = outline * scale
    pen.line([*points, points[0]], fill=0, width=round(2 * width))
    for x, y in points:
        pen.ellipse((x - width, y - width, x + width, y + width), fill=0)
    return whole.reduce(scale), inside.reduce(scale)


def _contour(shape: str) -> list[tuple[float, float]]:
    """The closed contour of a shape in the square [-1, 1] x [-1, 1], y down."""
    turn = 2 * math.pi
    if shape == "circle":
        return [(math.cos(turn * i / 90), math.sin(turn * i / 90)) for i in range(90)]
    if shape == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if shape == "triangle":
        return [(0.0, -0.96), (1.0, 0.84), (-1.0, 0.84)]
    if shape == "diamond":
        # Narrow: a square on its corner is too near to a circle at 64 pixels.
        return [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)]
    if shape == "star":
        tips = ((1.0 if i % 2 == 0 else 0.42, turn * (i / 10 - 0.25)) for i in range(10))
        return [(r * math.cos(a), 0.05 + r * math.sin(a)) for r, a in tips]
    if shape == "heart":
        contour = []
        for i in range(90):
            a = turn * i / 90
            waves = zip((13, -5, -2, -1), (1, 2, 3, 4), strict=True)
            height = sum(weight * math.cos(n * a) for weight, n in waves) / 16
            contour.append((math.sin(a) ** 3, -height - 0.12))
        return contour
    if shape == "cross":
        w = 0.36
        return [
            *((-w, -1.0), (w, -1.0), (w, -w), (1.0, -w), (1.0, w), (w, w)),
            *((w, 1.0), (-w, 1.0), (-w, w), (-1.0, w), (-1.0, -w), (-w, -w)),
        ]
    if shape == "semicircle":
        return [(math.cos(turn * i / 90), 0.5 + math.sin(turn * i / 90)) for i in range(45, 91)]
    raise ValueError(f"unknown shape {shape!r}")


@functools.lru_cache(maxsize=256)
def _cloth(fill: str, light: tuple[int, ...], dark: tuple[int, ...]) -> Image.Image:
    """A canvas of a pattern with period 24 in both directions, in two colours."""
    scale = _SUPERSAMPLE
    y, x = np.mgrid[: CELL * scale, : CELL * scale] / scale + 0.5 / scale
    if fill == "striped":
        on = (x + y) % CELL < CELL / 2
    elif fill == "checked":
        on = (x < CELL / 2) == (y < CELL / 2)
    elif fill == "dotted":
        # One dot a cell, on the lattice points: an object has one in its middle and some around it.
        near_x, near_y = np.minimum(x, CELL - x), np.minimum(y, CELL - y)
        on = near_x**2 + near_y**2 < 6.0**2
    else:
        raise ValueError(f"unknown fill {fill!r}")
    tile = on.reshape(CELL, scale, CELL, scale).mean((1, 3))[..., None]
    tile = tile * np.array(dark, float) + (1 - tile) * np.array(light, float)
    repeats = CANVAS // CELL
    return Image.fromarray(np.tile(np.round(tile).astype(np.uint8), (repeats, repeats, 1)))
