"""Pictures to take away, with the settings that made them, and such settings read again."""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from cogview2_jax.page.limits import Refused

NAME = "cogview2"  # of the PNG's text chunk with the settings
FILE = "settings.json"
_MOST_BYTES = 100_000  # of settings


def png(picture: np.ndarray | Image.Image, settings: Mapping[str, Any]) -> bytes:
    """A picture as a PNG that holds its settings."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    about, content = PngImagePlugin.PngInfo(), io.BytesIO()
    about.add_itxt(NAME, json.dumps(settings, ensure_ascii=False))
    image.save(content, "PNG", pnginfo=about)
    return content.getvalue()


def archive(
    pictures: Sequence[Path], settings: Mapping[str, Any], animations: Sequence[Path] = ()
) -> bytes:
    """The pictures, their settings and perhaps how they came to be, as a ZIP file."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr(FILE, json.dumps(settings, ensure_ascii=False, indent=2))
        for number, picture in enumerate(pictures):
            with Image.open(picture) as opened:
                file.writestr(f"{number}.png", png(opened, {**settings, "picture": number}))
        for number, animation in enumerate(animations):
            file.write(animation, f"{number}_making{animation.suffix}")
    return content.getvalue()


def read(file: Path) -> dict[str, Any]:
    """The settings in a picture or JSON file of this page. Raises Refused for any other file."""
    try:
        if file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n":
            with Image.open(file, formats=("PNG",)) as opened:  # its pixels are not decoded
                text = str(opened.info[NAME])
        elif file.stat().st_size > _MOST_BYTES:
            raise Refused("no_settings")
        else:
            text = file.read_text("utf-8")
        found = json.loads(text) if len(text) <= _MOST_BYTES else None
    except Refused:
        raise
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise Refused("no_settings") from error
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise Refused("no_settings")
    return found
