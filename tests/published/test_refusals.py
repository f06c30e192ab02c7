"""What `convert` refuses: in one line that says why, with nothing left at the target."""

import errno
import json
import os
import re
import shutil

import numpy as np
import pytest

from cogview2_jax.published import convert
from tests.published import published_files as pf

RANK = "coglm/432000/mp_rank_{:02d}_model_states.pt"
CONFIG = "coglm/model_config.json"
WORDS = pf.WORDS
BIAS = "transformer.layers.1.mlp.dense_4h_to_h.bias"
MLP = "transformer.layers.0.mlp.dense_h_to_4h.weight"


def edit_config(**changes):
    def mutate(root):
        file = root / CONFIG
        content = json.loads(file.read_text()) | changes
        file.unlink()
        file.write_text(json.dumps({k: v for k, v in content.items() if v != "gone"}))

    return mutate


def edit_state(change, rank=0, ranks=1):
    """Writes a rank again, with its tensors or what is beside them changed by `change(state)`."""

    def mutate(root):
        tensors = {
            name: pf.Tensor(pf.rank_part(name, each, rank, ranks).astype("f2"))
            for name, each in pf.TENSORS["coglm"].items()
        }
        state = pf.state(tensors, ranks, 432000)
        made = change(state)
        pf.write_pt(root / RANK.format(rank), state if made is None else made)

    return mutate


def with_tensor(name, numbers, **options):
    return edit_state(lambda state: state["module"].update({name: pf.Tensor(numbers)}), **options)


def swap(one, other):
    def change(state):
        module = state["module"]
        module[one], module[other] = module[other], module[one]

    return edit_state(change)


def replace(name, content):
    def mutate(root):
        (root / name).unlink()
        (root / name).write_bytes(content)

    return mutate


def remove(*names):
    def mutate(root):
        for name in names:
            path = root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return mutate


def labels(array):
    def mutate(root):
        (root / "cluster_label.npy").unlink()
        np.save(root / "cluster_label.npy", array, allow_pickle=True)

    return mutate


