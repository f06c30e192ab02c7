"""Pictures as they come in: opened, turned upright, cropped and resized."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cogview2_jax.errors import first_line

# A path, the content of a file, or pixels.
Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray


class PictureError(ValueError):
    """What is wrong with one picture: a short `kind` to count by, and one line that says why."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def open_picture(picture: Picture) -> Image.Image:
    """A picture in RGB, upright, on white where it is transparent. Raises PictureError."""
    try:
        if isinstance(picture, (str, os.PathLike)):
            picture = Path(picture).read_bytes()
        if isinstance(picture, bytes):
            picture = Image.open(io.BytesIO(picture))
        elif isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
                raise PictureError(
                    "unreadable image",
                    f"picture must be uint8 [y, x, 3]: got {picture.dtype} {picture.shape}",
                )
            return Image.fromarray(picture)
        opened = ImageOps.exif_transpose(picture)
        if opened.has_transparency_data:
            opened = opened.convert("RGBA")
            opened = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened)
        return opened if opened.mode == "RGB" else opened.convert("RGB")
    except PictureError:
        raise
    except FileNotFoundError as error:
        raise PictureError("missing image", "no such file") from error
    except MemoryError:
        raise
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise PictureError("unreadable image", f"not a picture ({first_line(error)})") from error


def fit_picture(picture: Picture, height: int, width: int) -> np.ndarray:
    """A picture as uint8 [height, width, 3]: resized to cover that, then cropped at the centre.

    Shrinking averages areas, as Scenes pictures are shrunk; enlarging is bicubic. Raises
    PictureError.
    """
    opened = open_picture(picture)
    scale = max(height / opened.height, width / opened.width)
    size = (max(round(opened.width * scale), width), max(round(opened.height * scale), height))
    if size != opened.size:
        way = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
        opened = opened.resize(size, way)
    left, top = (opened.width - width) // 2, (opened.height - height) // 2
    return np.asarray(opened.crop((left, top, left + width, top + height)))
