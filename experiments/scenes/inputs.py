"""Scenes adapted for training: cuts for the tokenizer, objects named in order, other colours."""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from cogview2_jax.data import scenes
from cogview2_jax.data.sources import Input
from experiments.scenes.presets import COARSE_PIXELS, FINE_PIXELS, FINE_STRIDE

WHOLE_SHARE = 10 / 16  # of the cuts; the others are parts of the large picture


class Cuts:
    """Pictures of 64 pixels: whole scenes made small, and parts of large ones with an object."""

    def __init__(self, length: int) -> None:
        self._length = length

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"source": "scenes/train, cut", "side": COARSE_PIXELS, "whole": WHOLE_SHARE}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Input:
        rng = np.random.default_rng((43, index))
        example = scenes.example("train", index)
        return Input(f"cut {index}", self._cut(rng, example.scene, example.image), ())

    def _cut(
        self, rng: np.random.Generator, scene: scenes.Scene, picture: Image.Image
    ) -> Image.Image:
        if rng.random() < WHOLE_SHARE:
            return picture.reduce(FINE_PIXELS // COARSE_PIXELS)
        item = scene.objects[rng.integers(len(scene.objects))]
        corner = np.array([item.x, item.y]) + rng.integers(-COARSE_PIXELS, 1, 2)
        # At multiples of the stride, so that a part's cells coincide with the whole picture's.
        x, y = corner.clip(0, FINE_PIXELS - COARSE_PIXELS) // FINE_STRIDE * FINE_STRIDE
        return picture.crop((x, y, x + COARSE_PIXELS, y + COARSE_PIXELS))


class InOrder:
    """Scenes with captions that name the object further up or left first: none has "below" or
    "right of".
    """

    def __init__(self, length: int) -> None:
        self._length = length

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"source": "scenes/train, named in order"}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Input:
        rng = np.random.default_rng((41, index))
        scene = scenes.example_scene("train", index)
        first = int(np.argmin([item.x + item.y for item in scene.objects]))
        captions = {
            language: scenes.caption(scene, rng, language, first) for language in scenes.LANGUAGES
        }
        return Input(f"in order {index}", scenes.draw(scene), (captions,))


class Repainted:
    """Scenes in other colours and fills than their captions say."""

    def __init__(self, length: int) -> None:
        self._length = length

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"source": "scenes/train, repainted"}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Input:
        rng = np.random.default_rng((42, index))
        example = scenes.example("train", index)
        objects = tuple(
            dataclasses.replace(
                item,
                colour=str(rng.choice(list(scenes.COLOURS))),
                fill=str(rng.choice(scenes.FILLS)),
            )
            for item in example.scene.objects
        )
        other = dataclasses.replace(example.scene, objects=objects)
        return Input(f"repainted {index}", scenes.draw(other), (example.captions,))


def on_object(pixels: Any) -> Any:
    """Which pixels are not background: [..., 3] from 0 to 255, NumPy or jax → bool [...]."""
    far = [
        abs(pixels - np.array(colour, np.float32)).max(axis=-1) > 4
        for colour in scenes.BACKGROUNDS.values()
    ]
    everywhere = far[0]
    for one in far[1:]:
        everywhere = everywhere & one
    return everywhere


def object_cells(index: int) -> np.ndarray:
    """Which fine cells of a scene hold a part of an object: bool [cells]."""
    pixels = np.asarray(scenes.draw(scenes.example_scene("train", index)), np.float32)
    side = FINE_PIXELS // FINE_STRIDE
    cells = on_object(pixels).reshape(side, FINE_STRIDE, side, FINE_STRIDE)
    return cells.any(axis=(1, 3)).reshape(-1)
