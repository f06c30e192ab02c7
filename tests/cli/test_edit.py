"""edit and rank: what they write, and what of a file of edits is done."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import cogview2_jax
from cogview2_jax.cli import edits
from cogview2_jax.pipeline import patch_completion

TEXT, OTHER = "a small green star", "左边的绿色星形"


@pytest.fixture
def wide(tmp_path):
    """A picture of 60 × 200 pixels, and a mask of its right part."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 200, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    mask = Image.new("L", (200, 60))
    mask.paste(255, (150, 0, 200, 60))
    mask.save(tmp_path / "mask.png")
    return tmp_path / "wide.png"


def pictures(folder):
    return {file.name: np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))}


def test_a_box_and_a_mask_as_in_python(run, tiny_folder, wide, tmp_path):
    options = ("--bundle", tiny_folder, "--num-images", 2, "--seed", 4)
    cv = cogview2_jax.load(tiny_folder)
    for part, said in (
        ({"box": (0, 0.75, 1, 1)}, ("--box", "0,0.75,1,1")),
        ({"mask": wide.with_name("mask.png")}, ("--mask", wide.with_name("mask.png"))),
    ):
        out = tmp_path / said[0][2:]
        code, printed, _ = run("edit", wide, TEXT, *said, "--out", out, *options)
        assert code == 0
        assert sorted(printed.split()) == sorted(str(file) for file in out.iterdir())
        made = np.stack(list(pictures(out).values()))
        expected = cv.edit(TEXT, wide, **part, num_images=2, key=jax.random.key(4))
        np.testing.assert_array_equal(made, expected)
        (report_file,) = out.glob("*.json")
        report = json.loads(report_file.read_text("utf-8"))
        assert report["pictures"] == list(pictures(out))
        assert (report["text"], report["seed"], report["stage"]) == (TEXT, 4, "full")
        assert ("mask_sha256" in report) == ("mask" in part) and ("box" in report) == (
            "box" in part
        )


def test_a_file_of_edits(run, tiny_folder, wide, tmp_path):
    """Bad lines are named by their number; the others are done as in Python."""
    lines = [
        f"{TEXT}\t{wide}\t0\t0.5\t1\t1",
        f"cat\t{OTHER}\t{wide}\t0\t0\t1\t0.5\r",
        "",
        f"{TEXT}\t{wide}\t0\t0.5\t1",  # 3 edges
        f"{TEXT}\t{wide}\t0\tx\t1\t1",
        f"{TEXT}\t{tmp_path / 'gone.png'}\t0\t0\t1\t1",
        f"{TEXT}\t{wide}\t1\t0\t0\t1",
        f"{TEXT}\t{wide}\t0.5\t0\t0.51\t1",
        f"a zebra\t{wide}\t0\t0\t1\t1",
        f"cat\t{TEXT}\t{wide}\t0\t0\t1\t0.5",
        f"\t{TEXT}\t{wide}\t0\t0\t1\t0.5",
        f"{TEXT}\t{wide}\tnan\t0\t1\t0.5",
        f"last\t{TEXT}\t{wide}\t0\t0\t1\t0.5",
    ]
    file, out = tmp_path / "edits.tsv", tmp_path / "out"
    file.write_bytes("\n".join(lines).encode("utf-8-sig") + b"\n\xff\xfe\t\n")
    options = ("--bundle", tiny_folder, "--num-images", 2, "--out", out)
    code, printed, err = run("edit", "--lines", file, *options)
    assert code == 1
    said = dict(
        line.removeprefix(f"cogview2: {file}: line ").split(": ", 1) for line in err.splitlines()
    )
    for number, words in (
        ("4", "got 5 fields"),
        ("5", "must be numbers: got 0, x, 1, 1"),
        ("6", "gone.png: no such file"),
        ("7", "box must be (top, left, bottom, right)"),
        ("8", "box must be at least a pixel"),
        ("9", "outside the text model: zebra"),
        ("10", "has the id of line 2, cat"),
        ("11", "must name its id"),
        ("12", "box must be"),
        ("14", "must be UTF-8"),
    ):
        assert words in said.pop(number)
    assert not said and len(printed.split()) == 9
    reports = [json.loads(report.read_text("utf-8")) for report in out.glob("*.json")]
    assert {(report["line"], report["id"]) for report in reports} == {
        (1, "1"),
        (2, "cat"),
        (13, "last"),
    }
    # The box is one of the square in the middle.
    mask = patch_completion.square_box_mask((0, 0.5, 1, 1), 60, 200)
    cv = cogview2_jax.load(tiny_folder)
    expected = cv.edit(TEXT, wide, mask=mask, num_images=2, key=jax.random.key(0))
    (first,) = (report for report in reports if report["line"] == 1)
    made = np.stack([pictures(out)[name] for name in first["pictures"]])
    np.testing.assert_array_equal(made, expected)


def test_good_lines_alone_end_well(run, tiny_folder, wide, tmp_path):
    file = tmp_path / "edits.tsv"
    options = ("--bundle", tiny_folder, "--num-images", 2, "--out", tmp_path / "out")
    file.write_text(f"{TEXT}\t{wide}\t0\t0.5\t1\t1\n")
    code, _, err = run("edit", "--lines", file, *options)
    assert (code, err) == (0, "")
    file.write_text("\n \r\n")
    code, _, err = run("edit", "--lines", file, *options)
    assert code == 2 and "no line with an edit" in err and err.count("\n") == 1
    file.write_text("nothing\n")
    code, _, err = run("edit", "--lines", file, *options)
    assert code == 1 and "line 1: must have" in err and err.count("\n") == 1


