"""Checkpoints: damaged and foreign ones are refused in one line."""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogview2_jax.config import CogLMConfig
from cogview2_jax.training import checkpoint


class State(NamedTuple):
    params: Any
    opt_state: Any
    extra: Any
    step: Any


class Extra(NamedTuple):
    size: Any


class NewerExtra(NamedTuple):
    size: Any
    idle: Any


SETTINGS = {"network": {"layers": 2}, "sizes": (1, 2)}


def state(step: int, width: int = 4, extra: Any = ()) -> State:
    params = {"a": {"w": jnp.full((3, width), float(step))}, "b": jnp.arange(2.0)}
    return State(params, jax.tree.map(jnp.ones_like, params), extra, jnp.int32(step))


def save(folder: Path, *steps: int, extra: Any = ()) -> None:
    with checkpoint.open_folder(folder) as checkpoints:
        for step in steps:
            checkpoint.save(checkpoints, step, state(step, extra=extra), SETTINGS)


def restore(folder: Path, like: Any = None, settings: Any = None) -> Any:
    with checkpoint.open_folder(folder) as checkpoints:
        return checkpoint.restore(checkpoints, like or state(0), settings or SETTINGS)


def refused(folder: Path, error: type[Exception], message: str) -> str:
    with pytest.raises(error, match=message) as caught:
        restore(folder)
    said = str(caught.value)
    assert "\n" not in said and "delete" not in said
    return said


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 1 and 2."""
    save(tmp_path / "run" / "checkpoints", 1, 2)
    return tmp_path / "run" / "checkpoints"


def test_the_newest_comes_back(folder):
    found, step = restore(folder)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, found, state(2))


def test_a_step_before_the_newest_comes_back_if_it_is_kept(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    save(folder, 4, 8)
    with checkpoint.open_folder(folder) as checkpoints:
        found, step = checkpoint.restore(checkpoints, state(0), SETTINGS, last=4)
        assert step == 4 and float(found.params["a"]["w"][0, 0]) == 4
        assert checkpoint.restore(checkpoints, state(0), SETTINGS, last=9)[1] == 8
        with pytest.raises(ValueError, match="is past step 6: it keeps the steps 4, 8"):
            checkpoint.restore(checkpoints, state(0), SETTINGS, last=6)


def test_an_empty_folder_starts_anew(tmp_path):
    found, step = restore(tmp_path / "new")
    assert step == 0
    jax.tree.map(np.testing.assert_array_equal, found, state(0))


LONG = "/".join(letter * 200 for letter in "abcdef")


@pytest.mark.parametrize(
    "name",
    ["run [v2]", "a*", "b?", "#1 100%", "~", "~root", "实验", "q'u\"o`t$e\\", "-o", "gs:/x", LONG],
    ids=lambda name: name[:10],
)
def test_a_folder_may_have_any_name(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    folder = tmp_path / name / "checkpoints"
    save(folder, 1, 2)
    save(folder, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    found, step = restore(folder)
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, found, state(3))
    (folder / "3" / "rest" / "_METADATA").write_text("{")
    assert str(folder) in refused(folder, ValueError, "rest/_METADATA is not the JSON")
    assert not any((tmp_path / "temporary").iterdir())


def test_what_a_kill_left_half_written_is_passed_over(folder):
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp-1")
    assert checkpoint.begun_settings(folder.parent) is not None
    assert restore(folder)[1] == 2


def files_of_arrays(folder: Path) -> list[Path]:
    """The files of step 2 that are read: orbax keeps a second copy of them for each process."""
    every = [*folder.glob("2/*/d/*"), *folder.glob("2/*/manifest.ocdbt")]
    assert len(every) == 4
    return every


@pytest.mark.parametrize("damage", ["half", "changed"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_offered(damage, folder):
    json_files = [*folder.glob("2/*/_METADATA"), folder / "2" / "run" / "metadata"]
    for file in [*files_of_arrays(folder), *json_files]:
        whole = file.read_bytes()
        half = len(whole) // 2
        changed = whole[:half] + bytes([whole[half] ^ 255]) + whole[half + 1 :]
        file.write_bytes(whole[:half] if damage == "half" else changed)
        said = refused(folder, ValueError, f"checkpoint {folder / '2'} is damaged")
        assert said.endswith("move folder 2 away to resume from the checkpoint before it")
        file.write_bytes(whole)
    (folder / "2").rename(folder.parent / "2")
    assert restore(folder)[1] == 1


def test_what_cannot_be_read_is_not_said_to_be_damaged(tmp_path):
    """Its name contains the words by which damage is recognised."""
    folder = tmp_path / "corrupt checksum DATA_LOSS" / "checkpoints"
    save(folder, 1, 2)
    for file in [*files_of_arrays(folder), folder / "2" / "run" / "metadata"]:
        kept = file.rename(tmp_path / "kept")
        file.symlink_to(file)  # a loop, which even root cannot read
        said = refused(folder, OSError, "could not be read: ")
        assert "damaged" not in said
        file.unlink()
        kept.rename(file)
    assert restore(folder)[1] == 2


def test_a_missing_file_is_not_said_to_be_damaged(folder):
    for file in files_of_arrays(folder):
        kept = file.rename(folder.parent / "kept")
        assert "damaged" not in refused(folder, OSError, "could not be read: .*are all there")
        kept.rename(file)


def test_another_network_is_refused(folder):
    expected = r"parameter 'a/w' has shape \(3, 4\) there and \(3, 5\) here"
    with pytest.raises(ValueError, match=expected):
        restore(folder, state(0, width=5))


def test_another_optimiser_is_refused(folder):
    expected = r"part of the state 'opt_state/c' has shape that is missing there and \(\) here"
    like = state(0)
    with pytest.raises(ValueError, match=expected):
        restore(folder, like._replace(opt_state=like.opt_state | {"c": jnp.ones(())}))


def test_a_run_of_an_older_version_goes_on_with_what_it_did_not_save(tmp_path):
    save(tmp_path, 1, extra=Extra(jnp.full(2, 7.0)))
    like = state(0, extra=NewerExtra(jnp.ones(2), jnp.full(2, 20.0)))
    found, step = restore(tmp_path, like)
    assert step == 1 and isinstance(found.extra, NewerExtra)
    np.testing.assert_array_equal(found.extra, [[7, 7], [20, 20]])
    save(tmp_path, 2, extra=found.extra)
    np.testing.assert_array_equal(restore(tmp_path, like)[0].extra, found.extra)


def test_other_settings_are_refused(folder):
    with pytest.raises(ValueError, match="was begun with network.layers 2, now it is 3"):
        restore(folder, settings={"network": {"layers": 3}, "sizes": (1, 2)})


def test_a_run_of_a_version_with_other_settings_is_refused(folder):
    with pytest.raises(ValueError, match=r"by another version, .* \(network.heads\): go on with"):
        restore(folder, settings={"network": {"layers": 2, "heads": None}, "sizes": (1, 2)})


def test_begun_settings_are_those_of_the_newest_checkpoint(folder):
    expected = {"network": {"layers": 2}, "sizes": [1, 2]}
    before = sorted(os.walk(folder))
    assert checkpoint.begun_settings(folder.parent) == expected
    assert checkpoint.read_settings(folder, 1) == expected
    assert sorted(os.walk(folder)) == before
    assert checkpoint.begun_settings(folder.parent / "none") is None
    (folder / "2" / "run" / "metadata").write_text('{"settings": ')
    with pytest.raises(ValueError, match="is damaged .*run/metadata"):
        checkpoint.begun_settings(folder.parent)


def test_runs_of_version_0_1_describe_a_vocabulary_by_its_ids():
    described = checkpoint.describe(CogLMConfig())
    assert described["vocabulary"].keys() == {"num_image", "size", "pad", "unknown"}


def test_a_foreign_folder_with_a_number_is_refused(folder):
    (folder / "7").mkdir()
    (folder / "7" / "notes.txt").write_text("mine")
    refused(folder, ValueError, "is incomplete, it has no run/metadata: move folder 7 away")


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    refused(tmp_path / "checkpoints", OSError, "checkpoints is a file: checkpoints need a folder")


def test_the_best_stays_when_a_run_goes_on(tmp_path):
    """Losses that are not finite are never the best."""
    losses = {1: 3.0, 2: 2.0, 3: np.nan, 4: 5.0, 5: -np.inf, 6: 4.0}
    for steps in ((1, 2), (3,), (4, 5, 6)):
        with checkpoint.open_folder(tmp_path, keep=1, best=True) as checkpoints:
            for step in steps:
                checkpoint.save(checkpoints, step, state(step), SETTINGS, losses[step])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "6"]
