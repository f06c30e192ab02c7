"""generate, caption and infill: what they write."""

import json

import numpy as np
import pytest
from PIL import Image

from cogview2_jax import bundle as bundles
from cogview2_jax import cli
from cogview2_jax.cli import common, pictures

PROMPT, OTHER = "a red circle above a striped blue square", "左边的绿色星形"


@pytest.fixture(scope="module")
def written(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("written") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(common, "use_compilation_cache", lambda: None)
        options = ["--bundle", tiny_folder, "--out", out, "--num-images", 2, "--seed", 3]
        cli.main([str(argument) for argument in ("generate", PROMPT, OTHER, *options)])
    assert caught.value.code == 0
    return out


def size_of(file):
    with Image.open(file) as picture:
        return picture.size


def test_generate_writes_pictures_grid_and_report(written):
    (report_file,) = written.glob("*.json")
    report = json.loads(report_file.read_text("utf-8"))
    assert [row["prompt"] for row in report["prompts"]] == [PROMPT, OTHER]
    assert report["seed"] == 3
    assert report["versions"].keys() >= {"cogview2_jax", "jax", "python"}
    assert report["seconds"].keys() == {"load", "base", "direct", "iterative", "pixels", "total"}
    for row in report["prompts"]:
        assert len(row["pictures"]) == 2
        for name in row["pictures"]:
            assert size_of(written / name) == (96, 96)
    width, height = size_of(written / report["grid"])
    assert width == 2 * 96 + 4 and height > 2 * 96
    # Two prompts of two pictures, the grid and the report: nothing else lies there.
    assert len(list(written.iterdir())) == 6


def test_a_seed_reproduces_the_pictures(written, run, tiny_folder, tmp_path):
    options = ("--bundle", tiny_folder, "--num-images", 2, "--seed", 3, "--out", tmp_path)
    assert run("generate", PROMPT, *options)[0] == 0
    pictures = sorted(tmp_path.glob("*seed3_[01].png"))
    assert len(pictures) == 2
    for picture in pictures:
        assert picture.read_bytes() == (written / picture.name).read_bytes()


@pytest.mark.parametrize("stage", ["base", "direct"])
def test_a_stage_can_be_the_last(stage, run, tiny_folder, tmp_path):
    options = ("--bundle", tiny_folder, "--num-images", 2, "--stage", stage, "--out", tmp_path)
    code, out, err = run("generate", OTHER, *options)
    assert code == 0
    assert "pixels" in err and "iterative" not in err
    assert [line for line in out.splitlines() if line.endswith(f"_{stage}_1.png")]


def test_a_bundle_in_the_making_does_what_it_can(run, tiny, tmp_path):
    folder, out = tmp_path / "bundle", tmp_path / "out"
    bundles.save(folder, tiny._replace(direct={}, iterative={}))
    options = ("--bundle", folder, "--num-images", 1, "--out", out)
    code, _, err = run("generate", OTHER, *options)
    assert code == 2 and not out.exists()
    assert err == (
        f"cogview2: bundle {folder} lacks direct, iterative:"
        " `cogview2 train direct-sr` trains direct\n"
    )
    assert run("generate", OTHER, *options, "--stage", "base")[0] == 0
    assert run("caption", *out.glob("*_base_0.png"), "--bundle", folder)[0] == 0


def test_captions_and_infilling(run, tiny_folder, tmp_path):
    picture = tmp_path / "picture.png"
    Image.fromarray(np.full((120, 100, 3), 90, np.uint8)).save(picture)
    code, out, _ = run("caption", picture, "--bundle", tiny_folder, "--language", "zh")
    assert code == 0 and out.startswith(f"{picture}: ")
    options = ("--bundle", tiny_folder, "--out", tmp_path / "out", "--num-images", 2)
    code, out, _ = run("infill", OTHER, picture, "--box", 0, 0, 0.5, 1, *options)
    assert code == 0 and len(out.splitlines()) == 3
    assert sorted(str(path) for path in (tmp_path / "out").iterdir()) == sorted(
        out.split("\n")[:-1]
    )


def test_file_names_are_short_and_never_alike():
    prompts = ["A red circle!", "a red circle", "左边的绿色星形" * 9, "..."]
    stems = pictures._stems(prompts, 0, "full")
    assert len(set(stems)) == 4
    assert stems[0] == "a-red-circle_seed0"
    assert all(len(stem.encode()) < 80 for stem in stems)
    assert stems[3] == "prompt_seed0"


def test_long_prompts_wrap_in_the_grid():
    rows = [np.zeros((1, 96, 96, 3), np.uint8)]
    short, long = (
        pictures._grid(["a star"], rows),
        pictures._grid(["a star below a heart " * 3], rows),
    )
    assert long.height > short.height and long.width == short.width


def test_many_pictures_wrap_in_the_grid():
    grid = pictures._grid(["a star", "a heart"], [np.zeros((9, 96, 96, 3), np.uint8)] * 2)
    assert grid.width == 8 * 100 - 4 and grid.height > 4 * 100
