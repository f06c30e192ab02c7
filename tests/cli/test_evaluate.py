"""`cogview2 evaluate`: the whole way from pictures to a table, and mistakes in one line."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cogview2_jax.data.engine import Cluster, on_cluster
from cogview2_jax.data.prepare import prepare_pictures
from cogview2_jax.data.sources import PictureFolder
from cogview2_jax.evaluation import distances, features, report
from tests.data.conftest import CHINESE, SENTENCE, picture
from tests.evaluation.conftest import write_pictures
from tests.evaluation.feature_run import ENCODER
from tests.evaluation.inception_weights import published
from tests.processes import ROOT


@pytest.fixture
def small(monkeypatch):
    """A small encoder in place of the large one."""
    monkeypatch.setattr(features, "inception_encoder", lambda file, resize: ENCODER)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return write_pictures(folder / "drawn", 60, 1), write_pictures(folder / "real", 50, 2)


OPTIONS = ("--inception", "weights.pth", "--size", 16)


def test_two_folders_are_compared(run, small, pair, tmp_path):
    blurs = ("--blur", 2)  # and none, always
    code, out, err = run("evaluate", *pair, *OPTIONS, *blurs, "--out", tmp_path / "out")
    assert code == 0, err
    names = [line.split("\t")[0] for line in out.splitlines()]
    assert names == ["FID-0", "FID-2", "KID", "Inception Score", "precision", "recall"]
    made = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert made["measures"]["fid"].keys() == {"0", "2"} and made["settings"]["size"] == 16
    again = run("evaluate", *pair, *OPTIONS, *blurs, "--out", tmp_path / "out")
    assert (again[0], again[1]) == (0, out)


def test_statistics_in_a_file_stand_for_the_pictures(run, small, pair, tmp_path):
    file, made = tmp_path / "real.npz", tmp_path / "out"
    assert run("evaluate", pair[1], *OPTIONS, "--out", made, "--save-statistics", file)[0] == 0
    assert run("evaluate", *pair, *OPTIONS, "--out", tmp_path / "folders")[0] == 0
    blur = ("--blur", 4)
    code, out, err = run("evaluate", pair[0], file, *OPTIONS, *blur, "--out", tmp_path / "file")
    assert code == 0 and "no FID-4, KID, precision and recall" in err
    assert [line.split("\t")[0] for line in out.splitlines()] == ["FID-0", "Inception Score"]
    found = [
        json.loads((tmp_path / name / "evaluation.json").read_text())["measures"]["fid"]["0"]
        for name in ("folders", "file")
    ]
    assert found[0] == pytest.approx(found[1])


def test_a_corrupt_picture_is_left_out_and_the_exit_code_says_so(run, small, pair, tmp_path):
    drawn = shutil.copytree(pair[0], tmp_path / "drawn")
    (drawn / "00003.png").write_bytes(b"\x89PNG and no more")
    code, out, err = run("evaluate", drawn, pair[1], *OPTIONS, "--out", tmp_path / "out")
    assert code == 1 and out.startswith("FID-0")
    assert f"1 pictures were left out: see refused.jsonl in {tmp_path / 'out'}" in err


def test_the_caption_loss_of_a_captions_file(run, tiny_folder, tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(0))
    (tmp_path / "b.jpg").write_bytes(picture(1))
    lines = [{"image": "a.jpg", "caption": SENTENCE}, {"image": "b.jpg", "caption": CHINESE}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = "--caption-loss", "--bundle", tiny_folder, "--out", tmp_path / "out"
    code, out, err = run("evaluate", tmp_path / "captions.jsonl", *options)
    assert code == 0 and out.startswith("caption loss\t"), err
    code, _, err = run("evaluate", tmp_path, *options)
    assert code == 2 and "is a folder: --caption-loss needs its captions file" in err


def test_what_is_measured_is_shown_though_no_caption_can_be_scored(run, small, tiny_folder, pair):
    folder = pair[0].parent
    lines = [{"image": f"drawn/{n:05d}.png", "caption": "quux blah"} for n in range(20)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = (*OPTIONS, "--caption-loss", "--bundle", tiny_folder, "--out", folder / "out")
    code, out, err = run("evaluate", folder / "captions.jsonl", pair[1], *options)
    assert code == 2 and out.startswith("FID-0")
    assert "captions: all inputs were left out, for the reasons in refused.jsonl" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_cluster_measures_the_same(run, tiny_folder, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
    lines = [{"image": f"{number}.jpg", "caption": SENTENCE} for number in range(3)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir(tmp_path)  # relative paths mean the same in the cluster's processes
    options = "--caption-loss", "--bundle", tiny_folder, "--out"
    here = run("evaluate", "captions.jsonl", *options, "here")
    there = run(
        "evaluate", "captions.jsonl", *options, "there", "--engine", "ray", "--processes", 2
    )
    assert here[0] == there[0] == 0, there[2]
    assert here[1] == there[1]
    with pytest.raises(ValueError, match="was begun with"):
        # What a process of the cluster finds wrong is raised here as it is.
        call = functools.partial(prepare_pictures, PictureFolder(tmp_path), Path("there/captions"))
        on_cluster(call, Cluster(processes=1))


MISTAKES = {
    "nothing to measure": ((), "give --inception FILE, --caption-loss, or both"),
    "no such weights": (("--inception", "nowhere.pth"), "nowhere.pth: No such file"),
    "a reference for captions": (("--caption-loss", "real"), "need --inception FILE"),
    "statistics of another ending": (
        ("--inception", "w.pth", "--save-statistics", "a.txt"),
        "must end in .npz: got a.txt",
    ),
    "damaged statistics": (("damaged.npz", "--inception", "w.pth"), "damaged.npz"),
    "no such reference": (("nowhere", "--inception", "w.pth"), "'nowhere' is neither"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, run, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.npz").write_bytes(b"PK and no more")
    arguments, message = MISTAKES[mistake]
    code, out, err = run("evaluate", pair[0], *arguments, "--out", tmp_path / "out")
    assert code == 2 and message in err and not out and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_way_with_weights_of_the_published_size(run, pair, tmp_path):
    weights = tmp_path / "inception.safetensors"
    save_file(published(), weights)
    options = "--inception", weights, "--count", 12, "--batch-size", 6, "--out", tmp_path / "out"
    code, out, err = run("evaluate", *pair, *options)
    assert code == 0 and "FID is biased upwards" in err
    own, other = (
        distances.statistics(features.read_features(tmp_path / "out" / name))
        for name in ("pictures", "reference")
    )
    assert own.mean.shape == (2048,) and np.isfinite(own.mean).all()
    assert other.num_pictures == 12 and out.startswith("FID-0\t")
    assert report.statistics_of(tmp_path / "out" / "pictures").num_pictures == 12
