"""Writes files as the published ones are, without torch: .pt archives and whole checkpoints."""

import argparse
import io
import json
import pickle
import random
import struct
import sys
import types
import zipfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import sentencepiece as spm

from experiments.parity.golden import Golden, seeded_weights

GOLDEN = Path(__file__).parents[1] / "golden"
# network → its recorded file, its folder, its step
TRANSFORMERS = {
    "coglm": ("coglm", "coglm", 432000),
    "direct": ("direct_sr", "cogview2-dsr", 20000),
    "iterative": ("iterative_sr", "cogview2-itersr", 20000),
}
NUM_IMAGE, SIZE, PADDED = 256, 360, 384
WORDS = "transformer.word_embeddings.weight"
TENSORS = {
    name: seeded_weights(Golden(GOLDEN / f"{row[0]}.npz")) for name, row in TRANSFORMERS.items()
}
TENSORS["tokenizer"] = seeded_weights(Golden(GOLDEN / "hvqvae.npz"))

_KINDS = {"float16": "Half", "float32": "Float", "float64": "Double", "uint8": "Byte"}
_KINDS |= {"int64": "Long", "int32": "Int"}
_TORCH = types.ModuleType("torch")
for _kind in {*_KINDS.values(), "BFloat16"}:
    setattr(_TORCH, f"{_kind}Storage", type(f"{_kind}Storage", (), {"__module__": "torch"}))
_UTILS = types.ModuleType("torch._utils")


def _rebuild_tensor_v2(*_: Any) -> None:
    raise AssertionError("only its name is written")


_rebuild_tensor_v2.__module__ = "torch._utils"
_UTILS._rebuild_tensor_v2 = _rebuild_tensor_v2  # type: ignore[attr-defined]


class View(NamedTuple):
    """A tensor that is part of a storage: in numbers of it, not bytes."""

    storage: np.ndarray  # of one axis
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Storage(NamedTuple):
    numbers: np.ndarray


class _Pickler(pickle.Pickler):
    """As torch's: tensors by their parts, storages by reference."""

    def __init__(self, file: io.BytesIO, protocol: int, old: bool = False) -> None:
        super().__init__(file, protocol)
        self.old = old
        self.storages: list[np.ndarray] = []
        self._keys: dict[int, str] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        numbers = obj.numbers
        if id(numbers) not in self._keys:
            self._keys[id(numbers)] = str(len(self.storages))
            self.storages.append(numbers)
        kind = _KINDS.get(numbers.dtype.name, "BFloat16")
        key = self._keys[id(numbers)]
        kept = "storage", getattr(_TORCH, f"{kind}Storage"), key, "cpu", numbers.size
        return (*kept, None) if self.old else kept

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            view = obj.view
            rest = (view.offset, view.shape, view.strides, False, {})
            return _rebuild_tensor_v2, (_Storage(view.storage), *rest)
        return NotImplemented


class Tensor:
    """Marks what is written as a tensor."""

    def __init__(self, numbers: np.ndarray | View) -> None:
        if not isinstance(numbers, View):
            numbers = np.array(numbers, order="C")
            strides = tuple(step // numbers.itemsize for step in numbers.strides)
            numbers = View(numbers.reshape(-1), 0, numbers.shape, strides)
        self.view = numbers


def write_pt(file: Path, content: Any, *, protocol: int = 2, old_numpy: bool = False) -> None:
    """A .pt file of this content, in place of one that is there."""
    written = io.BytesIO()
    with mock.patch.dict(sys.modules, {"torch": _TORCH, "torch._utils": _UTILS}):
        pickler = _Pickler(written, protocol)
        pickler.dump(content)
    data = written.getvalue()
    if old_numpy:
        data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    write_archive(file, data, pickler.storages)


def write_old(file: Path, content: Any, *, keys: list[str] | None = None) -> None:
    """A file of this content in the format before torch 1.6; `keys` in place of its storages'."""
    written = io.BytesIO()
    for head in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "type_sizes": {"int": 4}}):
        pickle.dump(head, written, protocol=2)
    with mock.patch.dict(sys.modules, {"torch": _TORCH, "torch._utils": _UTILS}):
        pickler = _Pickler(written, 2, old=True)
        pickler.dump(content)
    there = [str(key) for key in range(len(pickler.storages))]
    pickle.dump(there if keys is None else keys, written, protocol=2)
    for numbers in pickler.storages:
        written.write(struct.pack("<q", numbers.size) + numbers.tobytes())
    file.write_bytes(written.getvalue())


def write_archive(file: Path, pickled: bytes, storages: list[np.ndarray]) -> None:
    entries = {"data.pkl": pickled, "byteorder": b"little"}
    entries |= {f"data/{key}": numbers.tobytes() for key, numbers in enumerate(storages)}
    write_entries(file, entries | {"version": b"3\n"})


