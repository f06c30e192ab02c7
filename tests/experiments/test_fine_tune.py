"""The three commands of the training README, on a folder of captioned pictures."""

import json

import pytest
from click.testing import CliRunner
from PIL import Image

from experiments.fine_tune import run


def test_close_ups_are_larger_than_any_scene(tmp_path):
    run.make_photos(tmp_path, 3)
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == ["0.png", "1.png", "2.png"]
    with Image.open(tmp_path / "2.png") as picture:
        assert picture.size == (96, 96)


@pytest.mark.long
@pytest.mark.multiprocess
def test_fine_tuning_lowers_the_validation_loss(tmp_path):
    arguments = ["--work", tmp_path / "work", "--pictures", 160, "--steps", 20]
    files = ["--json", tmp_path / "results.json", "--grid", tmp_path / "grid.png"]
    done = CliRunner().invoke(run.main, [str(word) for word in (*arguments, *files)])
    assert done.exit_code == 0, done.output
    before, after = json.loads((tmp_path / "results.json").read_text())["validation_loss"]
    assert after < 0.8 * before
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (4 * 192, 2 * 192)
