"""`cogview2 plan`, and `generate --memory`, which follows it."""

import json

import numpy as np
import pytest
from PIL import Image

from cogview2_jax.pipeline import memory


def test_the_plan_names_what_fits(run, tiny_folder):
    code, out, err = run("plan", "--memory", "1GB", "--batch", 2, "--bundle", tiny_folder)
    assert code == 0, err
    head, *rows, chosen = out.splitlines()
    assert head.split()[:2] == ["dtype", "pictures"]
    assert rows[0].split()[:2] == ["bfloat16", "2"]
    assert chosen.startswith("bfloat16, 2 pictures at once, all networks:")


def test_nothing_fits_into_nothing(run, tiny_folder):
    options = "--batch", 1, "--dtype", "int8", "--bundle", tiny_folder
    code, out, err = run("plan", "--memory", "1KB", *options)
    assert code == 1 and "nothing fits into 1,000 bytes" in err and "int8" in out


def test_generate_follows_the_plan(run, tiny_folder, tmp_path):
    options = "--num-images", 1, "--stage", "base", "--bundle", tiny_folder
    code, _, err = run("generate", "a star", "--memory", "64MiB", *options, "--out", tmp_path / "a")
    assert code == 0 and "--memory 64.00 MiB: bfloat16, 1 pictures at once" in err
    (report,) = (tmp_path / "a").glob("*.json")
    made = json.loads(report.read_text())
    assert made["dtype"] == "bfloat16" and made["memory"] == {"in_turn": False, "at_once": 1}
    code, _, err = run("generate", "a star", "--memory", "9KB", *options, "--out", tmp_path / "b")
    assert code == 2 and "1 pictures at once take at least" in err
    assert not (tmp_path / "b").exists()


def test_only_what_runs_is_planned(run, tiny_folder, tmp_path, monkeypatch):
    asked = []

    def usage(description, stage, batch, precision):
        asked.append((stage, description.sampling.guidance))
        return memory.Usage(1, 10**9 if stage == "direct" else 1000)

    monkeypatch.setattr(memory, "usage", usage)
    options = "--memory", "1MB", "--guidance", 2, "--num-images", 1, "--bundle", tiny_folder
    code, _, err = run("generate", "a star", "--stage", "base", *options, "--out", tmp_path / "a")
    assert code == 0, err
    assert {stage for stage, _ in asked} == {"base", "score", "pixels"}
    assert {guidance for _, guidance in asked} == {2}
    code, _, err = run("generate", "a star", "--stage", "direct", *options, "--out", tmp_path / "b")
    assert code == 2 and "direct" in err


def test_pictures_that_do_not_fit_together_are_drawn_in_batches(
    run, tiny_folder, tmp_path, monkeypatch
):
    """And are those that are drawn together; the rest is not lost."""
    monkeypatch.setattr(
        memory, "usage", lambda description, stage, batch, precision: memory.Usage(1, batch * 1000)
    )
    options = "--num-images", 5, "--candidates", 2, "--dtype", "float32", "--bundle", tiny_folder
    stage = "--stage", "direct"
    assert run("generate", "a star", *options, *stage, "--out", tmp_path / "all")[0] == 0
    limit = "--memory", "2500B"
    code, _, err = run("generate", "a star", *limit, *options, *stage, "--out", tmp_path / "few")
    assert code == 0 and "float32, 2 pictures at once" in err
    names = sorted(file.name for file in (tmp_path / "all").glob("*.png"))
    assert len(names) == 6  # and the grid
    for name in names:
        few, all_ = (
            np.asarray(Image.open(tmp_path / out / name)).astype(int) for out in ("few", "all")
        )
        # The batch sizes differ, and a value halfway between two may be rounded to either.
        assert np.abs(few - all_).max() <= 1


@pytest.mark.parametrize("size", ["", "0", "16XB", "-1GB", "GB", "1e3"])
def test_a_size_that_is_none_is_refused(size, run, tiny_folder):
    code, _, err = run("plan", f"--memory={size}", "--bundle", tiny_folder)
    assert code == 2 and "must be a size such as 16GB or 24GiB" in err
