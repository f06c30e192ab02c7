"""vary and outpaint: what they write is what Python gives."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import cogview2_jax

TEXT = "a small green star"


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def written(folder):
    (report,) = folder.glob("*.json")
    report = json.loads(report.read_text("utf-8"))
    return report, np.stack([np.asarray(Image.open(folder / name)) for name in report["pictures"]])


def test_versions_and_continued_pictures(run, tiny_folder, picture, tmp_path):
    cv = cogview2_jax.load(tiny_folder)
    options = ("--bundle", tiny_folder, "--num-images", 2, "--seed", 4)
    shared = {"num_images": 2, "key": jax.random.key(4)}
    varied, continued = tmp_path / "varied", tmp_path / "continued"
    assert run("vary", picture, TEXT, "--keep", 0.25, "--out", varied, *options)[0] == 0
    report, made = written(varied)
    np.testing.assert_array_equal(made, cv.vary(picture, TEXT, keep=0.25, **shared))
    assert (report["text"], report["keep"], report["seed"]) == (TEXT, 0.25, 4)

    assert run("outpaint", picture, TEXT, "--left", 0.5, "--out", continued, *options)[0] == 0
    report, made = written(continued)
    np.testing.assert_array_equal(made, cv.outpaint(TEXT, picture, left=0.5, **shared))
    assert (report["left"], report["right"]) == (0.5, 0.0) and made.shape == (2, 40, 90, 3)


def test_mistakes_are_one_line(run, tiny_folder, picture, tmp_path):
    for arguments, said in {
        ("vary", picture, "zebra"): "text model: zebra",
        ("vary", tmp_path / "none.png"): "none.png: no such file",
        ("vary", picture, "--keep", "1"): "not in the range",
        ("outpaint", picture, TEXT): "must add a pixel or more",
        ("outpaint", picture, TEXT, "--top", "2"): "top must be from 0 to 1: ".rstrip(": "),
        ("outpaint", picture, "--top", "1"): "Missing argument 'TEXT'",
    }.items():
        code, out, err = run(*arguments, "--bundle", tiny_folder, "--out", tmp_path / "out")
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
