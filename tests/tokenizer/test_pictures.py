"""Pictures: every kind of input, every mode, and the messages of refusals."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cogview2_jax.tokenizer import pictures
from cogview2_jax.tokenizer.pictures import (
    PictureError,
    centre_crop_box,
    fit_picture,
    open_picture,
)


def drawn(size=(48, 32)) -> Image.Image:
    """A red disc and a blue bar on nearly white."""
    image = Image.new("RGB", size, (240, 240, 245))
    pen = ImageDraw.Draw(image)
    pen.ellipse((4, 4, 20, 20), fill=(220, 40, 40))
    pen.rectangle((30, 10, 44, 28), fill=(40, 70, 220))
    return image


def written(image: Image.Image, kind: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def png(samples: np.ndarray, depth: int, colour: int, key: bytes = b"") -> bytes:
    """A PNG file from rows of big-endian or packed samples: Pillow cannot write all of them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    height, width = samples.shape[0], samples.shape[1] * samples.itemsize * 8 // depth // channels
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", head), chunk(b"tRNS", key) if key else b""]
    parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def pixels(picture) -> np.ndarray:
    opened = open_picture(picture)
    assert opened.mode == "RGB"
    return np.asarray(opened)


# --- Ways in --------------------------------------------------------------------------------------


def test_every_way_in_gives_the_same_picture(tmp_path):
    image = drawn()
    content = written(image, "PNG")
    (tmp_path / "a.png").write_bytes(content)
    ways = (content, tmp_path / "a.png", str(tmp_path / "a.png"), image, np.asarray(image))
    for way in ways:
        np.testing.assert_array_equal(pixels(way), np.asarray(image))
        np.testing.assert_array_equal(fit_picture(way, 16, 16), fit_picture(image, 16, 16))


def test_arrays_may_be_grey_or_have_alpha():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(pixels(grey), np.stack([grey] * 3, -1))
    alpha = np.dstack([np.zeros((3, 4, 3), np.uint8), np.full((3, 4), 51, np.uint8)])
    np.testing.assert_array_equal(pixels(alpha), np.full((3, 4, 3), 204))
    np.testing.assert_array_equal(pixels(grey.T), np.stack([grey.T] * 3, -1))


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (np.zeros((4, 4, 3)), "uint8 [y, x, 3], grey [y, x] or with alpha [y, x, 4]: got float64"),
        (np.zeros((4, 4, 3), np.uint16), "got uint16 [4, 4, 3]"),
        (np.zeros((4, 4, 2), np.uint8), "got uint8 [4, 4, 2]"),
        (np.zeros((1, 4, 4, 3), np.uint8), "got uint8 [1, 4, 4, 3]"),
        (np.zeros(4, np.uint8), "got uint8 [4]"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels: 4 × 0"),
        (Image.new("RGB", (0, 5)), "no pixels: 0 × 5"),
        (7, "must be a path, bytes, a PIL image or an array: got int"),
        (None, "got NoneType"),
        (b"", "not a picture"),
        (b"<html>not found</html>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a picture"),
        (written(drawn(), "JPEG")[:700], "truncated"),
        (written(drawn(), "PNG")[:150], ""),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(picture, reason):
    for call in (open_picture, lambda picture: fit_picture(picture, 8, 8)):
        with pytest.raises(PictureError) as caught:
            call(picture)
        assert caught.value.kind == "unreadable image"
        assert reason in caught.value.reason and caught.value.reason
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("nowhere.png", "missing image", "no such file"),
        (".", "missing image", "not a file"),
        ("a.txt", "unreadable image", "not a picture"),
        ("a.txt/b", "missing image", "no such file"),
        ("a\0b", "missing image", "not a path"),
        ("\ud83d.png", "missing image", "not a path"),
        ("a" * 300, "missing image", "name too long"),
        ("/dev/zero", "missing image", "not a file"),
    ],
)
def test_a_path_is_named(name, kind, reason, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PictureError, match=reason) as caught:
        open_picture(name)
    assert caught.value.kind == kind
    assert caught.value.name == name and str(caught.value).startswith(f"{name}: ")


