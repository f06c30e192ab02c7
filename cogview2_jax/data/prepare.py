"""Inputs of a source → shards of records in a folder: parallel, resumable, the same every time.

The records depend only on the inputs and the settings: batches for the tokenizer are formed by
input number, so that the numbers of threads and processes change nothing. `shards` writes the
shards and shares them between processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import sentencepiece as spm

from cogview2_jax.config import HVQVAEConfig
from cogview2_jax.data import defaults
from cogview2_jax.data import manifest as manifests
from cogview2_jax.data.manifest import Manifest
from cogview2_jax.data.records import RecordLayout, text_part
from cogview2_jax.data.shards import Progress, Recipe, Report, Run, Work, write_shards
from cogview2_jax.data.sources import Captions, Input, Refused, Source, refused_text
from cogview2_jax.tokenizer import text
from cogview2_jax.tokenizer.cleaning import TextError
from cogview2_jax.tokenizer.image import to_tokens
from cogview2_jax.tokenizer.pictures import fit_picture, open_picture, read_picture


def prepare_tokens(
    source: Source,
    folder: Path,
    layout: RecordLayout,
    text_model: spm.SentencePieceProcessor,
    tokenizer: Any,
    tokenizer_config: HVQVAEConfig,
    *,
    batch_size: int = defaults.BATCH_SIZE,
    allow_unknown: bool | None = None,
    apart: bool = False,
    shard_size: int = defaults.SHARD_SIZE,
    workers: int = 1,
    progress: Progress = lambda inputs: None,
    run: Run = write_shards,
) -> Report:
    """Token records: rows of `layout`, as little-endian int32.

    `tokenizer` is the parameter tree of the image tokenizer. Texts of a set share a record, as
    published; with `apart`, each has its own record. A caption without a word, one that does not
    fit, one that is not Unicode and, unless `allow_unknown`, one with words that the text model
    cannot spell is refused, with the texts that share its record. `allow_unknown` None follows the
    layout's vocabulary. A shard has `shard_size` inputs.

    `workers` threads read and decode; `progress` is called with numbers of inputs as they are done,
    first with those done before. Raises ValueError if the folder was begun with other settings or
    (before it is begun) if a batch does not fit the memory, OSError (one line) if something cannot
    be written; the same call then continues where this one stopped. `run` is who does the work:
    this process, or those of `engine.on_cluster`.
    """
    if allow_unknown is None:
        allow_unknown = layout.vocabulary.as_published
    settings = {
        "source": source.fingerprint,
        **_text_settings(text_model, layout),
        "tokenizer": fingerprint(tokenizer),
        "tokenizer_config": dataclasses.asdict(tokenizer_config),
        "batch_size": batch_size,
        "allow_unknown": allow_unknown,
        "apart": apart,
    }
    manifest = Manifest(manifests.TOKENS, len(source), shard_size, layout, settings)
    manifests.require_same(folder, manifest)  # before anything is compiled
    for size in layout.sizes:
        _require_memory(tokenizer, tokenizer_config, batch_size, size, layout.stride)

    def read(item: Input, number: int) -> tuple[Any, list[tuple[str, Refused]]]:
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
        pictures = [list(each) for each in zip(*(pictures for _, pictures in batch), strict=True)]
        image = _image_tokens(pictures, tokenizer, tokenizer_config, batch_size, layout)
        return [
            [np.concatenate([row, ids]).astype("<i4").tobytes() for row in rows]
            for (rows, _), ids in zip(batch, image, strict=True)
        ]

    recipe = Recipe(read, write, batch_size)
    return run(Work(source, manifest, recipe), folder, workers, progress)


def prepare_token_file(
    source: Source,
    folder: Path,
    layout: RecordLayout,
    text_model: spm.SentencePieceProcessor,
    *,
    shard_size: int = defaults.SHARD_SIZE,
    workers: int = 1,
    progress: Progress = lambda inputs: None,
    run: Run = write_shards,
) -> Report:
    """Token records of rows that are tokens already. Arguments and errors are those of
    `prepare_tokens`.
    """
    settings = {"source": source.fingerprint, **_text_settings(text_model, layout)}
    manifest = Manifest(manifests.TOKENS, len(source), shard_size, layout, settings)

    def read(item: Input, number: int) -> tuple[Any, list[tuple[str, Refused]]]:
        return item.picture, []

    def write(batch: Sequence[Any]) -> list[list[bytes]]:
        return [[row.astype("<i4").tobytes()] for row in batch]

    return run(Work(source, manifest, Recipe(read, write, 1)), folder, workers, progress)


def prepare_pictures(
    source: Source,
    folder: Path,
    *,
    shard_size: int = defaults.SHARD_SIZE,
    workers: int = 1,
    progress: Progress = lambda inputs: None,
    run: Run = write_shards,
) -> Report:
    """Picture records, to train an image tokenizer: the unchanged content of each file that can be
    opened; pixels (Scenes) become PNG. Captions are ignored. Arguments and errors are those of
    `prepare_tokens`.
    """
    settings = {"source": source.fingerprint}
    manifest = Manifest(manifests.PICTURES, len(source), shard_size, None, settings)

    def read(item: Input, number: int) -> tuple[Any, list[tuple[str, Refused]]]:
        picture = item.picture
        if isinstance(picture, (str, os.PathLike)):
            picture = read_picture(picture)
        opened = open_picture(picture)
        if isinstance(picture, bytes):
            return picture, []
        content = io.BytesIO()
        opened.save(content, "PNG")
        return content.getvalue(), []

    def write(batch: Sequence[Any]) -> list[list[bytes]]:
        return [[content] for content in batch]

    recipe = Recipe(read, write, 1)
    return run(Work(source, manifest, recipe), folder, workers, progress)


def _text_settings(text_model: spm.SentencePieceProcessor, layout: RecordLayout) -> dict[str, Any]:
    """What a manifest says of how text was read."""
    vocabulary = layout.vocabulary
    return {
        "text_model": hashlib.sha256(text_model.serialized_model_proto()).hexdigest(),
        "first_chinese": vocabulary.first_chinese,
        # No key else, as in folders of version 0.1.
        **({"as_published": True} if vocabulary.as_published else {}),
    }


def fingerprint(tree: Any) -> str:
    """SHA-256 of arrays with their names, shapes and dtypes, as hexadecimal digits."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        leaf = np.ascontiguousarray(jax.device_get(leaf))  # one at a time: a tree may be large
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}\n".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def _split(captions: tuple[Captions, ...], apart: bool) -> Iterator[Captions]:
    for one_set in captions:
        if apart:
            yield from ({field: words} for field, words in one_set.items())
        else:
            yield one_set


