"""Published checkpoints → a bundle, tensor by tensor.

Everything is checked before a number is read: the files, their sizes against model_config.json, all
names and shapes. Then each tensor is read, put into our axes and dtype, and written (`writing.py`).
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import sentencepiece as spm

from cogview2_jax import __version__
from cogview2_jax import bundle as bundles
from cogview2_jax.config import (
    CogLMConfig,
    DirectSRConfig,
    HVQVAEConfig,
    IterativeSRConfig,
    Sampling,
    TransformerConfig,
    Vocabulary,
)
from cogview2_jax.description import check_description
from cogview2_jax.errors import one_line
from cogview2_jax.published import checkpoints, names
from cogview2_jax.published.checkpoints import Checkpoint, Settings
from cogview2_jax.published.torch_files import TorchFile
from cogview2_jax.published.writing import DTYPES, Entry, Progress, converted, write_safetensors
from cogview2_jax.styles import PUBLISHED_STYLES
from cogview2_jax.tokenizer import text

_SOURCES = "sources.json"  # in the unfinished folder: what it is made from
_MOST_PADDING = 1023  # rows of the word table; more mean that text model or labels are others


class Converted(NamedTuple):
    """What was written, and what to know about it."""

    description: bundles.Description
    parameters: dict[str, int]  # network → count
    notes: list[str]


def convert(
    source: Path,
    target: Path,
    *,
    dtype: str = "float16",
    networks: Sequence[str] = bundles.NETWORKS,
    elsewhere: Mapping[str, Path] | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Write the bundle `target` from the published files in or below `source`.

    `networks` says which; `elsewhere` gives the path of a file that is not below `source`
    ("tokenizer", "text", "labels"). Parameters get the dtype `dtype`, one of `DTYPES`.

    A conversion that was killed or interrupted goes on where it was when it is called again with
    the same files; until then `.<name of target>.partial` beside `target` holds what there is.

    Raises ValueError, in one line, for files that are missing, damaged, ask for code, or do not fit
    each other, and lists all such faults of one kind at once; OSError for a place that cannot be
    read or written. Then there is nothing at `target`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}: got {dtype!r}")
    target = target.absolute()
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists: give a new folder")
    elsewhere = dict(elsewhere or {})
    wanted = [name for name in (*networks, "text", "labels") if name not in elsewhere]
    places = checkpoints.find(source, wanted) | elsewhere
    with contextlib.ExitStack() as closing:
        opened = _open(source, places, networks, closing)
        _require_fit(source, opened)
        for checkpoint in opened.checkpoints.values():
            checkpoint.require_one_run()
        _write(target, opened, opened.files(places), dtype, progress or (lambda now, all: None))
    counts = {
        network: sum(math.prod(leaf.shape) for leaf in names.leaves(opened.config(network)))
        for network in networks
    }
    return Converted(opened.description, counts, opened.notes())


class _Opened(NamedTuple):
    """All files, opened, and the configuration that follows from them."""

    description: bundles.Description
    settings: dict[str, Settings]  # of the transformers
    checkpoints: dict[str, Checkpoint]
    text_model: spm.SentencePieceProcessor
    labels: np.ndarray

    def config(self, network: str) -> Any:
        return getattr(self.description, f"{network}_config")

    def files(self, places: Mapping[str, Path]) -> list[Path]:
        """All that is read."""
        weights = [file.path for each in self.checkpoints.values() for file in each.files]
        settings = [places[network] / checkpoints.CONFIG for network in self.settings]
        return [*weights, *settings, places["text"], places["labels"]]

    def notes(self) -> list[str]:
        codes = self.description.tokenizer_config.codebook_size
        if "tokenizer" not in self.checkpoints or codes == len(self.labels):
            return []
        return [
            f"the tokenizer has {codes} codes and there are {len(self.labels)} image tokens:"
            " it cannot be used together with the other networks"
        ]


def _open(
    source: Path,
    places: Mapping[str, Path],
    networks: Sequence[str],
    closing: contextlib.ExitStack,
) -> _Opened:
    labels = checkpoints.read_labels(places["labels"])
    text_model = text.load_text_model(places["text"])
    try:
        vocabulary = text.vocabulary_for(text_model, len(labels), as_published=True)
    except ValueError as error:
        raise ValueError(f"{places['text']}: {error}") from error
    settings, opened, positions = {}, {}, {}
    for network in networks:
        if network == "tokenizer":
            continue
        folder = places[network]
        settings[network] = read = checkpoints.read_settings(folder)
        most = vocabulary.size + _MOST_PADDING
        if not vocabulary.size <= read.vocab_size <= most:
            raise ValueError(
                f"{folder / checkpoints.CONFIG}: vocab_size must be from {vocabulary.size} to"
                f" {most}, for {len(labels)} image tokens, {text_model.vocab_size()} text pieces"
                f" and 3 start tokens: got {read.vocab_size}"
            )
        opened[network] = checkpoints.open_ranks(folder, read.ranks, closing)
        if read.transformer.num_layers > len(opened[network].parts[0]):
            raise ValueError(
                f"{folder / checkpoints.CONFIG}: num_layers must be that of the checkpoint, which"
                f" has {len(opened[network].parts[0])} tensors: got {read.transformer.num_layers}"
            )
        positions[network] = _positions(opened[network])
    tokenizer = HVQVAEConfig(codebook_size=len(labels))
    if "tokenizer" in networks:
        file = closing.enter_context(TorchFile(places["tokenizer"]))
        opened["tokenizer"] = Checkpoint([file])
        try:
            tokenizer = names.hvqvae_config(opened["tokenizer"].parts[0])
        except (ValueError, ArithmeticError, IndexError) as error:
            raise ValueError(f"{file.path} is no published tokenizer: {one_line(error)}") from error
    try:
        description = _describe(settings, positions, vocabulary, tokenizer)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    check_description(description, source)
    return _Opened(description, settings, opened, text_model, labels)


def _positions(checkpoint: Checkpoint) -> int:
    """Rows of the position table, which no configuration says."""
    table = checkpoint.parts[0].get("transformer.position_embeddings.weight")
    # One of another kind is refused with all that does not fit.
    return table.shape[0] if table and len(table.shape) == 2 else CogLMConfig().num_positions


def _describe(
    settings: Mapping[str, Settings],
    positions: Mapping[str, int],
    vocabulary: Vocabulary,
    tokenizer: HVQVAEConfig,
) -> bundles.Description:
    """The configuration of all networks: grids, windows and rounds are the published ones."""
    any_sizes = next((each.transformer for each in settings.values()), TransformerConfig())

    def sizes(network: str) -> dict[str, Any]:
        of_network = settings[network].transformer if network in settings else any_sizes
        common: dict[str, Any] = {"transformer": of_network, "vocabulary": vocabulary}
        return common | {"num_positions": positions.get(network, CogLMConfig().num_positions)}

    return bundles.Description(
        CogLMConfig(**sizes("coglm")),
        DirectSRConfig(CogLMConfig(**sizes("direct"))),
        IterativeSRConfig(**sizes("iterative")),
        tokenizer,
        Sampling(),
        made_with=bundles.made_with(),
        styles=PUBLISHED_STYLES,
    )


def _require_fit(source: Path, opened: _Opened) -> None:
    """Raises ValueError with everything that is missing, unexpected or of another shape."""
    problems: list[str] = []
    for network, checkpoint in opened.checkpoints.items():
        settings = opened.settings.get(network)
        try:
            leaves = names.leaves(opened.config(network))
        except Exception as error:  # jax and flax raise what their layers happen to raise
            raise ValueError(f"{source}: no {network} of these sizes: {one_line(error)}") from error
        ignored = names.HVQVAE_BUFFERS if network == "tokenizer" else ()
        problems += checkpoint.problems(leaves, settings and settings.vocab_size, ignored)
    if problems:
        raise ValueError(f"{source} does not fit its configuration: {'; '.join(problems)}")


def _write(
    target: Path, opened: _Opened, sources: Sequence[Path], dtype: str, progress: Progress
) -> None:
    """Write the files in a folder beside `target`, which is renamed at the end.

    When the process is killed, the folder stays, and the next conversion of the same files goes on
    in it.
    """
    entries = list(_entries(opened, dtype))
    unfinished = target.with_name(f".{target.name}.partial")
    with _held(unfinished, target):
        _keep_only_of(unfinished, _fingerprint(sources, dtype))
        try:
            weights = unfinished / bundles.WEIGHTS
            there = weights.stat().st_size if weights.exists() else 0
            needed, free = sum(each.bytes for each in entries), shutil.disk_usage(unfinished).free
            if needed - there > free:
                raise OSError(f"{target} needs {needed - there:,} bytes, and {free:,} are free")
            content = json.dumps(bundles.to_json(opened.description), indent=2) + "\n"
            (unfinished / bundles.CONFIG).write_text(content, "utf-8")
            (unfinished / bundles.TEXT_MODEL).write_bytes(
                opened.text_model.serialized_model_proto()
            )
            with open(os.open(weights, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                write_safetensors(file, entries, progress)
            (unfinished / _SOURCES).unlink()
            unfinished.rename(target)
        except Exception:  # and not KeyboardInterrupt, after which one may go on
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


@contextlib.contextmanager
def _held(unfinished: Path, target: Path) -> Iterator[None]:
    """Be the only conversion in the folder `unfinished`, which is made. Raises OSError."""
    unfinished.mkdir(parents=True, exist_ok=True)
    folder = os.open(unfinished, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"another process is converting to {target}: wait for it") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(folder)


def _fingerprint(sources: Sequence[Path], dtype: str) -> str:
    """What is converted: the files as they are now, and to what."""
    status = [(str(file.absolute()), file.stat()) for file in sources]
    files = [[name, found.st_size, found.st_mtime_ns] for name, found in status]
    return json.dumps([__version__, dtype, files])


def _keep_only_of(unfinished: Path, fingerprint: str) -> None:
    """Empties the folder unless what is in it was begun with the same files. Raises OSError for
    files that no conversion wrote.
    """
    ours = {_SOURCES, bundles.CONFIG, bundles.TEXT_MODEL, bundles.WEIGHTS}
    there = {file.name for file in unfinished.iterdir()}
    if foreign := sorted(there - ours):
        raise FileExistsError(f"{unfinished} is needed and has {foreign[0]!r} in it: move it away")
    note = unfinished / _SOURCES
    if not note.is_file() or note.read_text("utf-8") != fingerprint:
        for name in there:
            (unfinished / name).unlink()
        note.write_text(fingerprint, "utf-8")


def _entries(opened: _Opened, dtype: str) -> Iterator[Entry]:
    kind = np.dtype(jax.numpy.dtype(dtype))
    labels = opened.labels
    yield Entry(
        bundles.CLUSTER_LABELS, "I32", labels.shape, labels.nbytes, lambda _: iter([labels])
    )
    for network, checkpoint in opened.checkpoints.items():
        for leaf in names.leaves(opened.config(network)):
            size = math.prod(leaf.shape) * kind.itemsize
            yield Entry(
                f"{network}/{leaf.path}",
                DTYPES[dtype],
                leaf.shape,
                size,
                partial(converted, leaf, checkpoint, kind),
            )
