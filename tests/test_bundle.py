"""Saving and loading a model: exact, strict, atomic."""

import dataclasses
import errno
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cogview2_jax import bundle as bundles
from cogview2_jax import description
from cogview2_jax.description import CONFIGS
from cogview2_jax.tokenizer import text

Damage = Callable[[Path], object]


def test_a_saved_bundle_loads_equal(tiny, tiny_folder):
    loaded = bundles.load(tiny_folder)
    for name in CONFIGS:
        assert getattr(loaded, name) == getattr(tiny, name)
    for name in bundles.NETWORKS:
        jax.tree.map(np.testing.assert_array_equal, getattr(loaded, name), getattr(tiny, name))
        assert {leaf.dtype for leaf in jax.tree.leaves(getattr(loaded, name))} == {
            np.dtype("float32")
        }
    np.testing.assert_array_equal(loaded.cluster_labels, tiny.cluster_labels)
    assert loaded.num_clusters == tiny.cluster_labels.max() + 1
    assert loaded.text_model.serialized_model_proto() == tiny.text_model.serialized_model_proto()


@pytest.mark.parametrize(("name", "value"), [("guidance", 2.0), ("edit_candidates", 8)])
def test_a_bundle_from_before_a_setting_has_none(name, value, tiny, tmp_path):
    bundles.save(tmp_path / "plain", tiny)
    file = tmp_path / "plain" / "config.json"
    assert name not in json.loads(file.read_text())["sampling"]
    assert bundles.load(tmp_path / "plain", ("coglm",)).sampling == tiny.sampling
    changed = dataclasses.replace(tiny.sampling, **{name: value})
    bundles.save(tmp_path / "changed", tiny._replace(sampling=changed))
    assert bundles.load(tmp_path / "changed", ("coglm",)).sampling == changed


def test_weights_are_float16_on_disk_and_readable_by_all(tiny_folder):
    tensors = load_file(tiny_folder / bundles.WEIGHTS)
    labels = tensors.pop(bundles.CLUSTER_LABELS)
    assert labels.dtype == np.int32
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float16")}
    assert len({file.stat().st_mode for file in tiny_folder.iterdir()}) == 1


def test_a_bundle_in_the_making_loads_what_it_has(tiny, tmp_path):
    none = tiny._replace(
        **{name: {} for name in bundles.NETWORKS}, cluster_labels=np.zeros(0, np.int32)
    )
    made, folder = none, tmp_path / "model"
    for number, name in enumerate(bundles.NETWORKS):
        bundles.save(folder, made)
        there = bundles.NETWORKS[:number]
        assert bundles.networks_in(folder) == there
        assert (folder / bundles.WEIGHTS).exists() == bool(there)
        loaded = bundles.load(folder, there)
        if there:  # by default, what is there
            assert bundles.load(folder).coglm.keys() == loaded.coglm.keys()
        for each in bundles.NETWORKS:
            jax.tree.map(np.testing.assert_array_equal, getattr(loaded, each), getattr(made, each))
        np.testing.assert_array_equal(loaded.cluster_labels, made.cluster_labels)
        assert loaded.num_clusters == (tiny.num_clusters if there else 0)
        with pytest.raises(
            ValueError, match=f"lacks {name}.*`{bundles.TRAINED_BY[name]}`"
        ) as caught:
            bundles.load(folder, bundles.NETWORKS)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        made = made._replace(**{name: getattr(tiny, name)}, cluster_labels=tiny.cluster_labels)
    bundles.save(folder, made)
    assert bundles.networks_in(folder) == bundles.NETWORKS
    bundles.load(folder)


def test_labels_and_tokenizer_are_saved_together(tiny, tmp_path):
    with pytest.raises(ValueError, match="lacks tensor 'cluster_labels'"):
        bundles.save(tmp_path / "model", tiny._replace(cluster_labels=np.zeros(0, np.int32)))


def test_half_a_network_is_refused_whatever_is_asked_for(tiny, tmp_path):
    bundles.save(tmp_path / "model", tiny)
    edit_weights(lambda tensors: tensors.pop(EMBEDDINGS))(tmp_path / "model")
    with pytest.raises(ValueError, match=f"lacks tensor '{EMBEDDINGS}'"):
        bundles.load(tmp_path / "model", ("tokenizer",))


def test_an_unknown_network_is_refused(tiny_folder):
    with pytest.raises(ValueError, match="networks must be of .*: got 'direct-sr'"):
        bundles.load(tiny_folder, ("direct-sr",))


def edit_config(change: Callable[[dict], object]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / bundles.CONFIG).read_text())
        change(content)
        (folder / bundles.CONFIG).write_text(json.dumps(content))

    return damage


