"""Files of tokens, as the released training script reads them, as records."""

import json

import numpy as np
import pytest

from cogview2_jax.config import Vocabulary
from cogview2_jax.data import reading
from cogview2_jax.data.records import RecordLayout
from cogview2_jax.data.sources import Refused, TokenFile


@pytest.fixture
def layout(tiny):
    return RecordLayout.of(tiny.coglm_config)


def rows_of(layout, number, seed=0):
    """Right rows: a few words, pads, image ids."""
    rng, vocabulary = np.random.default_rng(seed), layout.vocabulary
    rows = np.full((number, layout.length), vocabulary.pad, np.int32)
    for row in rows:
        words = rng.integers(1, layout.text_slots + 1)
        row[:words] = vocabulary.num_image + rng.integers(1, vocabulary.num_text, words)
        row[:words][row[:words] == vocabulary.pad] = vocabulary.num_image + 1
        row[layout.text_slots + 1 :] = rng.integers(0, vocabulary.num_image, layout.cells(32))
    return rows


def test_the_published_row_has_512_tokens(tmp_path):
    layout = RecordLayout(vocabulary=Vocabulary())
    assert layout.length == 512
    rows = rows_of(RecordLayout(sizes=(32,)), 1)
    wide = np.concatenate([rows[:, :112], np.zeros((1, 400), np.int32)], axis=1)
    wide.astype("<i4").tofile(tmp_path / "one.bin")
    source = TokenFile(tmp_path / "one.bin", layout)
    assert len(source) == 1
    np.testing.assert_array_equal(source[0].picture, wide[0])


def test_records_are_the_rows(run, tiny, tiny_folder, layout, tmp_path):
    """Wrong rows are listed with the reason, and training reads the others."""
    rows = rows_of(layout, 20)
    vocabulary, image = layout.vocabulary, layout.text_slots + 1
    wrong = {
        3: (image, vocabulary.num_image, "is no image token"),
        5: (image + 2, -1, "-1 is no image token"),
        7: (0, 2, "2 is no text token"),
        8: (0, vocabulary.size, "is no text token"),
        11: (layout.text_slots, vocabulary.num_image + 1, "places of"),
    }
    for number, (column, value, _) in wrong.items():
        rows[number, column] = value
    rows[13, :image] = vocabulary.pad
    rows[16, 0] = vocabulary.pad
    rows.astype("<i4").tofile(tmp_path / "rows.bin")
    command = ("data", "prepare", tmp_path / "rows.bin", "--out", tmp_path / "records")
    code, out, _ = run(*command, "--bundle", tiny_folder, "--shard-size", 6)
    assert code == 0 and "13 records of 20 inputs, 7 refused" in out
    lines = (tmp_path / "records" / "refused.jsonl").read_text().splitlines()
    refused = {entry["input"]: entry for entry in map(json.loads, lines)}
    assert set(refused) == {*wrong, 13, 16}
    assert "does not begin with a text" in refused[16]["reason"]
    for number, (_, _, said) in wrong.items():
        assert said in refused[number]["reason"]
        assert refused[number]["name"] == f"rows.bin row {number}"
    kept = [row for number, row in enumerate(rows) if number not in refused]
    records = reading.Records(tmp_path / "records")
    found = [np.frombuffer(records[number], "<i4") for number in range(len(records))]
    np.testing.assert_array_equal(found, kept)


def test_files_that_are_no_rows(layout, run, tiny_folder, tmp_path):
    rows_of(layout, 2).tofile(tmp_path / "rows.bin")
    cut = tmp_path / "cut.bin"
    cut.write_bytes((tmp_path / "rows.bin").read_bytes()[:-2])
    for file, said in ((cut, "no whole number of rows"), (tmp_path / "none.bin", "no such file")):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            TokenFile(file, layout)
        code, _, err = run(
            "data", "prepare", file, "--out", tmp_path / "out", "--bundle", tiny_folder
        )
        assert code == 2 and said in err and err.count("\n") == 1
    for option in (("--apart",), ("--size", 32), ("--pictures",), ("--split", "test")):
        command = ("data", "prepare", tmp_path / "rows.bin", "--out", tmp_path / "out", *option)
        code, _, err = run(*command)
        assert code == 2 and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_a_source_refuses_with_the_row(layout, tmp_path):
    rows = rows_of(layout, 3)
    rows[1, -1] = 10**6
    rows.tofile(tmp_path / "rows.bin")
    source = TokenFile(tmp_path / "rows.bin", layout)
    with pytest.raises(Refused, match="1000000 is no image token") as caught:
        source[1]
    assert caught.value.name == "rows.bin row 1"
