"""Pictures and captions of illustrations as examples to train on: varied in size and place, and in
frames of two things.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cogview2_jax.data import illustrations
from cogview2_jax.data.illustrations import Item
from cogview2_jax.pipeline.settings import LANGUAGES
from cogview2_jax.tokenizer.pictures import open_picture
from experiments.illustrations.presets import COARSE_PIXELS, FINE_PIXELS

# Variants are nearly as large as the picture and nearly in its place: all styles of a thing then
# have its parts at much the same cells, which is what a style that it was never seen in is drawn
# from. Without variants the tokens of each picture are soon known by heart.
VARIANTS = 12  # of each picture: itself, with every caption, and smaller ones, with two each
FRAMES = 2.0  # frames of two things, for each picture
SMALLEST = 0.88  # of a variant, of the picture's side


class Collection(NamedTuple):
    """`pictures` uint8 [n, FINE_PIXELS, FINE_PIXELS, 3], and what each shows."""

    pictures: np.ndarray
    items: list[Item]

    def indices(self, split: str) -> np.ndarray:
        return np.flatnonzero([item.split == split for item in self.items])


class Example(NamedTuple):
    picture: np.ndarray  # uint8 [FINE_PIXELS, FINE_PIXELS, 3]
    captions: list[str]


def read(folder: Path) -> Collection:
    """The pictures of a folder as `gather` makes it, at FINE_PIXELS a side."""
    items = illustrations.read_index(folder)

    def one(item: Item) -> np.ndarray:
        picture = open_picture(folder / item.file)
        side = (FINE_PIXELS, FINE_PIXELS)
        return np.asarray(picture.resize(side, Image.Resampling.LANCZOS))

    return Collection(np.stack(_in_parallel(one, items)), items)


def of_kinds(collection: Collection, kinds: Sequence[str]) -> Collection:
    """The pictures of things of these kinds, or all. Raises ValueError for a kind without any."""
    there = {item.kind for item in collection.items}
    if unknown := sorted(set(kinds) - there):
        raise ValueError(f"kinds must be of {', '.join(sorted(there))}: got {unknown[0]}")
    if not kinds:
        return collection
    kept = [number for number, item in enumerate(collection.items) if item.kind in kinds]
    return Collection(collection.pictures[kept], [collection.items[number] for number in kept])


def to_train(
    collection: Collection,
    share: float = 1.0,
    *,
    variants: int = VARIANTS,
    frames: float = FRAMES,
    at_once: int = 1024,
) -> Iterator[list[Example]]:
    """Every picture of the train split, in its own size and place and in others, and frames of two:
    in lists of about `at_once`, which are made when they are asked for.

    There are `variants` of each picture, and `frames` for each. `share` of them, for a trial.
    """
    known = collection.indices("train")
    known = known[: max(64, round(share * len(known)))]

    def one(job: tuple[int, int]) -> Example:
        number, variant = job
        rng = np.random.default_rng((51, number, variant))
        picture, item = collection.pictures[number], collection.items[number]
        if variant:
            return Example(varied(picture, rng), list(illustrations.captions(item, rng).values()))
        words = (illustrations.single_captions(item, language) for language in LANGUAGES)
        return Example(picture, [caption for of_one in words for caption in of_one])

    def frame(index: int) -> Example:
        return framed(collection, known, np.random.default_rng((52, index)))

    jobs = [(int(number), variant) for number in known for variant in range(variants)]
    for make, every in ((one, jobs), (frame, range(round(frames * len(known))))):
        for begin in range(0, len(every), at_once):
            yield _in_parallel(make, every[begin : begin + at_once])


def to_validate(collection: Collection) -> list[Example]:
    """The pictures of the validation split as they are."""
    rng = np.random.default_rng(53)
    return [
        Example(
            collection.pictures[number],
            list(illustrations.captions(collection.items[number], rng).values()),
        )
        for number in collection.indices("validation")
    ]


def framed(collection: Collection, known: np.ndarray, rng: np.random.Generator) -> Example:
    """A frame of two of the pictures `known`."""
    frame = illustrations.draw_frame([collection.items[index] for index in known], rng)
    first, second = (
        Image.fromarray(collection.pictures[known[place]]) for place in (frame.first, frame.second)
    )
    whole = illustrations.compose(first, second, frame.relation, rng, FINE_PIXELS)
    return Example(np.asarray(whole), list(frame.captions.values()))


def reduced(pictures: np.ndarray) -> np.ndarray:
    """Pictures uint8 [n, FINE_PIXELS, FINE_PIXELS, 3] at COARSE_PIXELS a side."""
    ratio = FINE_PIXELS // COARSE_PIXELS

    def one(picture: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(picture).reduce(ratio))

    return np.stack(_in_parallel(one, pictures))


def varied(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture smaller, at a random place on white."""
    side = int(rng.integers(round(SMALLEST * FINE_PIXELS), FINE_PIXELS + 1))
    x, y = (int(value) for value in rng.integers(FINE_PIXELS - side + 1, size=2))
    canvas = Image.new("RGB", (FINE_PIXELS, FINE_PIXELS), "white")
    canvas.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), (x, y))
    return np.asarray(canvas)


def _in_parallel(
    function: Callable[[Any], Any], values: Sequence[Any] | np.ndarray | range
) -> list[Any]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, values))
