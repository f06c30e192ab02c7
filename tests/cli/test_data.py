"""data prepare: what it writes and says."""

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


def test_data_prepare_says_when_nothing_is_left(run, tiny_folder, tmp_path):
    out = tmp_path / "records"
    code, _, err = run(*SCENES, out, "--bundle", tiny_folder, "--caption-field", "en")
    assert code == 2
    assert err.splitlines()[-1].startswith("cogview2: no input became a record: see ")
