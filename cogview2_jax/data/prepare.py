"""Inputs of a source → shards of records in a folder: parallel, resumable, the same every time.

The inputs are cut into shards by number. A shard is written under a temporary name, read back and
renamed when it is whole, so that a kill, a full disk or a failing machine costs at most the shards
in work. What the records are depends on the inputs and the settings alone: pictures go through the
tokenizer in batches that are cut by number too, whatever the number of threads or processes.

Any number of processes may prepare one folder at once: each takes shards that no other holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import sentencepiece as spm
from PIL import Image

from cogview2_jax.config import HVQVAEConfig
from cogview2_jax.data import manifest as manifests
from cogview2_jax.data.manifest import Manifest
from cogview2_jax.data.records import RecordLayout, text_part
from cogview2_jax.data.sources import Captions, Input, Refused, Source, open_picture
from cogview2_jax.tokenizer import text
from cogview2_jax.tokenizer.cleaning import TextError
from cogview2_jax.tokenizer.image import to_tokens
from cogview2_jax.tokenizer.pictures import fit_picture


class Refusal(NamedTuple):
    """One line of the report. `input` is its number from 0; `caption` says which of several."""

    input: int
    name: str
    kind: str
    reason: str
    caption: str | None = None


class Report(NamedTuple):
    """Numbers of a folder. `complete` is false while another process still works on a shard."""

    inputs: int
    records: int
    refused: dict[str, int]  # kind -> number of refusals
    complete: bool


class _Recipe(NamedTuple):
    """How inputs become records.

    `read` runs in a thread on one input and raises `Refused`; it gives what `write` needs, None
    when nothing of the input is left, and the refusals of single captions. `write` runs in the
    main thread on up to `batch_size` of those and gives the records of each.
    """

    read: Callable[[Input], tuple[Any, list[tuple[str, Refused]]]]
    write: Callable[[Sequence[Any]], list[list[bytes]]]
    batch_size: int


# --- What is prepared -----------------------------------------------------------------------------


def prepare_tokens(
    source: Source,
    folder: Path,
    layout: RecordLayout,
    text_model: spm.SentencePieceProcessor,
    tokenizer: Any,
    tokenizer_config: HVQVAEConfig,
    *,
    batch_size: int = 64,
    allow_unknown: bool | None = None,
    apart: bool = False,
    shard_size: int = 4096,
    workers: int = 1,
    progress: Callable[[int], None] = lambda inputs: None,
) -> Report:
    """Token records: rows of `layout`, as little-endian int32.

    `tokenizer` is the parameter tree of the image tokenizer. Texts of a set share a record, as
    published; with `apart`, each has a record of its own. A caption without a word, one that does
    not fit, one that is not Unicode and, unless `allow_unknown`, one with words that the text model
    cannot spell is refused, with the texts that share its record. `allow_unknown` None does as
    the layout's vocabulary says. Shards are of `shard_size` inputs each.

    `workers` threads read and decode; `progress` is called with numbers of inputs as they are done,
    first with those done before. Raises ValueError when the folder was begun with other settings
    and, before it is begun, when a batch does not fit the memory, OSError (one line) when something
    cannot be written; the same call then goes on where this one stopped.
    """
    if allow_unknown is None:
        allow_unknown = layout.vocabulary.as_published
    settings = {
        "source": source.fingerprint,
        "text_model": hashlib.sha256(text_model.serialized_model_proto()).hexdigest(),
        "first_chinese": layout.vocabulary.first_chinese,
        "tokenizer": fingerprint(tokenizer),
        "tokenizer_config": dataclasses.asdict(tokenizer_config),
        "batch_size": batch_size,
        "allow_unknown": allow_unknown,
        "apart": apart,
    }
    if layout.vocabulary.as_published:  # no key else, as in folders of version 0.1
        settings["as_published"] = True
    manifest = Manifest(manifests.TOKENS, len(source), shard_size, layout, settings)
    for size in layout.sizes:
        _require_memory(tokenizer, tokenizer_config, batch_size, size, layout.stride)

    def read(item: Input) -> tuple[Any, list[tuple[str, Refused]]]:
        rows, refused = [], []
        for captions in _split(item.captions, apart):
            try:
                rows.append(_text_row(captions, text_model, layout, allow_unknown))
            except Refused as one:
                refused.append((" | ".join(captions.values()), one))
        if not rows:
            return None, refused
        picture = open_picture(item.picture)
        return (rows, [fit_picture(picture, size, size) for size in layout.sizes]), refused

    def write(batch: Sequence[Any]) -> list[list[bytes]]:
        columns = []
        for number, size in enumerate(layout.sizes):
            # Always as many, so that there is one program, and each row comes from the same one.
            pictures = np.zeros((batch_size, size, size, 3), np.uint8)
            pictures[: len(batch)] = [pixels[number] for _, pixels in batch]
            columns.append(
                to_tokens(tokenizer, pictures, stride=layout.stride, config=tokenizer_config)
            )
        image = np.concatenate(jax.device_get(columns), axis=1)
        return [
            [np.concatenate([row, ids]).astype("<i4").tobytes() for row in rows]
            for (rows, _), ids in zip(batch, image, strict=False)
        ]

    return _prepare(source, folder, manifest, _Recipe(read, write, batch_size), workers, progress)


def prepare_pictures(
    source: Source,
    folder: Path,
    *,
    shard_size: int = 4096,
    workers: int = 1,
    progress: Callable[[int], None] = lambda inputs: None,
) -> Report:
    """Picture records, to train an image tokenizer: each file as it was found, once it is known to
    open; pixels (Scenes) become PNG. Captions are passed over. Arguments and errors are those of
    `prepare_tokens`.
    """
    settings = {"source": source.fingerprint}
    manifest = Manifest(manifests.PICTURES, len(source), shard_size, None, settings)

    def read(item: Input) -> tuple[Any, list[tuple[str, Refused]]]:
        opened = open_picture(item.picture)
        if isinstance(item.picture, bytes):
            return item.picture, []
        content = io.BytesIO()
        opened.save(content, "PNG")
        return content.getvalue(), []

    def write(batch: Sequence[Any]) -> list[list[bytes]]:
        return [[content] for content in batch]

    return _prepare(source, folder, manifest, _Recipe(read, write, 1), workers, progress)


def fingerprint(tree: Any) -> str:
    """SHA-256 of arrays with their names, shapes and dtypes, as hexadecimal digits."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]:
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}\n".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def _split(captions: tuple[Captions, ...], apart: bool) -> Iterator[Captions]:
    for one_set in captions:
        if apart:
            yield from ({field: words} for field, words in one_set.items())
        else:
            yield one_set