def test_a_failing_machine_is_no_mistake_of_the_picture(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(written(drawn(), "PNG"))

    def fail(path):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    with pytest.raises(OSError, match="Too many open files"):
        open_picture(tmp_path / "a.png")


def test_limits_hold_before_anything_is_decoded(tmp_path, monkeypatch):
    content = written(drawn(), "PNG")
    (tmp_path / "a.png").write_bytes(content)
    monkeypatch.setattr(pictures, "MOST_PIXELS", 48 * 32 - 1)
    with pytest.raises(PictureError, match="1,536 pixels, more than 1,535"):
        open_picture(content[:100])  # its pixels are missing, and nobody looks for them
    monkeypatch.setattr(pictures, "MOST_BYTES", 99)
    with pytest.raises(PictureError, match="larger than"):
        open_picture(tmp_path / "a.png")


# --- Orientation and transparency -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_pictures_are_turned_upright(kind):
    turned = drawn().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"quality": 95} if kind in ("JPEG", "WEBP", "AVIF") else {}
    content = written(turned, kind, exif=exif, **options)
    opened = open_picture(content)
    assert opened.size == (48, 32)
    difference = np.abs(np.asarray(opened).astype(int) - np.asarray(drawn()))
    assert np.median(difference) <= 4
    in_python = open_picture(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(np.asarray(in_python), np.asarray(opened))
    again = open_picture(opened)  # not turned twice
    np.testing.assert_array_equal(np.asarray(again), np.asarray(opened))


def test_damaged_exif_data_turn_nothing():
    content = written(drawn(), "JPEG", exif=b"Exif\0\0nonsense")
    assert open_picture(content).size == (48, 32)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_what_is_transparent_is_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 2), (0, 0, 0, 255))
    image.putpixel((2, 2), (0, 0, 0, 51))
    if mode == "PA":
        grey, alpha = image.convert("LA").split()
        image = grey.convert("P")
        image.putalpha(alpha)
    else:
        image = image.convert("LA" if mode == "La" else "RGBA").convert(mode)
    assert image.mode == mode
    found = pixels(image)
    assert (found[0] == 255).all() and (found[2, 1] == 0).all() and (found[2, 2] == 204).all()


def test_a_palette_or_a_colour_may_be_transparent():
    palette = drawn().quantize(8)
    index = palette.getpixel((0, 0))
    for options in ({"transparency": index}, {"transparency": bytes([255] * index + [0])}):
        found = pixels(written(palette, "PNG", **options))
        assert (found[0, 0] == 255).all() and found[12, 12, 0] > found[12, 12, 1]
    found = pixels(written(palette, "GIF", transparency=index))
    assert (found[0, 0] == 255).all()
    found = pixels(written(drawn(), "PNG", transparency=(240, 240, 245)))
    assert (found[0, 0] == 255).all() and tuple(found[12, 12]) == (220, 40, 40)


def test_the_transparent_colour_of_other_depths_is_the_right_one():
    deep = np.array([[[0x1234] * 3, [0x5678] * 3]], ">u2").reshape(1, 6)
    found = pixels(png(deep, 16, 2, struct.pack(">HHH", *[0x1234] * 3)))
    assert found[0, :, 0].tolist() == [255, 0x56]
    grey = np.array([[0x1234, 0x1235]], ">u2")
    assert pixels(png(grey, 16, 0, struct.pack(">H", 0x1234)))[0, :, 0].tolist() == [255, 0x12]
    packed = np.array([[0x5A]], np.uint8)  # two greys of 4 bits
    assert pixels(png(packed, 4, 0, struct.pack(">H", 5)))[0, :, 0].tolist() == [255, 0xAA]
    packed = np.array([[0b0110_1100]], np.uint8)  # four greys of 2 bits
    found = pixels(png(packed, 2, 0, struct.pack(">H", 1)))
    assert found[0, :, 0].tolist() == [255, 170, 255, 0]


# --- Modes ----------------------------------------------------------------------------------------

