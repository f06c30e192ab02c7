"""generate, caption and infill: what they write."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import cogview2_jax
from cogview2_jax import bundle as bundles
from cogview2_jax import cli
from cogview2_jax.cli import common, sheets
from cogview2_jax.pipeline.cogview import CogView

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
    # Two prompts of two pictures, the grid and the report: there is nothing else.
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
    options = ("--bundle", folder, "--num-images", 2, "--out", out)
    lacks = (
        "the model lacks direct, iterative: `cogview2 train direct-sr` trains direct;"
        " until then it draws as far as stage base (--stage base)\n"
    )
    for asked in ("full", "direct"):
        code, _, err = run("generate", OTHER, *options, "--stage", asked)
        assert code == 2 and not out.exists()
        assert err.startswith(f"cogview2: {folder}: the model lacks") and "--stage base" in err
    # Without --stage it goes as far as it can, and says so.
    code, said, err = run("generate", OTHER, *options)
    assert code == 0 and f"cogview2: {lacks}" in err
    (picture,) = out.glob("*_base_0.png")
    assert str(picture) in said
    assert run("caption", picture, "--bundle", folder)[0] == 0
    code, said, err = run("infill", OTHER, picture, "--box", 0.5, 0, 1, 1, *options)
    assert code == 0 and f"cogview2: {lacks}" in err and "_base_0.png" in said


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A picture of 60 × 200 pixels, turned on its side by its EXIF data."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 200, 3)).astype(np.uint8)
    file = tmp_path_factory.mktemp("pictures") / "wide.png"
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    return file


def test_captions_of_many_pictures(run, tiny_folder, wide, tmp_path):
    """Pictures that cannot be used are named, and the others are captioned."""
    cut, gone = tmp_path / "cut.png", tmp_path / "gone.png"
    cut.write_bytes(wide.read_bytes()[:2000])
    options = ("--bundle", tiny_folder, "--language", "zh")
    code, out, err = run("caption", wide, cut, gone, tmp_path, wide, *options)
    assert code == 1
    cv = cogview2_jax.load(tiny_folder)
    assert out == f"{wide}: {cv.caption(wide, language='zh')}\n" * 2
    lines = err.splitlines()
    assert len(lines) == 3 and all(line.startswith("cogview2: ") for line in lines)
    named = zip((cut, gone, tmp_path), lines, strict=True)
    assert all(str(name) in line for name, line in named)
    assert "no such file" in lines[1] and "not a file" in lines[2]
    code, out, err = run("caption", wide, *options)
    assert (code, err) == (0, "")


def test_captions_come_in_batches(run, tiny_folder, wide, tmp_path, monkeypatch):
    """The pictures of the second batch do not exist until the first is captioned."""
    late = tmp_path / "late.png"
    batches, caption = [], CogView.token_captions

    def caption_and_write(cv, images, *arguments, **options):
        late.write_bytes(wide.read_bytes())
        batches.append(len(images))
        return caption(cv, images, *arguments, **options)

    monkeypatch.setattr(CogView, "token_captions", caption_and_write)
    code, out, _ = run("caption", *[wide] * 8, late, "--bundle", tiny_folder)
    assert code == 0 and len(set(line.split(": ")[1] for line in out.splitlines())) == 1
    assert len(out.splitlines()) == 9 and batches == [8, 1]


def test_captions_beside_their_pictures(run, tiny_folder, wide, tmp_path):
    picture = tmp_path / "wide.png"
    picture.write_bytes(wide.read_bytes())
    options = ("--json", "--bundle", tiny_folder)
    code, out, _ = run("caption", picture, *options)
    report = json.loads((tmp_path / "wide.png.caption.json").read_text("utf-8"))
    assert code == 0 and out == f"{picture}: {report['caption']}\n"
    assert (report["language"], report["picture"]) == ("en", "wide.png")
    code, _, err = run("caption", picture, "--language", "zh", *options)
    assert code == 2 and "other settings (language en, now zh)" in err
    code, _, err = run("caption", picture, "--candidates", 2, *options)
    assert code == 2 and "other settings (candidates None, now 2)" in err
    code, out, _ = run("caption", picture, "--language", "zh", "--overwrite", *options)
    report = json.loads((tmp_path / "wide.png.caption.json").read_text("utf-8"))
    assert code == 0 and out == f"{picture}: {report['caption']}\n"


def test_the_best_of_many_are_kept(run, tiny_folder, tmp_path):
    options = ("--bundle", tiny_folder, "--seed", 3, "--stage", "base", "--out", tmp_path)
    code, out, _ = run("generate", OTHER, "--candidates", 5, "--keep", 2, *options)
    assert code == 0
    pictures = [Path(line) for line in out.split() if line.endswith(("_0.png", "_1.png"))]
    made = np.stack([np.asarray(Image.open(file)) for file in sorted(pictures)])
    cv = cogview2_jax.load(tiny_folder)
    expected = cv.generate_stages(
        [OTHER], jax.random.key(3), 2, candidates=5, keep_best=True, stages=("base",)
    )["base"][0]
    np.testing.assert_array_equal(made, expected)
    for more, said in (
        (("--keep", 2), "--keep 2 needs"),
        (("--keep", 2, "--candidates", 1), "--keep 2 needs"),
        (("--keep", 2, "--candidates", 2, "--num-images", 2), "give one of them"),
    ):
        code, _, err = run("generate", OTHER, *more, *options)
        assert code == 2 and said in err and err.count("\n") == 1


def test_infilling_on_the_command_line_and_in_python(run, tiny_folder, wide, tmp_path):
    """A box of the whole upright picture; the result has the picture's size."""
    options = ("--bundle", tiny_folder, "--out", tmp_path, "--num-images", 2, "--seed", 4)
    box = (0, 0.75, 1, 1)
    code, out, _ = run("infill", OTHER, wide, "--box", *box, *options)
    assert code == 0
    assert sorted(out.split()) == sorted(str(path) for path in tmp_path.iterdir())
    made = np.stack([np.asarray(Image.open(file)) for file in sorted(tmp_path.glob("*.png"))])
    cv = cogview2_jax.load(tiny_folder)
    expected = cv.infill(OTHER, wide, box, 2, key=jax.random.key(4))
    np.testing.assert_array_equal(made, expected)
    with Image.open(wide) as opened:
        seen = np.asarray(opened.transpose(Image.Transpose.ROTATE_270))
    assert made.shape == (2, 60, 200, 3)
    np.testing.assert_array_equal(made[:, :, :140], np.stack([seen[:, :140]] * 2))


