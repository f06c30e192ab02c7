"""Features of many pictures on disk: the same however they were made, and nothing lost."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageFilter

from cogview2_jax.evaluation import distances, features, report
from cogview2_jax.evaluation.features import LOGITS, read_features
from cogview2_jax.tokenizer.pictures import fit_picture
from tests.evaluation.conftest import write_pictures
from tests.evaluation.feature_run import CLASSES, ENCODER, WIDTH, run
from tests.processes import Started


def whole(folder, blur=0):
    return np.concatenate(list(read_features(folder, blur)))


def test_features_are_those_of_each_picture_in_order(some, tmp_path):
    assert run(some, tmp_path).records == 250
    files = sorted(some.iterdir())
    for blur in (0, 1):
        shown = [Image.open(file).filter(ImageFilter.GaussianBlur(blur)) for file in files[:8]]
        expected, logits = ENCODER.apply(np.stack([np.asarray(each) for each in shown]))
        np.testing.assert_allclose(whole(tmp_path, blur)[:8], expected, atol=1e-6)
        if blur == 0:
            np.testing.assert_allclose(whole(tmp_path, LOGITS)[:8], logits, atol=1e-6)
    assert whole(tmp_path).shape == (250, WIDTH) and whole(tmp_path, LOGITS).shape == (250, CLASSES)
    with pytest.raises(ValueError, match="blurs 0.0, logits, 1.0: got 2"):
        list(read_features(tmp_path, 2))


def test_pictures_are_resized_before_they_are_blurred(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", 9, side=40)
    run(pictures, tmp_path / "out")
    first = fit_picture(pictures / "00000.png", 16, 16)
    sharp, _ = ENCODER.apply(np.stack([first] * 8))
    soft, _ = ENCODER.apply(np.stack([features.blurred(first, 1)] * 8))
    np.testing.assert_allclose(whole(tmp_path / "out")[0], sharp[0], atol=1e-6)
    np.testing.assert_allclose(whole(tmp_path / "out", 1)[0], soft[0], atol=1e-6)


def test_threads_and_processes_change_nothing(some, tmp_path):
    run(some, tmp_path / "one", workers=1)
    run(some, tmp_path / "many", workers=7)
    np.testing.assert_array_equal(whole(tmp_path / "one"), whole(tmp_path / "many"))


def test_a_folder_of_other_settings_is_refused(some, tmp_path):
    run(some, tmp_path)
    for change in ({"size": 8}, {"blurs": (0,)}):
        with pytest.raises(ValueError, match="was begun with settings"):
            run(some, tmp_path, **change)


def test_a_corrupt_picture_is_left_out_and_listed(some, tmp_path):
    pictures = shutil.copytree(some, tmp_path / "pictures")
    (pictures / "00100.png").write_bytes((pictures / "00100.png").read_bytes()[:200])
    (pictures / "00007.png").write_text("no picture")
    made = run(pictures, tmp_path / "out")
    assert (made.records, made.refused) == (248, {"unreadable image": 2})
    lines = (tmp_path / "out" / "refused.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert [each["name"] for each in listed] == ["00007.png", "00100.png"]
    run(some, tmp_path / "intact")
    kept = np.delete(whole(tmp_path / "intact"), [7, 100], axis=0)
    np.testing.assert_allclose(whole(tmp_path / "out"), kept, atol=1e-6)


def test_an_encoder_that_overflows_is_refused(some, tmp_path):
    broken = ENCODER._replace(
        apply=lambda pictures: (np.full((len(pictures), WIDTH), np.nan), None)
    )
    with pytest.raises(ValueError, match="features of small are not finite"):
        features.write_features(
            features_source(some), tmp_path, broken._replace(num_classes=0), size=16
        )
    assert not list(tmp_path.glob("records-*.array_record"))


def features_source(folder):
    from cogview2_jax.data.sources import PictureFolder

    return PictureFolder(folder)


def test_a_folder_that_is_not_complete_or_damaged_is_refused(some, tmp_path):
    run(some, tmp_path)
    shard = next(tmp_path.glob("records-00001*.array_record"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is damaged: delete it"):
        whole(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match="2 of 3 shards"):
        whole(tmp_path)
    run(some, tmp_path)
    assert shard.read_bytes() == content


def test_measures_of_two_folders(some, tmp_path):
    other = write_pictures(tmp_path / "pictures", 230, seed=1)
    run(some, tmp_path / "a")
    run(other, tmp_path / "b")
    notes: list[str] = []
    made = report.measure(tmp_path / "a", tmp_path / "b", note=notes.append)
    pair = [distances.statistics([whole(tmp_path / name)]) for name in "ab"]
    assert made["fid"]["0"] == pytest.approx(distances.frechet_distance(*pair))
    assert made["fid"].keys() == {"0", "1"} and made["fid"]["1"] != made["fid"]["0"]
    assert made["inception_score"]["mean"] >= 1 and 0 < made["precision"] <= 1 and not notes
    distances.save_statistics(tmp_path / "b.npz", pair[1])
    by_file = report.measure(tmp_path / "a", tmp_path / "b.npz")
    assert by_file["fid"] == pytest.approx({"0": made["fid"]["0"]}) and "kid" not in by_file
    lines = report.table(made).splitlines()
    assert [line.split("\t")[0] for line in lines] == [
        *("FID-0", "FID-1", "KID", "Inception Score", "precision", "recall")
    ]
    run(other, tmp_path / "c", size=8)
    with pytest.raises(ValueError, match="features with size 8, not 16: measure both"):
        report.measure(tmp_path / "a", tmp_path / "c")


def test_too_few_pictures_are_said_to_be_too_few(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        run(write_pictures(tmp_path / f"pictures {name}", 9, seed), tmp_path / name)
    notes: list[str] = []
    made = report.measure(tmp_path / "a", tmp_path / "b", note=notes.append)
    assert made.keys() == {"fid"}
    assert [note.split(":")[0] for note in notes] == [
        "no Inception Score",
        *["FID is biased upwards"] * 2,
        "no KID, precision and recall",
    ]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_ten_thousand_pictures_with_kills_and_two_processes(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", 10_000)
    broken = pictures / "05000.png"
    broken.write_bytes(broken.read_bytes()[:99])
    module = "tests.evaluation.feature_run"

    def start(name, shown, out):
        command = ("-m", module, shown, tmp_path / out)
        return Started(command, tmp_path / "logs" / name, tmp_path / "cache")

    few = tmp_path / "few"
    few.mkdir()
    for file in sorted(pictures.iterdir())[:500]:
        shutil.copy(file, few)
    small = start("few", few, "of_few")
    assert small.finish() == 0, small.err()
    alone = start("alone", pictures, "alone")
    assert alone.finish() == 0, alone.err()
    records, refused, complete, peak = alone.out().split()
    assert (records, refused, complete) == ("9999", "1", "True")
    # Twenty times the pictures: their pixels alone would be 8 MB, their files' names little.
    assert int(peak) < int(small.out().split()[3]) + 100

    for kill in range(2):
        killed = start(f"killed {kill}", pictures, "shared")
        most = (kill + 1) * 10
        killed.wait_until(
            lambda most=most: len(list((tmp_path / "shared").glob("records-*.json"))) >= most
        )
        killed.kill()
    both = [start(f"both {number}", pictures, "shared") for number in range(2)]
    for each in both:
        assert each.finish() == 0, each.err()
    np.testing.assert_array_equal(whole(tmp_path / "shared"), whole(tmp_path / "alone"))
    assert (tmp_path / "shared" / "refused.jsonl").read_bytes() == (
        tmp_path / "alone" / "refused.jsonl"
    ).read_bytes()