def _require_memory(
    tokenizer: Any, config: HVQVAEConfig, batch_size: int, size: int, stride: int
) -> None:
    """Raises ValueError when tokens of `batch_size` pictures of `size` pixels take more memory than
    there is. Compiles the program, which is then at hand.
    """
    pictures = jax.ShapeDtypeStruct((batch_size, size, size, 3), np.uint8)
    batch = f"a batch of {batch_size} pictures of {size} pixels"
    try:
        program = to_tokens.lower(tokenizer, pictures, stride=stride, config=config).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(f"{batch} does not fit the memory: make batches smaller") from error
    parts = program.memory_analysis()
    if parts is None:  # a device that does not say
        return
    needed = parts.temp_size_in_bytes + parts.argument_size_in_bytes + parts.output_size_in_bytes
    # On a CPU the device has no memory of its own, and says nothing.
    of_device = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    there = of_device or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ValueError(
            f"{batch} needs {needed / 1e9:.0f} GB of memory, and there are {there / 1e9:.0f}:"
            " make batches smaller"
        )


# The kinds of `TextError`, as the report counts them.
_TEXT_KINDS = {
    "malformed": "malformed line",
    "empty": "empty caption",
    "long": "long caption",
    "unknown": "unknown words",
}


def _text_row(
    captions: Captions, model: spm.SentencePieceProcessor, layout: RecordLayout, allow_unknown: bool
) -> np.ndarray:
    vocabulary = layout.vocabulary
    texts = []
    for field, words in captions.items():
        try:
            texts.append(text.encode(model, words, vocabulary, allow_unknown=allow_unknown))
        except TextError as error:
            reason = str(error).removeprefix("text ")
            raise Refused(_TEXT_KINDS[error.kind], f"{field!r} {reason}") from error
    needed = sum(map(len, texts)) + len(texts) - 1
    if needed > layout.text_slots:
        raise Refused(
            "long caption", f"{' and '.join(captions)} need {needed} places of {layout.text_slots}"
        )
    try:
        return text_part(texts, layout.text_slots, vocabulary)
    except ValueError as error:
        raise Refused("unfit caption", str(error)) from error


# --- Shards ---------------------------------------------------------------------------------------


def _prepare(
    source: Source,
    folder: Path,
    manifest: Manifest,
    recipe: _Recipe,
    workers: int,
    progress: Callable[[int], None],
) -> Report:
    """Make all shards of `manifest` in `folder` that are not there."""
    with _one_line_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            manifests.begin(folder, manifest)
    done = [shard for shard in range(manifest.num_shards) if _is_done(folder, manifest, shard)]
    progress(sum(len(manifest.inputs(shard)) for shard in done))
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        # Pillow warns of oddities that do no harm, but for sizes made to exhaust the memory.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
        try:
            for shard in range(manifest.num_shards):
                with _held(folder, manifest, shard) as mine:
                    if mine and not _is_done(folder, manifest, shard):
                        _write_shard(
                            source, folder, manifest, shard, recipe, pool, workers, progress
                        )
        finally:
            pool.shutdown(cancel_futures=True)
    with _one_line_errors(folder), _locked(folder):
        return _summarise(folder, manifest)