def _image_tokens(
    pictures: Sequence[Sequence[np.ndarray]],
    tokenizer: Any,
    config: HVQVAEConfig,
    batch_size: int,
    layout: RecordLayout,
) -> np.ndarray:
    """Tokens of up to `batch_size` pictures, given at each size of `layout`: int32 [b, cells]."""
    columns = []
    for size, given in zip(layout.sizes, pictures, strict=True):
        # The last batch is padded, so that one program computes all rows.
        whole = np.zeros((batch_size, size, size, 3), np.uint8)
        whole[: len(given)] = given
        columns.append(to_tokens(tokenizer, whole, stride=layout.stride, config=config))
    tokens: np.ndarray = np.concatenate(jax.device_get(columns), axis=1)[: len(pictures[0])]
    return tokens


def _require_memory(
    tokenizer: Any, config: HVQVAEConfig, batch_size: int, size: int, stride: int
) -> None:
    """Raises ValueError if encoding `batch_size` pictures of `size` pixels takes more memory than
    there is. Compiles the program, which the next call reuses.
    """
    pictures = jax.ShapeDtypeStruct((batch_size, size, size, 3), np.uint8)
    batch = f"a batch of {batch_size} pictures of {size} pixels"
    try:
        program = to_tokens.lower(tokenizer, pictures, stride=stride, config=config).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(f"{batch} does not fit the memory: give a smaller --batch-size") from error
    parts = program.memory_analysis()
    if parts is None:  # not every device reports it
        return
    needed = parts.temp_size_in_bytes + parts.argument_size_in_bytes + parts.output_size_in_bytes
    # A CPU device reports no limit: it shares the memory of the machine.
    of_device = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    there = of_device or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ValueError(
            f"{batch} needs {needed / 1e9:.0f} GB of memory of {there / 1e9:.0f} GB:"
            " give a smaller --batch-size"
        )


def _text_row(
    captions: Captions, model: spm.SentencePieceProcessor, layout: RecordLayout, allow_unknown: bool
) -> np.ndarray:
    vocabulary = layout.vocabulary
    texts = []
    for field, words in captions.items():
        try:
            texts.append(text.encode(model, words, vocabulary, allow_unknown=allow_unknown))
        except TextError as error:
            raise refused_text(error, repr(field)) from error
    needed = sum(map(len, texts)) + len(texts) - 1
    if needed > layout.text_slots:
        raise Refused(
            "long caption", f"{' and '.join(captions)} need {needed} places of {layout.text_slots}"
        )
    try:
        return text_part(texts, layout.text_slots, vocabulary)
    except ValueError as error:
        raise Refused("unfit caption", str(error)) from error