def edit_weights(change: Callable[[dict], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / bundles.WEIGHTS)
        change(tensors)
        save_file(tensors, folder / bundles.WEIGHTS)

    return damage


def truncate(folder: Path) -> None:
    file = folder / bundles.WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def other_text_model(folder: Path) -> None:
    (folder / bundles.TEXT_MODEL).write_bytes(text.train_text_model(["quite another text"]))


def test_a_bundle_of_before_gets_its_text_facts_from_the_text_model(tiny_folder, tiny, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "old")
    content = json.loads((folder / bundles.CONFIG).read_text())
    parts = content["coglm_config"], content["direct_config"]["coglm"], content["iterative_config"]
    for part in parts:
        del part["vocabulary"]["first_chinese"], part["vocabulary"]["as_published"]
    (folder / bundles.CONFIG).write_text(json.dumps(content))
    assert bundles.read_description(folder)[:5] == tiny[:5]
    assert not tiny.coglm_config.vocabulary.as_published
    (folder / bundles.TEXT_MODEL).write_bytes(b"abc")
    with pytest.raises(ValueError, match="text.model is damaged"):
        bundles.read_description(folder)


CODEBOOK, EMBEDDINGS = "tokenizer/codebook", "coglm/word_embeddings"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no config": (lambda f: (f / bundles.CONFIG).unlink(), "no file config.json"),
    "no text model": (lambda f: (f / bundles.TEXT_MODEL).unlink(), "no file text.model"),
    "no weights": (
        lambda f: (f / bundles.WEIGHTS).unlink(),
        "lacks tokenizer, coglm, direct, iterative (no file weights.safetensors)",
    ),
    "not JSON": (lambda f: (f / bundles.CONFIG).write_text("{"), "config.json is damaged"),
    "not UTF-8": (lambda f: (f / bundles.CONFIG).write_bytes(b"\xff"), "config.json is damaged"),
    "another JSON": (lambda f: (f / bundles.CONFIG).write_text("[]"), "not the configuration"),
    "newer format": (edit_config(lambda c: c.update(format=2)), "has format 2"),
    "unknown field": (edit_config(lambda c: c.update(extra=1)), "unknown field 'extra'"),
    "missing field": (edit_config(lambda c: c["sampling"].pop("base")), "lacks 'base'"),
    "wrong type": (edit_config(lambda c: c["coglm_config"].update(max_text="9")), "must be int"),
    "true for one": (edit_config(lambda c: c["coglm_config"].update(max_text=True)), "be int"),
    "short grid": (edit_config(lambda c: c["coglm_config"].update(grid=[4])), "have 2 entries"),
    "invalid value": (
        edit_config(lambda c: c["sampling"]["base"].update(temperature=-1)),
        "temperature must be finite and at least 0",
    ),
    "two grids": (
        edit_config(lambda c: c["iterative_config"].update(grid=[12, 9])),
        "iterative_config.grid must be (12, 12)",
    ),
    "damaged text model": (
        lambda f: (f / bundles.TEXT_MODEL).write_bytes(b"abc"),
        "text.model is damaged",
    ),
    "empty text model": (
        lambda f: (f / bundles.TEXT_MODEL).write_bytes(b""),
        "text.model is damaged: it has no pieces",
    ),
    "other text model": (other_text_model, "text.model has"),
    "truncated": (truncate, "weights.safetensors is damaged"),
    "not tensors": (lambda f: (f / bundles.WEIGHTS).write_bytes(b"x" * 99), "is damaged"),
    "missing tensor": (edit_weights(lambda t: t.pop(CODEBOOK)), f"lacks tensor '{CODEBOOK}'"),
    "extra tensor": (
        edit_weights(lambda t: t.update(extra=np.zeros(1, np.float16))),
        "has unknown tensor 'extra'",
    ),
    "wrong shape": (
        edit_weights(lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS][1:]})),
        f"tensor '{EMBEDDINGS}' must have shape",
    ),
    "not finite": (
        edit_weights(lambda t: t[EMBEDDINGS].fill(np.nan)),
        f"tensor '{EMBEDDINGS}' is not finite",
    ),
    "negative label": (
        edit_weights(lambda t: t[bundles.CLUSTER_LABELS].fill(-1)),
        "a cluster label of -1, not from 0 to 63",
    ),
    # The one-hot matrix of the clusters would have billions of columns.
    "large label": (
        edit_weights(lambda t: t[bundles.CLUSTER_LABELS].fill(2**31 - 1)),
        "a cluster label of 2147483647, not from 0 to 63",
    ),
    "whole numbers as weights": (
        edit_weights(lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS].astype(np.int16)})),
        f"tensor '{EMBEDDINGS}' must be floating: got int16",
    ),
    "fractions as labels": (
        edit_weights(lambda t: t.update(cluster_labels=np.ones(64, np.float16))),
        "tensor 'cluster_labels' must be integer: got float16",
    ),
    "even window": (
        edit_config(lambda c: c["direct_config"].update(window=[8, 5])),
        "window must have odd sides: got (8, 5)",
    ),
    "no steps": (
        edit_config(lambda c: c["iterative_config"].update(text_slots=0)),
        "text_slots must be at least 1: got 0",
    ),
    "no mean": (
        edit_config(lambda c: c["tokenizer_config"].update(mean=[0.5, math.nan, 0.5])),
        "mean must be finite",
    ),
    "another stride": (
        edit_config(lambda c: c["tokenizer_config"].update(decoder_multipliers=[[1, 1, 1]])),
        "the strides of tokenizer_config must have 8",
    ),
    "a number too large": (
        edit_config(lambda c: c["sampling"].update(text_upweight=10**400)),
        "config.json is not valid",
    ),
    "endless blocks": (
        edit_config(lambda c: c["tokenizer_config"].update(encoder_blocks=10**9)),
        "encoder_blocks must be at most 256",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_bundle_is_refused_in_one_line(name, tiny_folder, tmp_path):
    damage, message = DAMAGES[name]
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder, folder)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        bundles.load(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        bundles.load(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file"):
        bundles.load(tmp_path / "file")


def test_a_missing_shipped_bundle_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(bundles, "SHIPPED", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="install the package again"):
        bundles.load()


def test_a_bundle_that_ships_is_found_by_name(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bundles.locate("scenes") == bundles.SHIPPED
    with pytest.raises(FileNotFoundError, match="a saved bundle, or scenes"):
        bundles.locate("scene")
    shutil.copytree(tiny_folder, "scenes")  # a folder of one's own comes first
    assert bundles.locate("scenes").resolve() == tmp_path / "scenes"


@pytest.mark.parametrize("step", ["save_file", "rename"])
def test_a_failed_save_leaves_what_was_there(step, tiny, tiny_folder, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = tmp_path / "kept"
    shutil.copytree(tiny_folder, kept)
    before = {file.name: file.read_bytes() for file in kept.iterdir()}
    rename = Path.rename
    if step == "save_file":
        monkeypatch.setattr(bundles, "save_file", full)
    else:
        # Only the new folder's step into place fails; the old one can still be put back.
        monkeypatch.setattr(
            Path, "rename", lambda a, b: full() if a.suffix == ".partial" else rename(a, b)
        )
    for target in (tmp_path / "new", kept):
        with pytest.raises(OSError, match=f"{target.name} could not be written: No space left"):
            bundles.save(target, tiny)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == before


def test_save_replaces_a_bundle(tiny, tmp_path):
    for _ in range(2):
        bundles.save(tmp_path / "model", tiny)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    bundles.load(tmp_path / "model")


def test_save_replaces_nothing_but_a_bundle(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    bundles.save(tmp_path / "empty", tiny)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("a picture")
    for path in (tmp_path / "photos", tmp_path / "photos" / "a.jpg"):
        with pytest.raises(FileExistsError, match=f"{path.name} is there and is no bundle: give"):
            bundles.save(path, tiny)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]


def test_save_refuses_what_float16_cannot_hold(tiny, tmp_path):
    large = tiny._replace(tokenizer=tiny.tokenizer | {"codebook": np.full((64, 8), 1e6)})
    with pytest.raises(ValueError, match="'tokenizer/codebook' has values that float16"):
        bundles.save(tmp_path / "model", large)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["nothing", "sampling", "shape", "configuration", "version"])
def test_shapes_are_compared_unless_these_were(change, tiny_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    if change == "shape":
        tensors = load_file(folder / bundles.WEIGHTS)
        del tensors["coglm/word_embeddings"]
        save_file(tensors, folder / bundles.WEIGHTS)
    elif change == "configuration":
        config = json.loads((folder / bundles.CONFIG).read_text())
        config["tokenizer_config"]["channels"] *= 2
        (folder / bundles.CONFIG).write_text(json.dumps(config))
    elif change == "sampling":  # which says nothing of shapes
        config = json.loads((folder / bundles.CONFIG).read_text())
        config["sampling"]["candidates"] += 1
        (folder / bundles.CONFIG).write_text(json.dumps(config))
    elif change == "version":
        monkeypatch.setattr(description, "__version__", "another")
    compared = []
    monkeypatch.setattr(bundles, "_check_shapes", lambda *given: compared.append(given))
    bundles.load(folder)
    assert bool(compared) == (change not in ("nothing", "sampling"))


def test_the_shapes_of_the_bundle_that_ships_were_compared(monkeypatch):
    """It takes every command more than a second otherwise."""
    monkeypatch.setattr(bundles, "_check_shapes", lambda *given: pytest.fail("compared again"))
    bundles.load(networks=("tokenizer",), on_host=True)