def truncate(root):
    file = root / RANK.format(0)
    content = file.read_bytes()
    replace(RANK.format(0), content[: len(content) // 2])(root)


def flip(root):
    file = root / RANK.format(0)
    content, table = file.read_bytes(), pf.TENSORS["coglm"][WORDS].astype("f2").tobytes()
    place = content.index(table[:64]) + 30000
    replace(RANK.format(0), content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])(
        root
    )


def twice(root):
    shutil.copytree(root / "coglm", root / "old" / "coglm")


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def pop(*names):
    return edit_state(lambda state: [state["module"].pop(name) for name in names] and None)


ZEROS = np.zeros((64, 256), np.float16)
MUTATIONS = {
    "a command in a pickle": (
        edit_state(lambda s: s.update(args=Evil())),
        "asks for 'posix.system'",
    ),
    "a command as the file": (edit_state(lambda s: Evil()), "asks for 'posix.system'"),
    "a truncated file": (truncate, "mp_rank_00_model_states.pt is damaged"),
    "a changed number": (flip, "checksum of 'data/0' is wrong"),
    "an empty file": (replace(RANK.format(0), b""), "not a zip archive"),
    "no module": (edit_state(lambda s: {"model": s["module"]}), "no tensors under 'module'"),
    "a list": (edit_state(lambda s: [1, 2]), "no tensors under 'module'"),
    "no tensors": (edit_state(lambda s: {"module": {}}), "no tensors under 'module'"),
    "a number as a tensor": (edit_state(lambda s: s["module"].update(a=1)), "is no tensor: 'a'"),
    "swapped axes": (
        with_tensor(MLP, ZEROS),
        f"{MLP!r} must have shape (256, 64): got (64, 256)",
    ),
    "swapped tensors": (swap(MLP, BIAS), "must have shape (256, 64): got (64,)"),
    "a flat tensor": (
        with_tensor(MLP, ZEROS.reshape(-1)),
        "must have shape (256, 64): got (16384,)",
    ),
    "a scalar": (with_tensor(BIAS, np.array(1, np.float16)), "must have shape (64,): got ()"),
    "whole numbers": (with_tensor(BIAS, np.zeros(64, np.int64)), "must be of floats: got int64"),
    "not a number": (
        with_tensor(BIAS, np.full(64, np.nan, np.float16)),
        f"{BIAS!r} has numbers that are not finite",
    ),
    "a number too large": (
        with_tensor(BIAS, np.full(64, 1e6, np.float32)),
        "are not finite in float16",
    ),
    "a missing tensor": (pop(BIAS), f"lacks tensor {BIAS!r}"),
    "two missing tensors": (pop(BIAS, WORDS), f"lacks tensors {BIAS!r}, {WORDS!r}"),
    "no positions": (
        pop("transformer.position_embeddings.weight"),
        "lacks tensor 'transformer.position_embeddings.weight'",
    ),
    "few positions": (
        with_tensor("transformer.position_embeddings.weight", np.zeros((600, 64), np.float16)),
        "num_positions must hold the image cells",
    ),
    "flat positions": (
        with_tensor("transformer.position_embeddings.weight", np.zeros(64, np.float16)),
        "must have shape (1024, 64): got (64,)",
    ),
    "another tensor": (with_tensor("odd", ZEROS), "has unexpected tensor 'odd'"),
    "another network": (
        lambda root: replace(
            RANK.format(0), next((root / "cogview2-itersr").rglob("*.pt")).read_bytes()
        )(root),
        "unexpected tensor 'mixins.extra_position_embedding",
    ),
    "no configuration": (remove(CONFIG), "No such file"),
    "no JSON": (replace(CONFIG, b"{"), "is damaged (not JSON"),
    "no text": (replace(CONFIG, b"\xff\xfe"), "is damaged (not JSON"),
    "another JSON": (replace(CONFIG, b"[1]"), "it is no object"),
    "more layers": (edit_config(num_layers=3), "lacks tensors 'transformer.layers.2."),
    "fewer layers": (edit_config(num_layers=1), "unexpected tensors 'transformer.layers.1."),
    "endless layers": (edit_config(num_layers=10**6), "num_layers must be that of the checkpoint"),
    "no layers": (edit_config(num_layers=0), "num_layers must be from 1"),
    "no width": (edit_config(hidden_size="gone"), "hidden_size must be from 1 to 10000000: it is"),
    "a wider network": (edit_config(hidden_size=128), "must have shape (384, 128): got (192, 64)"),
    "a width in words": (edit_config(hidden_size="64"), "hidden_size must be from 1"),
    "heads that do not fit": (edit_config(num_attention_heads=5), "multiple of num_heads"),
    "another MLP": (edit_config(inner_hidden_size=128), "must have shape (128, 64): got (256, 64)"),
    "another order": (edit_config(layernorm_order="post"), "layernorm_order must be 'sandwich'"),
    "another vocabulary": (edit_config(vocab_size=361), "must have shape (361, 64): got (360, 64)"),
    "a small vocabulary": (edit_config(vocab_size=359), "vocab_size must be from 360 to 1383"),
    "more ranks": (edit_config(model_parallel_size=2), "lacks mp_rank_01_model_states.pt"),
    "odd ranks": (edit_config(model_parallel_size=3), "hidden_size are not for 3 ranks"),
    "no latest": (remove("coglm/latest"), "No such file"),
    "latest elsewhere": (
        replace("coglm/latest", b"../cogview2-dsr/20000"),
        "name of a folder beside",
    ),
    "another latest": (replace("coglm/latest", b"7"), "lacks the folder 7"),
    "no checkpoint": (remove("coglm"), "lacks coglm/model_config.json"),
    "two checkpoints": (twice, "has coglm/model_config.json twice"),
    "no text model": (remove("ice_text.model"), "lacks ice_text.model"),
    "no text model, no labels": (
        remove("ice_text.model", "cluster_label.npy"),
        "lacks ice_text.model; lacks cluster_label.npy",
    ),
    "a damaged text model": (replace("ice_text.model", b"abc"), "not a SentencePiece model"),
    "damaged labels": (replace("cluster_label.npy", b"abc"), "cluster_label.npy is damaged"),
    "labels with code": (labels(np.array([Evil()])), "cluster_label.npy is damaged"),
    "labels of fractions": (labels(np.ones(256)), "one row of whole numbers"),
    "labels in a grid": (labels(np.ones((16, 16), int)), "one row of whole numbers"),
    "a label below 0": (labels(np.full(256, -1)), "a cluster for each image token"),
    "no labels": (labels(np.zeros(0, int)), "a cluster for each image token"),
    "labels of another model": (
        lambda root: [
            with_tensor(WORDS, np.zeros((1500, 64), np.float16))(root),
            edit_config(vocab_size=1500)(root),
        ],
        "vocab_size must be from 360 to 1383",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_files_that_do_not_fit_are_refused_in_one_line(name, one_rank, tmp_path, monkeypatch):
    mutate, message = MUTATIONS[name]
    root = tmp_path / "files"
    shutil.copytree(one_rank, root, copy_function=os.link)
    mutate(root)
    monkeypatch.chdir(tmp_path)
    assert message in refusal(root, tmp_path, networks=("coglm",))
    assert not (tmp_path / "ran").exists()


def refusal(source, folder, **options) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        convert.convert(source, folder / "model", **options)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert [path.name for path in folder.iterdir()] == ["files"]
    return str(caught.value)


OTHER = {"coglm": {name: each + 0.1 for name, each in pf.TENSORS["coglm"].items()}}
RANKS = {
    "a missing rank": (remove(RANK.format(1)), "lacks mp_rank_01_model_states.pt"),
    "both missing": (
        remove(RANK.format(0), RANK.format(1)),
        "lacks mp_rank_00_model_states.pt, lacks mp_rank_01",
    ),
    "a rank too many": (
        lambda root: shutil.copy(root / RANK.format(1), root / RANK.format(2)),
        "has mp_rank_02_model_states.pt too many",
    ),
    "a rank of another run": (
        lambda root: pf.write_pt(
            root / RANK.format(1),
            pf.state(
                {
                    name: pf.Tensor(pf.rank_part(name, each + 0.1, 1, 2).astype("f2"))
                    for name, each in pf.TENSORS["coglm"].items()
                },
                2,
                432000,
            ),
        ),
        "is of another run or step than",
    ),
    "a rank of another step": (
        edit_state(lambda state: state.update(global_steps=431000), rank=1, ranks=2),
        "global_steps 431000, not 432000",
    ),
    "a rank of fewer ranks": (
        edit_state(lambda state: state.update(mp_world_size=4), rank=0, ranks=2),
        "was written by 4 ranks",
    ),
    "a rank that is whole": (edit_state(lambda state: None), "was written by 1 ranks"),
    "a part of another shape": (
        with_tensor(MLP, np.zeros((256, 64), np.float16), rank=1, ranks=2),
        "must have shape (128, 64): got (256, 64)",
    ),
    "a tensor that one rank lacks": (
        edit_state(lambda state: state["module"].pop(BIAS) and None, rank=1, ranks=2),
        f"mp_rank_01_model_states.pt lacks tensor {BIAS!r}",
    ),
}


@pytest.mark.parametrize("name", RANKS)
def test_ranks_that_do_not_belong_together_are_refused(name, two_ranks, tmp_path):
    mutate, message = RANKS[name]
    root = tmp_path / "files"
    shutil.copytree(two_ranks, root, copy_function=os.link)
    mutate(root)
    assert message in refusal(root, tmp_path, networks=("coglm",))


def test_all_that_does_not_fit_is_listed_at_once(one_rank, tmp_path):
    root = tmp_path / "files"
    shutil.copytree(one_rank, root, copy_function=os.link)

    def change(state):
        module = state["module"]
        del module[BIAS]
        module["odd"] = module[MLP] = pf.Tensor(ZEROS)

    edit_state(change)(root)
    tokenizer = {
        name: pf.Tensor(each.astype("f2")) for name, each in pf.TENSORS["tokenizer"].items()
    }
    del tokenizer["enc.mid.attn_1.q.bias"]
    pf.write_pt(root / "ice_image.pt", {"module": tokenizer})
    said = refusal(root, tmp_path)
    for part in (
        f"lacks tensor {BIAS!r}",
        "unexpected tensor 'odd'",
        f"{MLP!r} must have shape (256, 64)",
        "ice_image.pt lacks tensor 'enc.mid.attn_1.q.bias'",
    ):
        assert part in said


def test_a_tokenizer_that_is_none_is_refused(one_rank, tmp_path):
    root = tmp_path / "files"
    shutil.copytree(one_rank, root, copy_function=os.link)
    pf.write_pt(root / "ice_image.pt", {"module": {"a": pf.Tensor(ZEROS)}})
    said = refusal(root, tmp_path, networks=("tokenizer",))
    assert "no published tokenizer: tensor 'enc.conv_in.weight' is missing" in said


def test_a_place_that_is_taken_stays(one_rank, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="model exists: give a new folder"):
        convert.convert(one_rank, tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        convert.convert(tmp_path / "nowhere", tmp_path / "other")
    with pytest.raises(ValueError, match="dtype must be one of"):
        convert.convert(one_rank, tmp_path / "other", dtype="int8")


def test_a_full_disk_leaves_nothing(one_rank, tmp_path, monkeypatch):
    (tmp_path / "files").symlink_to(one_rank)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert re.search(
        r"needs [\d,]+ bytes, and 1,000 are free", refusal(tmp_path / "files", tmp_path)
    )
    monkeypatch.undo()

    def full(now, total):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    assert "No space left" in refusal(tmp_path / "files", tmp_path, progress=full)
