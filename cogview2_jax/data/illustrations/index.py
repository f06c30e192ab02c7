"""A folder of illustrations: index.json, the pictures, credits and what was left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from cogview2_jax.errors import one_line

INDEX, REFUSED, CREDITS = "index.json", "refused.jsonl", "CREDITS.md"
PICTURES = "pictures"  # the folder of pictures in it
FORMAT = 1
SPLITS = ("train", "unseen_pair", "unseen_thing", "validation")


class Item(NamedTuple):
    """A picture of a thing in a style.

    `split`: "train"; "unseen_pair", a style of a thing that is known in other styles only;
    "unseen_thing", a thing that is known in no style, only its kind; "validation", kept to measure
    the loss on.
    """

    file: str  # in the folder, "pictures/3d/panda.png"
    thing: str  # one word for each thing, from its English name: "red-apple"
    style: str
    english: str
    chinese: str
    kind: str  # "animals", "food", …
    split: str


def read_index(folder: Path) -> list[Item]:
    """The pictures of a folder. Raises FileNotFoundError or ValueError, in one line."""
    file = folder / INDEX
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no illustrations: it has no {INDEX}: run `cogview2 data gather` first"
        )
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError("another format")
        items = [Item(**item) for item in content["items"]]
        if not items or any(item.split not in SPLITS for item in items):
            raise ValueError("no pictures, or an unknown split")
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{file} is damaged ({one_line(error)}): gather them again") from error
    return items
