"""Preparing: which inputs are kept or refused, and that records depend on nothing else."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogview2_jax.data import manifest as manifests
from cogview2_jax.data import prepare, reading, shards, sources
from cogview2_jax.data.records import RecordLayout, english_texts, text_part
from cogview2_jax.tokenizer import text
from cogview2_jax.tokenizer.image import to_tokens
from cogview2_jax.tokenizer.pictures import fit_picture

from .conftest import CHINESE, DAMAGE, SENTENCE, picture, write_inputs

SIZES = (32, 96)


@pytest.fixture(scope="module")
def make(tiny):
    """Prepare token records with the tiny model."""

    def call(source, folder, layout=None, **options):
        layout = layout or RecordLayout.of(tiny.coglm_config)
        options = {"batch_size": 8, "shard_size": 16} | options
        parts = (tiny.text_model, tiny.tokenizer, tiny.tokenizer_config)
        return prepare.prepare_tokens(source, folder, layout, *parts, **options)

    return call


@pytest.fixture(scope="module")
def made(make, captions_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "records"
    return folder, make(sources.CaptionsFile(captions_file), folder)


def contents(folder: Path) -> list[bytes]:
    records = reading.Records(folder)
    return [records[i] for i in range(len(records))]


def refusals(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "refused.jsonl").read_text("utf-8").splitlines()]


def expected_row(tiny, number, caption, layout):
    vocabulary = layout.vocabulary
    ids = text.encode(tiny.text_model, caption, vocabulary)
    parts = [text_part([ids], layout.text_slots, vocabulary)]
    for size in layout.sizes:
        pixels = fit_picture(picture(number), size, size)[None]
        tokens = to_tokens(
            tiny.tokenizer, pixels, stride=layout.stride, config=tiny.tokenizer_config
        )
        parts.append(np.asarray(tokens)[0])
    return np.concatenate(parts)


def test_the_published_record_is_the_default_layout():
    layout = RecordLayout()
    assert layout.length == 512
    assert layout.columns(160) == slice(112, 512)


def test_every_input_is_a_record_or_listed(made, damaged, captions_file):
    folder, report = made
    listed = refusals(folder)
    assert {row["input"]: row["kind"] for row in listed} == {
        number: DAMAGE[name] for number, name in damaged.items()
    }
    assert len(listed) == len(damaged)
    assert report.inputs == 70 and report.records == 70 - len(damaged) and report.complete
    assert sum(report.refused.values()) == len(damaged)
    for row in listed:
        assert f"line {row['input'] + 1}" in row["name"]
        assert row["reason"] and "\n" not in row["reason"]
    written = json.loads((folder / "report.json").read_text())
    assert written["records"] == report.records
    assert not [file.name for file in folder.iterdir() if file.name.startswith(".")]


def test_records_are_what_the_model_is_trained_on(made, tiny, damaged):
    folder, _ = made
    layout = RecordLayout.of(tiny.coglm_config)
    kept = [i for i in range(70) if i not in damaged]
    rows = [np.frombuffer(each, "<i4") for each in contents(folder)]
    for number, row in list(zip(kept, rows, strict=True))[::7]:
        caption = (SENTENCE, CHINESE)[number % 2]
        np.testing.assert_array_equal(row, expected_row(tiny, number, caption, layout))
    first_chinese = manifests.read(folder).settings["first_chinese"]
    english = english_texts(np.stack(rows), tiny.coglm_config, first_chinese)
    assert english[:, 0].tolist() == [number % 2 == 0 for number in kept]


def test_two_sizes_and_two_languages(make, tiny, tmp_path):
    (tmp_path / "0.jpg").write_bytes(picture(0))
    file = tmp_path / "pairs.tsv"
    file.write_text(f"zh\timage\ten\n{CHINESE}\t0.jpg\ta small green star\n\t0.jpg\ta red circle\n")
    layout = RecordLayout(30, 8, SIZES, tiny.coglm_config.vocabulary)
    source = sources.CaptionsFile(file, fields=("en", "zh"))
    one = {"batch_size": 1}  # as many as `expected_row` encodes: one program for both
    assert make(source, tmp_path / "together", layout, **one).records == 2
    rows = [np.frombuffer(each, "<i4") for each in contents(tmp_path / "together")]
    assert [len(row) for row in rows] == [30 + 1 + 16 + 144] * 2
    apart = expected_row(tiny, 0, "a red circle", layout)
    np.testing.assert_array_equal(rows[1], apart)
    np.testing.assert_array_equal(rows[0][layout.columns(96)], apart[layout.columns(96)])
    english = text.encode(tiny.text_model, "a small green star", layout.vocabulary)
    chinese = text.encode(tiny.text_model, CHINESE, layout.vocabulary)
    pad = layout.vocabulary.pad
    assert rows[0][: len(english) + len(chinese) + 2].tolist() == [*english, pad, *chinese, pad]

    assert make(source, tmp_path / "apart", layout, apart=True, **one).records == 3
    rows = [np.frombuffer(each, "<i4") for each in contents(tmp_path / "apart")]
    assert rows[1][: len(chinese) + 1].tolist() == [*chinese, pad]


def test_each_of_a_list_of_captions_is_refused_alone(make, tmp_path):
    (tmp_path / "0.jpg").write_bytes(picture(0))
    captions = ["a red circle", "", "a blue square", "a zebra"]
    file = tmp_path / "captions.jsonl"
    file.write_text(json.dumps({"image": "0.jpg", "caption": captions}))
    report = make(sources.CaptionsFile(file), tmp_path / "records")
    assert report.records == 2
    assert [row["caption"] for row in refusals(tmp_path / "records")] == ["", "a zebra"]


def test_a_folder_of_version_0_1_goes_on(make, tiny, captions_file, tmp_path):
    """The settings say where Chinese begins; the vocabulary has the four fields of that version."""
    make(sources.CaptionsFile(captions_file), tmp_path)
    content = (tmp_path / manifests.MANIFEST).read_text()
    vocabulary = tiny.coglm_config.vocabulary
    stored = json.loads(content)
    assert stored["layout"]["vocabulary"].keys() == {"num_image", "size", "pad", "unknown"}
    assert stored["settings"]["first_chinese"] == vocabulary.first_chinese
    assert "as_published" not in stored["settings"]
    assert manifests.read(tmp_path).layout.vocabulary == vocabulary
    # With another way to read text, a folder is refused.
    other = dataclasses.replace(vocabulary, as_published=True)
    layout = dataclasses.replace(RecordLayout.of(tiny.coglm_config), vocabulary=other)
    with pytest.raises(ValueError, match="begun with settings.allow_unknown False, now it is True"):
        make(sources.CaptionsFile(captions_file), tmp_path, layout)
    with pytest.raises(ValueError, match="begun with settings.as_published None, now it is True"):
        make(sources.CaptionsFile(captions_file), tmp_path, layout, allow_unknown=False)
    assert (tmp_path / manifests.MANIFEST).read_text() == content


@pytest.mark.parametrize(
    "refused", ["0", ["no refusal"], [{"input": 0}], [{**dict.fromkeys(shards.Refusal._fields, 1)}]]
)
def test_a_damaged_report_of_a_shard_is_named(tmp_path, refused):
    prepare.prepare_pictures(sources.Scenes(2), tmp_path)
    (file,) = tmp_path.glob("records-*.json")
    file.write_text(json.dumps({"records": 2, "refused": refused}))
    with pytest.raises(ValueError, match=f"{file.name} is missing or damaged: delete"):
        prepare.prepare_pictures(sources.Scenes(2), tmp_path)


HALF_PAIR = "a small green star \ud83d"


@pytest.mark.parametrize(
    ("rows", "records", "kinds"),
    [
        ([{"caption": HALF_PAIR}], 2, ["malformed line"]),
        ([{"caption": [SENTENCE, HALF_PAIR, SENTENCE]}], 4, ["malformed line"]),
        ([{"caption": SENTENCE, "\udc00": 1}], 3, []),
        ([{"image": "\ud83d.jpg", "caption": SENTENCE}], 2, ["missing image"]),
        ([{"caption": "\udfff"}, {"caption": HALF_PAIR * 30}], 2, ["malformed line"] * 2),
        ([{"image": "thin.png", "caption": SENTENCE}], 3, []),
        ([{"image": "grey.png", "caption": SENTENCE}], 3, []),
        ([{"image": "float.tif", "caption": SENTENCE}], 2, ["unreadable image"]),
        ([{"caption": "\u3000"}], 2, ["empty caption"]),
        ([{"caption": 10**400}], 2, ["malformed line"]),
    ],
)
def test_one_bad_line_does_not_end_the_others(make, tmp_path, rows, records, kinds):
    (tmp_path / "0.jpg").write_bytes(picture(0))
    Image.new("RGB", (2_000_000, 1), "red").save(tmp_path / "thin.png")
    Image.fromarray(np.full((40, 40), 30_000, np.uint16)).save(tmp_path / "grey.png")
    Image.new("F", (40, 40)).save(tmp_path / "float.tif")
    good = {"image": "0.jpg", "caption": SENTENCE}
    lines = [json.dumps(row) for row in (good, *({"image": "0.jpg"} | row for row in rows), good)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    folder = tmp_path / "records"
    report = make(sources.CaptionsFile(tmp_path / "captions.jsonl"), folder, shard_size=2)
    assert report.complete and report.records == records
    listed = refusals(folder)
    assert [row["kind"] for row in listed] == kinds
    assert all(row["reason"] and f"line {row['input'] + 1}" in row["name"] for row in listed)


def test_fields_may_have_any_name(make, tmp_path):
    (tmp_path / "0.jpg").write_bytes(picture(0))
    file = tmp_path / "captions.jsonl"
    file.write_text(json.dumps({"image": "0.jpg", "\ud83d": SENTENCE, "zh": HALF_PAIR}))
    source = sources.CaptionsFile(file, fields=("\ud83d", "zh"))
    assert make(source, tmp_path / "records", apart=True).records == 1
    reason = "'zh' is not valid Unicode: half of a surrogate pair at character 19"
    assert refusals(tmp_path / "records")[0]["reason"] == reason


def test_workers_do_not_matter(made, make, captions_file, tmp_path):
    make(sources.CaptionsFile(captions_file), tmp_path / "records", workers=2)
    assert_same(made[0], tmp_path / "records")


def test_it_goes_on_where_it_stopped(made, make, captions_file, tmp_path):
    """A failing machine refuses no input: it stops the run, and the next run loses nothing."""

    class Failing(sources.CaptionsFile):
        def __getitem__(self, index):
            if index == 40:
                raise OSError(errno.EIO, os.strerror(errno.EIO), "photos/40.jpg")
            return super().__getitem__(index)

    folder = tmp_path / "records"
    with pytest.raises(OSError, match="Input/output error"):
        make(Failing(captions_file), folder)
    assert len(list(folder.glob("*.array_record"))) == 2
    assert not list(folder.glob(".*"))
    with pytest.raises(FileNotFoundError, match="lacks 3 of 5 shards"):
        reading.Records(folder)
    before = []
    make(sources.CaptionsFile(captions_file), folder, progress=before.append)
    assert before[0] == 32 and sum(before) == 70
    assert_same(made[0], folder)


def test_several_runs_share_the_shards(made, make, captions_file, tmp_path):
    """Threads in place of processes: a lock belongs to an open file, not to a process."""
    folder, reports = tmp_path / "records", []

    def run():
        reports.append(make(sources.CaptionsFile(captions_file), folder))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(report.complete for report in reports)
    assert_same(made[0], folder)


def test_other_settings_are_refused(made, make, captions_file, tmp_path):
    source = sources.CaptionsFile(captions_file)
    with pytest.raises(ValueError, match="begun with settings.apart False, now it is True"):
        make(source, made[0], apart=True)
    with pytest.raises(ValueError, match="begun with layout.sizes"):
        make(source, made[0], RecordLayout(13, 8, SIZES, manifests.read(made[0]).layout.vocabulary))
    other = write_inputs(tmp_path / "other", 70, {})
    with pytest.raises(ValueError, match="begun with settings.source.sha256"):
        make(sources.CaptionsFile(other), made[0])


def test_a_full_disk_is_one_line_and_nothing_half_written(captions_file, tmp_path):
    """A limit on the size of files, in place of a full disk."""
    code = """if True:
        import resource, signal, sys
        from cogview2_jax.cli import main
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        main(sys.argv[1:])
    """
    out = tmp_path / "records"
    arguments = ["data", "prepare", captions_file, "--out", out, "--pictures"]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    last = run.stderr.splitlines()[-1]
    assert last.startswith(f"cogview2: cannot write to {out}: ") and "File too large" in last
    assert "Traceback" not in run.stderr
    assert [file.name for file in out.iterdir()] == ["records.json"]


def test_what_cannot_be_read_back_is_not_kept(tmp_path):
    file = tmp_path / "shard"
    file.write_bytes(b"\0" * 70_000)
    with pytest.raises(OSError, match="does not hold what was written"):
        shards.require_written(file, [b""])


def test_a_folder_of_pictures_keeps_them_as_they_are(tmp_path):
    photos = tmp_path / "photos"
    (photos / "below").mkdir(parents=True)
    (photos / "a.jpg").write_bytes(picture(0))
    (photos / "below" / "b.JPG").write_bytes(picture(1)[:300])
    (photos / "c.txt").write_text("no picture")
    (photos / "d.png").symlink_to("/dev/zero")
    (photos / os.fsdecode(b"e\xff.png")).write_bytes(b"no picture")
    report = prepare.prepare_pictures(sources.PictureFolder(photos), tmp_path / "records")
    assert report.records == 1 and report.inputs == 4 and report.left_out == 1
    assert contents(tmp_path / "records") == [picture(0)]
    assert [(row["input"], row["name"], row["kind"]) for row in refusals(tmp_path / "records")] == [
        (1, "below/b.JPG", "unreadable image"),
        (2, "d.png", "missing image"),
        (3, os.fsdecode(b"e\xff.png"), "unreadable image"),
        (None, "c.txt", "other file"),
    ]


def test_what_a_kill_may_leave_behind_is_cleared(made, make, captions_file, tmp_path):
    folder = tmp_path / "records"
    folder.mkdir()
    shard = made[0] / "records-00001-of-00005.array_record"
    for name in (f".{shard.name}.partial", f".{shard.name}.lock", ".records.json.partial"):
        (folder / name).write_bytes(b"half")
    make(sources.CaptionsFile(captions_file), folder)
    assert_same(made[0], folder)
    (folder / f".{shard.name}.lock").touch()  # killed between the shard's name and the lock's end
    make(sources.CaptionsFile(captions_file), folder)
    assert_same(made[0], folder)


def run_and_kill(command, out, at, cache):
    """Run `command`, kill it as soon as `out` has `at` shards; returns whether it was running."""
    run = subprocess.Popen(command, env=cache, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while run.poll() is None and len(list(out.glob("*.array_record"))) < at:
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    return run.wait() == -signal.SIGKILL


@pytest.fixture
def cache(tmp_path):
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}


def test_kill_9_loses_nothing(made, captions_file, tiny_folder, tmp_path, cache):
    out = tmp_path / "records"
    command = [sys.executable, "-m", "cogview2_jax.cli", "data", "prepare", str(captions_file)]
    command += ["--out", str(out), "--bundle", str(tiny_folder), "--workers", "2"]
    command += ["--batch-size", "8", "--shard-size", "16"]
    run_and_kill(command, out, 1, cache)
    finished = subprocess.run(command, env=cache, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(f"{out}: 58 records of 70 inputs, 12 refused")
    assert_same(made[0], out)


@pytest.mark.slow
def test_ten_thousand_inputs_of_which_3_percent_are_damaged(tiny_folder, tmp_path, cache):
    """Only damaged inputs are lost, and all are listed; one worker, two, or five kills: all equal.

    About 52 s of processor time, eight starts of the command included.
    """
    chosen = np.random.default_rng(0).choice(10_000, 300, replace=False).tolist()
    damaged = dict(zip(chosen, list(DAMAGE) * 25, strict=True))
    file = write_inputs(tmp_path / "photos", 10_000, damaged)
    command = [sys.executable, "-m", "cogview2_jax.cli", "data", "prepare", str(file)]
    command += ["--bundle", str(tiny_folder), "--shard-size", "500", "--out"]
    for workers in ("1", "2"):
        subprocess.run(
            [*command, str(tmp_path / workers), "--workers", workers], env=cache, check=True
        )
    killed = tmp_path / "killed"
    interrupted = [
        run_and_kill([*command, str(killed), "--workers", "2"], killed, at, cache)
        for at in (1, 4, 5, 11, 17)
    ]
    assert all(interrupted)
    subprocess.run([*command, str(killed), "--workers", "1"], env=cache, check=True)

    one = tmp_path / "1"
    kinds = {row["input"]: row["kind"] for row in refusals(one)}
    assert kinds == {number: DAMAGE[name] for number, name in damaged.items()}
    assert len(refusals(one)) == 300 and len(contents(one)) == 9_700
    for other in (tmp_path / "2", killed):
        assert_same(one, other)


def assert_same(folder, other):
    """The same files with the same content, and no others."""
    assert sorted(os.listdir(folder)) == sorted(os.listdir(other))
    for file in folder.iterdir():
        assert (other / file.name).read_bytes() == file.read_bytes(), file.name
