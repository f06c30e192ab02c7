"""data prepare: what it writes and says."""

import pytest

SCENES = ["data", "prepare", "scenes", "--count", "2", "--out"]


def test_data_prepare_writes_records_and_goes_on(run, tiny_folder, tmp_path):
    out = tmp_path / "records"
    options = ("--bundle", tiny_folder, "--apart", "--allow-unknown", "--shard-size", 2)
    command = ("data", "prepare", "scenes", "--count", 3, "--out", out, *options)
    code, said, _ = run(*command, "--batch-size", 4, "--workers", 2)
    assert code == 0
    assert said.startswith(f"{out}: 4 records of 3 inputs, 2 refused\n")
    assert f"{out / 'refused.jsonl'}: 2 long caption" in said
    assert run(*command, "--batch-size", 4)[:2] == (0, said)
    code, _, err = run(*command, "--batch-size", 5)
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith(f"cogview2: {out} was begun with settings.batch_size 4, now it is 5")


@pytest.mark.parametrize("number", [10**7, 10**9])
def test_a_batch_beyond_the_memory_is_refused_before_anything_is_begun(
    number, run, tiny_folder, tmp_path
):
    out = tmp_path / "records"
    code, _, err = run(*SCENES, out, "--bundle", tiny_folder, "--batch-size", number)
    assert code == 2 and not out.exists()
    last = err.splitlines()[-1]
    assert last.startswith(f"cogview2: a batch of {number} pictures of 32 pixels needs ")
    assert last.endswith("make batches smaller")


@pytest.mark.parametrize(
    "option", ["--count", "--size", "--stride", "--text-slots", "--batch-size", "--shard-size"]
)
@pytest.mark.parametrize("number", [0, 10**23])
def test_numbers_beyond_reason_are_refused(option, number, run, tiny_folder, tmp_path):
    out = tmp_path / "records"
    code, _, err = run(*SCENES, out, "--bundle", tiny_folder, option, number)
    assert code == 2 and err.count("\n") == 1 and not out.exists()
    assert f"{number} is not in the range" in err


def test_data_prepare_says_when_nothing_is_left(run, tiny_folder, tmp_path):
    out = tmp_path / "records"
    code, _, err = run(*SCENES, out, "--bundle", tiny_folder, "--caption-field", "en")
    assert code == 2
    assert err.splitlines()[-1].startswith("cogview2: no input became a record: see ")
