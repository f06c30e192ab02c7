"""The page without a browser: what visitors may ask for, draw, take away and load again."""

import io
import json
import os
import re
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from cogview2_jax.page import records, tools, words
from cogview2_jax.page.desk import Desk
from cogview2_jax.page.limits import Limits, Refused
from cogview2_jax.page.parts import drawn_part
from cogview2_jax.pipeline.cogview import CogView

TEXT = "a small green star"


@pytest.fixture(scope="module")
def desk(tiny):
    limits = Limits(images=2, candidates=3, characters=40, pixels=10_000, file_bytes=40_000)
    return Desk(CogView(tiny), limits)


@pytest.fixture
def upload(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 120, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "upload.png")
    return str(tmp_path / "upload.png")


def refused(call, *arguments):
    with pytest.raises(Refused) as caught:
        result = call(*arguments)
        next(result)  # of a generator
    for language in words.LANGUAGES:
        said = words.say(caught.value.name, language, **caught.value.values)
        assert said and "\n" not in said
    return caught.value.name


# --- What is asked for ----------------------------------------------------------------------------


def test_pictures_come_step_by_step(desk):
    steps = list(desk.generate(f" {TEXT}\n", 3, 2, 1))
    assert [step for step, _ in steps] == [
        *("candidate", "base", "direct"),
        *["round"] * desk.rounds,
        "confidence",
    ]
    expected = desk.cv.generate(TEXT, 2, key=jax.random.key(3), candidates=1)
    np.testing.assert_array_equal(steps[-2][1], expected)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ((" ", 0, 1, 1), "no_text"),
        ((None, 0, 1, 1), "no_text"),
        (("a" * 41, 0, 1, 1), "long_text"),
        (("a zebra", 0, 1, 1), "refused"),
        ((TEXT, -1, 1, 1), "range"),
        ((TEXT, 2**32, 1, 1), "range"),
        ((TEXT, None, 1, 1), "range"),
        ((TEXT, float("inf"), 1, 1), "range"),
        ((TEXT, 0, 3, 1), "range"),
        ((TEXT, 0, 1.5, 1), "range"),
        ((TEXT, 0, 1, 4), "range"),
        ((TEXT, 0, 1, "x"), "range"),
    ],
)
def test_what_is_refused(desk, asked, name):
    assert refused(desk.generate, *asked) == name


def test_uploads(desk, upload, tmp_path):
    assert desk.picture(upload).size == (120, 60)
    for name, content in (
        ("text.png", b"no picture"),
        ("cut.png", Path(upload).read_bytes()[:999]),
    ):
        (tmp_path / name).write_bytes(content)
        assert refused(desk.picture, str(tmp_path / name)) == "bad_picture"
    Image.new("RGB", (101, 100)).save(tmp_path / "large.png")
    assert refused(desk.picture, str(tmp_path / "large.png")) == "bad_picture"
    (tmp_path / "heavy.png").write_bytes(b"0" * 40_001)
    assert refused(desk.picture, str(tmp_path / "heavy.png")) == "large_file"
    for nothing in (None, "", str(tmp_path / "gone.png")):
        assert refused(desk.picture, nothing) == "no_picture"


def test_edits_captions_and_ranks_are_those_of_python(desk, upload):
    key = jax.random.key(1)
    before, made = desk.edit(TEXT, upload, None, "0, 0, 1, 0.5", 1, 2)
    expected = desk.cv.edit(TEXT, upload, box=(0, 0, 1, 0.5), num_images=2, key=key)
    np.testing.assert_array_equal(made, expected)
    np.testing.assert_array_equal(np.asarray(before)[:, 100:], made[0][:, 100:])
    assert desk.caption(upload, "zh") == desk.cv.caption(upload, language="zh")
    order, scores = desk.cv.rank(TEXT, [upload, before])
    assert desk.best(TEXT, [upload, upload]) == [(i, pytest.approx(scores[0])) for i in (0, 1)]
    assert refused(desk.best, TEXT, []) == "no_pictures"
    assert refused(desk.edit, TEXT, upload, None, "0.5,0,0.5001,1", 1, 1) == "refused"


# --- What is drawn --------------------------------------------------------------------------------


def test_a_box_and_a_mask():
    size, limits = (50, 100), Limits()
    drawn = json.dumps({"box": [0, 0.25, 0.5, 1], "strokes": []})
    assert drawn_part(drawn, "", size, limits) == {"box": (0, 0.25, 0.5, 1)}
    assert drawn_part(drawn, "0，0,1, 1", size, limits) == {"box": (0, 0, 1, 1)}
    drawn = json.dumps({"box": None, "strokes": [[0.1, [0.2, 0.5], [0.8, 0.5]], [0.05, [0.5, 0]]]})
    mask = np.asarray(drawn_part(drawn, "", size, limits)["mask"])
    assert mask.shape == size and set(np.unique(mask)) == {0, 255}
    assert mask[25, 20:81].all() and mask[16:34, 50].all() and not mask[40:].any()
    assert mask[0, 50] and not mask[:10, :40].any()


