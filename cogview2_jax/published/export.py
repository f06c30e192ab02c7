"""A bundle → files in the published layout, tensor by tensor: the way back from `convert`.

The files hold what `convert`, torch and the published library read: tensors by their published
names, counters, sizes. Numbers stay as they are in the bundle, bit for bit.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from cogview2_jax import bundle as bundles
from cogview2_jax.config import DirectSRConfig, HVQVAEConfig
from cogview2_jax.errors import one_line
from cogview2_jax.published import names
from cogview2_jax.published.checkpoints import CONFIG, FILES, FOLDERS, LATEST
from cogview2_jax.published.names import Leaf
from cogview2_jax.published.torch_writing import NewTensor, write_pt
from cogview2_jax.published.writing import Progress

_CLASSES = {"coglm": "BaseModel", "direct": "DsrModel", "iterative": "ItersrModel"}
_STEP = "1"  # any name: `latest` says which one is to be read
_ROWS = 4096  # of a table are read at once


class Exported(NamedTuple):
    """What was written."""

    files: list[Path]
    notes: list[str]


def export(
    bundle: Path | None, target: Path, *, ranks: int = 1, progress: Progress | None = None
) -> Exported:
    """Write the bundle in the folder `bundle` (None: the one that ships) as published files, in the
    new folder `target`. Networks that it lacks are left out.

    `ranks` is the number of model-parallel files of each transformer; the word table is padded with
    zeros to a multiple of it.

    Raises ValueError, in one line, for a bundle that is damaged and for sizes that the ranks do not
    divide; OSError for a place that cannot be read or written. Then there is nothing at `target`.
    """
    folder, target = bundles.locate(bundle), target.absolute()
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists: give a new folder")
    # Checks the bundle as `load` does, without reading its weights.
    description = bundles.read_description(folder)
    text_model = bundles.read_text_model(folder, description)
    there = bundles.networks_in(folder)
    if not there:
        raise ValueError(f"bundle {folder} has no network to export")
    configs = {network: getattr(description, f"{network}_config") for network in there}
    for network, config in configs.items():
        _require_ranks(network, config, ranks)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        unfinished.mkdir(parents=True)
        with safetensors.safe_open(folder / bundles.WEIGHTS, framework="numpy") as stored:
            _write_networks(unfinished, _Stored(folder, stored), configs, ranks, progress)
            if bundles.CLUSTER_LABELS in stored.keys():
                labels = stored.get_tensor(bundles.CLUSTER_LABELS)
                np.save(unfinished / FILES["labels"], labels.astype(np.int64))
        (unfinished / FILES["text"]).write_bytes(text_model.serialized_model_proto())
        written = sorted(file.relative_to(unfinished) for file in unfinished.rglob("*.*"))
        unfinished.rename(target)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / bundles.WEIGHTS} is damaged ({one_line(error)})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Exported([target / file for file in written], _notes(description))


def _notes(description: bundles.Description) -> list[str]:
    ours, published = description.direct_config, DirectSRConfig()
    if (ours.grid, ours.coglm.grid) == (published.grid, published.coglm.grid):
        return []
    return [
        f"the grids are {ours.coglm.grid} and {ours.grid}, and no published file says so: `convert`"
        " and the published library take them for 20×20 and 60×60"
    ]


class _Stored:
    """The weights of a bundle, open."""

    def __init__(self, folder: Path, file: Any) -> None:
        self.where, self._file = folder / bundles.WEIGHTS, file
        self._names = frozenset(file.keys())

    def slice_of(self, network: str, leaf: Leaf) -> Any:
        """The parameter, to be read in parts. Raises ValueError where it is missing or unfit."""
        name = f"{network}/{leaf.path}"
        if name not in self._names:
            raise ValueError(f"{self.where} lacks tensor {name!r}")
        found = self._file.get_slice(name)
        if tuple(found.get_shape()) != leaf.shape:
            raise ValueError(
                f"{self.where}: tensor {name!r} must have shape {leaf.shape}:"
                f" got {tuple(found.get_shape())}"
            )
        return found


def _write_networks(
    folder: Path, stored: _Stored, configs: dict[str, Any], ranks: int, progress: Progress | None
) -> None:
    parts: list[tuple[Path, dict[str, Any]]] = []
    for network, config in configs.items():
        if isinstance(config, HVQVAEConfig):
            module = _tensors(stored, network, config, 0, 1, 0)
            parts.append((folder / FILES["tokenizer"], {"module": module | _buffers(module)}))
            continue
        place = folder / FOLDERS[network]
        (place / _STEP).mkdir(parents=True)
        (place / LATEST).write_text(_STEP, "utf-8")
        sizes = _model_config(network, config, ranks)
        (place / CONFIG).write_text(json.dumps(sizes, indent=4) + "\n", "utf-8")
        for rank in range(ranks):
            content: dict[str, Any] = {
                "module": _tensors(stored, network, config, rank, ranks, sizes["vocab_size"]),
                "buffer_names": [],
                "optimizer": None,
                "global_steps": int(_STEP),
                "iteration": int(_STEP),
                "mp_world_size": ranks,
            }
            parts.append((place / _STEP / f"mp_rank_{rank:02d}_model_states.pt", content))
    total = sum(
        math.prod(tensor.shape) * tensor.dtype.itemsize
        for _, content in parts
        for tensor in content["module"].values()
    )
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OSError(f"{folder.parent} needs {total:,} bytes, and {free:,} are free")
    for file, content in parts:
        write_pt(file, content, lambda now: progress(now, total) if progress else None)


def _transformer_of(config: Any) -> Any:
    coglm = config.coglm if isinstance(config, DirectSRConfig) else config
    return coglm.transformer, coglm.vocabulary, coglm.num_positions


def _model_config(network: str, config: Any, ranks: int) -> dict[str, Any]:
    sizes, vocabulary, positions = _transformer_of(config)
    return {
        "model_class": _CLASSES[network],
        "num_layers": sizes.num_layers,
        "hidden_size": sizes.hidden_size,
        "inner_hidden_size": sizes.hidden_size * sizes.mlp_ratio,
        "num_attention_heads": sizes.num_heads,
        "vocab_size": -(-vocabulary.size // ranks) * ranks,
        "max_sequence_length": positions,
        "layernorm_order": "sandwich",
        "model_parallel_size": ranks,
    }


def _require_ranks(network: str, config: Any, ranks: int) -> None:
    if ranks < 1:
        raise ValueError(f"ranks must be 1 or more: got {ranks}")
    if isinstance(config, HVQVAEConfig):
        return
    heads = _transformer_of(config)[0].num_heads
    if heads % ranks:
        raise ValueError(f"{network} has {heads} heads, which {ranks} ranks do not divide")


def _tensors(
    stored: _Stored, network: str, config: Any, rank: int, ranks: int, vocab_size: int
) -> dict[str, NewTensor]:
    """Published names → the tensors of one rank."""
    made = {}
    for leaf in names.leaves(config):
        source = stored.slice_of(network, leaf)
        dtype = source[:0].dtype
        for number, name in enumerate(leaf.names):
            shape = leaf.published_shape
            if name == names.WORD_TABLE:
                rows = vocab_size // ranks
                blocks = partial(_table_rows, source, shape, rank * rows, rows)
                made[name] = NewTensor(dtype, (rows, shape[1]), blocks)
                continue
            axis = {"rows": 0, "thirds": 0, "columns": 1}.get(names.cut_of(name) or "")
            shape = tuple(
                length // ranks if at == axis else length for at, length in enumerate(shape)
            )
            at = number if leaf.stacked else None
            made[name] = NewTensor(
                dtype, shape, partial(_part, source, leaf, at, name, rank, ranks)
            )
    return made


def _part(
    source: Any, leaf: Leaf, layer: int | None, name: str, rank: int, ranks: int
) -> Iterator[np.ndarray]:
    """What one rank has of a tensor, with the published axes."""
    ours = source[:] if layer is None else source[layer]
    whole = ours.transpose(np.argsort(leaf.axes))
    cut = names.cut_of(name)
    if cut == "thirds":
        yield np.concatenate([np.split(third, ranks)[rank] for third in np.split(whole, 3)])
    elif cut is not None:
        yield np.split(whole, ranks, axis=0 if cut == "rows" else 1)[rank]
    else:
        yield whole


def _table_rows(source: Any, shape: Sequence[int], first: int, number: int) -> Iterator[np.ndarray]:
    """Rows of the word table; those behind its end are zeros."""
    there = max(0, min(shape[0] - first, number))
    for start in range(first, first + there, _ROWS):
        yield source[start : min(start + _ROWS, first + there)]
    if number > there:
        yield np.zeros((number - there, shape[1]), source[:0].dtype)


def _buffers(module: dict[str, NewTensor]) -> dict[str, NewTensor]:
    """The codebook's moving averages, which the published tokenizer has and does not use: every
    code used once.
    """
    codebook = module["quantize.embed.weight"]

    def ones() -> Iterator[np.ndarray]:
        yield np.ones(codebook.shape[0], codebook.dtype)

    size, average = names.HVQVAE_BUFFERS
    return {
        size: NewTensor(codebook.dtype, codebook.shape[:1], ones),
        average: codebook,
    }
