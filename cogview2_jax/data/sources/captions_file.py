"""A captions file: each line has a picture's path and its captions."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cogview2_jax.data import defaults
from cogview2_jax.data.sources.inputs import (
    Captions,
    Input,
    Refused,
    caption_sets,
    digest_of_sizes,
    some_of,
)
from cogview2_jax.files import require_file
from cogview2_jax.tokenizer.pictures import PictureError, read_picture


class CaptionsFile:
    """Lines of a `.jsonl` or `.tsv` file, each with the path of a picture and its captions.

    JSON lines: `{"image": "a.jpg", "caption": "a cat"}`, where `fields` name the captions; one may
    be a list, and each of its texts makes a record. Tab-separated: the first line may name the
    columns, if it names `image_field` and all of `fields`; otherwise it is data, and the columns
    are the picture, then `fields` in order. A field that is missing, null or empty gives no
    caption; at least one field must give one. With `pictures_only`, captions are ignored.

    Paths start at `images` (default: the file's folder). Blank lines do not count. Raises
    ValueError for another ending and for no lines, OSError when the file cannot be read.
    """

    def __init__(
        self,
        file: Path,
        images: Path | None = None,
        fields: Sequence[str] = (defaults.CAPTION_FIELD,),
        image_field: str = defaults.IMAGE_FIELD,
        *,
        pictures_only: bool = False,
    ) -> None:
        if file.suffix not in (".jsonl", ".tsv"):
            raise ValueError(f"{file} must be .jsonl (JSON lines) or .tsv (tab-separated)")
        self._file, self._images = file, images or file.parent
        self._fields = () if pictures_only else tuple(fields)
        self._image_field, self._all_fields = image_field, tuple(fields)
        self._columns: tuple[str, ...] = (image_field, *fields)
        require_file(file)
        starts, numbers = array("q"), array("q")
        digest, start = hashlib.sha256(), 0
        with file.open("rb") as content:
            for number, line in enumerate(content, 1):
                digest.update(line)
                if line.strip():
                    starts.append(start)
                    numbers.append(number)
                start += len(line)
        starts.append(start)
        self._starts, self._numbers, self._digest = starts, numbers, digest.hexdigest()
        self._descriptor = os.open(file, os.O_RDONLY)
        if file.suffix == ".tsv" and len(self):
            first: list[str] = []
            with contextlib.suppress(Refused):  # then it is no line of names
                first = self._line(0).split("\t")
            # A caption or a file could be named "image".
            if {image_field, *fields} <= set(first) or (pictures_only and first == [image_field]):
                self._columns = tuple(first)
                del self._starts[0], self._numbers[0]
        if not len(self):
            raise ValueError(f"{file} has no lines")

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {
            "source": self._file.name,
            "sha256": self._digest,
            "image_field": self._image_field,
            "caption_fields": list(self._fields),
            "sizes": digest_of_sizes(map(self._picture, some_of(len(self)))),
        }

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Input:
        where = f"line {self._numbers[index]}"
        try:
            row = self._row(self._line(index))
            picture = self._path_in(row)
            where += f": {picture}"
            captions = self._captions_of(row)
            return Input(where, read_picture(self._images / picture), captions)
        except (Refused, PictureError) as error:
            raise Refused(error.kind, error.reason + self._hint(index), where) from error

    def captions(self, index: int) -> tuple[Captions, ...]:
        """The captions of an input, without its picture. Raises Refused."""
        return self._captions_of(self._row(self._line(index)))

    def _path_in(self, row: Mapping[str, Any]) -> str:
        picture = row.get(self._image_field)
        if not isinstance(picture, str) or not picture:
            raise Refused("malformed line", f"no path of a picture in {self._image_field!r}")
        return picture

    def _picture(self, index: int) -> Path:
        """The file of an input; its folder where the line names none."""
        with contextlib.suppress(Refused):
            return self._images / self._path_in(self._row(self._line(index)))
        return self._images

    def _hint(self, index: int) -> str:
        """A hint for a refused first line that may have been meant to name the columns."""
        if index or self._numbers[0] != 1 or self._file.suffix != ".tsv":
            return ""
        with contextlib.suppress(Refused):
            names = self._line(0).split("\t")
            missing = sorted(set(self._all_fields) - set(names))
            if self._image_field in names and missing:
                return f" (if the line names the columns, it has no {missing[0]!r})"
        return ""

    def _captions_of(self, row: Mapping[str, Any]) -> tuple[Captions, ...]:
        return caption_sets({field: row.get(field) for field in self._fields})

    def _line(self, index: int) -> str:
        start, end = self._starts[index], self._starts[index + 1]
        line = os.pread(self._descriptor, end - start, start)
        try:
            return line.decode("utf-8-sig" if start == 0 else "utf-8").strip("\r\n")
        except UnicodeDecodeError as error:
            raise Refused("malformed line", "not UTF-8") from error

    def _row(self, line: str) -> Mapping[str, Any]:
        if self._file.suffix == ".tsv":
            cells = line.split("\t")
            if len(cells) < 1 + bool(self._fields) or len(cells) > len(self._columns):
                raise Refused(
                    "malformed line", f"{len(cells)} columns where {len(self._columns)} belong"
                )
            row = dict(zip(self._columns, cells, strict=False))
            return {name: cell for name, cell in row.items() if cell}
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Refused("malformed line", f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise Refused("malformed line", "not a JSON object")
        return row
