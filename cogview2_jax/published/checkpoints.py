"""The published checkpoints on disk: where each file is, and a network's tensors of all its ranks.

    coglm/latest                                        a step, 432000
    coglm/model_config.json                             sizes
    coglm/432000/mp_rank_00_model_states.pt             one file for each model-parallel rank
    cogview2-dsr/…, cogview2-itersr/…                   the same
    ice_image.pt, ice_text.model, cluster_label.npy     image tokenizer, text model, cluster labels

They may lie in any folder below the one that is given. Errors name the file.
"""

import contextlib
import io
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cogview2_jax.config import TransformerConfig
from cogview2_jax.errors import one_line
from cogview2_jax.files import read_file
from cogview2_jax.published import names
from cogview2_jax.published.torch_files import Tensor, TorchFile

FOLDERS = {"coglm": "coglm", "direct": "cogview2-dsr", "iterative": "cogview2-itersr"}
FILES = {"tokenizer": "ice_image.pt", "text": "ice_text.model", "labels": "cluster_label.npy"}
CONFIG, LATEST = "model_config.json", "latest"
_MOST = 10_000_000  # of a size in model_config.json
_MOST_RANKS = 1024
_COUNTERS = ("mp_world_size", "global_steps", "global_samples", "iteration")


def find(source: Path, wanted: Collection[str]) -> dict[str, Path]:
    """The place of each of `wanted` (keys of `FOLDERS` and `FILES`) in or below `source`.

    Raises ValueError, which lists all that is missing or there more than once; OSError for a
    missing `source`.
    """
    if not source.is_dir():
        kind = NotADirectoryError if source.exists() else FileNotFoundError
        raise kind(f"{source} is no folder: give the one that holds the published files")
    places: dict[str, list[Path]] = {name: [] for name in wanted}
    seen: set[str] = set()
    for folder, folders, files in os.walk(source, followlinks=True):
        here, real = Path(folder), os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(folders)  # a link may lead back up
        if real in seen:
            continue
        seen.add(real)
        for name in wanted:
            if name in FILES and FILES[name] in files:
                places[name].append(here / FILES[name])
            if FOLDERS.get(name) == here.name and (CONFIG in files or LATEST in files):
                places[name].append(here)
    wrong = []
    for name, found in places.items():
        what = FILES.get(name) or f"{FOLDERS[name]}/{CONFIG}"
        if not found:
            wrong.append(f"lacks {what}")
        elif len(found) > 1:
            wrong.append(f"has {what} twice, {found[0]} and {found[1]}")
    if wrong:
        raise ValueError(f"{source} {'; '.join(wrong)}")
    return {name: found[0] for name, found in places.items()}


class Settings(NamedTuple):
    """What a model_config.json says."""

    transformer: TransformerConfig
    vocab_size: int  # rows of the word table, padding included
    ranks: int


