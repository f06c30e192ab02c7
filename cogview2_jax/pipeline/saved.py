"""Pictures as PNG files that hold the settings that made them."""

import io
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

NAME = "cogview2"  # of the PNG's text chunk with the settings
MOST_CHARACTERS = 100_000  # of settings


def png(picture: np.ndarray | Image.Image, settings: Mapping[str, Any]) -> bytes:
    """A picture as a PNG with settings, any JSON values by name."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    about, content = PngImagePlugin.PngInfo(), io.BytesIO()
    about.add_itxt(NAME, json.dumps(settings, ensure_ascii=False))
    image.save(content, "PNG", pnginfo=about)
    return content.getvalue()


def settings_of(picture: bytes | str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a PNG, whose pixels are not decoded. Raises ValueError for any other file."""
    file = io.BytesIO(picture) if isinstance(picture, bytes) else picture
    try:
        with Image.open(file, formats=("PNG",)) as opened:
            text = str(opened.info[NAME])
        return parse_settings(text)
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise ValueError("the picture holds no settings") from error


def parse_settings(text: str) -> dict[str, Any]:
    """Settings from their JSON text. Raises ValueError for another text."""
    found = json.loads(text) if len(text) <= MOST_CHARACTERS else None
    if not isinstance(found, dict):
        raise ValueError("settings must be a JSON object, and not endless")
    return found
