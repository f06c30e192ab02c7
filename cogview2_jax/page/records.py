"""Pictures to take away, with the settings that made them, and such settings read again."""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cogview2_jax.page.limits import Refused
from cogview2_jax.pipeline.saved import MOST_CHARACTERS, parse_settings, settings_of
from cogview2_jax.pipeline.saved import png as png

FILE = "settings.json"


def archive(
    pictures: Sequence[Path],
    settings: Mapping[str, Any],
    insides: Sequence[tuple[Path, ...]] = (),
) -> bytes:
    """The pictures, their settings and perhaps how they came to be, as a ZIP file."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr(FILE, json.dumps(settings, ensure_ascii=False, indent=2))
        for number, picture in enumerate(pictures):
            with Image.open(picture) as opened:
                file.writestr(f"{number}.png", png(opened, {**settings, "picture": number}))
        for number, inside in enumerate(insides):
            for each in inside:
                file.write(each, f"inside/{number}_{each.name}")
    return content.getvalue()


def read(file: Path) -> dict[str, Any]:
    """The settings in a picture or JSON file of this page. Raises Refused for any other file."""
    try:
        if file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n":
            found = settings_of(file)
        elif file.stat().st_size > 4 * MOST_CHARACTERS:
            raise Refused("no_settings")
        else:
            found = parse_settings(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused("no_settings") from error
    if not isinstance(found.get("prompt"), str):
        raise Refused("no_settings")
    return found
