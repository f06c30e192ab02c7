"""Published files → a bundle: every layout of them, exactly; what is refused leaves nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from cogview2_jax import bundle as bundles
from cogview2_jax import shapes
from cogview2_jax.published import convert, names
from cogview2_jax.styles import PUBLISHED_STYLES
from cogview2_jax.tokenizer import text
from tests.published import published_files as pf


def stored(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(folder / bundles.WEIGHTS, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def assert_has_the_recorded_weights(folder: Path, dtype: str = "float16") -> None:
    """The seeded weights, put into trees by `names` and rounded to float16, as published."""
    found, description = stored(folder), bundles.read_description(folder)
    assert found.keys() == bundles.expected_shapes(*description[:4]).keys()
    readers = {
        "coglm": names.coglm,
        "direct": names.direct_sr,
        "iterative": names.iterative_sr,
        "tokenizer": names.hvqvae,
    }
    for network, reader in readers.items():
        config = getattr(description, f"{network}_config")
        halves = {name: each.astype("f2") for name, each in pf.TENSORS[network].items()}
        expected = dict(shapes.flat({network: reader(halves, config)}))
        for name, tensor in expected.items():
            assert found[name].dtype == jnp.dtype(dtype)
            np.testing.assert_array_equal(found[name], tensor.astype(jnp.dtype(dtype)))


VARIANTS = {
    "one rank": {},
    "two ranks": {"ranks": 2},
    "four ranks, padded": {"ranks": 4, "padded": True},
    "padded": {"padded": True},
    "old NumPy": {"old_numpy": True},
    "nested": {"nested": True},
    "all of it": {"ranks": 2, "padded": True, "old_numpy": True, "nested": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layout_gives_the_recorded_weights(name, tmp_path):
    pf.write_all(tmp_path / "files", **VARIANTS[name])
    convert.convert(tmp_path / "files", tmp_path / "model")
    assert_has_the_recorded_weights(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "model"]
    for network in bundles.NETWORKS:
        assert bundles.load(tmp_path / "model", (network,)).params(network)


@pytest.mark.parametrize("dtype", convert.DTYPES)
def test_dtypes(dtype, one_rank, tmp_path):
    done = []
    made = convert.convert(
        one_rank, tmp_path / "model", dtype=dtype, progress=lambda now, all: done.append((now, all))
    )
    assert_has_the_recorded_weights(tmp_path / "model", dtype)
    assert sum(now for now, _ in done) == done[0][1]
    weights = sum(made.parameters.values()) * jnp.dtype(dtype).itemsize
    assert done[0][1] == weights + 4 * pf.NUM_IMAGE
    loaded = bundles.load(tmp_path / "model", ("coglm",))
    assert loaded.coglm["word_embeddings"].dtype == jnp.float32
    assert loaded.num_clusters == 32


def test_the_configuration_follows_from_the_files(one_rank, tmp_path):
    made = convert.convert(one_rank, tmp_path / "model")
    description = bundles.read_description(tmp_path / "model")
    assert description.styles == PUBLISHED_STYLES
    assert description == made.description
    vocabulary = description.coglm_config.vocabulary
    assert (vocabulary.num_image, vocabulary.size) == (pf.NUM_IMAGE, pf.SIZE)
    assert vocabulary.as_published
    assert description.coglm_config.grid == (20, 20) and description.iterative_config.rounds == 6
    labels = np.load(one_rank / "cluster_label.npy")
    np.testing.assert_array_equal(
        bundles.load(tmp_path / "model", ("coglm",)).cluster_labels, labels
    )


def test_a_tokenizer_of_other_size_is_told_and_not_used_with_the_others(one_rank, tmp_path):
    made = convert.convert(one_rank, tmp_path / "model")
    assert made.notes == [
        "the tokenizer has 96 codes and there are 256 image tokens: it cannot be used together with"
        " the other networks"
    ]
    with pytest.raises(ValueError, match="96 codes, the other networks draw 256 image tokens"):
        bundles.load(tmp_path / "model")
    assert not convert.convert(one_rank, tmp_path / "one", networks=("coglm",)).notes


def test_some_networks_and_files_elsewhere(one_rank, tmp_path):
    source = tmp_path / "files"
    shutil.copytree(one_rank / "cogview2-dsr", source / "a" / "b" / "cogview2-dsr")
    (source / "again").symlink_to(source)  # a loop
    elsewhere = {"text": one_rank / "ice_text.model", "labels": one_rank / "cluster_label.npy"}
    convert.convert(source, tmp_path / "model", networks=("direct",), elsewhere=elsewhere)
    assert bundles.networks_in(tmp_path / "model") == ("direct",)
    bundles.load(tmp_path / "model")


def test_linked_folders_are_found(one_rank, tmp_path):
    (tmp_path / "files").mkdir()
    for path in one_rank.iterdir():
        (tmp_path / "files" / path.name).symlink_to(path)
    convert.convert(tmp_path / "files", tmp_path / "model")
    assert_has_the_recorded_weights(tmp_path / "model")


# --- The published files' own writer, and the real files ------------------------------------------


def published_folder(*needed: str) -> Path:
    folder = os.environ.get("COGVIEW2_PUBLISHED")
    if not folder or not all((Path(folder) / name).exists() for name in needed):
        pytest.skip(f"COGVIEW2_PUBLISHED names no folder with {', '.join(needed)}")
    return Path(folder)


@pytest.mark.parametrize(
    "options",
    [["1"], ["2", "--pad-vocab", "384"], ["4", "--old-numpy", "--nested"]],
    ids=lambda options: " ".join(options),
)
def test_files_that_torch_wrote(options, tmp_path):
    pytest.importorskip("torch")
    script = published_folder("make_checkpoints.py") / "make_checkpoints.py"
    command = [sys.executable, script, pf.GOLDEN, tmp_path / "files", *options]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    convert.convert(tmp_path / "files", tmp_path / "model")
    assert_has_the_recorded_weights(tmp_path / "model")


def test_the_real_text_model_and_labels(tmp_path):
    folder = published_folder("ice_text.model", "cluster_label.npy")
    tensors = dict(pf.TENSORS["coglm"])
    tensors[pf.WORDS] = np.ones((150_016, 64), np.float32)  # the published table is padded so
    pf.write_transformer(tmp_path / "files", "coglm", tensors=tensors, size=150_016, ranks=2)
    elsewhere = {"text": folder / "ice_text.model", "labels": folder / "cluster_label.npy"}
    networks = ("coglm",)
    convert.convert(tmp_path / "files", tmp_path / "model", networks=networks, elsewhere=elsewhere)
    made = bundles.load(tmp_path / "model")
    published = made.coglm_config.vocabulary
    assert published == type(published)()  # the preset
    assert made.coglm["word_embeddings"].shape == (150_003, 64)
    assert made.num_clusters == 500
    assert text.encode(made.text_model, "a cat 猫", published)[-1] >= published.first_chinese


def convert_until(share: float, source: Path, target: Path) -> list[int]:
    """Convert and be interrupted after this share of the bytes. The bytes of each call."""
    written: list[int] = []

    def progress(now: int, total: int) -> None:
        written.append(now)
        if sum(written) > share * total:
            raise KeyboardInterrupt

    if share < 1:
        with pytest.raises(KeyboardInterrupt):
            convert.convert(source, target, progress=progress)
    else:
        convert.convert(source, target, progress=progress)
    return written


def test_an_interrupted_conversion_goes_on_and_ends_the_same(one_rank, tmp_path):
    convert.convert(one_rank, tmp_path / "at_once")
    target, unfinished = tmp_path / "model", tmp_path / ".model.partial"
    convert_until(0.3, one_rank, target)
    assert unfinished.is_dir() and not target.exists()
    kept = convert_until(0.7, one_rank, target)[0]
    again = convert_until(1, one_rank, target)
    assert 0 < kept < again[0] < sum(again)
    assert not unfinished.exists()
    for name in (bundles.CONFIG, bundles.WEIGHTS, bundles.TEXT_MODEL):
        assert (target / name).read_bytes() == (tmp_path / "at_once" / name).read_bytes()


def test_other_files_are_converted_from_the_beginning(one_rank, two_ranks, tmp_path):
    convert_until(0.5, one_rank, tmp_path / "model")
    convert_until(1, two_ranks, tmp_path / "model")
    assert_has_the_recorded_weights(tmp_path / "model")
    unfinished = tmp_path / ".other.partial"
    unfinished.mkdir()
    (unfinished / "letter.txt").touch()
    with pytest.raises(FileExistsError, match="letter.txt"):
        convert.convert(one_rank, tmp_path / "other")
    assert (unfinished / "letter.txt").exists()


def test_two_conversions_to_one_place_are_one_too_many(one_rank, tmp_path):
    refused = []

    def second(*_: int) -> None:
        if not refused:
            with pytest.raises(OSError, match="another process is converting") as error:
                convert.convert(one_rank, tmp_path / "model", networks=["tokenizer"])
            refused.append(error)

    convert.convert(one_rank, tmp_path / "model", progress=second)
    assert_has_the_recorded_weights(tmp_path / "model")
