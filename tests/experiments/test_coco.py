"""The MS-COCO protocol on a small data set in the exact layout of tfds' coco_captions."""

import json

import pytest
from click.testing import CliRunner

from cogview2_jax.data import sources
from experiments.coco import fake, run
from experiments.fine_tune.run import cogview2

VALIDATION = "val+test+restval"


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    fake.write(folder, 160, 12)
    return folder


def evaluate(coco, out, *more):
    arguments = ["--data-dir", coco, "--judge", "--stage", "base"]
    arguments += ["--batch-size", 8, "--out", out, "--json", out / "table.json", *more]
    done = CliRunner().invoke(run.main, [str(word) for word in arguments])
    assert done.exit_code == 0, done.output
    return done.output, json.loads((out / "table.json").read_text())["measures"]


def test_it_is_read_as_the_real_one(coco):
    source = sources.Tfds("coco_captions", VALIDATION, coco, ("captions/text",))
    assert len(source) == 36 and source[0].name.startswith("coco_captions/2014/1.1.0/")
    assert len(source[0].captions) == 5 and source[0].captions[0]["captions/text"].startswith("a ")
    information = json.loads(next(coco.rglob("dataset_info.json")).read_text())
    assert [split["name"] for split in information["splits"]] == list(fake.SPLITS)
    features = json.loads(next(coco.rglob("features.json")).read_text())["featuresDict"]["features"]
    assert set(features) == {"image", "image/filename", "image/id", "objects", "captions"}


@pytest.mark.slow
def test_one_command_goes_from_a_bundle_to_a_table(coco, tmp_path):
    said, measures = evaluate(coco, tmp_path, "--num-pictures", 12)
    assert set(measures["fid"]) == {"0", "1", "2", "4", "8"} and measures["fid"]["0"] > 0
    assert measures["caption_loss"]["mean"] > 0 and "FID-8" in said
    drawn = sorted((tmp_path / "drawn").glob("*.array_record"))
    before = {file: file.stat().st_mtime_ns for file in drawn}
    assert evaluate(coco, tmp_path, "--num-pictures", 12)[1] == measures
    assert {file: file.stat().st_mtime_ns for file in drawn} == before
    words = ["--data-dir", str(coco), "--out", str(tmp_path / "none")]
    for more in ([], ["--split", "validation", "--judge"]):
        failed = CliRunner().invoke(run.main, words + more)
        assert failed.exit_code and "Traceback" not in failed.output
    assert not (tmp_path / "none").exists()


@pytest.mark.long
@pytest.mark.multiprocess
def test_fine_tuning_lowers_fid(coco, tmp_path):
    cogview2(
        f"data prepare coco_captions --data-dir {coco} --caption-field captions/text --out records",
        tmp_path,
    )
    cogview2("train coglm records --steps 30 --batch-size 16 --out run", tmp_path)
    before = evaluate(coco, tmp_path / "before")[1]
    after = evaluate(coco, tmp_path / "after", "--bundle", tmp_path / "run" / "model")[1]
    assert after["fid"]["0"] < 0.8 * before["fid"]["0"]
