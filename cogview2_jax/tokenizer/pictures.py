"""Reading of pictures, for the commands and for Python: opened, turned upright, put on white,
cropped and resized.
"""

import errno
import functools
import io
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cogview2_jax.errors import first_line

# A path, the content of a file, or pixels: uint8 [y, x, 3], grey [y, x] or with alpha [y, x, 4].
Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

MOST_BYTES = 1 << 28  # of a picture file; a larger one is refused before it is read
MOST_PIXELS = (1 << 28) // 3  # 256 MiB in RGB; more are refused before they are decoded

# Of the formats that Pillow opens, not these: PostScript, for which Pillow starts another program;
# Windows metafiles, which only Windows draws; and formats that Pillow only recognises.
_NOT_OPENED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
_COMMON = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM")  # tried first
_TRANSPOSED = 0x0112  # the EXIF tag of the orientation
_BITS, _WHITE_IS_ZERO = 258, 262  # TIFF tags
# A picture that is more times as long as the crop is cut to its middle part first.
_LONGEST = 16
# Errors in reading a file that come from the path or the file, not from the machine.
_OF_THE_FILE = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.EISDIR: "not a file",
    errno.EACCES: "not readable",
    errno.EPERM: "not readable",
    errno.ENAMETOOLONG: "name too long",
    errno.ELOOP: "too many links",
}


