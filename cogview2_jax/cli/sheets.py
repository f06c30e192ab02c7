"""Pictures as files: their names, their PNG, and the labelled grid of all."""

from __future__ import annotations

import contextlib
import io
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageFont

_LABEL_HEIGHT, _LABEL_MARGIN, _GAP, _COLUMNS = 22, 6, 4, 8
_LABEL_CHARACTERS = 300
_CHINESE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "PingFang.ttc",
    "msyh.ttc",
)


def stems(prompts: Sequence[str], seed: int, stage: str) -> list[str]:
    """A file name for each prompt, without ending and all different; `stage` is part of it."""
    stems: list[str] = []
    for prompt in prompts:
        stem = f"{slug(prompt)}_seed{seed}" + (f"_{stage}" if stage else "")
        same = sum(other == stem or other.startswith(f"{stem}_v") for other in stems)
        stems.append(f"{stem}_v{same + 1}" if same else stem)
    return stems


def slug(text: str) -> str:
    """Letters and digits of `text` in at most 48 bytes, with "-" between words."""
    words = re.sub(r"\W+", "-", unicodedata.normalize("NFKC", text).lower()).strip("-_")
    return words.encode()[:48].decode(errors="ignore").rstrip("-_") or "prompt"


def png(picture: np.ndarray | Image.Image) -> bytes:
    from PIL import Image

    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def labelled_grid(prompts: Sequence[str], rows: Sequence[np.ndarray]) -> Image.Image:
    """The pictures of each prompt, [n, y, x, 3], under its words."""
    from PIL import Image, ImageDraw

    number, height, width = rows[0].shape[:3]
    columns = min(number, _COLUMNS)
    lines_of_pictures = -(-number // columns)
    total = columns * (width + _GAP) - _GAP
    labels = [_label(prompt, i, total) for i, prompt in enumerate(prompts, 1)]
    tops = [len(lines) * _LABEL_HEIGHT + _LABEL_MARGIN for lines, _ in labels]
    below = lines_of_pictures * (height + _GAP)
    grid = Image.new("RGB", (total, sum(tops) + len(rows) * below - _GAP), "white")
    pen = ImageDraw.Draw(grid)
    y = 0
    for (lines, font), top, pictures in zip(labels, tops, rows, strict=True):
        for i, line in enumerate(lines):
            pen.text((_LABEL_MARGIN, y + 2 + i * _LABEL_HEIGHT), line, fill="black", font=font)
        for i, picture in enumerate(pictures):
            row, column = divmod(i, columns)
            place = (column * (width + _GAP), y + top + row * (height + _GAP))
            grid.paste(Image.fromarray(picture), place)
        y += top + below
    return grid


def _as_label(prompt: str) -> str:
    """A prompt as it is drawn. Invisible characters and line breaks, any number of which are no
    more than spaces to the model, cannot be measured, or take long.
    """
    shown = "".join(one for one in " ".join(prompt.split()) if one.isprintable())
    return shown if len(shown) <= _LABEL_CHARACTERS else shown[: _LABEL_CHARACTERS - 1] + "…"


def _label(
    prompt: str, number: int, width: int
) -> tuple[list[str], ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """The lines of a label at most `width` pixels wide, and their font.

    A Chinese prompt on a machine without a Chinese font is shown by its number in the JSON file.
    """
    from PIL import ImageFont

    font: ImageFont.FreeTypeFont | ImageFont.ImageFont = ImageFont.load_default(16)
    if max(map(ord, prompt)) > 0x24F:  # beyond what Pillow's own font has
        for name in _CHINESE_FONTS:
            with contextlib.suppress(OSError):
                font = ImageFont.truetype(name, 16)
                break
        else:
            prompt = f"prompt {number}"
    room = width - 2 * _LABEL_MARGIN
    prompt = _as_label(prompt)
    lines = [""]
    # Chinese breaks anywhere, English between words.
    for piece in re.findall(r"[^\W\u3000-\uffff]+\S*\s*|.", prompt):
        if lines[-1] and font.getlength(lines[-1] + piece.rstrip()) > room:
            lines.append("")
        lines[-1] += piece
    return lines, font
