"""Checkpoints: damage and strangers are one line, and never a wrong start."""

import shutil
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
    step: Any


SETTINGS = {"network": {"layers": 2}, "sizes": (1, 2)}


def state(step: int, width: int = 4) -> State:
    params = {"a": {"w": jnp.full((3, width), float(step))}, "b": jnp.arange(2.0)}
    return State(params, jax.tree.map(jnp.ones_like, params), jnp.int32(step))


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 1 and 2."""
    with checkpoint.open_folder(tmp_path / "run" / "checkpoints") as manager:
        for step in (1, 2):
            checkpoint.save(manager, step, state(step), SETTINGS)
        checkpoint.finish(manager)
    return tmp_path / "run" / "checkpoints"


def restore(folder, like=None, settings=None):
    with checkpoint.open_folder(folder) as manager:
        return checkpoint.restore(manager, like or state(0), settings or SETTINGS)


def test_the_newest_comes_back(folder):
    found, step = restore(folder)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, found, state(2))


def test_an_empty_folder_starts_anew(tmp_path):
    found, step = restore(tmp_path / "new")
    assert step == 0
    jax.tree.map(np.testing.assert_array_equal, found, state(0))


def test_what_a_kill_left_half_written_is_passed_over(folder):
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp-1")
    assert restore(folder)[1] == 2


# Of the reads that orbax still has in flight when one of them fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_truncated_file_of_arrays_is_noticed(folder):
    files = [
        file
        for file in sorted((folder / "2").rglob("*"))
        if file.is_file() and (file.parent.name == "d" or file.name == "manifest.ocdbt")
    ]
    assert len(files) > 5
    refused = 0
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        try:
            found, _ = restore(folder)
            # Not all that lies there is read; what comes back is never wrong.
            jax.tree.map(np.testing.assert_array_equal, found, state(2))
        except ValueError as error:
            refused += 1
            assert "is damaged" in str(error) and "delete its folder" in str(error)
            assert "\n" not in str(error)
        file.write_bytes(whole)
    assert refused >= 4  # manifests and data of both trees
    shutil.rmtree(folder / "2")
    assert restore(folder)[1] == 1


def test_another_network_is_refused(folder):
    expected = r"parameter 'a/w' has shape \(3, 4\) there and \(3, 5\) here"
    with pytest.raises(ValueError, match=expected):
        restore(folder, state(0, width=5))


def test_other_settings_are_refused(folder):
    with pytest.raises(ValueError, match="was begun with network.layers 2, now it is 3"):
        restore(folder, settings={"network": {"layers": 3}, "sizes": (1, 2)})


def test_runs_of_version_0_1_describe_a_vocabulary_by_its_ids():
    described = checkpoint.describe(CogLMConfig())
    assert described["vocabulary"].keys() == {"num_image", "size", "pad", "unknown"}


def test_a_foreign_folder_with_a_number_is_refused(folder):
    (folder / "7").mkdir()
    (folder / "7" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is damaged") as caught:
        restore(folder)
    assert "\n" not in str(caught.value)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(OSError, match="checkpoints is a file: checkpoints need a folder") as caught:
        restore(tmp_path / "checkpoints")
    assert "\n" not in str(caught.value)


def test_parameters_alone_come_back(folder):
    with checkpoint.open_folder(folder) as manager:
        params = checkpoint.restore_params(manager, 1, state(0).params)
        assert checkpoint.read_settings(manager, 1)["network"] == {"layers": 2}
    jax.tree.map(np.testing.assert_array_equal, params, state(1).params)