class PictureError(ValueError):
    """Why a picture cannot be used: a short `kind` to count by, and a reason in one line.

    `kind` is "missing image" or "unreadable image"; `name` is the path, if it came from one.
    """

    def __init__(self, kind: str, reason: str, name: str = "") -> None:
        super().__init__(f"{name}: {reason}" if name else reason)
        self.kind, self.reason, self.name = kind, reason, name


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are opened. A file's format is known by its content, not
    by its ending.
    """
    Image.init()
    others = sorted(Image.OPEN.keys() - set(_COMMON) - _NOT_OPENED)
    return *(name for name in _COMMON if name in Image.OPEN), *others


@functools.cache
def endings() -> frozenset[str]:
    """Endings of picture files, in lower case and with their dot."""
    known = formats()
    return frozenset(
        ending for ending, name in Image.registered_extensions().items() if name in known
    ) | {".mpo"}  # two JPEGs in one file, of which the first is opened


def read_picture(file: str | os.PathLike[str]) -> bytes:
    """The content of a picture file, not yet opened as a picture.

    Raises PictureError for a file that is missing, not readable or too large, and OSError for a
    failing machine (too many open files, a failing disk).
    """
    name = os.fspath(file)
    try:
        status = os.stat(name)
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device would never end
            raise PictureError("missing image", "not a file", name)
        if status.st_size > MOST_BYTES:
            reason = f"larger than {MOST_BYTES >> 20} MiB"
            raise PictureError("unreadable image", reason, name)
        return Path(name).read_bytes()
    except PictureError:
        raise
    except ValueError as error:  # a NUL in the path, or half of a surrogate pair
        raise PictureError("missing image", "not a path", name) from error
    except OSError as error:
        if error.errno not in _OF_THE_FILE:
            raise
        raise PictureError("missing image", _OF_THE_FILE[error.errno], name) from error


def open_picture(picture: Picture, *, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """A picture in RGB, decoded: upright as its EXIF data say, on white where it is transparent, of
    an animated file the first frame. A PIL image that needs no change is returned itself.

    16-bit greys are scaled to 8 bits. 32-bit greys (modes I and F) are refused, as only PPM files
    say which number is white. Colour profiles are not applied. Raises
    PictureError for anything that is not a picture, is too large or has more than `most_pixels`
    (known before it is decoded), and OSError as `read_picture` does.
    """
    name = ""
    if isinstance(picture, (str, os.PathLike)):
        name = os.fspath(picture)
        picture = read_picture(name)
    try:
        return _in_rgb(_identified(picture, most_pixels))
    except PictureError as error:
        raise PictureError(error.kind, error.reason, name) from error.__cause__
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        reason = "not a picture, or of a format that is not opened"
        raise PictureError("unreadable image", reason, name) from error
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise PictureError("unreadable image", first_line(error), name) from error


def fit_picture(picture: Picture, height: int, width: int) -> np.ndarray:
    """A picture as uint8 [height, width, 3]: resized to cover that, then cropped at the centre.

    Shrinking averages areas, as for Scenes; enlarging is bicubic. Memory is bounded by the sizes of
    the picture and of the result, however long the picture is. Raises as `open_picture`.
    """
    opened = open_picture(picture)
    fit = _fit(opened.size, height, width)
    if fit.part != (0, 0, *opened.size):
        opened = opened.crop(fit.part)
    if fit.size != opened.size:
        shrinks = fit.size[0] < opened.width or fit.size[1] < opened.height
        opened = opened.resize(
            fit.size, Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
        )
    left, top = fit.corner
    return np.asarray(opened.crop((left, top, left + width, top + height)))


def centre_crop_box(
    size: tuple[int, int], height: int, width: int
) -> tuple[float, float, float, float]:
    """The part of a picture of `size` (width, height) that `fit_picture` keeps: left, top, right
    and bottom in pixels of the picture.
    """
    part, resized, corner = _fit(size, height, width)
    scales = [(part[axis + 2] - part[axis]) / resized[axis] for axis in (0, 1)]
    left, top = (part[axis] + corner[axis] * scales[axis] for axis in (0, 1))
    return left, top, left + width * scales[0], top + height * scales[1]


class _Fit(NamedTuple):
    """`part` of the picture is resized to `size`, then cropped from `corner` on. Widths come before
    heights.
    """

    part: tuple[int, int, int, int]
    size: tuple[int, int]
    corner: tuple[int, int]


def _fit(size: tuple[int, int], height: int, width: int) -> _Fit:
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1: got {height} and {width}")
    scale = max(height / size[1], width / size[0])
    # Resizing the whole of a very long picture would take unlimited memory.
    longest = (max(round(_LONGEST * kept / scale), 1) for kept in (width, height))
    columns, rows = (min(full, most) for full, most in zip(size, longest, strict=True))
    left, top = (size[0] - columns) // 2, (size[1] - rows) // 2
    resized = max(round(columns * scale), width), max(round(rows * scale), height)
    corner = (resized[0] - width) // 2, (resized[1] - height) // 2
    return _Fit((left, top, left + columns, top + rows), resized, corner)


# --- Opening --------------------------------------------------------------------------------------


def _identified(picture: bytes | Image.Image | np.ndarray, most_pixels: int) -> Image.Image:
    """An image that may not be decoded yet. Raises PictureError for one too large or empty."""
    if isinstance(picture, bytes):
        opened: Image.Image = Image.open(io.BytesIO(picture), formats=formats())
    elif isinstance(picture, Image.Image):
        opened = picture
    elif hasattr(picture, "__array__"):
        opened = _of_pixels(np.asarray(picture))
    else:
        raise PictureError(
            "unreadable image",
            f"picture must be a path, bytes, a PIL image or an array: got {type(picture).__name__}",
        )
    pixels = opened.width * opened.height
    if not pixels:
        raise PictureError("unreadable image", f"no pixels: {opened.width} × {opened.height}")
    if pixels > (most := min(most_pixels, MOST_PIXELS)):
        reason = f"{pixels:,} pixels, more than {most:,}"
        raise PictureError("unreadable image", reason)
    return opened


def _of_pixels(pixels: np.ndarray) -> Image.Image:
    channels = pixels.shape[2:]
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels not in ((), (3,), (4,)):
        raise PictureError(
            "unreadable image",
            "picture must be uint8 [y, x, 3], grey [y, x] or with alpha [y, x, 4]: got"
            f" {pixels.dtype} {list(pixels.shape)}",
        )
    if not pixels.size:
        return Image.new("L", (pixels.shape[1], pixels.shape[0]))
    return Image.fromarray(np.ascontiguousarray(pixels))


def _in_rgb(picture: Image.Image) -> Image.Image:
    sample = _sample_format(picture)  # known until it is decoded
    picture.load()
    try:
        turned = picture.getexif().get(_TRANSPOSED, 1) != 1
    except Exception:  # EXIF data that are damaged turn nothing
        turned = False
    if turned:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        picture = _eight_bits(picture)
    elif "transparency" in picture.info:
        picture = _with_key_colour(picture, sample)
    if picture.mode in ("La", "RGBa"):  # Pillow has no direct way to the others
        picture = picture.convert(picture.mode.replace("a", "A"))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _sample_format(picture: Image.Image) -> str:
    """How samples are stored in a file, as Pillow names it: "RGB;16B", "L;2"; "" when unknown."""
    tiles: Sequence[object] = getattr(picture, "tile", None) or ()
    arguments = getattr(tiles[0], "args", None) if tiles else None
    if isinstance(arguments, tuple) and arguments:
        arguments = arguments[0]
    return arguments if isinstance(arguments, str) else ""


def _with_key_colour(picture: Image.Image, sample: str) -> Image.Image:
    """`picture` with its transparent colour in 8 bits. Pillow keeps it as PNG files store it,
    while it scales the pixels.
    """
    key = picture.info["transparency"]
    if sample == "RGB;16B" or (isinstance(key, tuple) and max(key) > 255):
        key = tuple(value >> 8 for value in key)
    elif sample in ("L;2", "L;4"):
        key *= {"L;2": 85, "L;4": 17}[sample]
    else:
        return picture
    picture = picture.copy()
    picture.info["transparency"] = key
    return picture


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of more than 8 bits as L, or as LA if one of its greys is transparent."""
    white = 65_535
    tags = getattr(picture, "tag_v2", {})
    if picture.mode in ("I", "F") and (picture.mode, picture.format) != ("I", "PPM"):
        raise PictureError(
            "unreadable image",
            f"mode {picture.mode} has 32-bit greys, with no known white: save the picture with 8 or"
            " 16 bits",
        )
    if tags.get(_BITS) == (12,):
        white = 4095
    table = np.rint(np.arange(65_536) * 255 / white).clip(0, 255).astype(np.uint8)
    if tags.get(_WHITE_IS_ZERO) == 0:
        table = 255 - table
    deep = np.asarray(picture).reshape(-1)
    grey = np.empty(deep.shape, np.uint8)
    for start in range(0, len(deep), 1 << 20):  # in parts: NumPy makes 64-bit indices of them
        part = slice(start, start + (1 << 20))
        grey[part] = table[deep[part]]
    shape = picture.height, picture.width
    made = Image.fromarray(grey.reshape(shape))
    key = picture.info.get("transparency")
    if isinstance(key, int):
        made.putalpha(
            Image.fromarray(np.where(deep == key, 0, 255).astype(np.uint8).reshape(shape))
        )
    return made
