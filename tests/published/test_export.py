"""A bundle → published files → a bundle: the same bits; and files that torch reads."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from cogview2_jax import bundle as bundles
from cogview2_jax.published import convert, export, names
from cogview2_jax.published.torch_files import TorchFile
from cogview2_jax.published.torch_writing import NewTensor, write_pt
from tests.published import published_files as pf


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32"])
def model(request, one_rank, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / request.param
    convert.convert(one_rank, folder, dtype=request.param)
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_converted_export_is_the_bundle_bit_for_bit(model, ranks, tmp_path):
    steps = []
    made = export.export(
        model, tmp_path / "files", ranks=ranks, progress=lambda *now: steps.append(now)
    )
    assert not made.notes and all(file.is_file() for file in made.files)
    assert sum(now for now, _ in steps) == steps[-1][1]
    convert.convert(tmp_path / "files", tmp_path / "again", dtype=model.name)
    for name in (bundles.CONFIG, bundles.WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (model / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "files"]


def test_every_rank_has_the_parts_that_published_ones_have(two_ranks, tmp_path):
    convert.convert(two_ranks, tmp_path / "model")
    export.export(tmp_path / "model", tmp_path / "files", ranks=2)
    for network, (_, folder, step) in pf.TRANSFORMERS.items():
        for rank in range(2):
            name = f"mp_rank_{rank:02d}_model_states.pt"
            with (
                TorchFile(tmp_path / "files" / folder / "1" / name) as ours,
                TorchFile(two_ranks / folder / str(step) / name) as theirs,
            ):
                found, expected = ours.content["module"], theirs.content["module"]
                assert found.keys() == expected.keys(), network
                for key in expected:
                    np.testing.assert_array_equal(found[key].read(), expected[key].read())


def test_networks_that_are_missing_are_left_out(one_rank, tmp_path):
    convert.convert(one_rank, tmp_path / "model", networks=["coglm"])
    made = export.export(tmp_path / "model", tmp_path / "files")
    # The labels come with the tokenizer or, as here, from the published files.
    assert {file.relative_to(tmp_path / "files").parts[0] for file in made.files} == {
        "coglm",
        "cluster_label.npy",
        "ice_text.model",
    }


def test_a_padded_table_is_padded_with_zeros(one_rank, tmp_path, monkeypatch):
    convert.convert(one_rank, tmp_path / "model", networks=["coglm"])
    # As many ranks as do not divide the vocabulary; the heads would not allow it.
    monkeypatch.setattr(export, "_require_ranks", lambda *_: None)
    leaf = next(each for each in names.leaves(_coglm(tmp_path)) if each.names == (pf.WORDS,))
    with safe_open(tmp_path / "model" / bundles.WEIGHTS, framework="numpy") as stored:
        source = stored.get_slice("coglm/word_embeddings")
        parts = [
            np.concatenate(list(export._table_rows(source, leaf.published_shape, rank * 52, 52)))
            for rank in range(7)
        ]
        table = np.concatenate(parts)
        np.testing.assert_array_equal(table[: pf.SIZE], source[:])
    assert len(table) == 364 and not table[pf.SIZE :].any()


def _coglm(folder):
    return bundles.read_description(folder / "model").coglm_config


def test_another_grid_is_noted(tmp_path):
    made = export.export(None, tmp_path / "files")
    assert "20×20 and 60×60" in made.notes[0]
    sizes = json.loads((tmp_path / "files/coglm/model_config.json").read_text())
    assert sizes["num_layers"] == 6 and sizes["model_class"] == "BaseModel"


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("ranks", "4 heads, which 3 ranks do not divide"),
        ("there", "exists: give a new folder"),
        ("missing", "does not exist"),
        ("truncated", "is damaged"),
        ("shape", "must have shape"),
        ("empty", "has no network"),
    ],
)
def test_what_is_refused_leaves_nothing(wrong, message, one_rank, tmp_path):
    model, target = tmp_path / "model", tmp_path / "files"
    convert.convert(one_rank, model, networks=["coglm"])
    weights = model / bundles.WEIGHTS
    if wrong == "missing":
        shutil.rmtree(model)
    elif wrong == "there":
        target.mkdir()
    elif wrong == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif wrong == "empty":
        weights.unlink()
    elif wrong == "shape":
        with safe_open(weights, framework="numpy") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        tensors["coglm/word_embeddings"] = tensors["coglm/word_embeddings"][:-1]
        save_file(tensors, weights)
    with pytest.raises((ValueError, OSError), match=message) as refused:
        export.export(model, target, ranks=3 if wrong == "ranks" else 1)
    assert "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "files"}
    assert not target.exists() or not any(target.iterdir())


def test_plain_values_are_read_back(tmp_path):
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensor = NewTensor(numbers.dtype, numbers.shape, lambda: iter([numbers[:1], numbers[1:]]))
    content = {"a": {"b": [1, -5, 2**40, None, "红"]}, "t": tensor, "pair": (2, "x"), "none": {}}
    write_pt(tmp_path / "file.pt", content)
    with TorchFile(tmp_path / "file.pt") as file:
        assert file.content["a"] == content["a"] and file.content["pair"] == (2, "x")
        np.testing.assert_array_equal(file.content["t"].read(), numbers)


def test_torch_reads_them(one_rank, tmp_path):
    torch = pytest.importorskip("torch")
    convert.convert(one_rank, tmp_path / "model")
    made = export.export(tmp_path / "model", tmp_path / "files", ranks=2)
    files = [file for file in made.files if file.suffix == ".pt"]
    assert len(files) == 7
    for file in files:
        # The strict reader of torch itself: no other global than those of tensors.
        content = torch.load(file, map_location="cpu", weights_only=True)
        with TorchFile(file) as ours:
            for name, tensor in ours.content["module"].items():
                np.testing.assert_array_equal(content["module"][name].numpy(), tensor.read())
    assert set(names.HVQVAE_BUFFERS) <= set(torch.load(tmp_path / "files/ice_image.pt")["module"])


def test_the_command(one_rank, tmp_path):
    convert.convert(one_rank, tmp_path / "model", networks=["coglm"])
    command = [sys.executable, "-m", "cogview2_jax.cli", "export", tmp_path / "model"]
    done = subprocess.run([*command, tmp_path / "files"], capture_output=True, text=True)
    assert done.returncode == 0 and "mp_rank_00_model_states.pt" in done.stdout
    again = subprocess.run([*command, tmp_path / "files"], capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.count("\n") == 1
