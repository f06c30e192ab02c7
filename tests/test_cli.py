"""The command line: what it writes, and how it refuses."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cogview2_jax import bundle as bundles
from cogview2_jax import cli

PROMPT, OTHER = "a red circle above a striped blue square", "左边的绿色星形"


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """Compiled programs of a test are nobody's business."""
    monkeypatch.setattr(cli, "_use_compilation_cache", lambda: None)


@pytest.fixture
def run(capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return call


@pytest.fixture(scope="module")
def written(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("written") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(cli, "_use_compilation_cache", lambda: None)
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


def test_info_shows_model_and_devices(run, tiny_folder):
    code, out, _ = run("info", "--bundle", tiny_folder)
    assert code == 0
    for expected in (str(tiny_folder), "12 tokens", "4 × 4", "12 × 12", "device", "CogLMConfig"):
        assert expected in out


COMMANDS = [
    (),
    ("generate",),
    ("caption",),
    ("infill",),
    ("info",),
    ("data",),
    ("data", "prepare"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command, run):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "Examples:" in out and f"cogview2 {' '.join(command)}" in out


SCENES = ["data", "prepare", "scenes", "--count", "2", "--out"]
BAD = {
    "empty prompt": (["generate", ""], "at least one word"),
    "blank prompt": (["generate", "a star", " "], "at least one word"),
    "long prompt": (["generate", "a star " * 20], "at most 12 tokens: got 40"),
    "unknown word": (["generate", "a pink elephant"], "outside the text model: pink, elephant"),
    "unknown Chinese": (["generate", "大象"], "outside the text model: 大象"),
    "line breaks": (["generate", "a\nzebra\nstar"], "outside the text model: zebra"),
    "no prompt": (["generate"], "Missing argument"),
    "no images": (["generate", "a star", "--num-images", "0"], "num-images"),
    "many images": (["generate", "a star", "--num-images", "1000000"], "num-images"),
    "half an image": (["generate", "a star", "--num-images", "1.5"], "num-images"),
    "no candidates": (["generate", "a star", "--candidates", "0"], "candidates"),
    "negative seed": (["generate", "a star", "--seed", "-1"], "seed"),
    "large seed": (["generate", "a star", "--seed", str(2**32)], "seed"),
    "no number": (["generate", "a star", "--seed", "one"], "seed"),
    "wrong stage": (["generate", "a star", "--stage", "last"], "stage"),
    "unknown option": (["generate", "a star", "--colour", "red"], "--colour"),
    "unknown command": (["paint", "a star"], "paint"),
    "out is a file": (["generate", "a star", "--out", "FILE"], "cannot write to"),
    "out in a file": (["generate", "a star", "--out", "FILE/below"], "cannot write to"),
    "no bundle": (["generate", "a star", "--bundle", "NOWHERE"], "does not exist"),
    "bundle is a file": (["info", "--bundle", "FILE"], "is a file"),
    "damaged config": (["generate", "a star", "--bundle", "CONFIG"], "config.json is damaged"),
    "damaged weights": (["generate", "a star", "--bundle", "WEIGHTS"], "is damaged"),
    "no picture": (["caption", "NOWHERE"], "no such file"),
    "not a picture": (["caption", "FILE"], "not a picture"),
    "wrong box": (["infill", "a star", "PICTURE", "--box", "1", "0", "0", "1"], "box must be"),
    "no box": (["infill", "a star", "PICTURE"], "--box"),
    "no source": (["data", "prepare", "--out", "o"], "Missing argument"),
    "nowhere to": (["data", "prepare", "scenes", "--count", "2"], "--out"),
    "endless scenes": (["data", "prepare", "scenes", "--out", "o"], "give --count"),
    "no captions file": (["data", "prepare", "no.jsonl", "--out", "o"], "no.jsonl: No such file"),
    "another ending": (["data", "prepare", "FILE", "--out", "o"], "must be .jsonl"),
    "a folder of pictures": (["data", "prepare", "CONFIG", "--out", "o"], "or --pictures"),
    "records in a file": ([*SCENES, "FILE"], "cannot write to"),
    "unknown split": ([*SCENES, "o", "--split", "trian"], "split must be one of"),
    "third language": (
        [*SCENES, "o", *(f"--caption-field={name}" for name in "abc")],
        "once or twice",
    ),
    "no such stride": ([*SCENES, "o", "--stride", "6"], "--stride must be one of 4, 8, 16: got 6"),
    "no such size": ([*SCENES, "o", "--size", "20"], "sizes must be multiples of stride 8: got"),
    "pictures with a size": (
        [*SCENES, "o", "--pictures", "--size", "32"],
        "--pictures keeps files as they are",
    ),
}


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


def test_data_prepare_says_when_nothing_is_left(run, tiny_folder, tmp_path):
    out = tmp_path / "records"
    code, _, err = run(*SCENES, out, "--bundle", tiny_folder, "--caption-field", "en")
    assert code == 2
    assert err.splitlines()[-1].startswith("cogview2: no input became a record: see ")


@pytest.mark.parametrize("name", BAD)
def test_mistakes_end_in_one_line_and_exit_code_2(name, run, tiny_folder, tmp_path, monkeypatch):
    arguments, message = BAD[name]
    inputs, work = tmp_path / "inputs", tmp_path / "work"
    work.mkdir()
    for damaged, file in (("CONFIG", bundles.CONFIG), ("WEIGHTS", bundles.WEIGHTS)):
        shutil.copytree(tiny_folder, inputs / damaged)
        content = (inputs / damaged / file).read_bytes()
        (inputs / damaged / file).write_bytes(content[:-100])
    (inputs / "FILE").write_text("no picture")
    Image.new("RGB", (8, 8)).save(inputs / "PICTURE", "PNG")
    monkeypatch.chdir(work)
    capitals = ("FILE", "FILE/below", "NOWHERE", "CONFIG", "WEIGHTS", "PICTURE")
    given = [str(inputs / each) if each in capitals else each for each in arguments]
    if "--bundle" not in given and arguments[0] != "paint":
        given += ["--bundle", str(tiny_folder)]
    code, out, err = run(*given)
    assert code == 2
    assert message in err
    assert err.startswith("cogview2: ") and err.count("\n") == 1
    assert out == ""
    assert not list(work.iterdir())


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    from pathlib import Path

    (tmp_path / "b.png").write_bytes(b"old")
    write = Path.write_bytes

    def fail_at_second(path: Path, content: bytes) -> int:
        if "b.png" in path.name:
            write(path, content[:1])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail_at_second)
    with pytest.raises(cli.click.ClickException, match="No space left"):
        cli._write_all(tmp_path, {"a.png": b"new", "b.png": b"new"})
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("b.png", b"old")]


def test_file_names_are_short_and_never_alike():
    prompts = ["A red circle!", "a red circle", "左边的绿色星形" * 9, "..."]
    stems = cli._stems(prompts, 0, "full")
    assert len(set(stems)) == 4
    assert stems[0] == "a-red-circle_seed0"
    assert all(len(stem.encode()) < 80 for stem in stems)
    assert stems[3] == "prompt_seed0"


def test_long_prompts_wrap_in_the_grid():
    rows = [np.zeros((1, 96, 96, 3), np.uint8)]
    short, long = cli._grid(["a star"], rows), cli._grid(["a star below a heart " * 3], rows)
    assert long.height > short.height and long.width == short.width


def test_many_pictures_wrap_in_the_grid():
    grid = cli._grid(["a star", "a heart"], [np.zeros((9, 96, 96, 3), np.uint8)] * 2)
    assert grid.width == 8 * 100 - 4 and grid.height > 4 * 100


def test_importing_is_quick():
    """Neither the package nor the command line imports jax before it is needed."""
    code = "import sys, cogview2_jax.cli; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
