"""data prepare: files and messages."""

import json

import numpy as np
import pytest
from PIL import Image

SCENES = ["data", "prepare", "scenes", "--count", "2", "--out"]


def test_data_prepare_writes_records_and_goes_on(run, tiny_folder, tmp_path):
    out = tmp_path / "records"
    options = ("--bundle", tiny_folder, "--apart", "--allow-unknown", "--shard-size", 2)
    command = ("data", "prepare", "scenes", "--count", 3, "--out", out, *options)
    code, said, _ = run(*command, "--batch-size", 4, "--workers", 2)
    assert code == 0
    assert said.startswith(f"{out}: 4 records of 3 inputs, 2 refused\n")
    assert f"{out / 'refused.jsonl'}: 2 long caption" in said
    assert run(*command, "--batch-size", 4)[:2] == (0, said)
    code, _, err = run(*command, "--batch-size", 5)
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith(f"cogview2: {out} was begun with settings.batch_size 4, now it is 5")


@pytest.mark.parametrize("number", [10**7, 10**9])
def test_a_batch_beyond_the_memory_is_refused_before_anything_is_begun(
    number, run, tiny_folder, tmp_path
):
    out = tmp_path / "records"
    code, _, err = run(*SCENES, out, "--bundle", tiny_folder, "--batch-size", number)
    assert code == 2 and not out.exists()
    last = err.splitlines()[-1]
    assert last.startswith(f"cogview2: a batch of {number} pictures of 32 pixels needs ")
    assert last.endswith("give a smaller --batch-size")


@pytest.mark.parametrize(
    "option", ["--count", "--size", "--stride", "--text-slots", "--batch-size", "--shard-size"]
)
@pytest.mark.parametrize("number", [0, 10**23])
def test_numbers_beyond_reason_are_refused(option, number, run, tiny_folder, tmp_path):
    out = tmp_path / "records"
    code, _, err = run(*SCENES, out, "--bundle", tiny_folder, option, number)
    assert code == 2 and err.count("\n") == 1 and not out.exists()
    assert f"{number} is not in the range" in err


def test_data_prepare_says_when_nothing_is_left(run, tiny_folder, tmp_path):
    out = tmp_path / "records"
    options = ("--bundle", tiny_folder, "--batch-size", 4, "--caption-field", "en")
    code, _, err = run(*SCENES, out, *options)
    assert code == 2
    assert err.splitlines()[-1].startswith("cogview2: no input became a record: see ")


def test_bad_lines_are_listed_and_the_others_prepared(run, tiny_folder, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "records"
    photos.mkdir()
    Image.new("RGB", (40, 32), "red").save(photos / "plain.png")
    Image.new("RGB", (2_000_000, 1), "red").save(photos / "thin.png")
    Image.fromarray(np.zeros((32, 32), np.float32)).save(photos / "float.tif")
    sentence = "a small green star on the left"
    rows = [("plain.png", sentence), ("plain.png", sentence + "\ud83d"), ("thin.png", sentence)]
    rows += [("float.tif", sentence), ("plain.png", "a small green star")]
    lines = [json.dumps({"image": image, "caption": caption}) for image, caption in rows]
    (photos / "captions.jsonl").write_text("\n".join(lines))
    code, said, _ = run(
        *("data", "prepare", photos / "captions.jsonl", "--out", out),
        *("--bundle", tiny_folder, "--batch-size", 4),
    )
    assert code == 0
    assert said.startswith(f"{out}: 3 records of 5 inputs, 2 refused\n")
    assert "1 malformed line" in said and "1 unreadable image" in said
    listed = [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()]
    assert [row["name"] for row in listed] == ["line 2: plain.png", "line 4: float.tif"]


def test_what_a_folder_has_other_than_pictures_is_said(run, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "records"
    (photos / "below").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    image = Image.new("RGB", (40, 32), "red")
    for file in ("photos/a.avif", "photos/b.ppm", "photos/below/c.png", "elsewhere/d.jpg"):
        image.save(tmp_path / file)
    (photos / "link").symlink_to("../elsewhere")
    (photos / "notes.txt").write_text("no picture")
    code, said, _ = run("data", "prepare", photos, "--pictures", "--out", out)
    assert code == 0
    assert said.splitlines() == [
        f"{out}: 4 records of 4 inputs, 0 refused",
        f"not read as pictures: 1 other files or folders, see {out / 'refused.jsonl'}",
    ]
    assert json.loads((out / "refused.jsonl").read_text())["name"] == "notes.txt"
