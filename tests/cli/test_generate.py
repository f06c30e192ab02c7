"""generate: prompts from a file or a terminal, styles and sampling settings."""

import fcntl
import io
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from PIL import Image

import cogview2_jax
from tests.processes import Started, ending

TEXT = "a small green star"
COLOURS = ("red", "green", "blue", "yellow")


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


def test_lines_that_are_done_are_left_as_they_are(run, tiny_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{TEXT}\na red circle\n")
    options = ("--bundle", tiny_folder, "--num-images", 1, "--stage", "base", "--candidates", 1)
    command = ("generate", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out")
    assert run(*command, *options)[0] == 0

    def times():
        return {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}

    before = times()
    code, out, err = run(*command, *options)
    assert (code, out) == (0, "") and "2 lines were done before" in err and times() == before
    picture = next((tmp_path / "out").glob("2_*_0.png"))
    picture.unlink()
    assert run(*command, *options)[0] == 0
    after = times()
    assert set(after) == set(before)
    assert {name[0] for name in after if after[name] != before[name]} == {"2"}
    code, _, err = run(*command, *options, "--seed", 1, "--num-images", 2)
    assert code == 0 and "done before" not in err  # other files


def test_a_line_of_another_run_is_waited_for(run, tiny_folder, tmp_path):
    """It may end without having done it."""
    (tmp_path / "prompts.txt").write_text(f"{TEXT}\na red circle\n")
    out = tmp_path / "out"
    out.mkdir()
    other = (out / ".prompts.txt.line1.lock").open("wb")
    fcntl.flock(other, fcntl.LOCK_EX)

    def end_when_the_second_line_is_there():
        while not list(out.glob("2_*.json")):
            time.sleep(0.01)
        assert not list(out.glob("1_*"))
        other.close()

    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(end_when_the_second_line_is_there)
        options = ("--bundle", tiny_folder, "--num-images", 1, "--stage", "base")
        code, _, err = run(
            "generate", "--prompts", tmp_path / "prompts.txt", "--out", out, *options
        )
        ended.result()
    assert code == 0 and set(written(out)) == {TEXT, "a red circle"}
    assert not list(out.glob(".*"))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_runs_share_the_lines(tiny_folder, tmp_path):
    """Three runs of one command, one of them killed, draw what one run draws."""
    lines = [f"a {colour} {shape}" for colour in COLOURS for shape in ("star", "circle")]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    options = ["--bundle", tiny_folder, "--num-images", 1, "--candidates", 1, "--out"]
    command = ["-m", "cogview2_jax.cli", "generate", "--prompts", tmp_path / "prompts.txt"]

    def start(name, out):
        return Started([*command, *options, tmp_path / out], tmp_path / name, tmp_path / "cache")

    with ending([start("one", "alone")]) as (one,):
        assert one.finish() == 0, one.err()
    with ending([start(f"run{n}", "shared") for n in range(3)]) as runs:
        runs[0].wait_until(lambda: list((tmp_path / "shared").glob("*.json")))
        runs[0].kill()
        for other in runs[1:]:
            assert other.finish() == 0, other.err()
    alone, shared = (
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("*.png")}
        for name in ("alone", "shared")
    )
    assert len(alone) == 2 * len(lines) and shared == alone


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.long
def test_several_devices_draw_what_one_draws(tiny_folder, tmp_path):
    command = ["-m", "cogview2_jax.cli", "generate", TEXT, "--bundle", tiny_folder]
    command += ["--num-images", 3, "--candidates", 2, "--out"]
    choices = {"one": [], "many": ["--devices", 4, "--data", 2]}
    for name, options in choices.items():
        run = Started(
            [*command, tmp_path / name, *options], tmp_path / f"{name}.log", tmp_path, devices=4
        )
        with ending([run]):
            assert run.finish() == 0, run.err()
    (one, _), (many, report) = (written(tmp_path / name)[TEXT] for name in choices)
    assert report["mesh"] == {"data": 2, "tensor": 2}
    # Equal tokens; the decoder's sums may round a pixel to the next level.
    assert len(many) == 3 and np.abs(one.astype(int) - many).max() <= 1


def test_devices_that_are_not_there(run, tiny_folder, tmp_path):
    common = ("generate", TEXT, "--bundle", tiny_folder, "--out", tmp_path / "out")
    for options, words in (
        (("--devices", 9999), "--devices 9999: there is"),
        (("--devices", 3, "--data", 2), "must be a multiple of --data 2: got 3"),
        (("--devices", 2, "--memory", "16GB"), "leave out --devices"),
    ):
        code, out, err = run(*common, *options)
        assert (code, out) == (2, "") and words in err
    assert not (tmp_path / "out").exists()


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
        assert (report["style"] or "none") == name
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
    # Without the option it is another command, which leaves these pictures as they are.
    code, _, err = run(*common, "--candidates", 1, "--out", tmp_path / "out")
    assert code == 2 and "was made with other settings (sampling " in err
    for option, value in (("--temperature", -1), ("--text-upweight", "nan"), ("--top-clusters", 0)):
        code, out, err = run(*common, option, value, "--out", tmp_path / "refused")
        assert (code, out) == (2, "") and err.startswith("cogview2: ") and err.count("\n") == 1
    assert not (tmp_path / "refused").exists()


def test_lines_that_were_drawn_with_other_settings_are_not_done(run, styled_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{TEXT}\n")
    common = ("generate", "--prompts", tmp_path / "prompts.txt", "--bundle", styled_folder)
    common += ("--num-images", 1, "--stage", "base", "--out", tmp_path / "out")
    assert run(*common, "--style", "left")[0] == 0
    for more in (("--style", "left"), ()):  # the default style
        code, _, err = run(*common, *more)
        assert code == 0 and "done before" in err
    code, _, err = run(*common, "--style", "none")
    assert code != 0 and "was made with other settings" in err


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
