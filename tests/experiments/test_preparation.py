"""The cost of preparing: photographs, the plan, and the command at a small size."""

import io
import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from experiments.preparation import run, trials


def test_a_photograph_has_the_size_and_about_the_bytes_of_one():
    content = run.photograph(np.random.default_rng(0))
    assert Image.open(io.BytesIO(content)).size == run.SIZE
    assert 20_000 < len(content) < 300_000


def test_the_plan_names_what_limits():
    measured = {"open": 200.0, "fit": 200.0, "bytes_of_a_picture": 1e5}
    slow = run.plan(measured, 50.0, 30_000_000, 2048, 2e9)
    assert slow[0]["limit"] == "encode" and slow[0]["pictures_a_second"] == 400
    assert slow[0]["days"] == pytest.approx(0.87, abs=0.01) and slow[-1]["limit"] == "store"
    fast = run.plan(measured, 500.0, 30_000_000, 2048, 2e9)
    assert fast[0]["limit"] == "open and fit" and fast[0]["pictures_a_second"] == 800
    assert fast[0]["records_gb"] == 61.4 and fast[0]["read_tb"] == 3.0


@pytest.mark.slow
@pytest.mark.multiprocess
def test_twenty_thousand_inputs_and_two_deaths(tiny_folder, tmp_path):
    pytest.importorskip("ray")
    found = trials.killed_and_starved(tmp_path, 20_000, None, "--bundle", tiny_folder)
    assert found["same_bytes"] and found["deaths"] == ["killed", "out of memory"], found
    assert found["inputs"] == 20_000 and found["records"] == 20_000 - found["damaged"]
    assert found["listed"] == found["damaged"] == 606 and found["listed_once"]


@pytest.mark.long
@pytest.mark.multiprocess
def test_the_command(tmp_path):
    pytest.importorskip("ray")
    file = tmp_path / "results.json"
    arguments = ["--pictures", "32", "--more", "64", "--processes", "1", "--inputs", "660"]
    arguments += ["--prompts", "64", "--stage", "base", "--json", str(file)]
    done = CliRunner().invoke(run.main, arguments)
    assert done.exit_code == 0, done.output
    made = json.loads(file.read_text())["parts"]
    assert len(made["whole"]) == 4 and all(one["peak_mb"] > 50 for one in made["whole"].values())
    assert made["kills"]["same_bytes"] and made["kills"]["listed"] == made["kills"]["damaged"] == 20
    assert made["draw"]["same_bytes"] and made["draw"]["prompts"] == 64