@pytest.mark.parametrize("line", ["a\tb\t0\t0\t1\t1", "7\ta\tb\t0\t0\t1\t1"])
def test_a_line_with_and_without_an_id(line):
    request = edits.parse_line(line.encode(), 3)
    assert (request.text, str(request.picture), request.box) == ("a", "b", (0, 0, 1, 1))
    assert (request.line, request.name) == (3, "7" if line[0] == "7" else "3")


BAD = {
    "nothing": ([], "give PICTURE and TEXT, or --lines"),
    "no text": (["WIDE", "--box", "0,0,1,1"], "give PICTURE and TEXT"),
    "no part": (["WIDE", TEXT], "give --box or --mask"),
    "two parts": (["WIDE", TEXT, "--box", "0,0,1,1", "--mask", "MASK"], "one of them"),
    "lines and a picture": (["WIDE", "--lines", "MASK"], "give nothing else"),
    "no lines": (["--lines", "NOWHERE"], "No such file"),
    "three edges": (["WIDE", TEXT, "--box", "0,0,1"], "four numbers, Y0,X0,Y1,X1: got 0,0,1"),
    "no number": (["WIDE", TEXT, "--box", "0,0,1,x"], "four numbers"),
    "off the picture": (["WIDE", TEXT, "--box", "0,0,1,1.5"], "box must be (top, left"),
    "thin": (["WIDE", TEXT, "--box", "0.02,0,0.05,1"], "pixels high and wide"),
    "no picture": (["NOWHERE", TEXT, "--box", "0,0,1,1"], "no such file"),
    "no mask": (["WIDE", TEXT, "--mask", "NOWHERE"], "no such file"),
    "a mask of another size": (["WIDE", TEXT, "--mask", "SMALL"], "60 × 200 pixels: got 10 × 10"),
    "long text": (["WIDE", "a star " * 20, "--box", "0,0,1,1"], "at most 11 tokens: got 40"),
    "unknown word": (["WIDE", "a zebra", "--box", "0,0,1,1"], "text model: zebra"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_end_in_one_line(name, run, tiny_folder, wide, tmp_path):
    arguments, said = BAD[name]
    Image.new("L", (10, 10), 255).save(tmp_path / "small.png")
    places = {"WIDE": wide, "MASK": wide.with_name("mask.png"), "NOWHERE": tmp_path / "gone.png"}
    places["SMALL"] = tmp_path / "small.png"
    out = tmp_path / "out"
    command = [places.get(argument, argument) for argument in arguments]
    code, printed, err = run("edit", *command, "--bundle", tiny_folder, "--out", out)
    assert (code, printed) == (2, "")
    assert said in err and err.startswith("cogview2: ") and err.count("\n") == 1
    assert not out.exists()


def test_rank_sorts_pictures_and_names_those_that_it_cannot_use(run, tiny_folder, wide, tmp_path):
    plain, gone = tmp_path / "plain.png", tmp_path / "gone.png"
    Image.new("RGB", (96, 96), "red").save(plain)
    code, out, err = run("rank", TEXT, plain, gone, wide, "--bundle", tiny_folder)
    assert code == 1 and err == f"cogview2: {gone}: no such file\n"
    cv = cogview2_jax.load(tiny_folder)
    scores = cv.scores([TEXT], [plain, wide])[0].tolist()
    expected = sorted(zip(scores, (plain, wide), strict=True), key=lambda pair: -pair[0])
    assert out == "".join(f"{score:.4f}\t{file}\n" for score, file in expected)
    code, out, err = run("rank", TEXT, plain, "--bundle", tiny_folder)
    assert (code, err) == (0, "") and out.count("\n") == 1
    code, out, err = run("rank", TEXT, gone, "--bundle", tiny_folder)
    assert (code, out) == (1, "")
    code, _, err = run("rank", "a zebra", plain, "--bundle", tiny_folder)
    assert code == 2 and "zebra" in err


def test_rank_of_several_texts_is_a_matrix(run, tiny_folder, wide, tmp_path):
    plain, report = tmp_path / "plain.png", tmp_path / "scores" / "s.json"
    Image.new("RGB", (96, 96), "red").save(plain)
    options = ("--bundle", tiny_folder, "--json", report)
    code, out, _ = run("rank", TEXT, plain, wide, "--text", OTHER, *options)
    assert code == 0
    scores = cogview2_jax.load(tiny_folder).scores([TEXT, OTHER], [plain, wide])
    rows = [[f"{score:.4f}" for score in scores[:, i]] for i in (0, 1)]
    expected = [[TEXT, OTHER, "picture"], [*rows[0], str(plain)], [*rows[1], str(wide)]]
    assert out == "".join("\t".join(row) + "\n" for row in expected)
    written = json.loads(report.read_text("utf-8"))
    assert written["texts"] == [TEXT, OTHER] and written["scores"] == scores.tolist()
    code, _, err = run("rank", TEXT, plain, *options)
    assert code == 2 and "was made with other settings" in err
