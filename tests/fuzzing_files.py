"""Odd files for the generated tests: pictures, captions, and paths that are no files."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from tests.fuzzing import JSON, WORDS, damaged

MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA")
MODES += ("RGBX", "RGBa", "La", "I;16", "I;16B")
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "TGA", "JPEG2000", "AVIF")
# Not for a program that reads to the end of a file.
ENDLESS = ("pipe", "pipe.jsonl", "pipe.tsv", "pipe.png", "zero", "zero.jsonl", "zero.png")


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A picture of coloured squares in any of Pillow's modes."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    made = Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)
    if mode in ("I;16", "I;16B"):
        return made.convert("I").convert(mode)
    if mode in ("RGBa", "La", "PA"):
        return made.convert({"RGBa": "RGBA", "La": "LA", "PA": "P"}[mode]).convert(mode)
    if mode == "LAB":
        return Image.new("LAB", size, (50, 10, 200))
    return made.convert(mode)


def saved(made: Image.Image, kind: str, **options: Any) -> bytes | None:
    """The content of a picture file; None where the format has no such mode."""
    content = io.BytesIO()
    try:
        made.save(content, kind, **options)
    except (OSError, ValueError, KeyError, SystemError):
        return None
    return content.getvalue()


def make_world(folder: Path) -> Path:
    """A folder of inputs, usable and not, by name."""
    folder.mkdir()
    plain = saved(picture(), "PNG")
    assert plain is not None
    exif = Image.Exif()
    exif[0x112] = 6
    frames = [picture(size=(8 + i, 8)) for i in range(3)]
    files: dict[str | bytes, bytes | None] = {
        "plain.png": plain,
        "a [b]*?.png": plain,
        " sp ace .png": plain,
        "line\nbreak.png": plain,
        b"\xff.png": plain,
        "ünï 图.png": plain,
        "no_ending": plain,
        "-dash.png": plain,
        "turned.jpg": saved(picture(), "JPEG", exif=exif),
        "animated.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "black.png": saved(Image.new("L", picture().size), "PNG"),
        "white.png": saved(Image.new("1", picture().size, 1), "PNG"),
        "dot.png": saved(picture(size=(1, 1)), "PNG"),
        "high.png": saved(picture(size=(1, 5000)), "PNG"),
        "thin.png": saved(Image.new("RGB", (300_000, 1)), "PNG"),
        "text.png": b"no picture at all\n",
        "html.jpg": b"<html>404</html>",
        "empty.png": b"",
        "bomb.ppm": b"P6 99999 99999 255\n",
        "cut.png": plain[: len(plain) // 2],
        "good.jsonl": b'{"image": "plain.png", "caption": "a red circle"}\n' * 3,
        "good.tsv": "plain.png\ta red circle\nplain.png\t左边的绿色星形\n".encode(),
        "empty.jsonl": b"",
        "blank.tsv": b"\n \n\n",
        "nul.jsonl": b"\0" * 100,
        "deep.json": b"[" * 100_000,
        "deep.jsonl": b'{"a":' * 50_000 + b"\n",
        "captions.txt": "a red circle\n\n左边\nA Star!\n".encode(),
        "latin.txt": b"caf\xe9\n",
    }
    files |= {f"{mode.replace(';', '')}.tif": saved(picture(mode), "TIFF") for mode in MODES}
    for name, content in files.items():
        if content is not None:
            Path(os.fsdecode(os.fsencode(folder) + b"/" + os.fsencode(name))).write_bytes(content)
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nowhere")
    (folder / "linked.png").symlink_to("plain.png")
    for name in ENDLESS:
        if name.startswith("pipe"):
            os.mkfifo(folder / name)
        else:
            (folder / name).symlink_to("/dev/zero")
    locked = folder / "locked.png"
    locked.write_bytes(plain)
    locked.chmod(0)
    return folder


def inputs_of(world: Path) -> Any:
    """Paths of inputs: what is in the world, what is not, and what can be no path."""
    names = sorted(os.listdir(world))
    odd = ["", ".", "nowhere", "x" * 300, "plain.png/below", "/dev/null", "a/" * 3000 + "b", "~"]
    return st.sampled_from([*(str(world / name) for name in names), *odd]) | relative_paths()


def relative_paths() -> Any:
    """Odd names below the folder that a test works in."""
    return WORDS.map(lambda name: name.replace("..", "").lstrip("/").strip("\n") or "o")


def outputs() -> Any:
    """Folders to write to. `file`, `loop` and `pipe` are there, and are not folders."""
    odd = ["out", "new/er/out", "o [v]*?", " o ", "file", "file/below", "loop", "loop/o", "pipe"]
    odd += ["x" * 300, "/dev/null", "/dev/null/o", "/proc/none/o", "図", "there", "a/" * 3000 + "b"]
    return st.sampled_from(odd) | relative_paths()


def captions_files() -> Any:
    """(ending, content) of captions files of every kind."""
    value = st.sampled_from(["plain.png", "nowhere.png", "pipe.png", "zero", "a red circle", ""])
    entry = st.fixed_dictionaries(
        {}, optional={"image": value | WORDS | JSON, "caption": WORDS | JSON, "zh": WORDS | JSON}
    )
    line = st.one_of(
        entry.map(lambda one: json.dumps(one).encode()),
        JSON.map(lambda one: json.dumps(one).encode()),
        st.just(b'{"image": "plain.png", "caption": "a red circle"}'),
        st.lists(value | WORDS, max_size=4).map(
            lambda cells: "\t".join(cells).encode(errors="surrogatepass")
        ),
        st.sampled_from(
            [b"", b"image\tcaption", b"\xff\xfe", b"\xef\xbb\xbf{}", b"NaN", b"[" * 9999]
        ),
        st.binary(max_size=30),
    )
    content = st.lists(line, max_size=6).map(b"\n".join)
    return st.tuples(st.sampled_from([".jsonl", ".tsv", ".txt", ".json", ""]), content)


@st.composite
def picture_files(draw: Any) -> bytes:
    """Files of pictures in every mode and format, whole and damaged."""
    size = draw(st.sampled_from([(40, 32), (1, 1), (1, 700), (700, 1), (33, 2)]))
    made = picture(draw(st.sampled_from(MODES)), size)
    options: dict[str, Any] = {}
    if draw(st.integers(0, 3)) == 0:
        exif = Image.Exif()
        exif[0x112] = draw(st.integers(0, 9))
        options["exif"] = exif
    content = saved(made, draw(st.sampled_from(FORMATS)), **options)
    if content is None:
        content = saved(picture(size=size), "PNG")
    assert content is not None
    return draw(damaged(content)) if draw(st.booleans()) else content
