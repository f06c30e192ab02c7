"""The judge: a small convolutional network that reads a picture of Scenes.

It sees 192x192 pixels and nothing else: no prompt, no token, no part of any generator. On a 7x7
grid of positions 24 pixels apart it says whether an object is centred near by, where exactly, and
its shape, colour, size and fill. An attribute that it is unsure of is reported as "unclear", which
no claim of a caption matches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from cogview2_jax.data.scenes import CANVAS, COLOURS, FILLS, SHAPES, SIZES, SceneObject

WEIGHTS = Path(__file__).with_name("judge.safetensors")
CELL = 24
GRID = np.arange(CELL, CANVAS, CELL)
"""Rows and columns of the grid, in pixels: 24, 48, ..., 168."""

WORDS: Mapping[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": SIZES,
    "fill": FILLS,
}
UNCLEAR = "unclear"
OBJECT_THRESHOLD = 0.5
ATTRIBUTE_THRESHOLD = 0.8
"""Whole objects are far above it, also when damaged; garbled ones, half and half, mostly below."""
_APART = 40.0  # pixels; no two objects of a scene are centred nearer than 60

Params = Mapping[str, Any]


class Reading(NamedTuple):
    """Logits on the grid, float32, [b, 7, 7, ...] with rows first.

    `present`: [b, 7, 7]. `offset`: [b, 7, 7, 2], x and y of the centre from the grid position, in
    cells. `words`: per attribute [b, 7, 7, number of words].
    """

    present: jax.Array
    offset: jax.Array
    words: dict[str, jax.Array]


class _Network(nn.Module):
    """Four reductions, 3 * 2 * 2 * 2 = 24, with a 3x3 layer or two after each."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.astype(jnp.float32) / 127.5 - 1.0
        # Half a cell around the picture centres the cells on multiples of 24.
        x = jnp.pad(x, ((0, 0), (CELL // 2,) * 2, (CELL // 2,) * 2, (0, 0)), mode="edge")
        x = self._layer(x, 24, kernel=6, stride=3)  # 72
        x = self._layer(x, 48, kernel=4, stride=2)  # 36
        x = self._layer(x, 48)
        x = self._layer(x, 96, kernel=4, stride=2)  # 18
        x = self._layer(x, 96)
        x = self._layer(x, 128, kernel=4, stride=2)  # 9
        x = self._layer(x, 128)
        x = self._layer(x, 128)
        x = x[:, 1:-1, 1:-1]
        return nn.Dense(3 + sum(len(words) for words in WORDS.values()))(x)

    def _layer(self, x: jax.Array, features: int, kernel: int = 3, stride: int = 1) -> jax.Array:
        x = nn.Conv(features, (kernel, kernel), (stride, stride), use_bias=False)(x)
        return nn.relu(nn.GroupNorm(num_groups=8)(x))


def init_params(key: jax.Array) -> Params:
    """Fresh weights, float32."""
    params: Params = _Network().init(key, jnp.zeros((1, CANVAS, CANVAS, 3)))["params"]
    return params


def apply(params: Params, images: jax.Array | np.ndarray) -> Reading:
    """Reads pictures: uint8 or float32 of the same range, [b, 192, 192, 3]."""
    out = _Network().apply({"params": params}, images)
    assert isinstance(out, jax.Array)
    sizes = [1, 2, *(len(words) for words in WORDS.values())]
    parts = jnp.split(out, np.cumsum(sizes)[:-1].tolist(), axis=-1)
    words = dict(zip(WORDS, parts[2:], strict=True))
    return Reading(parts[0][..., 0], parts[1], words)


_apply = jax.jit(apply)


def read(params: Params, images: np.ndarray, batch: int = 32) -> list[list[SceneObject]]:
    """What each picture shows: uint8 [n, 192, 192, 3] -> for each, its objects, surest first.

    Raises ValueError on pictures of another size or type.
    """
    if images.dtype != np.uint8 or images.shape[1:] != (CANVAS, CANVAS, 3):
        raise ValueError(
            f"the judge reads uint8 [n, {CANVAS}, {CANVAS}, 3], not {images.dtype} "
            f"{list(images.shape)}"
        )
    found: list[list[SceneObject]] = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        # Always the same batch size, so that one compilation serves any number of pictures.
        padded = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), np.uint8)])
        reading = jax.tree.map(np.asarray, _apply(params, padded))
        found += [decode(jax.tree.map(lambda x, i=i: x[i], reading)) for i in range(len(part))]
    return found


def decode(reading: Reading) -> list[SceneObject]:
    """The objects in the logits of one picture (a `Reading` of numpy arrays with no batch axis)."""
    present = 1 / (1 + np.exp(-np.asarray(reading.present, np.float64)))
    objects: list[SceneObject] = []
    for flat in np.argsort(present, axis=None)[::-1]:
        row, column = np.unravel_index(flat, present.shape)
        if present[row, column] < OBJECT_THRESHOLD:
            break
        dx, dy = np.clip(reading.offset[row, column], -1, 1) * CELL
        x, y = round(float(GRID[column] + dx)), round(float(GRID[row] + dy))
        # Several grid positions around a centre may detect it: the most certain one counts.
        if any(np.hypot(x - item.x, y - item.y) < _APART for item in objects):
            continue
        words = {n: _word(n, np.asarray(reading.words[n][row, column])) for n in WORDS}
        objects.append(SceneObject(**words, x=x, y=y))
    return objects


def _word(name: str, logits: np.ndarray) -> str:
    odds = np.exp(logits - logits.max())
    best = int(odds.argmax())
    return WORDS[name][best] if odds[best] >= ATTRIBUTE_THRESHOLD * odds.sum() else UNCLEAR


def save(params: Params, path: Path = WEIGHTS) -> None:
    """Writes the weights in float16, under names such as "Conv_0/kernel"."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    named = {"/".join(k.key for k in keys): np.asarray(x, np.float16) for keys, x in flat}
    save_file(named, path)


def load(path: Path = WEIGHTS) -> Params:
    """Weights in float32. Raises FileNotFoundError where there is no file at `path`."""
    params: dict[str, Any] = {}
    for name, value in load_file(path).items():
        *folders, leaf = name.split("/")
        at = params
        for folder in folders:
            at = at.setdefault(folder, {})
        at[leaf] = jnp.asarray(value, jnp.float32)
    return params