def _summarise(folder: Path, manifest: Manifest) -> Report:
    """Numbers of the shards that are done; when all are, also written, with all refusals."""
    records, lines = 0, []
    kinds: Counter[str] = Counter()
    done = [shard for shard in range(manifest.num_shards) if _is_done(folder, manifest, shard)]
    for shard in done:
        report = _read_report(folder, manifest, shard)
        records += report["records"]
        kinds.update(refusal["kind"] for refusal in report["refused"])
        lines += [_json_line(refusal) for refusal in report["refused"]]
    made = Report(
        sum(len(manifest.inputs(shard)) for shard in done),
        records,
        dict(kinds.most_common()),
        len(done) == manifest.num_shards,
    )
    if made.complete:
        for lock in folder.glob(".records-*.lock"):  # of runs killed just after their last shard
            lock.unlink(missing_ok=True)
        content = json.dumps(made._asdict(), indent=2) + "\n"
        manifests.write_durably(folder / manifests.REFUSED, b"".join(lines))
        manifests.write_durably(folder / manifests.REPORT, content.encode())
    return made


def _write_shard(
    source: Source,
    folder: Path,
    manifest: Manifest,
    shard: int,
    recipe: _Recipe,
    pool: ThreadPoolExecutor,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    file = manifest.shard_file(folder, shard)
    partial = file.with_name(f".{file.name}.partial")
    refusals: list[Refusal] = []
    written: list[bytes] = []  # digests

    def read(index: int) -> tuple[Any, list[Refusal]]:
        name = ""
        try:
            item = source[index]
            name = item.name
            made, refused = recipe.read(item)
        except Refused as one:
            return None, [Refusal(index, _short(one.name or name), one.kind, _short(one.reason))]
        return made, [
            Refusal(index, _short(name), one.kind, _short(one.reason), _short(caption))
            for caption, one in refused
        ]

    def accepted() -> Iterator[Any]:
        ahead = workers + 2 * recipe.batch_size
        for made, refused in _in_order(pool, read, manifest.inputs(shard), ahead):
            refusals.extend(refused)
            if made is not None:
                yield made
            progress(1)

    try:
        with _one_line_errors(folder):
            # One record a group: random access reads no neighbours.
            writer = ArrayRecordWriter(str(partial), "group_size:1")
        try:
            items = accepted()
            while batch := list(islice(items, recipe.batch_size)):
                for records in recipe.write(batch):
                    for record in records:
                        with _one_line_errors(folder):
                            writer.write(record)
                        written.append(hashlib.sha256(record).digest())
        finally:
            with _one_line_errors(folder):
                writer.close()
        report = {"records": len(written), "refused": [each._asdict() for each in refusals]}
        with _one_line_errors(folder):
            _check(partial, written)
            manifests.write_durably(_report_file(folder, manifest, shard), _json_line(report))
            manifests.rename_durably(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[int], Any], indices: range, ahead: int
) -> Iterator[Any]:
    """`function` of each index, in order, with at most `ahead` in work."""
    pending: deque[Future[Any]] = deque()
    for index in indices:
        pending.append(pool.submit(function, index))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _held(folder: Path, manifest: Manifest, shard: int) -> Iterator[bool]:
    """Whether this process alone holds the shard until the end; the system frees it at a kill."""
    file = manifest.shard_file(folder, shard)
    if file.exists():
        yield False
        return
    lock = file.with_name(f".{file.name}.lock")
    with lock.open("wb") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            # Whoever opened it before this sees, once it has the lock, that the shard is done.
            lock.unlink(missing_ok=True)


def _is_done(folder: Path, manifest: Manifest, shard: int) -> bool:
    return manifest.shard_file(folder, shard).exists()


def _report_file(folder: Path, manifest: Manifest, shard: int) -> Path:
    return manifest.shard_file(folder, shard).with_suffix(".json")


def _read_report(folder: Path, manifest: Manifest, shard: int) -> dict[str, Any]:
    file = _report_file(folder, manifest, shard)
    try:
        report: dict[str, Any] = json.loads(file.read_bytes())
        return {"records": int(report["records"]), "refused": list(report["refused"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is missing or damaged: delete {manifest.shard_file(folder, shard).name},"
            " and prepare will make both again"
        ) from error


def _check(file: Path, digests: Sequence[bytes]) -> None:
    """Raises OSError unless what lies on the disk is what was written."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(file))
    try:
        intact = reader.num_records() == len(digests)
        intact = intact and all(hashlib.sha256(reader.read()).digest() == each for each in digests)
        reader.close()  # raises what was wrong when it was opened
    except (RuntimeError, IndexError):
        intact = False
    if not intact:
        raise OSError(f"{file.name} does not hold what was written to it: a full or failing disk")


@contextlib.contextmanager
def _one_line_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None)
        # array_record says "write() failed: No space left on device; writing …; …"
        reason = reason or str(error).split(";")[0].removeprefix("write() failed: ")
        raise OSError(
            f"cannot write to {folder}: {reason} (the same command goes on from here)"
        ) from error


def _short(words: str, most: int = 300) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def _json_line(content: Any) -> bytes:
    # Half of a surrogate pair, which a file name may have, stays the escape that JSON has for it.
    return (json.dumps(content, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
