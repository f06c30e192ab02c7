"""data draw and data unpack: a picture for each caption, here and on a cluster."""

import json
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

import cogview2_jax
from tests.processes import ROOT

PROMPTS = ["a red circle", "", "左边的绿色星形", "a zebra", "a red circle", "a blue square"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS), "utf-8")
    return file


def draw(run, tiny_folder, prompts, out, *more):
    options = ["--bundle", tiny_folder, "--stage", "base", "--candidates", 1, "--batch-size", 2]
    return run("data", "draw", prompts, "--out", out, "--shard-size", 2, *options, *more)


def test_prompts_are_drawn_and_unpacked(run, tiny_folder, prompts, tmp_path):
    code, out, _ = draw(run, tiny_folder, prompts, tmp_path / "drawn")
    assert code == 0 and "4 records of 5 inputs, 1 refused" in out and "1 unknown words" in out
    assert run("data", "unpack", tmp_path / "drawn", "--out", tmp_path / "files")[0] == 0
    lines = (tmp_path / "files" / "captions.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    # Blank lines have no row; the refused one has.
    names = [f"{number:08d}.png" for number in (0, 1, 3, 4)]
    assert [row["image"] for row in rows] == names
    cv = cogview2_jax.load(tiny_folder)
    for row, number in zip(rows, (0, 1, 3, 4), strict=True):
        drawn = np.asarray(Image.open(tmp_path / "files" / row["image"]))
        expected = cv.generate_stages(
            [row["caption"]], jax.random.key(0), 1, candidates=1, stages=("base",), first=number
        )["base"][0, 0]
        np.testing.assert_array_equal(drawn, expected)
    assert run("data", "unpack", tmp_path / "drawn", "--out", tmp_path / "tars", "--tar")[0] == 0
    with tarfile.open(tmp_path / "tars" / "drawn-00000.tar") as archive:
        assert archive.getnames()[:2] == ["00000000.png", "00000000.txt"]
        assert archive.extractfile("00000001.txt").read().decode() == "左边的绿色星形"
        png = archive.extractfile("00000004.png").read()
    assert png == (tmp_path / "files" / "00000004.png").read_bytes()
    code, _, err = run("data", "unpack", tmp_path / "drawn", "--out", tmp_path / "tars")
    assert code == 2 and "is not empty" in err


def test_what_cannot_be_drawn_is_one_line(run, tiny_folder, prompts, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    for arguments, words in (
        ((tmp_path / "empty.txt",), "no line with a prompt"),
        ((tmp_path / "none.txt",), "No such file"),
        ((tmp_path,), "is a folder: give a file with captions"),
        ((prompts, "--processes", 2), "go with --engine ray"),
        ((prompts, "--style", "oil"), "style must be"),
        ((prompts, "--split", "test"), "--split: not an option for a file of prompts"),
        ((prompts, "--caption-field", "en"), "--caption-field: not an option"),
    ):
        code, _, err = draw(run, tiny_folder, *arguments[:1], tmp_path / "out", *arguments[1:])
        assert code == 2 and words in err, err
    assert not (tmp_path / "out").exists()
    code, _, err = run("data", "unpack", tmp_path, "--out", tmp_path / "files")
    assert code == 2 and err.count("\n") == 1


def test_a_caption_that_is_too_long_in_the_style_is_listed(run, styled_folder, tmp_path):
    # With the template it has 13 tokens, without 9; 12 have room.
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a small green star on the left " * 2 + "\na red circle\n")
    code, out, err = draw(run, styled_folder, prompts, tmp_path / "drawn")
    assert code == 0 and "1 records of 2 inputs, 1 refused" in out, err
    assert "1 long caption" in out


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_cluster_draws_the_same(run, tiny_folder, prompts, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    assert draw(run, tiny_folder, prompts, tmp_path / "here")[0] == 0
    options = ("--engine", "ray", "--processes", 2)
    assert draw(run, tiny_folder, prompts, tmp_path / "there", *options)[0] == 0
    here, there = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("here", "there")
    )
    assert here == there and len(here) > 6