def write_entries(file: Path, entries: dict[str, bytes]) -> None:
    file.unlink(missing_ok=True)  # it may be a hard link
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(f"{file.stem}/{name}", content)


def read_entries(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


def rank_part(name: str, tensor: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    """What one model-parallel rank has of a tensor."""
    if ".mlp.dense_h_to_4h." in name or name == WORDS:
        return np.split(tensor, ranks, axis=0)[rank]
    if ".query_key_value." in name:
        query, key, value = np.split(tensor, 3)
        return np.concatenate([np.split(each, ranks)[rank] for each in (query, key, value)])
    owner, _, kind = name.rpartition(".")
    row_parallel = owner.endswith(("attention.dense", "mlp.dense_4h_to_h")) or (
        "attention_plus.dense." in name
    )
    return np.split(tensor, ranks, axis=1)[rank] if row_parallel and kind == "weight" else tensor


def state(module: dict[str, Any], ranks: int, step: int) -> dict[str, Any]:
    """What the published files hold beside the tensors: every kind of object that was seen."""
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "sparse_tensor_module_names": {"a", "b"},
        "global_steps": step,
        "mp_world_size": ranks,
        "ds_config": {"train_micro_batch_size_per_gpu": 4, "fp16": {"enabled": True}},
        "client_lr_scheduler": {"end_lr": np.float64(1e-5), "num_iters": np.int64(step)},
        "random_rng_state": random.Random(1).getstate(),
        "np_rng_state": np.random.RandomState(1).get_state(),
        "torch_rng_state": Tensor(np.arange(100, dtype=np.uint8)),
        "args": argparse.Namespace(fp16=True, mode="inference", model_parallel_size=ranks),
    }


def write_transformer(
    root: Path,
    network: str,
    *,
    ranks: int = 1,
    padded: bool = False,
    old_numpy: bool = False,
    tensors: dict[str, np.ndarray] | None = None,
    size: int = SIZE,
) -> Path:
    """A transformer's folder."""
    _, name, step = TRANSFORMERS[network]
    tensors = dict(TENSORS[network] if tensors is None else tensors)
    if padded:
        table = tensors[WORDS]
        extra = np.full((PADDED - size, table.shape[1]), 7, table.dtype)
        tensors[WORDS] = np.concatenate([table, extra])
        size = PADDED
    folder = root / name
    (folder / str(step)).mkdir(parents=True)
    (folder / "latest").write_text(str(step))
    hidden = tensors["transformer.final_layernorm.bias"].size
    sizes = {
        "num_layers": 2,
        "hidden_size": hidden,
        "num_attention_heads": 4,
        "vocab_size": size,
        "layernorm_order": "sandwich",
        "model_parallel_size": ranks,
    }
    (folder / "model_config.json").write_text(json.dumps(sizes, indent=4))
    for rank in range(ranks):
        halves = {
            key: Tensor(rank_part(key, tensor, rank, ranks).astype(np.float16))
            for key, tensor in tensors.items()
        }
        file = folder / str(step) / f"mp_rank_{rank:02d}_model_states.pt"
        write_pt(file, state(halves, ranks, step), old_numpy=old_numpy)
    return folder


def write_text_model(file: Path, pieces: int) -> None:
    rng = random.Random(3)
    words = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz红蓝圆方大小", k=4)) for _ in range(900)
    ]
    made = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_writer=made,
        vocab_size=pieces,
        character_coverage=1.0,
        pad_id=3,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    file.write_bytes(made.getvalue())


def write_all(
    folder: Path,
    *,
    ranks: int = 1,
    padded: bool = False,
    old_numpy: bool = False,
    nested: bool = False,
) -> Path:
    """All published files, small, with the recorded files' seeded weights."""
    root = folder / "sharefs" / "cogview-new" if nested else folder
    for network in TRANSFORMERS:
        write_transformer(root, network, ranks=ranks, padded=padded, old_numpy=old_numpy)
    module = {key: Tensor(value.astype(np.float16)) for key, value in TENSORS["tokenizer"].items()}
    module["quantize.cluster_size"] = Tensor(np.ones(96, np.float16))
    module["quantize.embed_avg"] = Tensor(np.ones((96, 24), np.float16))
    write_pt(root / "ice_image.pt", {"module": module})
    labels = Golden(GOLDEN / "coglm.npz")["cluster_labels"]
    np.save(root / "cluster_label.npy", labels.astype(np.int64))
    write_text_model(root / "ice_text.model", SIZE - NUM_IMAGE - 3)
    return folder
