"""Drawing scenes at random, and the examples of the splits.

An example is a function only of (split, index), through a counter-based generator: splits have any
length and can be read in any order.
"""

import itertools
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from cogview2_jax.data.scenes.captions import caption
from cogview2_jax.data.scenes.drawing import draw
from cogview2_jax.data.scenes.scene import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    FILLS,
    LANGUAGES,
    LATTICE,
    PLACES,
    POSITIONS_BY_PLACE,
    SHAPES,
    SIZES,
    UNSEEN_PAIRS,
    Scene,
    SceneObject,
    pick,
)

SPLITS: Mapping[str, int] = {"train": 0, "validation": 1, "test": 2, "composition": 3}
ONE_OBJECT_SHARE = 0.35

Pairs = Literal["seen", "unseen"]


class Example(NamedTuple):
    """`image`: RGB, 192x192; `captions`: {"en": ..., "zh": ...}."""

    image: Image.Image
    scene: Scene
    captions: dict[str, str]


_ALL_PAIRS = tuple(itertools.product(SHAPES, COLOURS))
_SEEN = tuple(pair for pair in _ALL_PAIRS if pair not in UNSEEN_PAIRS)
_UNSEEN = tuple(pair for pair in _ALL_PAIRS if pair in UNSEEN_PAIRS)


def sample_scene(
    rng: np.random.Generator, num_objects: int | None = None, pairs: Pairs = "seen"
) -> Scene:
    """A random scene. `pairs` "unseen": exactly one object is of an unseen (shape, colour) pair.

    `num_objects` is 1 or 2, or None for the mix of the train split. Raises ValueError on anything
    else.
    """
    if num_objects is None:
        num_objects = 1 if rng.random() < ONE_OBJECT_SHARE else 2
    if num_objects not in (1, 2):
        raise ValueError(f"a scene has 1 or 2 objects, not {num_objects}")
    if pairs not in ("seen", "unseen"):
        raise ValueError(f'pairs is "seen" or "unseen", not {pairs!r}')

    kinds = [pick(rng, _SEEN) for _ in range(num_objects)]
    # Two objects of one shape and colour would leave captions with little to tell them apart by.
    while len(set(kinds)) < num_objects:
        kinds[1] = pick(rng, _SEEN)
    if pairs == "unseen":
        kinds[int(rng.integers(num_objects))] = pick(rng, _UNSEEN)
    sizes = [pick(rng, SIZES) for _ in kinds]
    fills = [pick(rng, FILLS) for _ in kinds]
    centres = [_one_centre(rng)] if num_objects == 1 else _two_centres(rng, "large" in sizes)
    objects = tuple(
        SceneObject(shape, colour, size, fill, x, y)
        for (shape, colour), size, fill, (x, y) in zip(kinds, sizes, fills, centres, strict=True)
    )
    return Scene(objects, pick(rng, tuple(BACKGROUNDS)))


def _one_centre(rng: np.random.Generator) -> tuple[int, int]:
    # Of uniform positions most would have no name, and captions could seldom name a place.
    if rng.random() < 0.7:
        return pick(rng, POSITIONS_BY_PLACE[pick(rng, PLACES)])
    return pick(rng, LATTICE), pick(rng, LATTICE)


def _two_centres(rng: np.random.Generator, any_large: bool) -> list[tuple[int, int]]:
    # Four cells apart is room for two large objects; three cells only for two small ones.
    spans = ((48, 144),) if any_large else ((48, 144), (48, 144), (48, 120), (72, 144))
    along = pick(rng, spans)
    across = [pick(rng, (72, 96, 120))]
    across.append(pick(rng, [c for c in (72, 96, 120) if abs(c - across[0]) <= CELL]))
    centres = list(zip(along, across, strict=True))
    if rng.random() < 0.5:
        centres = [(y, x) for x, y in centres]
    return centres if rng.random() < 0.5 else centres[::-1]


def example_scene(split: str, index: int) -> Scene:
    """The scene of example number `index` (>= 0) of `split`.

    Raises ValueError on an unknown split or a negative index.
    """
    return _scene(split, index)[0]


def example(split: str, index: int) -> Example:
    """Example number `index` (>= 0) of `split`, always the same. Errors as in `example_scene`."""
    scene, captions = captioned_scene(split, index)
    return Example(draw(scene), scene, captions)


def captioned_scene(split: str, index: int) -> tuple[Scene, dict[str, str]]:
    """The scene and the captions of `example`, without drawing it. Errors as in `example_scene`."""
    scene, rng = _scene(split, index)
    return scene, {language: caption(scene, rng, language) for language in LANGUAGES}


def _scene(split: str, index: int) -> tuple[Scene, np.random.Generator]:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; one of {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"an example index starts at 0, not {index}")
    # Philox is counter-based: the key selects the stream, and no example depends on another.
    key = np.array([0x5CE2E500 + SPLITS[split], index], dtype=np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    return sample_scene(rng, pairs="unseen" if split == "composition" else "seen"), rng
