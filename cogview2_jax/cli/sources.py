"""The argument SOURCE of commands that read many pictures, and its options."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview2_jax.data import defaults

if TYPE_CHECKING:
    from cogview2_jax.data.records import RecordLayout
    from cogview2_jax.data.sources import Source

workers_option = click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=lambda: min(os.cpu_count() or 1, 32),
    show_default="one per processor, at most 32",
    metavar="N",
    help="Threads that read and decode pictures.",
)


def choice_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which inputs of SOURCE are read, and which captions of theirs."""
    choices = (
        click.option(
            "--split",
            default=DEFAULT_SPLIT,
            show_default=True,
            help="Of scenes or a tfds data set.",
        ),
        click.option(
            "--count", type=click.IntRange(1), metavar="N", help="Only the first N inputs."
        ),
        click.option(
            "--caption-field",
            "caption_fields",
            multiple=True,
            metavar="NAME",
            help="Field with the caption.",
        ),
        click.option(
            "--data-dir",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Folder of tfds data sets.",
        ),
    )
    for choice in reversed(choices):
        command = choice(command)
    return command


# The options that each kind of source reads.
TOKEN_FILE = "a token file"
READ_BY: dict[str, set[str]] = {
    TOKEN_FILE: set(),
    "a captions file": {"images", "image_field", "caption_fields"},
    "scenes": {"split", "caption_fields"},
    "a folder": set(),
    "a file of prompts": set(),  # of `data draw`
    "a tfds data set": {"split", "image_field", "caption_fields", "data_dir", "download"},
}
READ_BY_ALL = {"count"}
DEFAULT_SPLIT = "train"


def kind_of(source: str) -> str:
    """What SOURCE names: a key of `READ_BY`."""
    path = Path(source)
    if path.suffix == ".bin":
        return TOKEN_FILE
    if path.suffix in (".jsonl", ".tsv") or path.is_file():
        return "a captions file"
    if source == "scenes":
        return "scenes"
    return "a folder" if path.is_dir() else "a tfds data set"


def require_read(kinds: Collection[str], **chosen: Any) -> None:
    """Raises ValueError for an option that was given and that no source of these kinds reads."""
    read = READ_BY_ALL.union(*(READ_BY[kind] for kind in kinds))
    for name, value in chosen.items():
        given = value not in (None, (), DEFAULT_SPLIT)
        if given and name not in read:
            option = {"caption_fields": "--caption-field"}.get(name, f"--{name.replace('_', '-')}")
            raise ValueError(f"{option}: not an option for {' and '.join(sorted(kinds))}")


def open_to_read(source: str, kind: str, **chosen: Any) -> Source:
    """As `open_source`, of what is only read: no tokens, nothing elsewhere, nothing downloaded."""
    chosen |= {"images": None, "image_field": defaults.IMAGE_FIELD, "download": False}
    return open_source(source, kind, None, **chosen)


def open_source(
    source: str,
    kind: str,
    layout: RecordLayout | None,
    *,
    pictures: bool,
    split: str,
    count: int | None,
    images: Path | None,
    image_field: str,
    caption_fields: tuple[str, ...],
    data_dir: Path | None,
    download: bool,
) -> Source:
    """The inputs that SOURCE names, of `kind`; `layout` is that of a file of tokens.

    Raises ValueError and OSError.
    """
    from cogview2_jax.data import sources

    found: Source
    path = Path(source)
    if kind == TOKEN_FILE:
        if layout is None:
            raise ValueError(f"{source} has tokens, and no pictures or captions")
        found = sources.TokenFile(path, layout)
    elif kind == "a captions file":
        fields = caption_fields or (defaults.CAPTION_FIELD,)
        found = sources.CaptionsFile(path, images, fields, image_field, pictures_only=pictures)
    elif kind == "scenes":
        if count is None:
            raise ValueError("scenes has no end: give --count")
        found = sources.Scenes(count, split, caption_fields)
    elif kind == "a folder":
        if not pictures:
            raise ValueError(
                f"{source} is a folder: give its captions file (.jsonl or .tsv), or --pictures"
            )
        found = sources.PictureFolder(path)
    else:
        found = sources.Tfds(
            source,
            split,
            data_dir,
            caption_fields,
            image_field,
            download=download,
            pictures_only=pictures,
        )
    return found if count is None else sources.First(found, count)
