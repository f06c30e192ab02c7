"""A folder of prepared records: its settings, the layout of its records, the names of its files.

    records.json                             the settings; a folder has one set of them
    records-00003-of-00010.array_record      the records of inputs 3·n to 4·n, in their order
    records-00003-of-00010.json              how many records, and which inputs were refused
    refused.jsonl, report.json               all refusals and their numbers, once all are done

A shard is done when its array_record file exists. Nothing in the folder is code.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogview2_jax.checks import check_count
from cogview2_jax.config import Vocabulary
from cogview2_jax.data.records import RecordLayout
from cogview2_jax.errors import first_difference, one_line

FORMAT = 1
MANIFEST, REPORT, REFUSED = "records.json", "report.json", "refused.jsonl"
TOKENS, PICTURES, FEATURES = "tokens", "pictures", "features"


@dataclass(frozen=True)
class Manifest:
    """The settings that every record of a folder depends on.

    `settings` holds the others as JSON values: source, fields, tokenizer. `layout` is None unless
    `kind` is "tokens": in "pictures" a record is the unchanged content of a picture file, in
    "features" the float32 values that a network found in one (`cogview2_jax.evaluation`).
    """

    kind: str
    num_inputs: int
    shard_size: int
    layout: RecordLayout | None
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        kinds = TOKENS, PICTURES, FEATURES
        if self.kind not in kinds or (self.kind != TOKENS) != (self.layout is None):
            raise ValueError(
                f"kind must be {TOKENS} with a layout, {PICTURES} or {FEATURES}: got {self.kind!r}"
            )
        check_count("num_inputs", self.num_inputs, 0)
        check_count("shard_size", self.shard_size)
        if not isinstance(self.settings, dict):
            raise ValueError(f"settings must be an object: got {self.settings!r}")

    @property
    def num_shards(self) -> int:
        return -(-self.num_inputs // self.shard_size)

    def inputs(self, shard: int) -> range:
        """The numbers of the inputs of a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_inputs))

    def shard_file(self, folder: Path, shard: int) -> Path:
        return folder / f"records-{shard:05d}-of-{self.num_shards:05d}.array_record"

    def shards_in(self, folder: Path) -> list[int]:
        """The shards that are done, in order. It costs as much as the folder has files, however
        many shards there are to be.
        """
        numbers = []
        for name in os.listdir(folder):
            number = name.removeprefix("records-").partition("-of-")[0]
            if number.isascii() and number.isdigit() and int(number) < self.num_shards:
                if name == self.shard_file(folder, int(number)).name:
                    numbers.append(int(number))
        return sorted(numbers)


def to_json(manifest: Manifest) -> dict[str, Any]:
    # Through JSON and back: then it compares equal to a manifest that was read.
    content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(manifest)))
    if layout := content["layout"]:
        # `settings` says how text was read.
        del layout["vocabulary"]["first_chinese"], layout["vocabulary"]["as_published"]
    return {"format": FORMAT} | content


def read(folder: Path) -> Manifest:
    """The manifest of a folder. Raises FileNotFoundError or ValueError, in one line."""
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no prepared records: it has no {MANIFEST}")
    try:
        content = json.loads(file.read_bytes())
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        if layout := content["layout"]:
            settings = content["settings"]
            vocabulary = Vocabulary(
                **layout.pop("vocabulary"),
                first_chinese=settings.get("first_chinese", Vocabulary.first_chinese),
                as_published=settings.get("as_published", False),
            )
            layout["sizes"] = tuple(layout["sizes"])
            content["layout"] = RecordLayout(**layout, vocabulary=vocabulary)
        return Manifest(**content)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or of another version ({one_line(error)})") from error


def begin(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, or check that the existing one has the same settings.

    Raises ValueError that names the first difference, OSError when the folder is not writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).exists():
        write_durably(folder / MANIFEST, (json.dumps(to_json(manifest), indent=2) + "\n").encode())
    require_same(folder, manifest)


def require_same(folder: Path, manifest: Manifest) -> None:
    """Raises ValueError, which names the first difference, for a folder with other settings."""
    if not (folder / MANIFEST).exists():
        return
    there, asked = to_json(read(folder)), to_json(manifest)
    if difference := first_difference(there, asked):
        name, old, new = difference
        raise ValueError(
            f"{folder} was begun with {name} {old!r}, now it is {new!r}:"
            " give the settings it was begun with, or another folder"
        )


def write_durably(file: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all, even after a power cut. One process at
    a time may write it.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_bytes(content)
        rename_durably(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def rename_durably(partial: Path, file: Path) -> None:
    """Give a finished file its name, once its content is on the disk."""
    _flush(partial)
    partial.replace(file)
    _flush(file.parent)


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
