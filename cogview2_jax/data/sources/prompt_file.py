"""A file of prompts as a source: captions without pictures."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from cogview2_jax.data.sources.inputs import Input, Refused
from cogview2_jax.files import read_file


class PromptFile:
    """The lines of a text file in UTF-8, a prompt each; blank ones do not count.

    Raises ValueError for a file without a line, OSError when it cannot be read.
    """

    def __init__(self, file: Path) -> None:
        content = read_file(file).removeprefix(b"\xef\xbb\xbf")
        lines = enumerate(content.split(b"\n"), 1)
        self._lines = [(number, line.strip()) for number, line in lines if line.strip()]
        self._digest = hashlib.sha256(content).hexdigest()
        if not self._lines:
            raise ValueError(f"{file} has no line with a prompt")

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"source": "prompts", "sha256": self._digest}

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Input:
        number, line = self._lines[index]
        name = f"line {number}"
        try:
            return Input(name, b"", ({"prompt": line.decode()},))
        except UnicodeDecodeError as error:
            raise Refused("malformed line", "the line is not UTF-8", name) from error
