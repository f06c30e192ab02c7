"""generate: prompts from a file or a terminal, styles and sampling settings."""

import io
import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import cogview2_jax
from cogview2_jax import bundle as bundles
from cogview2_jax.config import ClusterSampling
from cogview2_jax.styles import Style

TEXT = "a small green star"


@pytest.fixture(scope="module")
def styled_folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("styled") / "bundle"
    left = Style("left", "{} on the left", ClusterSampling(1.0, 4), ClusterSampling(1.0, 4))
    bundles.save(folder, tiny._replace(styles=(left,)))
    return folder


def written(folder):
    """Of each report: the prompts and their pictures, and the report."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        report = json.loads(file.read_text("utf-8"))
        for row in report["prompts"]:
            images = [np.asarray(Image.open(folder / name)) for name in row["pictures"]]
            found[row["prompt"]] = np.stack(images), report
    return found


def test_a_file_of_prompts(run, tiny_folder, tmp_path):
    """Each line is drawn as on the command line; bad ones are named by their number."""
    lines = [TEXT, "", "cat\t左边的绿色星形\r", "a zebra", "cat\ta red circle", "a\tb\tc"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), "utf-8")
    options = ("--bundle", tiny_folder, "--num-images", 2, "--stage", "base", "--candidates", 1)
    out = tmp_path / "out"
    code, _, err = run("generate", "--prompts", tmp_path / "prompts.txt", "--out", out, *options)
    said = [line for line in err.splitlines() if line.startswith("cogview2: ")]
    assert code == 1 and len(said) == 3
    for line, number, words in zip(
        said,
        (4, 5, 6),
        ("text model: zebra", "has the id of line 3, cat", "got 3 fields"),
        strict=True,
    ):
        assert f"line {number}: " in line and words in line
    found = written(out)
    assert set(found) == {TEXT, "左边的绿色星形"}
    cv = cogview2_jax.load(tiny_folder)
    for prompt, (images, _) in found.items():
        expected = cv.generate(prompt, 2, key=jax.random.key(0), stage="base", candidates=1)
        np.testing.assert_array_equal(images, expected)
    names = sorted(file.name for file in out.glob("*.json"))
    assert [name.split("_")[0] for name in names] == ["1", "cat"]


def test_a_terminal_is_asked(run, tiny_folder, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(f"{TEXT}\na zebra\n\n"))
    options = ("--bundle", tiny_folder, "--num-images", 2, "--stage", "base", "--out", tmp_path)
    code, _, err = run("generate", *options)
    assert code == 0 and "text model: zebra" in err and list(written(tmp_path)) == [TEXT]


def test_styles(run, styled_folder, tmp_path):
    common = ("generate", TEXT, "--bundle", styled_folder, "--num-images", 2, "--stage", "base")
    assert run(*common, "--out", tmp_path / "default")[0] == 0
    assert run(*common, "--style", "none", "--out", tmp_path / "none")[0] == 0
    cv = cogview2_jax.load(styled_folder)
    for style in ("default", "none"):
        images, report = written(tmp_path / style)[TEXT]
        name = "left" if style == "default" else "none"
        expected = cv.generate(TEXT, 2, key=jax.random.key(0), stage="base", style=name)
        np.testing.assert_array_equal(images, expected)
        assert report.get("style", "none") == name
    for command in (common, ("edit", tmp_path / "p.png", TEXT, "--box", "0,0,1,1")):
        code, out, err = run(*command, "--bundle", styled_folder, "--style", "oil")
        assert (code, out) == (2, "") and "style must be one of none, left: got oil" in err
    # With the template it has 13 tokens, without 9.
    long = "a small green star on the left " * 2
    code, _, err = run("generate", long, "--bundle", styled_folder, "--out", tmp_path / "long")
    assert code == 2 and "at most 12 tokens" in err


def test_sampling_settings(run, styled_folder, tmp_path):
    """They are used in every style, written into the report, and checked."""
    common = ("generate", TEXT, "--bundle", styled_folder, "--num-images", 2, "--stage", "base")
    assert run(*common, "--temperature", 0, "--candidates", 1, "--out", tmp_path / "out")[0] == 0
    images, report = written(tmp_path / "out")[TEXT]
    np.testing.assert_array_equal(images[0], images[1])
    assert report["sampling"] == {"temperature": 0.0}
    for option, value in (("--temperature", -1), ("--text-upweight", "nan"), ("--top-clusters", 0)):
        code, out, err = run(*common, option, value, "--out", tmp_path / "refused")
        assert (code, out) == (2, "") and err.startswith("cogview2: ") and err.count("\n") == 1
    assert not (tmp_path / "refused").exists()


def test_no_prompt_and_two_kinds_of_prompts(run, tiny_folder, tmp_path):
    code, _, err = run("generate", "--bundle", tiny_folder)
    assert code == 2 and "give a prompt, or --prompts FILE" in err
    code, _, err = run("generate", TEXT, "--prompts", "prompts.txt", "--bundle", tiny_folder)
    assert code == 2 and "one of them" in err
    code, _, err = run("generate", "--prompts", tmp_path / "none.txt", "--bundle", tiny_folder)
    assert code == 2 and "none.txt" in err
    (tmp_path / "empty.txt").write_text(" \n\n")
    code, _, err = run("generate", "--prompts", tmp_path / "empty.txt", "--bundle", tiny_folder)
    assert code == 2 and "no line with a prompt" in err
