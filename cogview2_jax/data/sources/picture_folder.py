"""A folder of pictures, and of folders with more."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from pathlib import Path
from typing import Any

from cogview2_jax.data import manifest
from cogview2_jax.data.sources.inputs import (
    Input,
    LeftOut,
    Refused,
    digest_of_sizes,
    some_of,
)
from cogview2_jax.tokenizer.pictures import PictureError, endings, read_picture


class PictureFolder:
    """All pictures in a folder and below it, by name, without captions.

    Pictures are the files with an ending of a format that Pillow opens, and those without any
    ending. Links are followed; a folder that several links lead to is read once. Other files, and
    folders that cannot be listed, are in `left_out`. Hidden files and folders (".…") and folders of
    prepared records are skipped. Raises ValueError if there is no picture.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names, self.left_out = _files_below(folder)
        if not self._names:
            others = f", and {len(self.left_out)} of other kinds" if self.left_out else ""
            raise ValueError(f"{folder} has 0 pictures{others}")

    @property
    def fingerprint(self) -> dict[str, Any]:
        names = "\n".join(self._names).encode(errors="surrogateescape")
        some = (self._folder / self._names[number] for number in some_of(len(self)))
        return {
            "source": self._folder.name,
            "sha256": hashlib.sha256(names).hexdigest(),
            "sizes": digest_of_sizes(some),
        }

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Input:
        name = self._names[index]
        try:
            return Input(name, read_picture(self._folder / name), ())
        except PictureError as error:
            raise Refused(error.kind, error.reason, name) from error


def _files_below(folder: Path) -> tuple[list[str], list[LeftOut]]:
    """Pictures by their path from `folder`, and the other files, both in order."""
    pictures: list[str] = []
    others: list[LeftOut] = []
    seen: set[tuple[int, int]] = set()
    # Linked folders come last, so that a folder that is also linked is listed by its own path.
    to_list, linked = deque([""]), deque[str]()
    while to_list or linked:
        place = to_list.popleft() if to_list else linked.popleft()
        try:
            status = os.stat(folder / place)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder / place) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if not place:
                raise
            others.append(LeftOut(place, error.strerror or "cannot be listed"))
            continue
        if place and any(entry.name == manifest.MANIFEST for entry in entries):
            continue
        for entry in entries:
            name = f"{place}/{entry.name}".lstrip("/")
            ending = Path(entry.name).suffix.lower()
            if entry.name.startswith("."):
                continue
            if not _is_folder(entry):
                if not ending or ending in endings():
                    pictures.append(name)
                else:
                    others.append(LeftOut(name, f"{ending} is not the ending of a picture"))
            elif not entry.is_symlink():
                to_list.append(name)
            elif _holds(entry.path):
                others.append(LeftOut(name, "a link to a folder that holds it"))
            else:
                linked.append(name)
    return sorted(pictures), sorted(others)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _holds(link: str) -> bool:
    """Whether a link leads to a folder that contains it."""
    return Path(os.path.realpath(Path(link).parent)).is_relative_to(os.path.realpath(link))
