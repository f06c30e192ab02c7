"""What a visitor of the page may ask for, and the error that tells them so."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """So that no visitor takes the memory or the time of all."""

    images: int = 8  # pictures at once
    candidates: int = 16  # base pictures for each of them
    characters: int = 1000  # of a text; the model's own limit is in tokens
    pixels: int = 16_000_000  # of an upload
    file_bytes: int = 32 << 20  # of an upload
    points: int = 20_000  # of what is drawn on a picture
    waiting: int = 16  # requests in the queue
    kept_seconds: int = 3600  # files of a visit, after which they are removed


class Refused(Exception):
    """What a visitor asked for cannot be done. `name` is that of a line of `words`."""

    def __init__(self, name: str, **values: Any) -> None:
        super().__init__(name)
        self.name, self.values = name, values
