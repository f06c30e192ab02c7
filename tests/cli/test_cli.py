"""The command line as a whole: its help, and how it refuses."""

import json
import os
import shutil
import subprocess
import sys

import click
import pytest
from PIL import Image

from cogview2_jax import bundle as bundles
from cogview2_jax.cli import common

COMMANDS = [
    (),
    ("generate",),
    ("caption",),
    ("rank",),
    ("edit",),
    ("infill",),
    ("init",),
    ("info",),
    ("data",),
    ("data", "prepare"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command, run):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "Examples:" in out and f"cogview2 {' '.join(command)}" in out


def test_the_name_of_a_file_is_one_line_whatever_it_is(run, tiny_folder):
    for command in (["caption"], ["infill", "a star", "--box", *"0011"]):
        code, _, err = run(*command, "--bundle", tiny_folder, "--", "a\nb\x1b\udcff.png")
        assert code in (1, 2)
        assert err == "cogview2: a b\\x1b\\udcff.png: no such file\n"


def test_a_report_holds_names_that_are_no_text():
    name = os.fsdecode("照片".encode("gbk") + b".png")
    content = common.to_json({"picture": name, "prompt": "猫"})
    assert json.loads(content) == {"picture": name, "prompt": "猫"} and "猫".encode() in content


def test_too_little_memory_of_a_device_is_one_line(run, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore lines")

    monkeypatch.setattr(common, "check_model", full)
    code, _, err = run("info")
    assert code == 2 and "not enough memory on the device" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("stdout", "encoding", "code", "said"),
    [
        ("/dev/full", "utf-8", 2, "cogview2: No space left on device\n"),
        ("/dev/null", "ascii", 0, ""),  # the help has Chinese
    ],
)
def test_output_that_cannot_be_written(stdout, encoding, code, said):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    with open(stdout, "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cogview2_jax.cli", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize("ending", [".jsonl", ".tsv", ""])
def test_a_pipe_makes_no_command_wait(run, tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    pipe = f"pipe{ending}"
    os.mkfifo(pipe)
    said = f"cogview2: {pipe} is not a file\n"
    for option in ("--captions", "--config", "--text-model"):
        assert run("init", "--out", "new", option, pipe) == (2, "", said)
    if ending:
        assert run("data", "prepare", pipe, "--pictures", "--out", "new") == (2, "", said)
    assert os.listdir() == [pipe]


@pytest.mark.parametrize("name", ["x" * 300, "loop", "loop/below"])
def test_a_new_model_needs_a_place(run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    code, _, err = run("init", "--out", name)
    assert code == 2 and err.startswith("cogview2: ") and err.count("\n") == 1
    assert os.listdir() == ["loop"]


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
    "no dtype": (["generate", "a star", "--dtype", "float8"], "dtype"),
    "third language of captions": (["caption", "PICTURE", "--language", "fr"], "language"),
    "unknown option": (["generate", "a star", "--colour", "red"], "--colour"),
    "unknown command": (["paint", "a star"], "paint"),
    "out is a file": (["generate", "a star", "--out", "FILE"], "cannot write to"),
    "out in a file": (["generate", "a star", "--out", "FILE/below"], "cannot write to"),
    "no bundle": (["generate", "a star", "--bundle", "NOWHERE"], "does not exist"),
    "bundle is a file": (["info", "--bundle", "FILE"], "is a file"),
    "damaged config": (["generate", "a star", "--bundle", "CONFIG"], "config.json is damaged"),
    "damaged weights": (["generate", "a star", "--bundle", "WEIGHTS"], "is damaged"),
    "no picture": (["infill", "a star", "NOWHERE", "--box", *"0011"], "no such file"),
    "not a picture": (["infill", "a star", "FILE", "--box", *"0011"], "not a picture"),
    "wrong box": (["infill", "a star", "PICTURE", "--box", "1", "0", "0", "1"], "box must be"),
    "small box": (
        ["infill", "a star", "PICTURE", "--box", "0", "0", "0.01", "1"],
        "centre of a cell",
    ),
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
    "no such stride": ([*SCENES, "o", "--stride", "6"], "--stride must be 8, which the model"),
    "another stride": ([*SCENES, "o", "--stride", "16"], "--stride must be 8, which the model"),
    "pictures with a stride": (
        [*SCENES, "o", "--pictures", "--stride", "8"],
        "--pictures keeps files as they are",
    ),
    "no such size": ([*SCENES, "o", "--size", "20"], "sizes must be multiples of stride 8: got"),
    "scenes from a folder": (
        [*SCENES, "o", "--data-dir", "tfds", "--download"],
        "--data-dir and --download: not an option for scenes",
    ),
    "pictures in batches": (
        [*SCENES, "o", "--pictures", "--batch-size", "8"],
        "--pictures keeps files as they are",
    ),
    "pictures with a size": (
        [*SCENES, "o", "--pictures", "--size", "32"],
        "--pictures keeps files as they are",
    ),
}


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
    with pytest.raises(click.ClickException, match="No space left"):
        common.write_all(tmp_path, {"a.png": b"new", "b.png": b"new"})
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("b.png", b"old")]


def test_importing_is_quick():
    """The command line imports heavy modules only when they are needed."""
    heavy = {"jax", "flax", "scipy", "PIL", "sentencepiece", "safetensors"}
    code = f"import sys, cogview2_jax.cli; sys.exit(bool({heavy} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)