@pytest.mark.parametrize(
    ("drawn", "numbers", "name"),
    [
        (None, "", "no_part"),
        ("{}", " ", "no_part"),
        ('{"strokes": [[0.1, [1.9, 1.9]]]}', "", "no_part"),
        ("[1]", "", "bad_part"),
        ("{", "", "bad_part"),
        ("[" * 100_000, "", "bad_part"),
        ('{"box": [0, 0, 1]}', "", "bad_part"),
        ('{"box": [1, 0, 0, 1]}', "", "bad_part"),
        ('{"box": [0, 0, NaN, 1]}', "", "bad_part"),
        ('{"strokes": [[9, [0, 0]]]}', "", "bad_part"),
        ('{"strokes": [[0.1, [0, NaN]]]}', "", "bad_part"),
        ('{"strokes": [[0.1, [0]]]}', "", "bad_part"),
        ('{"strokes": 5}', "", "bad_part"),
        (json.dumps({"strokes": [[0.1, *[[0, 0]] * 30_000]]}), "", "much_drawn"),
        (None, "0, 0, 1", "bad_part"),
        (None, "a, b, c, d", "bad_part"),
    ],
)
def test_nothing_else_is_drawn(drawn, numbers, name):
    assert refused(drawn_part, drawn, numbers, (50, 100), Limits()) == name


def test_what_a_drawing_area_holds():
    shown = tools.marks(Image.new("RGB", (4000, 10)), "box", "draw")
    assert len(shown) < 20_000 and json.loads(shown)["picture"].startswith("data:image/jpeg")
    assert json.loads(tools.changed('{"tool": "box", "box": [1]}', tool="brush", box=None)) == {
        "tool": "brush",
        "box": None,
    }
    assert tools.changed("{", box=None) == tools.changed("[]", box=None) == '{"box": null}'


# --- What is taken away ---------------------------------------------------------------------------


def test_settings_come_back_from_pictures_and_from_json(tmp_path):
    settings = {"prompt": "绿色星形", "seed": 7, "num_images": 2, "candidates": 4}
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    (tmp_path / "a.png").write_bytes(records.png(pixels, settings))
    with zipfile.ZipFile(io.BytesIO(records.archive([tmp_path / "a.png"], settings))) as archive:
        archive.extractall(tmp_path / "zip")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "zip" / "0.png")), pixels)
    assert records.read(tmp_path / "zip" / "settings.json") == settings
    assert records.read(tmp_path / "zip" / "0.png") == {**settings, "picture": 0}
    for name, content in (
        ("plain.png", records.png(pixels, {})),
        ("cut.png", records.png(pixels, settings)[:60]),
        ("list.json", b"[]"),
        ("other.json", b'{"prompt": 5}'),
        ("deep.json", b"[" * 50_000),
        ("long.json", json.dumps({"prompt": "a" * 200_000}).encode()),
        ("bytes", b"\xff\xfe"),
    ):
        (tmp_path / name).write_bytes(content)
        assert refused(records.read, tmp_path / name) == "no_settings", name


def test_pictures_that_were_not_finished_are_ranked_and_not_offered(desk, upload, tmp_path):
    """After a cancel the gallery holds them, and nothing yet of how they came to be."""
    pytest.importorskip("gradio", exc_type=ImportError)
    from cogview2_jax.page import generate_tab

    best = generate_tab._ranker(desk, tools.Folder(tmp_path, 60))
    settings = {"prompt": TEXT, "seed": 0}
    ordered, _, _, chosen, insides, *shown = best("", [(upload, None)], settings, [], None)
    assert ordered[0][0] == upload and (chosen, insides, shown) == (0, [], [None, None])
    assert not list(tmp_path.glob("*/*.zip"))


def test_old_files_are_removed(tmp_path, monkeypatch):
    folder = tools.Folder(tmp_path, 60)
    old, new = folder.write("a.png", b"0" * 10), folder.write("b.png", b"0" * 10)
    for each in (old, os.path.dirname(old)):
        os.utime(each, (0, 0))
    upload = tmp_path / "tmp1234"  # a file as Gradio leaves one of an upload that broke off
    upload.touch()
    os.utime(upload, (0, 0))
    folder.sweep()
    assert not os.path.exists(old) and os.path.exists(new) and not upload.exists()
    monkeypatch.setattr(tools, "_MOST_KEPT", 0)
    folder.sweep()
    assert not list(tmp_path.iterdir())


# --- Words ----------------------------------------------------------------------------------------


def test_every_word_in_both_languages():
    for name, (english, chinese) in words.WORDS.items():
        assert re.findall(r"{(\w+)", english) == re.findall(r"{(\w+)", chinese), name
        assert name == "refused" or (english.isascii() or "…" in english), name
        assert re.search("[\u4e00-\u9fff]", chinese), name


@pytest.mark.parametrize(
    ("accepted", "language"),
    [("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("en-US,zh", "en"), ("fr, zh-TW", "zh"), (None, "en")],
)
def test_the_language_of_a_browser(accepted, language):
    assert words.language_of(accepted) == language