def read_settings(folder: Path) -> Settings:
    """model_config.json in `folder`, checked. Raises ValueError."""
    file = folder / CONFIG
    try:
        content = json.loads(read_file(file))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged (not JSON: {one_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it is no object")

    def number(name: str, default: int | None = None) -> int:
        value = default if content.get(name) is None else content[name]
        if type(value) is not int or not 1 <= value <= _MOST:
            said = f"got {value!r}"[:60] if name in content else "it is missing"
            raise ValueError(f"{file}: {name} must be from 1 to {_MOST}: {said}")
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    inner, ranks = number("inner_hidden_size", 4 * hidden), number("model_parallel_size", 1)
    order = content.get("layernorm_order", "sandwich")
    if order != "sandwich":
        raise ValueError(f"{file}: layernorm_order must be 'sandwich': got {order!r}")
    if inner % hidden:
        raise ValueError(
            f"{file}: inner_hidden_size must be a multiple of hidden_size: got {inner}"
        )
    vocab_size = number("vocab_size")
    for name, size in (
        ("hidden_size", hidden),
        ("num_attention_heads", heads),
        ("vocab_size", vocab_size),
    ):
        if size % ranks:
            raise ValueError(f"{file}: {size} of {name} are not for {ranks} ranks")
    if ranks > _MOST_RANKS:
        raise ValueError(f"{file}: model_parallel_size must be at most {_MOST_RANKS}: got {ranks}")
    try:
        sizes = TransformerConfig(number("num_layers"), hidden, heads, inner // hidden)
    except ValueError as error:
        raise error if str(file) in str(error) else ValueError(f"{file}: {error}") from error
    return Settings(sizes, vocab_size, ranks)


class Checkpoint:
    """The tensors of one network, of all its ranks, by their published names. Not read yet."""

    def __init__(self, files: list[TorchFile]) -> None:
        self.files = files
        self.parts: list[Mapping[str, Tensor]] = [_state_dict(file) for file in files]

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The whole tensor as arrays of whole rows, in order. Raises ValueError for damage."""
        parts = [part[name] for part in self.parts]
        cut = names.cut_of(name) if len(parts) > 1 else None
        if cut == "thirds":
            thirds = [np.split(part.read(), 3) for part in parts]
            yield np.concatenate([of_rank[third] for third in range(3) for of_rank in thirds])
        elif cut == "columns":
            yield np.concatenate([part.read() for part in parts], axis=1)
        else:
            for part in parts if cut == "rows" else parts[:1]:
                yield from part.blocks()

    def problems(
        self, leaves: Sequence[names.Leaf], vocab_size: int | None, ignored: Collection[str] = ()
    ) -> Iterator[str]:
        """All that is missing, unexpected or of another shape or dtype, each in a few words."""
        expected = {name: leaf.published_shape for leaf in leaves for name in leaf.names}
        if vocab_size is not None:
            hidden = expected[names.WORD_TABLE][1]
            expected[names.WORD_TABLE] = (vocab_size, hidden)
        for file, part in zip(self.files, self.parts, strict=True):
            if missing := [name for name in expected if name not in part]:
                yield f"{file.path} lacks {_listed(missing)}"
            if unknown := [name for name in part if name not in expected and name not in ignored]:
                yield f"{file.path} has unexpected {_listed(unknown)}"
            for name in expected.keys() & part.keys():
                shape = self._part_of(expected[name], name)
                if part[name].shape != shape:
                    yield f"{file.path}: {name!r} must have shape {shape}: got {part[name].shape}"
                elif part[name].dtype.name not in ("float16", "bfloat16", "float32", "float64"):
                    yield f"{file.path}: {name!r} must be of floats: got {part[name].dtype}"

    def require_one_run(self) -> None:
        """Raises ValueError unless the ranks are of one run and step: what each has whole must be
        equal in all.
        """
        first, *others = self.files
        whole = [name for name in self.parts[0] if names.cut_of(name) is None] if others else []
        for file, part in zip(others, self.parts[1:], strict=True):
            for name in whole:
                pairs = zip(self.parts[0][name].blocks(), part[name].blocks(), strict=True)
                if not all(ours.tobytes() == theirs.tobytes() for ours, theirs in pairs):
                    raise ValueError(
                        f"{file.path} is of another run or step than {first.path}:"
                        f" their {name!r} differ"
                    )

    def _part_of(self, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
        axis = {"rows": 0, "thirds": 0, "columns": 1}.get(names.cut_of(name) or "")
        return tuple(
            length // len(self.parts) if at == axis else length for at, length in enumerate(shape)
        )


def open_ranks(folder: Path, ranks: int, closing: contextlib.ExitStack) -> Checkpoint:
    """The checkpoint that `latest` in `folder` names, with `ranks` files. `closing` closes them.

    Raises ValueError, which lists all ranks that are missing or too many.
    """
    step = read_file(folder / LATEST, most=1000).decode(errors="replace").strip()
    if not re.fullmatch(r"\w[\w.-]*", step):
        raise ValueError(f"{folder / LATEST} must be the name of a folder beside it: got {step!r}")
    if not (folder / step).is_dir():
        raise ValueError(f"{folder} lacks the folder {step} that {LATEST} names")
    wanted = [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(ranks)]
    there = {path.name for path in (folder / step).glob("mp_rank_*_model_states.pt")}
    wrong = [f"lacks {name}" for name in wanted if name not in there]
    wrong += [f"has {name} too many" for name in sorted(there.difference(wanted))]
    if wrong:
        raise ValueError(
            f"{folder / step} {', '.join(wrong)}: {CONFIG} says model_parallel_size {ranks}"
        )
    files = [closing.enter_context(TorchFile(folder / step / name)) for name in wanted]
    checkpoint = Checkpoint(files)
    for name in _COUNTERS:
        found = [file.content[name] for file in files if type(file.content.get(name)) is int]
        if name == "mp_world_size" and any(number != ranks for number in found):
            raise ValueError(
                f"{folder / step} was written by {found[0]} ranks, {CONFIG} says {ranks}"
            )
        for file, number in zip(files, found, strict=False):
            if number != found[0]:
                raise ValueError(
                    f"{file.path} is of another run or step than {files[0].path}:"
                    f" {name} {number}, not {found[0]}"
                )
    return checkpoint


def read_labels(file: Path) -> np.ndarray:
    """The cluster of each image token, int32 [image tokens]. Raises ValueError."""
    content = read_file(file, most=1 << 26)
    try:
        labels = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file} is damaged ({one_line(error)})") from error
    if not isinstance(labels, np.ndarray) or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"{file} must be one row of whole numbers")
    if not labels.size or labels.min() < 0 or labels.max() >= labels.size:
        raise ValueError(f"{file} must have a cluster for each image token, from 0 on")
    return labels.astype(np.int32)


def _state_dict(file: TorchFile) -> Mapping[str, Tensor]:
    content = file.content
    module = content.get("module") if isinstance(content, dict) else None
    if not isinstance(module, dict) or not module:
        raise ValueError(
            f"{file.path} has no tensors under 'module': it is no published checkpoint"
        )
    for name, tensor in module.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{file.path} has something under 'module' that is no tensor: {name!r}"
            )
    return module


def _listed(found: list[str]) -> str:
    return ("tensor " if len(found) == 1 else "tensors ") + ", ".join(map(repr, found))
