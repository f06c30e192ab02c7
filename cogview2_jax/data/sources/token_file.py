"""A binary file of token records, rows of int32, as the released `pretrain_coglm.py` reads it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from cogview2_jax.data.records import RecordLayout
from cogview2_jax.data.sources.inputs import Input, Refused, some_of


class TokenFile:
    """Rows of `layout`, little-endian int32: 111 text ids, a pad and 400 image ids as published.

    Raises FileNotFoundError, and ValueError for a file that is no whole number of rows.
    """

    def __init__(self, file: Path, layout: RecordLayout) -> None:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        self._file, self._layout = file, layout
        size, row = file.stat().st_size, 4 * layout.length
        if not size or size % row:
            raise ValueError(
                f"{file} has {size:,} bytes, no whole number of rows of {layout.length} int32:"
                " it is truncated, or of another model"
            )
        self._rows = np.memmap(file, "<i4", "r", shape=(size // row, layout.length))

    @property
    def fingerprint(self) -> dict[str, Any]:
        some = np.ascontiguousarray(self._rows[list(some_of(len(self)))])
        return {
            "source": "token file",
            "file": self._file.name,
            "bytes": self._rows.nbytes,
            "rows": hashlib.sha256(some.tobytes()).hexdigest()[:16],
        }

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Input:
        """A row, int32 [length], in the place of a picture. Raises Refused for ids that are no text
        or no picture, and a row without a text.
        """
        row, vocabulary = np.array(self._rows[index]), self._layout.vocabulary
        name, slots = f"{self._file.name} row {index}", self._layout.text_slots
        image, text = row[slots + 1 :], row[: slots + 1]
        words = text[text != vocabulary.pad]
        first_text = vocabulary.num_image
        for kind, ids, low, high in (
            ("image", image, 0, first_text),
            ("text", words, first_text, first_text + vocabulary.num_text),
        ):
            wrong = ids[(ids < low) | (ids >= high)]
            if wrong.size:
                raise Refused("malformed record", f"{wrong[0]} is no {kind} token", name)
        if not len(words):
            raise Refused("empty caption", "no text token", name)
        if text[0] == vocabulary.pad:
            raise Refused("malformed record", "does not begin with a text", name)
        if text[-1] != vocabulary.pad:
            raise Refused("long caption", f"{slots + 1} places of {slots}", name)
        return Input(name, row, ())
