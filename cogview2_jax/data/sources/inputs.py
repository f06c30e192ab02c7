"""What all sources share: inputs with captions, the reasons for refusing them, and how a change of
files is noticed.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from cogview2_jax.tokenizer.cleaning import TextError
from cogview2_jax.tokenizer.pictures import Picture

Captions = dict[str, str]  # field -> text


class Input(NamedTuple):
    """One input. Each item of `captions` is a set, in one language or two, and makes a record."""

    name: str
    picture: Picture
    captions: tuple[Captions, ...]


class Refused(Exception):
    """Why an input is refused: a short `kind` to count by, and a reason in one line."""

    def __init__(self, kind: str, reason: str, name: str = "") -> None:
        super().__init__(reason)
        self.kind, self.reason, self.name = kind, reason, name


# The kinds of `TextError`, as reports count them.
_TEXT_KINDS = {
    "malformed": "malformed line",
    "empty": "empty caption",
    "long": "long caption",
    "unknown": "unknown words",
}


def refused_text(error: TextError, what: str, name: str = "") -> Refused:
    """Why a caption is refused; `what` names it."""
    reason = str(error).removeprefix("text ")
    return Refused(_TEXT_KINDS[error.kind], f"{what} {reason}", name)


class LeftOut(NamedTuple):
    """A file or folder that a source found and does not read, and the reason."""

    name: str
    reason: str


class Source(Protocol):
    """Inputs by number. `fingerprint` has JSON values that tell these inputs from others; of files,
    some are looked at (`some_of`). A source may have `left_out`, the files that it does not read.
    """

    @property
    def fingerprint(self) -> dict[str, Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Input: ...


def left_out(source: Source) -> Sequence[LeftOut]:
    """The files that a source found and does not read."""
    found: Sequence[LeftOut] = getattr(source, "left_out", ())
    return found


def some_of(number: int, most: int = 1000) -> range:
    """Up to `most` numbers below `number`, spread evenly: what a fingerprint looks at."""
    return range(0, number, max(1, -(-number // most)))


def digest_of_sizes(files: Iterable[Path]) -> str:
    """A digest of how large files are, which tells pictures of the same names apart."""
    digest = hashlib.sha256()
    for file in files:
        try:
            found = os.stat(file)
            size = found.st_size if stat.S_ISREG(found.st_mode) else -1
        except (OSError, ValueError):  # missing, or no path at all
            size = -1
        digest.update(f"{size} ".encode())
    return digest.hexdigest()[:16]


def caption_sets(values: Mapping[str, Any]) -> tuple[Captions, ...]:
    """Captions by field, each None, a text or a list of texts, as sets with one text a field.

    Lists are paired item by item; a single text is paired with each item of a list. Without fields
    there are no sets. Raises Refused.
    """
    if not values:
        return ()
    lists: dict[str, list[Any]] = {}
    for field, value in values.items():
        if value is not None:
            lists[field] = value if isinstance(value, list) else [value]
            if not all(isinstance(text, str) for text in lists[field]):
                raise Refused("malformed line", f"{field!r} must be a text or a list of texts")
    lengths = {len(texts) for texts in lists.values()}
    if not lengths or lengths == {0}:
        raise Refused("empty caption", f"no caption in {', '.join(values)}")
    if 0 in lengths or len(lengths - {1}) > 1:
        numbers = ", ".join(f"{len(texts)} of {field!r}" for field, texts in lists.items())
        raise Refused("malformed line", f"captions do not go together: {numbers}")
    return tuple(
        {field: texts[i % len(texts)] for field, texts in lists.items()}
        for i in range(max(lengths))
    )


class Sampled:
    """`length` inputs of a source, chosen at random without repetition, in their order, each with
    one of its captions.

    The choice depends on `seed` and on the length of the source. Raises ValueError for a `length`
    above that.
    """

    def __init__(self, source: Source, length: int, seed: int = 0) -> None:
        if not 0 < length <= len(source):
            raise ValueError(f"length must be from 1 to the {len(source)} inputs: got {length}")
        rng = np.random.default_rng((seed, len(source)))
        self._source, self._seed = source, seed
        self._numbers = np.sort(rng.choice(len(source), length, replace=False))
        self.left_out = left_out(source)

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self._source.fingerprint | {"sampled": len(self), "sample_seed": self._seed}

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Input:
        number = int(self._numbers[index])
        item = self._source[number]
        captions = [{field: words} for each in item.captions for field, words in each.items()]
        if captions:
            chosen = np.random.default_rng((self._seed, number, 1)).integers(len(captions))
            captions = [captions[chosen]]
        return item._replace(captions=tuple(captions))


class First:
    """The first `length` inputs of a source, or all where it has fewer."""

    def __init__(self, source: Source, length: int) -> None:
        self._source, self._length = source, min(length, len(source))
        self.left_out = left_out(source)

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self._source.fingerprint

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Input:
        return self._source[index]