# --- Files that are there already -----------------------------------------------------------------


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_same_command_may_write_its_files_again(run, written, tiny_folder):
    before = contents(written)
    options = ("--bundle", tiny_folder, "--out", written, "--num-images", 2, "--seed", 3)
    assert run("generate", PROMPT, OTHER, *options)[0] == 0
    after = contents(written)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in after if name.endswith(".png"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("--candidates", 2), "was made with other settings (candidates 1, now 2)"),
        (("--num-images", 3), "was made with other settings (num_images 2, now 3)"),
        (("--dtype", "bfloat16"), "was made with other settings (dtype float32, now bfloat16)"),
        ((), "is there already"),  # of both prompts
    ],
)
def test_generate_replaces_no_other_files(changed, said, run, written, tiny_folder):
    before = contents(written)
    prompts = (PROMPT, OTHER) if changed else (PROMPT,)
    options = ("--bundle", tiny_folder, "--out", written, "--num-images", 2, "--seed", 3)
    code, out, err = run("generate", *prompts, *options, *changed)
    assert (code, out) == (2, "")
    assert said in err and "--overwrite" in err and err.count("\n") == 1
    assert contents(written) == before


def test_infill_replaces_no_other_files_unless_told_to(run, tiny_folder, wide, tmp_path):
    picture, out = tmp_path / "a.png", tmp_path / "out"
    picture.write_bytes(wide.read_bytes())
    options = ("--bundle", tiny_folder, "--out", out, "--num-images", 2)
    command = ("infill", OTHER, picture, "--box", 0, 0, 1, 0.3, *options)
    assert run(*command)[0] == 0
    before = contents(out)
    assert run(*command)[0] == 0
    code, _, err = run("infill", OTHER, picture, "--box", 0, 0, 1, 0.5, *options)
    assert code == 2 and "was made with other settings (box)" in err
    # Another picture, and another model, of the same name.
    Image.new("RGB", (60, 60), "white").save(picture)
    code, _, err = run(*command)
    assert code == 2 and "was made with other settings (picture_sha256 " in err
    assert {name: before[name] for name in before if name.endswith("png")} == {
        name: content for name, content in contents(out).items() if name.endswith("png")
    }
    code, _, err = run(*command, "--overwrite")
    assert code == 0
    assert contents(out).keys() == before.keys() and contents(out) != before


