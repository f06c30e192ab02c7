"""Illustrations: gathered from made-up packages of the real layout."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from cogview2_jax.data import illustrations
from cogview2_jax.data.illustrations import packages
from cogview2_jax.data.illustrations.gather import gather
from cogview2_jax.tokenizer import text

pytest.importorskip("resvg_py")

ANIMALS, FOOD = "Animals & Nature", "Food & Drink"
# Code point → its name in the packages, its category, English, Chinese.
THINGS = {
    "1f43c": ("panda", ANIMALS, "panda", "熊猫"),
    "1f989": ("owl", ANIMALS, "owl", "猫头鹰"),
    "1f34e": ("red-apple", FOOD, "red apple", "红苹果"),
    "1f3b8": ("guitar", "Objects", "guitar", "吉他"),
    "1f55b": ("twelve-oclock", "Travel & Places", "twelve o’clock", "十二点"),
    "1f9c3": ("juice", FOOD, "beverage box", None),
    "1fabb": ("hyacinth", ANIMALS, "hyacinth", "风信子"),
}
RARE, RARE_STYLES = "1fabb", ("flat", "cartoon")


def svg(colour):
    return f'<circle cx="16" cy="16" r="12" fill="{colour}"/>'


def write(file, contents):
    with tarfile.open(file, "w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """A folder of packages."""
    folder = tmp_path_factory.mktemp("packages")
    for style, package in illustrations.STYLES.items():
        codes = [code for code in THINGS if code != RARE or style in RARE_STYLES]
        file = packages.archive(folder, package)
        if style == "3d":
            made = {}
            for code in codes:
                content = io.BytesIO()
                whole = Image.new("RGBA", (64, 64))
                whole.paste((0, 0, 255, 128), (16, 16, 48, 48))
                whole.save(content, "WEBP", lossless=True)
                made[f"assets/{code.upper()}-fe0f.webp"] = content.getvalue()
            write(file, made)
            continue
        icons = {THINGS[code][0]: {"body": svg("red")} for code in codes}
        if style == "sticker":
            icons["guitar"] = {"body": ""}  # an empty picture
        categories: dict[str, list[str]] = {}
        for name, category, *_ in THINGS.values():
            categories.setdefault(category, []).append(name)
        contents = {
            "icons.json": {"icons": icons, "width": 32, "height": 32},
            "chars.json": {code: THINGS[code][0] for code in codes},
            "metadata.json": {"categories": categories},
        }
        write(file, {name: json.dumps(content).encode() for name, content in contents.items()})
    for package, part in zip(packages.NAMES, ("annotations", "annotationsDerived"), strict=True):
        made = {}
        for language, place in (("en", 2), ("zh", 3)):
            names = {
                chr(int(code, 16)): {"default": [], "tts": [thing[place]]}
                for code, thing in THINGS.items()
                if thing[place] and part == "annotations"
            }
            made[f"{part}/{language}/annotations.json"] = json.dumps(
                {part: {"annotations": names}}
            ).encode()
        write(packages.archive(folder, package), made)
    return folder


@pytest.fixture(scope="module")
def gathered(fetched, tmp_path_factory):
    folder = tmp_path_factory.mktemp("illustrations")
    return folder, gather(folder, fetched, unseen_things=0, validation=0.0)


def test_each_thing_is_drawn_in_each_style_and_one_style_is_held_out(gathered):
    folder, report = gathered
    assert illustrations.read_index(folder) == report.items
    splits = {}
    for item in report.items:
        with Image.open(folder / item.file) as picture:
            assert picture.size == (packages.SIDE,) * 2 and picture.mode == "RGB"
        splits.setdefault(item.thing, []).append(item.split)
    assert set(splits) == {"panda", "owl", "red-apple", "guitar"}
    for thing in ("panda", "owl", "red-apple"):
        assert sorted(splits[thing]) == ["train"] * 4 + ["unseen_pair"]
    assert splits["guitar"] == ["train"] * 4  # no animal and no food; one picture was empty


def test_what_is_left_out_has_a_reason(gathered):
    folder, report = gathered
    lines = (folder / "refused.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == report.refused
    assert {(one["name"], one["style"]): one["reason"] for one in report.refused} == {
        ("twelve o'clock", "all"): "a dial",
        ("beverage box", "all"): "it has no English and Chinese name",
        ("hyacinth", "all"): "only 2 styles have it",
        ("guitar", "sticker"): "the picture is empty",
    }


def test_transparent_pictures_are_put_on_white(gathered):
    folder, _ = gathered
    with Image.open(folder / "pictures/3d/panda.png") as picture:
        assert picture.getpixel((128, 128)) == (127, 127, 255)
    with Image.open(folder / "pictures/flat/panda.png") as picture:
        assert picture.getpixel((0, 0)) == (255, 255, 255)
        assert picture.getpixel((128, 128)) == (255, 0, 0)


def test_the_same_packages_give_the_same_bytes_and_what_is_there_is_kept(
    gathered, fetched, tmp_path
):
    folder, _ = gathered
    kept = tmp_path / "pictures" / "flat" / "panda.png"
    kept.parent.mkdir(parents=True)
    content = (folder / "pictures/flat/panda.png").read_bytes()
    kept.write_bytes(content)
    before = kept.stat().st_mtime_ns
    gather(tmp_path, fetched, unseen_things=0, validation=0.0)
    assert kept.stat().st_mtime_ns == before
    files = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    assert files == sorted(f.relative_to(tmp_path) for f in tmp_path.rglob("*") if f.is_file())
    assert all((tmp_path / file).read_bytes() == (folder / file).read_bytes() for file in files)


def test_things_can_be_held_out_whole(fetched, tmp_path):
    report = gather(tmp_path, fetched, unseen_things=5)
    assert {item.thing for item in report.items if item.split == "unseen_thing"} == {"guitar"}


def test_the_text_model_knows_all_words_and_a_chinese_name_is_one_of_them(gathered):
    folder, report = gathered
    model = text.load_text_model(folder / "text.model")
    vocabulary = text.vocabulary_for(model, 16)
    for caption in illustrations.every_caption(report.items):
        ids = text.encode(model, caption, vocabulary)
        assert vocabulary.unknown not in ids
        assert text.is_english(ids, vocabulary) != text.is_chinese(caption)
    # The space mark, the thing, the comma and the style.
    assert len(text.encode(model, "猫头鹰，立体", vocabulary)) == 4


def test_captions_name_the_thing_and_the_style(gathered):
    _, report = gathered
    item = next(i for i in report.items if (i.thing, i.style) == ("owl", "outlined"))
    english, chinese = (illustrations.single_captions(item, of) for of in ("en", "zh"))
    assert english[:3] == ["owl, outlined", "an owl, outlined", "an outlined picture of an owl"]
    assert chinese[0] == "猫头鹰，线描"
    drawn = illustrations.captions(item, np.random.default_rng(0))
    assert drawn["en"] in english and drawn["zh"] in chinese


def test_a_frame_has_two_things_of_one_style_where_its_caption_says(gathered):
    _, report = gathered
    red, blue = (Image.new("RGB", (96, 96), colour) for colour in ("red", "blue"))
    seen = set()
    for seed in range(80):
        rng = np.random.default_rng(seed)
        frame = illustrations.draw_frame(report.items, rng)
        first, second = report.items[frame.first], report.items[frame.second]
        assert first.style == second.style and first.thing != second.thing
        pixels = np.asarray(illustrations.compose(red, blue, frame.relation, rng, 192)).astype(int)
        (ry, rx), (by, bx) = (
            np.argwhere((pixels[..., channel] > 200) & (pixels[..., 1] < 50)).mean(0)
            for channel in (0, 2)
        )
        where = {"left": rx < bx, "right": rx > bx, "above": ry < by, "below": ry > by}
        assert where[frame.relation]
        # The caption may name either of the two first.
        name = f"{frame.captions['en']}"
        inverse = {"left": "right", "right": "left", "above": "below", "below": "above"}
        said = next(word for word in inverse if f" {word}" in name)
        ahead = name.index(first.english) < name.index(second.english)
        assert said == (frame.relation if ahead else inverse[frame.relation])
        seen.add((frame.relation, ahead))
    assert len(seen) == 8


def test_a_damaged_or_missing_package_is_named_in_one_line(fetched, tmp_path, monkeypatch):
    package = illustrations.STYLES["flat"]
    for file in fetched.iterdir():
        content = file.read_bytes()
        damaged = file == packages.archive(fetched, package)
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if damaged else content)
    with pytest.raises(ValueError, match=r"fluent-emoji-flat-.*\.tgz is damaged .*fetch it again"):
        gather(tmp_path / "out", tmp_path)
    packages.archive(tmp_path, package).unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"npm is needed to fetch @iconify-json/fluent-emoji-flat@"):
        gather(tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_one_wrong_byte_of_a_package_is_noticed(fetched, tmp_path):
    """tarfile alone ends quietly where it cannot read on."""
    shutil.copytree(fetched, tmp_path / "packages")
    for package in (illustrations.STYLES["3d"], packages.NAMES[0]):
        file = packages.archive(tmp_path / "packages", package)
        whole = file.read_bytes()
        for place in (len(whole) // 3, len(whole) // 2, len(whole) - 6):
            changed = bytearray(whole)
            changed[place] ^= 0x55
            file.write_bytes(changed)
            with pytest.raises(ValueError, match=r"\.tgz is damaged .*delete it") as caught:
                gather(tmp_path / "out", tmp_path / "packages")
            assert "\n" not in str(caught.value)
        file.write_bytes(whole)
    write(packages.archive(tmp_path / "packages", packages.NAMES[1]), {"package.json": b"{}"})
    with pytest.raises(ValueError, match=r"\.tgz has no annotationsDerived/en/annotations\.json"):
        gather(tmp_path / "out", tmp_path / "packages")


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `cogview2 data gather` first"):
        illustrations.read_index(tmp_path)
    (tmp_path / "index.json").write_text('{"format": 1, "items": [{"file": "a"}]}')
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        illustrations.read_index(tmp_path)