GREYS = np.asarray(drawn().convert("L"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bit_greys_are_scaled(kind):
    deep = Image.fromarray(GREYS.astype(np.uint16) * 257)
    expected = np.stack([GREYS] * 3, -1)
    np.testing.assert_array_equal(pixels(written(deep, kind)), expected)
    np.testing.assert_array_equal(pixels(deep), expected)


def test_sixteen_bit_greys_of_either_byte_order_and_polarity():
    deep = GREYS.astype(np.uint16) * 257
    for order in ("<u2", ">u2"):
        np.testing.assert_array_equal(pixels(Image.fromarray(deep.astype(order)))[..., 0], GREYS)
    inverted = written(Image.fromarray(65_535 - deep), "TIFF", tiffinfo={262: 0})
    np.testing.assert_array_equal(pixels(inverted)[..., 0], GREYS)
    between = Image.fromarray(np.array([[0, 128, 129, 65_535 - 129, 65_535]], np.uint16))
    assert pixels(between)[0, :, 0].tolist() == [0, 0, 1, 254, 255]


def test_greys_of_a_ppm_file_have_its_own_white():
    samples = np.array([0, 512, 1023], ">u2").tobytes()
    assert pixels(b"P5\n3 1\n1023\n" + samples)[0, :, 0].tolist() == [0, 128, 255]
    assert pixels(b"P2\n3 1\n1023\n0 512 1023\n")[0, :, 0].tolist() == [0, 128, 255]


def test_sixteen_bit_colours_are_scaled():
    deep = np.array([[[0x1234, 0x5678, 0x9ABC]]], ">u2").reshape(1, 3)
    assert pixels(png(deep, 16, 2))[0, 0].tolist() == [0x12, 0x56, 0x9A]
    with_alpha = np.array([[0x1234, 0x5678, 0x9ABC, 0xFFFF]], ">u2")
    assert pixels(png(with_alpha, 16, 6))[0, 0].tolist() == [0x12, 0x56, 0x9A]
    assert pixels(png(with_alpha[:, 2:], 16, 4))[0, 0].tolist() == [0x9A] * 3


@pytest.mark.parametrize("mode", ["I", "F"])
@pytest.mark.parametrize("in_file", [True, False])
def test_greys_of_unknown_range_are_refused_by_name(mode, in_file):
    image = Image.new(mode, (4, 4), 200)
    with pytest.raises(PictureError, match=f"mode {mode} .* 32-bit greys") as caught:
        open_picture(written(image, "TIFF") if in_file else image)
    assert caught.value.kind == "unreadable image"


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"])
def test_other_modes_become_rgb(mode):
    image = drawn() if mode == "P" else drawn().convert("L" if mode == "1" else "RGB")
    if mode == "LAB":
        image = Image.open(io.BytesIO(LAB))
    else:
        image = image.convert(mode)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(pixels(image), expected)
    assert expected.std() > 20


# L* of 0 and of 255 in a TIFF file: black and white.
LAB = written(Image.frombytes("LAB", (2, 1), bytes([0, 128, 128, 255, 128, 128])), "TIFF")


def test_every_mode_of_pillow_opens_or_is_refused_by_name():
    from PIL import ImageMode

    for mode in [*"1LPIF", "LA", "La", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"] + [
        "LAB", "HSV", "I;16", "I;16B", "I;16L"
    ]:  # fmt: skip
        assert ImageMode.getmode(mode).mode == mode
        image = Image.new(mode, (3, 2))
        if mode in "IF":
            with pytest.raises(PictureError, match=f"mode {mode} "):
                open_picture(image)
        else:
            assert open_picture(image).size == (3, 2)


def test_the_first_frame_of_an_animated_picture():
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        content = written(first, kind, save_all=True, append_images=[second])
        assert pixels(content)[0, 0, 0] > 240 and pixels(content)[0, 0, 2] < 20


@pytest.mark.filterwarnings("ignore:.* image format is deprecated:DeprecationWarning")
def test_formats_that_pillow_writes_are_read():
    left = {"PDF", "EPS", "PALM", "MPO"} | {"BUFR", "GRIB", "HDF5", "WMF"}
    Image.init()
    for kind in sorted(set(Image.SAVE) - left):
        image = drawn().convert(
            {"MSP": "1", "XBM": "1", "BLP": "P", "SPIDER": "F"}.get(kind, "RGB")
        )
        try:
            content = written(image, kind)
        except (OSError, KeyError):  # not compiled, or needs more than a picture
            continue
        if kind == "SPIDER":
            with pytest.raises(PictureError, match="mode F"):
                open_picture(content)
        else:
            assert open_picture(content).width > 0, kind
    assert {".jpg", ".png", ".avif", ".ppm", ".tga", ".jp2"} <= pictures.endings()
    assert ".eps" not in pictures.endings() and ".pdf" not in pictures.endings()


# --- Fitting --------------------------------------------------------------------------------------


def resized_then_cropped(image: Image.Image, height: int, width: int) -> np.ndarray:
    """What `fit_picture` must compute, without its limit on memory."""
    scale = max(height / image.height, width / image.width)
    size = max(round(image.width * scale), width), max(round(image.height * scale), height)
    if size != image.size:
        way = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
        image = image.resize(size, way)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def test_ordinary_pictures_are_resized_to_cover_and_cropped():
    rng = np.random.default_rng(0)
    for _ in range(60):
        height, width = rng.integers(1, 130, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        for size in ((32, 32), (24, 40), (96, 96)):
            lengths = height / size[0], width / size[1]
            if max(lengths) < 15 * min(lengths):
                np.testing.assert_array_equal(
                    fit_picture(image, *size), resized_then_cropped(image, *size)
                )


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000), (3000, 40), (40, 3000), (1, 1), (3000, 7)])
def test_extreme_pictures_show_their_middle(size):
    ramp = np.abs(np.arange(size[0] * size[1]) % max(size) - max(size) / 2)
    across = (ramp * 510 / max(size)).astype(np.uint8)
    values = across.reshape(size[1], size[0]) if size[0] > size[1] else across.reshape(-1, 1)
    if min(size) > 1 and size[1] > size[0]:
        values = np.repeat(np.abs(np.arange(3000) - 1500) // 6, 40).reshape(3000, 40)
    fitted = fit_picture(values.astype(np.uint8), 32, 32)
    assert fitted.shape == (32, 32, 3)
    if max(size) > 1:
        assert fitted.max() <= 12  # dark is the middle


def test_memory_is_bounded_by_what_is_kept(tmp_path):
    """Two million pixels in a line: resized to cover the crop, they would take 600 GB."""
    code = """if True:
        from pathlib import Path
        from PIL import Image
        from cogview2_jax.tokenizer.pictures import fit_picture, open_picture
        for size in ((2_000_000, 1), (1, 2_000_000), (2_000_000, 20)):
            opened = open_picture(Image.new("RGB", size, "red"))
            assert (fit_picture(opened, 480, 480) == (255, 0, 0)).all()
        # Not getrusage: its peak includes that of the process that started this one.
        print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    """
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the peak of memory is read from /proc")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1_000_000  # kB; the pictures themselves take 160 MB


@pytest.mark.parametrize("size", [(64, 64), (300, 97), (97, 300), (20, 31), (5000, 10), (1, 400)])
def test_the_crop_in_source_pixels(size):
    left, top, right, bottom = centre_crop_box(size, 32, 48)
    assert (right - left) / (bottom - top) == pytest.approx(48 / 32, rel=0.04)
    assert min(left, top) >= 0 and right <= size[0] + 1e-6 and bottom <= size[1] + 1e-6
    pixel = max(1, (right - left) / 48)
    assert abs((left + right) / 2 - size[0] / 2) <= pixel
    assert abs((top + bottom) / 2 - size[1] / 2) <= pixel
    # Pixels outside the box do not show.
    image = Image.new("RGB", size, "red")
    image.paste("blue", (round(left), round(top), round(right), round(bottom)))
    if min(size) > 48:
        assert (fit_picture(image, 32, 48)[1:-1, 1:-1] == (0, 0, 255)).all()


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="at least 1: got 0 and 8"):
        fit_picture(drawn(), 0, 8)