def test_a_model_that_has_learnt_more_is_another(tiny, tmp_path):
    bundles.save(tmp_path / "model", tiny)
    before = common.model_id(tmp_path / "model")
    assert common.model_id(tmp_path / "model") == before
    bundles.save(tmp_path / "model", tiny)
    os.utime(tmp_path / "model" / bundles.WEIGHTS, (1, 1))
    assert common.model_id(tmp_path / "model") != before


# --- Names and sheets -----------------------------------------------------------------------------


def test_file_names_are_short_and_never_alike():
    prompts = ["A red circle!", "a red circle", "左边的绿色星形" * 9, "..."]
    stems = sheets.stems(prompts, 0, "")
    assert len(set(stems)) == 4
    assert stems[0] == "a-red-circle_seed0"
    assert all(len(stem.encode()) < 80 for stem in stems)
    assert stems[3] == "prompt_seed0"


def test_long_prompts_wrap_in_the_grid():
    rows = [np.zeros((1, 96, 96, 3), np.uint8)]
    short, long = (
        sheets.labelled_grid(["a star"], rows),
        sheets.labelled_grid(["a star below a heart " * 3], rows),
    )
    assert long.height > short.height and long.width == short.width


def test_many_pictures_wrap_in_the_grid():
    grid = sheets.labelled_grid(["a star", "a heart"], [np.zeros((9, 96, 96, 3), np.uint8)] * 2)
    assert grid.width == 8 * 100 - 4 and grid.height > 4 * 100


@pytest.mark.parametrize("between", ["\n", "\u200b" * 50_000, " " * 50_000, "\u2028", "\x01"])
def test_a_label_of_a_prompt_with_characters_that_are_not_seen(between):
    """It is measured piece by piece: what has no width is left out, so that this ends."""
    picture = np.zeros((1, 96, 96, 3), np.uint8)
    grid = sheets.labelled_grid([f"a red{between}circle above a star"], [picture])
    assert grid.width == 96 and grid.height < 300


def test_generate_shows_how_pictures_came_to_be(run, tiny_folder, tmp_path):
    common = ("generate", "a red circle", "--bundle", tiny_folder, "--num-images", 2, "--seed", 1)
    assert run(*common, "--out", tmp_path / "plain")[0] == 0
    assert run(*common, "--out", tmp_path / "moving", "--animate", "gif")[0] == 0
    (report,) = (tmp_path / "moving").glob("*.json")
    (row,) = json.loads(report.read_text("utf-8"))["prompts"]
    for name, moving, sure in zip(
        row["pictures"], row["animations"], row["confidence"], strict=True
    ):
        drawn = (tmp_path / "moving" / name).read_bytes()
        assert drawn == (tmp_path / "plain" / name).read_bytes()
        with Image.open(tmp_path / "moving" / moving) as animation:
            assert animation.format == "GIF" and animation.n_frames > 8
        with Image.open(tmp_path / "moving" / sure) as maps:
            assert maps.size == (3 * 96, 96)
    report = json.loads(next((tmp_path / "plain").glob("*.json")).read_text("utf-8"))
    assert set(report["prompts"][0]) == {"prompt", "pictures"}
