"""The measurement of conversion, small."""

import json

from click.testing import CliRunner

from cogview2_jax.published import convert
from experiments.convert_speed import run
from experiments.convert_speed.run import write_checkpoint


def test_the_synthetic_checkpoint_is_converted(tmp_path):
    (tmp_path / "files").mkdir()
    file = write_checkpoint(tmp_path / "files", 10_000_000, 64, 2)
    assert 0.9 < file.stat().st_size / 10_000_000 < 1.1
    made = convert.convert(tmp_path / "files", tmp_path / "model", networks=["coglm"])
    assert made.parameters["coglm"] * 2 < file.stat().st_size


def test_the_table_has_a_copy_and_every_dtype(tmp_path, monkeypatch):
    ran = []

    def timed(what, command, repeats, target):
        ran.append((what, command, repeats))
        return run.Timing(what, 2.0 + len(ran), 100.0)

    monkeypatch.setattr(run, "timed", timed)
    options = ["--gigabytes", "0.005", "--width", "64", "--heads", "2", "--repeats", "2"]
    result = CliRunner().invoke(run.main, [*options, "--json", str(tmp_path / "made.json")])
    assert result.exit_code == 0, result.output
    names = [each["what"] for each in json.loads((tmp_path / "made.json").read_text())]
    assert names == ["copy", "float16", "bfloat16", "float32"]
    assert "2.00" in result.output  # the last took 6 s, a copy 3
    assert all(repeats == 2 for *_, repeats in ran)


def test_a_failure_is_told(tmp_path):
    target = tmp_path / "made"
    made = run.timed("touch", ["touch", str(target)], 2, target)
    assert made.seconds < 5 and not target.exists()
    result = CliRunner().invoke(run.main, ["--gigabytes", "0"])
    assert result.exit_code == 2
