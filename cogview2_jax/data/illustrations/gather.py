"""Gathering illustrations: packages → a folder of pictures with names, splits and credits.

Deterministic: the same packages and options give the same bytes. A picture that is there already is
not drawn again, so the same command goes on after an interruption.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cogview2_jax.data.illustrations.captions import RELATION_WORDS, STYLE_WORDS, every_caption
from cogview2_jax.data.illustrations.index import (
    CREDITS,
    FORMAT,
    INDEX,
    PICTURES,
    REFUSED,
    Item,
)
from cogview2_jax.data.illustrations.packages import (
    NAMES,
    STYLES,
    Pictures,
    every_package,
    fetch,
    read_names,
)
from cogview2_jax.data.manifest import write_durably
from cogview2_jax.errors import one_line
from cogview2_jax.pipeline.settings import LANGUAGES
from cogview2_jax.tokenizer import text

KINDS = {
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Activities": "activities",
    "Objects": "objects",
    "Travel & Places": "places",
}
"""The kinds of things, by their names in the packages. People, symbols and flags are left out."""
CORE = ("animals", "food")  # the kinds with a style held out of each thing
TEXT_MODEL = "text.model"
_FEWEST_STYLES = 4
_DIAL = re.compile(r"o.clock|-thirty")  # 24 dials differ in their hands only
_ENGLISH = re.compile(r"[a-z0-9 -]+")


class Report(NamedTuple):
    items: list[Item]
    refused: list[dict[str, str]]  # what was left out, and why


class _Thing(NamedTuple):
    code: str
    name: str  # in file names
    english: str
    chinese: str
    kind: str
    styles: tuple[str, ...]


def gather(
    folder: Path,
    packages: Path,
    *,
    seed: int = 0,
    unseen_things: int = 30,
    validation: float = 0.03,
    progress: Callable[[int], object] = lambda number: None,
    begin: Callable[[int], object] = lambda total: None,
) -> Report:
    """Write the illustrations to `folder`; `packages` holds the packages, or receives them.

    `begin` is called with the number of pictures, `progress` with 1 for each that is there.

    Raises OSError or ValueError, in one line, for packages that are missing or damaged and a folder
    that is not writable.
    """
    files = {package.name: fetch(packages, package) for package in every_package()}
    sources = {style: Pictures(files[package.name]) for style, package in STYLES.items()}
    things, refused = _things(sources, files)
    items = _split(things, seed, unseen_things, validation)
    begin(len(items))
    for style in STYLES:
        (folder / PICTURES / style).mkdir(parents=True, exist_ok=True)
    codes = {thing.name: thing.code for thing in things}

    def draw(item: Item) -> str:
        """The reason why there is no picture, or nothing."""
        try:
            _write_picture(folder / item.file, sources[item.style], codes[item.thing])
        except (KeyError, ValueError) as error:
            return one_line(error)
        finally:
            progress(1)
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = list(pool.map(draw, items))
    for item, reason in zip(items, reasons, strict=True):
        if reason:
            refused.append({"name": item.english, "style": item.style, "reason": reason})
    kept = [item for item, reason in zip(items, reasons, strict=True) if not reason]
    _write(folder, kept, refused, {"seed": seed})
    return Report(kept, refused)


def _things(
    sources: dict[str, Pictures], files: dict[str, Path]
) -> tuple[list[_Thing], list[dict[str, str]]]:
    """The things that have names in both languages and enough styles, and what is left out."""
    names = read_names(files, LANGUAGES)
    english, chinese = (names[language] for language in LANGUAGES)
    named = sources["cartoon"]
    codes = {name: code for code, name in named.names.items()}
    things, refused, taken = [], [], set()
    for category, kind in KINDS.items():
        for name in sorted(named.categories.get(category, [])):
            code = codes.get(name, "")
            words = english.get(code, "").lower().replace("’", "'")
            styles = tuple(style for style, of in sources.items() if code in of.names)
            reason = ""
            if not code:
                reason = "the package has no code point for it"
            elif not words or code not in chinese:
                reason = "it has no English and Chinese name"
            elif _DIAL.search(words):
                reason = "a dial"
            elif not _ENGLISH.fullmatch(words):
                reason = "its English name has other characters than letters"
            elif not text.is_chinese(chinese[code]):
                reason = "its Chinese name has no Chinese character"
            elif len(styles) < _FEWEST_STYLES:
                reason = f"only {len(styles)} styles have it"
            elif words in taken:
                reason = "another thing has this name"
            if reason:
                refused.append({"name": words or name, "style": "all", "reason": reason})
                continue
            taken.add(words)
            things.append(_Thing(code, words.replace(" ", "-"), words, chinese[code], kind, styles))
    return things, refused


def _split(things: list[_Thing], seed: int, unseen_things: int, validation: float) -> list[Item]:
    """An item for each thing and style, with a split drawn from the seed, thing by thing."""
    rng = np.random.default_rng(seed)
    others = [thing.name for thing in things if thing.kind not in CORE]
    unseen = set(rng.choice(others, min(unseen_things, len(others)), replace=False).tolist())
    items = []
    for thing in things:
        held_out = str(rng.choice(thing.styles)) if thing.kind in CORE else ""
        for style in thing.styles:
            split = "validation" if rng.random() < validation else "train"
            if thing.name in unseen:
                split = "unseen_thing"
            elif style == held_out:
                split = "unseen_pair"
            file = f"{PICTURES}/{style}/{thing.name}.png"
            items.append(
                Item(file, thing.name, style, thing.english, thing.chinese, thing.kind, split)
            )
    return items


def _write_picture(file: Path, source: Pictures, code: str) -> None:
    if file.exists():
        return
    picture: Image.Image = source.draw(code)
    extremes = picture.convert("L").getextrema()
    if extremes[0] == extremes[1]:
        raise ValueError("the picture is empty")
    partial = file.with_suffix(".partial")
    picture.save(partial, "PNG")
    partial.rename(file)


def _write(
    folder: Path, items: list[Item], refused: list[dict[str, str]], settings: dict[str, Any]
) -> None:
    content = {"format": FORMAT, **settings, "items": [item._asdict() for item in items]}
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in refused)
    credits = "".join(
        f"- {style}: {package.credit}, {package.licence}, npm {package.name} {package.version}\n"
        for style, package in STYLES.items()
    ) + "".join(
        f"- names: {package.credit}, {package.licence}, npm {package.name} {package.version}\n"
        for package in NAMES
    )
    write_durably(folder / REFUSED, "".join(lines).encode())
    write_durably(folder / CREDITS, f"# Where the pictures come from\n\n{credits}".encode())
    write_durably(folder / TEXT_MODEL, _text_model(items))
    write_durably(folder / INDEX, (json.dumps(content, ensure_ascii=False, indent=1)).encode())


def _text_model(items: list[Item]) -> bytes:
    """A text model of all words of all captions. A Chinese name is one word."""
    words = {item.chinese for item in items} | {of["zh"] for of in STYLE_WORDS.values()}
    words |= {of["zh"] for of in RELATION_WORDS.values()}
    return text.train_text_model(every_caption(items), words=sorted(words))
