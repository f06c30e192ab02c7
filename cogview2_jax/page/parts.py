"""What a visitor draws on a picture, as a box or a mask."""

import json
import math
from typing import Any

from PIL import Image, ImageDraw

from cogview2_jax.page.limits import Limits, Refused

Box = tuple[float, float, float, float]


def drawn_part(
    marks: str | None, numbers: str, size: tuple[int, int], limits: Limits
) -> dict[str, Any]:
    """The `box` or `mask` of `CogView.edit` for a picture of `size` (height, width).

    `numbers`, "top, left, bottom, right", goes before `marks`, what is drawn, as JSON: a `box`, or
    `strokes` [[radius, [x, y], …], …], all as parts of the picture's width and height, radii of its
    width. Raises Refused for nothing, for too much and for anything that is not of this form.
    """
    if numbers.strip():
        return {"box": _box(numbers.replace("，", ",").split(","))}
    try:
        said = json.loads(marks or "{}")
        box, strokes = said.get("box"), said.get("strokes") or []
    except (ValueError, AttributeError, RecursionError):
        raise Refused("bad_part") from None
    if strokes:
        return {"mask": _mask(strokes, size, limits)}
    if box:
        return {"box": _box(box)}
    raise Refused("no_part")


def _box(edges: Any) -> Box:
    try:
        top, left, bottom, right = (float(edge) for edge in edges)
    except (TypeError, ValueError, OverflowError):
        raise Refused("bad_part") from None
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise Refused("bad_part")
    return top, left, bottom, right


def _mask(strokes: Any, size: tuple[int, int], limits: Limits) -> Image.Image:
    """The strokes in white on black, as large as the picture."""
    height, width = size
    mask = Image.new("L", (width, height))
    pen = ImageDraw.Draw(mask)
    try:
        if sum(len(stroke) for stroke in strokes) > limits.points:
            raise Refused("much_drawn")
        for radius, *points in strokes:
            r = _within(radius, 0, 0.5) * width
            path = [(_within(x, -1, 2) * width, _within(y, -1, 2) * height) for x, y in points]
            pen.line(path, 255, max(round(2 * r), 1))
            for x, y in path:
                pen.ellipse((x - r, y - r, x + r, y + r), 255)
    except (TypeError, ValueError, OverflowError):
        raise Refused("bad_part") from None
    if not mask.getbbox():
        raise Refused("no_part")
    return mask


def _within(number: Any, low: float, high: float) -> float:
    value = float(number)
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError
    return value
